"""How fast a size trains by its pilot, or by those of other sizes.

An update takes some time whatever the model, some for each layer, and some for each FLOP: a straight line in the three
predicts sizes that were not run better than a power law in FLOPs, which small models, whose time goes into the calls of
operators, do not follow (bench/planning_speed.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

from train_large import flops
from train_large.pilot_runs import Pilot, is_encoder, parameters_like
from train_large.sizes import Size

PILOT_DEVIATION = 0.03  # of log seconds per token of a size that was run, from one run to the next
# Of a size that was not, by how far it is from the nearest that was, in the logarithm of its parameters.
NEAR_DEVIATION, FAR_DEVIATION = 0.2, 0.1  # bench/planning_speed.csv
PRIOR = 0.1  # what is assumed of a part counts as much as a run does that is measured to within 1 / PRIOR


def seconds_per_token(size: Size, pilots: Sequence[Pilot]) -> float:
    """As its pilot's log measured it (the mean of several), else by `predicted`."""
    own = [pilot.seconds_per_token for pilot in pilots if pilot.size == size]
    if own:
        return math.exp(float(np.mean(np.log(own))))
    batch = batch_tokens(size, pilots)
    runs = [
        ((pilot.size.layers, pilot.flops_per_token * pilot.batch_tokens), pilot.seconds_per_token * pilot.batch_tokens)
        for pilot in pilots
    ]
    return predicted((size.layers, flops_per_token(size, pilots) * batch), runs) / batch


def predicted(work: tuple[float, float], runs: Sequence[tuple[tuple[float, float], float]]) -> float:
    """Seconds of an update of so much `work`, (layers, FLOPs); `runs` have the work and the seconds of each run.

    None of the three parts is negative, and where the runs do not tell them apart each is a third of the longest
    update.
    """
    works = np.array([(1.0, *each) for each, _ in runs])
    seconds = np.array([each for _, each in runs])
    most = works.max(axis=0)
    # Errors count as shares of the seconds: a small model's as much as a large one's.
    rows = np.vstack([works / most / seconds[:, None], PRIOR * np.eye(3) / seconds.max()])
    parts, _ = nnls(rows, np.concatenate([np.ones(len(runs)), np.full(3, PRIOR / 3)]))
    return float(np.array([1.0, *work]) / most @ parts)


def deviation(size: Size, pilots: Sequence[Pilot]) -> float:
    """Of log seconds per token, as `seconds_per_token` has it."""
    if any(pilot.size == size for pilot in pilots):
        return PILOT_DEVIATION
    parameters = parameters_like(pilots[0], size)
    return NEAR_DEVIATION + FAR_DEVIATION * min(abs(math.log(parameters / pilot.parameters)) for pilot in pilots)


def batch_tokens(size: Size, pilots: Sequence[Pilot]) -> float:
    """Tokens of an update: its pilots', between and beyond them as their parameters say."""
    return interpolated(parameters_like(pilots[0], size), {p.parameters: p.batch_tokens for p in pilots})


def interpolated(parameters: float, known: dict[int, float]) -> float:
    """Between the pilots in log-log scale; beyond them as the nearest one has it."""
    xs = sorted(known)
    return math.exp(float(np.interp(math.log(parameters), np.log(xs), np.log([known[x] for x in xs]))))


def flops_per_token(size: Size, pilots: Sequence[Pilot]) -> float:
    """By Clark et al.'s rules where vocabulary and length are known, else by a power law between the pilots."""
    first = pilots[0]
    if first.vocabulary and first.length and is_encoder(first.arch):
        return flops.train_flops(size, first.vocabulary, first.length, 1) / first.length
    return _between(parameters_like(first, size), {float(p.parameters): p.flops_per_token for p in pilots})


def _between(x: float, known: dict[float, float]) -> float:
    """Straight lines in log-log scale; outside, the nearest one goes on, at a slope between 0.3 and 1.2."""
    xs = np.log(sorted(known))
    ys = np.log([known[key] for key in sorted(known)])
    if len(xs) == 1:
        return float(math.exp(ys[0] + math.log(x) - xs[0]))
    at = math.log(x)
    if xs[0] <= at <= xs[-1]:
        return float(math.exp(np.interp(at, xs, ys)))
    end, other = (0, 1) if at < xs[0] else (-1, -2)
    slope = min(1.2, max(0.3, (ys[end] - ys[other]) / (xs[end] - xs[other])))
    return float(math.exp(ys[end] + slope * (at - xs[end])))
