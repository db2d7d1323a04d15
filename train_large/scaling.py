"""Validation loss as a function of size and training: a scaling law fitted to the run logs of pilot runs.

The law is Hoffmann et al.'s (2022), with what short runs of small models need besides:

    loss = E + e^d (A N^-a + B N^-g x^-b) + c r          x = T - s T0

N     parameters without embeddings.
T     tokens, counted by the learning rate: a run whose rate goes down to zero has learned at half of its peak on
      average, and a validation at half time, at more. T is the tokens of the whole run that would have come as far
      (same area under the rate); at the end of a run it is the run's tokens.
r     the rate at the validation, as a share of the peak: what is still to be gained by bringing it down (Tissue et
      al., 2024). Zero at the end, so c r tells the end of a run from a validation on the way.
T0    where a run left its plateau, s in (0, 1). Small models stay near the unigram loss and leave it suddenly, larger
      ones sooner; no power law has that shape. So only the points from the steepest descent on are fitted, runs that
      are still on the plateau not at all, and T0 is a power of N of its own.
d     what is particular to one size (zero on average): its own points count for more than the trend over sizes.

Least squares of log loss with Huber's loss, from several starts, with weak priors on the exponents: with two or three
pilots the law would otherwise be undetermined. Intervals are from refits on perturbed data (`DRAWS` parametric
bootstraps: residuals, a shift for each run, and the priors' means are drawn anew), widened beyond the runs' ends by
what hold-outs of real runs were found to err there (`FARTHER_DEVIATION`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from train_large.errors import UserError
from train_large.pilot_runs import FALL, Pilot
from train_large.sizes import Size

DRAWS = 60
RUN_DEVIATION = 0.01  # of log loss from one run to its repetition: so much is assumed, and counts as much as
RUN_REPETITIONS = 4  # repetitions that were run
SIZE_DEVIATION = 0.05  # of d
FARTHER_DEVIATION = 0.06  # of log loss, for each factor of e that T lies beyond the runs; hold-outs of logged runs
DEPARTURE_DEVIATION = 0.25  # of log T0 about its power of N
POINTS = 4  # a run counts for no more than so many: its validations are not independent


# The places of the parameters in the vector that is fitted. Exponents as Hoffmann et al. found them, or near.
_E, _A, _a, _B, _g, _b, _c, _s = range(8)
_MEANS = {_a: 0.34, _g: 0.1, _b: 0.3, _s: 0.5}
_DEVIATIONS = {_E: 1.0, _A: 1.0, _a: 0.15, _B: 1.0, _g: 0.15, _b: 0.2, _c: 0.03, _s: 0.3}
_LOW = {_E: -6.0, _A: -12.0, _a: 0.01, _B: -12.0, _g: -0.5, _b: 0.02, _c: 0.0, _s: 0.0}
_HIGH = {_E: 4.0, _A: 5.0, _a: 1.5, _B: 5.0, _g: 1.0, _b: 2.0, _c: 0.3, _s: 0.95}


@dataclass(frozen=True, eq=False)
class Law:
    """The fitted law. `draws` has its refits, one a row: eight parameters, and d of each of `fitted_sizes`."""

    best: np.ndarray
    draws: np.ndarray
    fitted_sizes: tuple[Size, ...]
    n0: float
    t0: float
    loss0: float
    """N, tokens and loss are counted in these units within the law"""
    plateau: float | None
    """the loss at which runs begin their sudden descent; None where none was seen on a plateau"""
    departures: dict[int, float]
    """T0 by N, of runs that have left the plateau or begun to"""
    waiting: dict[int, tuple[float, float]]
    """(T, loss) at the end of the run, by N, of sizes still on the plateau"""
    residual: float
    """root mean square of log loss, of the points fitted"""
    run_deviation: float
    farthest: dict[int, float]
    """T at the end of the longest run by N, waiting ones too"""
    points: int
    """how many validations were fitted"""

    def losses(
        self, size: Size, parameters: int, tokens: np.ndarray | float, seed: int = 0, noise: bool = True
    ) -> np.ndarray:
        """Losses at the end of runs of so many tokens: (draws, tokens). `noise`: as of single runs, not of the mean."""
        generator = np.random.default_rng(seed)
        t = np.atleast_1d(np.asarray(tokens, dtype=float))
        count = len(self.draws)
        if size in self.fitted_sizes:
            d = self.draws[:, 8 + self.fitted_sizes.index(size)]
        else:
            d = SIZE_DEVIATION * generator.standard_normal(count)
        shift, ceiling = self._departure(parameters, generator, count)
        x = t - self.draws[:, _s, None] * shift[:, None]
        values = _evaluate(self.draws, d, parameters / self.n0, np.maximum(x, 1.0) / self.t0) * self.loss0
        if ceiling is not None:
            values = np.where(t <= shift[:, None], ceiling, np.minimum(values, ceiling))
        if noise:
            reached = self._reached(parameters)
            beyond = FARTHER_DEVIATION * np.log(np.maximum(t / reached, 1.0))
            values = values * np.exp(np.hypot(self.run_deviation, beyond) * generator.standard_normal((count, 1)))
        return values

    def _reached(self, parameters: int) -> float:
        """The T from which on losses of this N are extrapolated: between the runs' in the logarithms. A larger model
        comes less far in the time of the largest that was run, in inverse proportion to N."""
        known = sorted(self.farthest)
        near = math.exp(np.interp(math.log(parameters), np.log(known), np.log([self.farthest[n] for n in known])))
        return near * min(1.0, known[-1] / parameters)

    def on_plateau(self, parameters: int, tokens: float) -> bool:
        """Whether a run of so many tokens is likely to end on the plateau."""
        shift, ceiling = self._departure(parameters, np.random.default_rng(0), len(self.draws))
        return ceiling is not None and float(np.mean(tokens <= shift)) > 0.5

    def _departure(self, parameters: int, generator: Any, count: int) -> tuple[np.ndarray, float | None]:
        """(T0 for each draw, the loss of the plateau)."""
        noise = generator.standard_normal(count)
        if parameters in self.waiting:  # it has not left yet, and may stay for as long again
            tokens, loss = self.waiting[parameters]
            usual = self._usual_departure(parameters)[0] if self.departures else tokens
            return max(tokens, usual) * np.exp(np.abs(noise)), loss
        if not self.departures or self.plateau is None:
            return np.zeros(count), None
        if parameters in self.departures:
            return np.full(count, self.departures[parameters]), self.plateau
        usual, distance = self._usual_departure(parameters)
        return usual * np.exp(DEPARTURE_DEVIATION * distance * noise), self.plateau

    def _usual_departure(self, parameters: int) -> tuple[float, float]:
        """(T0, how much less is known of it than of one near a pilot): a power of N, of exponent -0.3 give or take 0.3
        unless the runs say otherwise."""
        x = np.log([n / parameters for n in self.departures])
        y = np.log(list(self.departures.values()))
        spread, tight = x - x.mean(), DEPARTURE_DEVIATION**2 / 0.3**2
        slope = (spread @ (y - y.mean()) - 0.3 * tight) / (spread @ spread + tight)
        return math.exp(y.mean() - slope * x.mean()), math.exp(min(1.0, float(np.min(np.abs(x)))))

    def describe(self) -> str:
        """The formula, with numbers."""
        b = self.best
        floor = self.loss0 / (1 + math.exp(-b[_E]))
        shape = math.exp(b[_A]) * self.loss0 * self.n0 ** b[_a]
        data = math.exp(b[_B]) * self.loss0 * self.n0 ** b[_g] * self.t0 ** b[_b]
        return (
            f"loss = {floor:.3g} + {shape:.3g} N^-{b[_a]:.2f} + {data:.3g} N^{-b[_g]:.2f} T^-{b[_b]:.2f}, "
            f"{100 * self.residual:.1f} % off the {self.points} points fitted"
        )


def _evaluate(p: np.ndarray, d: np.ndarray, n: float, x: np.ndarray) -> np.ndarray:
    """The law at r = 0 in its own units; p is (draws, 8), d (draws,), x (draws, tokens)."""
    floor = 1 / (1 + np.exp(-p[:, _E]))
    shape = np.exp(p[:, _A]) * n ** -p[:, _a]
    data = (np.exp(p[:, _B]) * n ** -p[:, _g])[:, None] * x ** -p[:, _b, None]
    return floor[:, None] + np.exp(d)[:, None] * (shape[:, None] + data)


@dataclass(frozen=True, eq=False)
class Fitted:
    """A run and which of its validations are fitted: those from `start` on. `left_at` is T0, 0 without a plateau."""

    pilot: Pilot
    start: int
    left_at: float


@dataclass(frozen=True, eq=False)
class Sorted:
    """The pilots by what can be learned from them, and the loss of the plateau if one was seen."""

    fitted: tuple[Fitted, ...]
    waiting: tuple[Pilot, ...]
    plateau: float | None


def sort_pilots(pilots: Sequence[Pilot]) -> Sorted:
    """Which runs are still on the plateau, and where the others left it.

    The plateau's loss is that at which runs seen to fall suddenly began to (the median of them). A run with too few
    validations to see it fall has left the plateau where it came below that loss. One that is above it, or has not two
    validations after its steepest descent, is still waiting.
    """
    drops = [pilot.drop for pilot in pilots]
    begun = [float(pilot.losses[drop[0]]) for pilot, drop in zip(pilots, drops) if drop]
    plateau = float(np.median(begun)) if begun else None
    fitted, waiting = [], []
    for pilot, drop in zip(pilots, drops):
        start, left_at = 0, 0.0
        if drop:
            start, left_at = drop[1], float(pilot.learned[drop[0]])
        elif plateau is not None and (pilot.losses > (1 - FALL) * plateau).any():
            last = int(np.flatnonzero(pilot.losses > (1 - FALL) * plateau)[-1])
            start, left_at = last + 1, float(pilot.learned[last])
        if plateau is not None and len(pilot.losses) - start < 2:
            waiting.append(pilot)
        else:
            fitted.append(Fitted(pilot, start, left_at))
    return Sorted(tuple(fitted), tuple(waiting), plateau)


def fit(pilots: Sequence[Pilot], draws: int = DRAWS, seed: int = 0) -> Law:
    """The law of these pilots. Raises UserError for fewer than two sizes, or where all are still on the plateau."""
    if len({pilot.parameters for pilot in pilots}) < 2:
        raise UserError(
            f"all logs are of the size {pilots[0].size.name}, or of as many parameters: the loss of other sizes cannot "
            "be told from one; give the logs of two sizes or more."
        )
    parts = sort_pilots(pilots)
    if not parts.fitted:
        raise UserError(
            "no pilot has left the plateau that small models start on by two validations, so nothing can be told of "
            "what comes after: run the pilots for longer."
        )
    data = _Data(parts.fitted)
    best = data.solve_from_starts()
    errors = data.errors(best)
    residual = float(np.sqrt(np.mean(errors**2)))
    run_deviation = _run_deviation([each.pilot for each in parts.fitted])
    generator = np.random.default_rng(seed)
    refits = []
    for _ in range(draws):
        shifts = run_deviation * generator.standard_normal(len(parts.fitted))[data.run]
        noise = shifts + max(residual, 0.002) * generator.standard_normal(len(data.run))
        target = data.modelled(best) + noise
        refits.append(data.solve(best, target, generator.standard_normal(len(data.means))))
    grouped: dict[int, list[float]] = {}
    falling = [Fitted(pilot, 0, float(pilot.learned[pilot.drop[0]])) for pilot in parts.waiting if pilot.drop]
    for each in (*parts.fitted, *falling):
        if each.left_at:
            grouped.setdefault(each.pilot.parameters, []).append(math.log(each.left_at))
    known = {each.pilot.parameters for each in (*parts.fitted, *falling)}
    return Law(
        best=best,
        draws=np.array(refits),
        fitted_sizes=data.sizes,
        n0=data.n0,
        t0=data.t0,
        loss0=data.loss0,
        plateau=parts.plateau,
        departures={n: math.exp(float(np.mean(values))) for n, values in grouped.items()},
        waiting={
            p.parameters: (float(p.learned[-1]), float(p.losses[-1]))
            for p in parts.waiting
            if p.parameters not in known
        },
        farthest={p.parameters: max(q.learned[-1] for q in pilots if q.parameters == p.parameters) for p in pilots},
        residual=residual,
        run_deviation=run_deviation,
        points=len(data.run),
    )


class _Data:
    """The points that are fitted, as arrays, and the least squares over them."""

    def __init__(self, fitted: Sequence[Fitted]) -> None:
        pilots, starts = [each.pilot for each in fitted], [each.start for each in fitted]
        self.sizes = tuple(dict.fromkeys(pilot.size for pilot in pilots))
        counts = [len(pilot.losses) - start for pilot, start in zip(pilots, starts)]
        self.run = np.repeat(np.arange(len(pilots)), counts)
        self.size = np.array([self.sizes.index(pilot.size) for pilot in pilots])[self.run]
        self.weight = np.sqrt(np.minimum(1.0, POINTS / np.array(counts)))[self.run] / 0.01
        left = np.array([each.left_at for each in fitted])[self.run]
        n = np.array([float(pilot.parameters) for pilot in pilots])[self.run]
        t = np.concatenate([pilot.learned[start:] for pilot, start in zip(pilots, starts)])
        losses = np.concatenate([pilot.losses[start:] for pilot, start in zip(pilots, starts)])
        self.rate = np.concatenate([pilot.rate[start:] for pilot, start in zip(pilots, starts)])
        self.n0, self.t0 = (math.exp(float(np.mean(np.log(values)))) for values in (n, t))
        self.loss0 = float(losses.min())
        self.n, self.t, self.left = n / self.n0, t / self.t0, left / self.t0
        self.log_loss = np.log(losses / self.loss0)
        means = {_E: 0.0, _A: math.log(0.2), _B: math.log(0.3), _c: 0.02, **_MEANS}
        extra = len(self.sizes)
        self.means = np.array([*(means[i] for i in range(8)), *[0.0] * extra])
        self.deviations = np.array([*(_DEVIATIONS[i] for i in range(8)), *[SIZE_DEVIATION] * extra])
        self.low = np.array([*(_LOW[i] for i in range(8)), *[-1.0] * extra])
        self.high = np.array([*(_HIGH[i] for i in range(8)), *[1.0] * extra])

    def modelled(self, p: np.ndarray) -> np.ndarray:
        """log loss at every point, in the law's units."""
        x = np.maximum(self.t - p[_s] * self.left, 1e-9)
        part = math.exp(p[_A]) * self.n ** -p[_a] + math.exp(p[_B]) * self.n ** -p[_g] * x ** -p[_b]
        floor = 1 / (1 + math.exp(-p[_E]))
        return np.log(floor + np.exp(p[8:][self.size]) * part + p[_c] * self.rate)

    def errors(self, p: np.ndarray) -> np.ndarray:
        return self.modelled(p) - self.log_loss

    def solve(self, start: np.ndarray, target: np.ndarray, prior_noise: np.ndarray | float = 0.0) -> np.ndarray:
        means = np.clip(self.means + self.deviations * prior_noise, self.low, self.high)

        def residuals(p: np.ndarray) -> np.ndarray:
            return np.concatenate([self.weight * (self.modelled(p) - target), (p - means) / self.deviations])

        inside = np.clip(start, self.low + 1e-6, self.high - 1e-6)
        found = least_squares(residuals, inside, bounds=(self.low, self.high), loss="huber", f_scale=3.0, max_nfev=200)
        self.cost = float(found.cost)
        return found.x

    def solve_from_starts(self) -> np.ndarray:
        best, least = None, math.inf
        for floor in (-1.0, 0.5):
            for exponent in (0.15, 0.3, 0.7):
                start = self.means.copy()
                start[_E], start[_b] = floor, exponent
                found = self.solve(start, self.log_loss)
                if self.cost < least:
                    best, least = found, self.cost
        assert best is not None
        return best


def _run_deviation(pilots: Iterable[Pilot]) -> float:
    """The deviation of log loss between whole runs of one size over the same tokens (within 2 %), together with the one
    that is assumed: two runs that end alike by chance do not tell that all do."""
    ends: dict[Size, list[Pilot]] = {}
    for pilot in pilots:
        ends.setdefault(pilot.size, []).append(pilot)
    squares, freedom = RUN_REPETITIONS * RUN_DEVIATION**2, RUN_REPETITIONS
    for group in ends.values():
        tokens = [pilot.tokens[-1] for pilot in group]
        if len(group) > 1 and max(tokens) < 1.02 * min(tokens):
            logs = np.log([pilot.losses[-1] for pilot in group])
            squares += float(np.sum((logs - logs.mean()) ** 2))
            freedom += len(group) - 1
    return math.sqrt(squares / freedom)
