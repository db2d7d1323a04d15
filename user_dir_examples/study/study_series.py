"""A study's measurements, put together over the seeds: what the figures and the tables show.

Rows that differ in nothing but the seed are measurements of one setting. Of several seeds the mean is shown, with the
least and the most; from one seed all three are the same.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from measurements import Accuracy, Point, Trained, best_finetunings

from train_large.report.pareto import pareto_frontier
from train_large.sizes import SHARING

SHARED = {"none": "nothing shared", "attention": "attention shared", "all": "all layers shared"}

Of = TypeVar("Of", bound=Trained)


@dataclass(frozen=True)
class Setting:
    """All that a run was told but its seed."""

    size: str
    layers: int
    hidden: int
    parameters: int
    batch: int
    rate: float
    share: str
    data: float
    target: float | None


@dataclass(frozen=True)
class Spread:
    """One number over the seeds."""

    mean: float
    low: float
    high: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.fmean(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class Line:
    """A setting's curve: the mean over the seeds at each x, with the least and the most."""

    setting: Setting
    xs: tuple[float, ...]
    heights: tuple[Spread, ...]


@dataclass(frozen=True)
class Level:
    """A setting's accuracy at one sparsity and bit width, and what that takes to store (means over the seeds)."""

    setting: Setting
    sparsity: float
    bits: int
    accuracy: Spread
    nonzero: float
    bytes: float
    bytes_paper: float
    examples: int


def by_setting(rows: Iterable[Of]) -> dict[Setting, list[Of]]:
    """The rows of each setting; the settings by falling share of the data, then rising parameters, then batch."""
    found: dict[Setting, list[Of]] = {}
    for row in rows:
        setting = Setting(**{name: getattr(row, name) for name in Setting.__dataclass_fields__})
        found.setdefault(setting, []).append(row)
    return {setting: found[setting] for setting in sorted(found, key=_order)}


def _order(setting: Setting) -> tuple:
    share = SHARING.index(setting.share) if setting.share in SHARING else len(SHARING)
    shape = (setting.parameters, setting.layers, setting.hidden, setting.size)
    return (-setting.data, *shape, setting.batch, share, setting.target or math.inf, setting.rate)


def names_of(settings: Iterable[Setting]) -> dict[Setting, str]:
    """What tells the settings apart, in words: the size, the batch, and so on, of which there are several."""
    settings = list(settings)
    parts: dict[str, Callable[[Setting], str]] = {
        "size": lambda setting: setting.size,
        "batch": lambda setting: f"batch {setting.batch:,}",
        "share": lambda setting: SHARED.get(setting.share, setting.share),
        "data": lambda setting: f"{setting.data:g} % of the text",
        "target": lambda setting: "to the end" if setting.target is None else f"to {setting.target:g}",
    }
    several = [name for name in parts if len({getattr(setting, name) for setting in settings}) > 1] or ["size"]
    return {setting: ", ".join(parts[name](setting) for name in several) for setting in settings}


def lines(points: Sequence[Point], x: Callable[[Point], float], height: Callable[[Point], float | None]) -> list[Line]:
    """The curve of each setting. Where the seeds were validated at different places, each is linear between its own."""
    found = []
    for setting, of_setting in by_setting(points).items():
        curves: dict[int, dict[int, tuple[float, float]]] = {}
        for point in of_setting:
            value = height(point)
            if value is not None and math.isfinite(value):
                curves.setdefault(point.seed, {})[point.updates] = (x(point), value)
        ordered = [sorted(curve.items()) for curve in curves.values()]
        if ordered:
            found.append(_line(setting, ordered))
    return [line for line in found if line.xs]


