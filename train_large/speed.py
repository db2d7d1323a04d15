"""How fast a size trains by its pilot, or by those of other sizes.

An update takes some time whatever the model, some for each layer, and some for each FLOP: a straight line in the three
predicts sizes that were not run better than a power law in FLOPs, which small models, whose time goes into the calls of
operators, do not follow (bench/planning_speed.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy.optimize import nnls

from train_large import flops
from train_large.pilot_runs import Pilot, is_encoder, parameters_like
from train_large.sizes import Size

PILOT_DEVIATION = 0.03  # of log seconds per token of a size that was run, from one run to the next
# Of sizes that were not, by bench/planning_speed.csv:
LINE_DEVIATION = 0.05  # of the pilots' seconds from the line, as a share of each
PART, PART_DEVIATION = 1 / 3, 0.25  # of the longest update: each of the three parts, before the pilots tell
NEAR_DEVIATION, FAR_DEVIATION = 0.15, 0.1  # of log seconds from the line, and for each factor of e in FLOPs

Work = tuple[float, float]
"""Layers and FLOPs of an update."""


def seconds_per_token(size: Size, pilots: Sequence[Pilot]) -> float:
    """As its pilot's log measured it (the mean of several), else by `predicted`."""
    own = [pilot.seconds_per_token for pilot in pilots if pilot.size == size]
    return _mean(own) if own else _guess(size, pilots)[0]


def deviation(size: Size, pilots: Sequence[Pilot]) -> float:
    """Of log seconds per token, as `seconds_per_token` has it."""
    return PILOT_DEVIATION if any(pilot.size == size for pilot in pilots) else _guess(size, pilots)[1]


def _guess(size: Size, pilots: Sequence[Pilot]) -> tuple[float, float]:
    """(seconds per token, their deviation) of a size without a pilot."""
    runs = {}
    for known in dict.fromkeys(pilot.size for pilot in pilots):  # repetitions are all on one side of the line
        of_size = [pilot for pilot in pilots if pilot.size == known]
        runs[_work(known, pilots)] = _mean(pilot.seconds_per_token * pilot.batch_tokens for pilot in of_size)
    seconds, error = predicted(_work(size, pilots), runs)
    return seconds / batch_tokens(size, pilots), error


def _work(size: Size, pilots: Sequence[Pilot]) -> Work:
    return float(size.layers), flops_per_token(size, pilots) * batch_tokens(size, pilots)


def predicted(work: Work, runs: Mapping[Work, float]) -> tuple[float, float]:
    """(seconds of an update of so much work, deviation of their logarithm), by the seconds of others.

    Least squares, in which no part is negative. What the runs do not tell apart, such as layers and FLOPs where all are
    of one width, is as uncertain as it was before.
    """
    works, seconds = np.array([(1.0, *each) for each in runs]), np.array(list(runs.values()))
    most = works.max(axis=0)
    # Errors count as shares of the seconds: a small model's as much as a large one's.
    rows = np.vstack([works / most / seconds[:, None] / LINE_DEVIATION, np.eye(3) / seconds.max() / PART_DEVIATION])
    parts, _ = nnls(rows, np.concatenate([np.full(len(runs), 1 / LINE_DEVIATION), np.full(3, PART / PART_DEVIATION)]))
    shares = np.array([1.0, *work]) / most
    found = float(shares @ parts)
    unknown = math.sqrt(shares @ np.linalg.inv(rows.T @ rows) @ shares) / found
    distance = float(np.abs(np.log(work[1] / works[:, 2])).min())
    return found, math.hypot(NEAR_DEVIATION + FAR_DEVIATION * distance, unknown)


def batch_tokens(size: Size, pilots: Sequence[Pilot]) -> float:
    """Tokens of an update: its pilots', between and beyond them as their parameters say."""
    return interpolated(size, pilots, [pilot.batch_tokens for pilot in pilots])


def interpolated(size: Size, pilots: Sequence[Pilot], values: Iterable[float]) -> float:
    """By one value of each pilot: its own pilots' mean, else between the pilots in log-log scale of their parameters,
    and beyond them as the nearest one has it."""
    told = list(zip(pilots, values))
    own = [value for pilot, value in told if pilot.size == size]
    if own:
        return _mean(own)
    xs = sorted({pilot.parameters for pilot in pilots})
    ys = [_mean(value for pilot, value in told if pilot.parameters == x) for x in xs]
    return math.exp(float(np.interp(math.log(parameters_like(pilots[0], size)), np.log(xs), np.log(ys))))


def _mean(values: Iterable[float]) -> float:
    return math.exp(float(np.mean(np.log(list(values)))))


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
