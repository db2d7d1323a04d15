"""The best trade-offs between bytes and accuracy, and what fits in a memory limit."""

from __future__ import annotations

from typing import Iterable, Sequence

from train_large.report.results import Compressed, Model, Results


def pareto_frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """The indices of the (cost, value) points that no other beats, by rising cost.

    A point is beaten by one that costs no more and is worth no less, and differs in one of the two. So of points that
    are equal in both, all stay."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    frontier: list[int] = []
    for i in order:
        if not frontier or points[i][1] > points[frontier[-1]][1] or points[i] == points[frontier[-1]]:
            frontier.append(i)
    return frontier


def measurements(models: Iterable[Model]) -> list[tuple[Model, Compressed]]:
    """Every (model, compressed entry)."""
    return [(model, entry) for model in models for entry in model.compressed]


def frontier_of(results: Results) -> list[tuple[Model, Compressed]]:
    """The entries on the Pareto frontier of bytes to store and accuracy, by rising bytes.

    Always guessing the commoner class costs nothing to store: what is no more accurate than that is not on it."""
    entries = [pair for pair in measurements(results.models) if pair[1].accuracy > results.task.majority]
    return [entries[i] for i in pareto_frontier([(entry.stored_bytes, entry.accuracy) for _, entry in entries])]


def best_within(models: Iterable[Model], limit: int) -> tuple[Model, Compressed] | None:
    """The most accurate entry of at most `limit` bytes, the smallest of those that tie; None if nothing fits."""
    fitting = [(model, entry) for model, entry in measurements(models) if entry.stored_bytes <= limit]
    return max(fitting, key=lambda pair: (pair[1].accuracy, -pair[1].stored_bytes), default=None)