def _line(setting: Setting, curves: list[list[tuple[int, tuple[float, float]]]]) -> Line:
    """The curves are (updates, (x, height)), by updates."""
    if len({tuple(updates for updates, _ in curve) for curve in curves}) == 1:
        xs = [statistics.fmean(place for _, (place, _) in column) for column in zip(*curves, strict=True)]
        heights = [Spread.of([value for _, (_, value) in column]) for column in zip(*curves, strict=True)]
        return Line(setting, tuple(xs), tuple(heights))
    columns = [([place for _, (place, _) in curve], [value for _, (_, value) in curve]) for curve in curves]
    first = max(places[0] for places, _ in columns)
    shared = sorted({place for places, _ in columns for place in places if place >= first})
    # A seed that stopped sooner, at a perplexity, counts on with its last.
    values = [np.interp(shared, places, curve) for places, curve in columns]
    return Line(
        setting, tuple(shared), tuple(Spread.of([float(v) for v in column]) for column in zip(*values, strict=True))
    )


def ends(points: Sequence[Point]) -> dict[Setting, list[Point]]:
    """The last validation of each seed, by setting."""
    found = {}
    for setting, of_setting in by_setting(points).items():
        last: dict[int, Point] = {}
        for point in sorted(of_setting, key=lambda point: point.updates):
            last[point.seed] = point
        found[setting] = [last[seed] for seed in sorted(last)]
    return found


def series_of(points: Sequence[Point]) -> list[tuple[str, list[Point]]]:
    """The depths of one width, the widths of one depth and the batches of one size that are among the curves, each
    with its name: the runs of Figures 2, 4 and 13."""
    if not points:
        return []
    settings = list(by_setting(points))
    batches = [setting.batch for setting in settings]
    common = max(sorted(set(batches)), key=batches.count)
    of_batch = {(setting.layers, setting.hidden) for setting in settings if setting.batch == common}
    widths, depths = [hidden for _, hidden in of_batch], [layers for layers, _ in of_batch]
    width, depth = max(sorted(set(widths)), key=widths.count), max(sorted(set(depths)), key=depths.count)
    sizes = [setting.size for setting in settings]
    size = max(sorted(set(sizes)), key=sizes.count)
    candidates = [
        ("depth", [p for p in points if p.batch == common and p.hidden == width]),
        ("width", [p for p in points if p.batch == common and p.layers == depth]),
        ("batch size", [p for p in points if p.size == size]),
    ]
    return [(name, rows) for name, rows in candidates if len(by_setting(rows)) > 1] or [("size", list(points))]


# ------------------------------------------------------------------------------------------------ compression


def chosen(rows: Sequence[Accuracy]) -> list[Accuracy]:
    """Of each pretrained model, the rows of its best finetuning. Only those from the end of the pretraining."""
    return best_finetunings(row for row in rows if row.checkpoint == 1)


def levels(rows: Sequence[Accuracy]) -> list[Level]:
    """The accuracy of each setting at each sparsity and bit width, in this order, bits falling."""
    found = []
    for setting, of_setting in by_setting(rows).items():
        for sparsity, bits in sorted({(row.sparsity, -row.bits) for row in of_setting}):
            here = [row for row in of_setting if row.sparsity == sparsity and row.bits == -bits]
            means = {
                name: statistics.fmean(getattr(row, name) for row in here)
                for name in ("nonzero", "bytes", "bytes_paper")
            }
            accuracy = Spread.of([row.accuracy for row in here])
            found.append(Level(setting, sparsity, -bits, accuracy, **means, examples=here[0].examples))
    return found


def frontier(measured: Sequence[Level]) -> list[Level]:
    """Those that nothing beats which takes no more bytes, by rising bytes."""
    return [measured[i] for i in pareto_frontier([(level.bytes, level.accuracy.mean) for level in measured])]


def kinds_in_order(kinds: Iterable[str]) -> list[str]:
    """Kinds of modules in the order of a model, norms and biases last."""
    from train_large.compression.weight_error import KINDS  # takes torch, which curves do without

    known = list(KINDS)
    last = {"norms", "biases", "other"}
    return sorted(set(kinds), key=lambda kind: (kind in last, known.index(kind) if kind in known else len(known), kind))
