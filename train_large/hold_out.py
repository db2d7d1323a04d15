"""How far the planner's law can be trusted: fitted on a part of the logged runs, it predicts the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train_large import pilot_runs, scaling, speed
from train_large.errors import UserError
from train_large.planner import CAUTION, QUANTILES, Interval, drawn
from train_large.report.units import format_seconds

ALIKE = 0.9  # the shortest run beside the longest


@dataclass(frozen=True)
class HeldOut:
    """A run that the fit has not seen, or not its end."""

    size: str
    measured: float
    predicted: float
    interval: Interval
    """perplexities, and the 90 % interval"""

    @property
    def error(self) -> float:
        """As a share of the measured perplexity."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class HoldOut:
    """What a fit on a part of the logs says of the rest. `pick` and `best` are of all sizes, `regret` is how much
    worse the pick's measured perplexity is than the best's."""

    how: str
    fitted_on: tuple[str, ...]
    errors: tuple[HeldOut, ...]
    pick: str
    best: str
    regret: float


def hold_out(logs: Sequence[Path], by: str = "size", share: float = 1 / 3, draws: int = scaling.DRAWS) -> HoldOut:
    """Fit on a part of the logged runs and predict the rest, of which only the seconds are known.

    `by` size: on the smaller half of the sizes, to predict the ends of the larger. `by` time: on every run up to
    `share` of its seconds, to predict its end; what such a run has seen is not what a pilot of that budget would have
    seen, for its learning rate has not come down, which the law allows for.
    Raises UserError as `plan` does, for runs that end at different times, of which none is the best, and for fewer than
    four sizes by size.
    """
    pilots = pilot_runs.read_pilots(logs)
    ends = {float(pilot.seconds[-1]): pilot for pilot in pilots}
    if min(ends) < ALIKE * max(ends):
        raise UserError(
            f"{ends[min(ends)].path} ends after {format_seconds(min(ends))} and {ends[max(ends)].path} after "
            f"{format_seconds(max(ends))}: to hold out, give runs of the same budget."
        )
    names = list(dict.fromkeys(pilot.size for pilot in pilots))
    if by == "size":
        if len(names) < 4:
            raise UserError(
                f"a hold-out by size needs four sizes, two to fit and two to predict, not {len(names)}: give more logs "
                "or hold out by time."
            )
        half = names[: len(names) // 2]
        known = [pilot for pilot in pilots if pilot.size in half]
        unknown = [pilot for pilot in pilots if pilot.size not in half]
        how = "fitted on the smaller half of the sizes"
    elif by == "time":
        cut = [pilot.until(share * pilot.seconds[-1]) for pilot in pilots]
        known = [pilot for pilot in cut if len(pilot.losses)]
        unknown = pilots
        how = f"fitted on the first {share:.0%} of every run"
        if not known:
            raise UserError(f"no run has a validation in its first {share:.0%}: hold out by size, or a larger share.")
    else:
        raise ValueError(f"by is size or time, not {by!r}")
    law = scaling.fit(known, draws)
    errors: list[HeldOut] = []
    predicted: dict[str, list[float]] = {}
    measured: dict[str, list[float]] = {}
    for pilot in pilots:
        tokens = float(pilot.seconds[-1]) / speed.seconds_per_token(pilot.size, known)
        losses = drawn(law, pilot.size, pilot.parameters, tokens, known)
        low, middle, high = np.exp(np.quantile(losses, QUANTILES))
        truth = math.exp(float(pilot.losses[-1]))
        if pilot in unknown:
            errors.append(HeldOut(pilot.size.name, truth, float(middle), (float(low), float(high))))
        predicted.setdefault(pilot.size.name, []).append(float(np.exp(np.quantile(losses, CAUTION))))
        measured.setdefault(pilot.size.name, []).append(truth)
    guesses, truths = ({name: float(np.mean(v)) for name, v in each.items()} for each in (predicted, measured))
    pick, best = min(guesses, key=guesses.__getitem__), min(truths, key=truths.__getitem__)
    return HoldOut(
        how=how,
        fitted_on=tuple(dict.fromkeys(pilot.size.name for pilot in known)),
        errors=tuple(errors),
        pick=pick,
        best=best,
        regret=truths[pick] / truths[best] - 1,
    )
