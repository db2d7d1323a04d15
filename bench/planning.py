"""The planner's pick against the best of all sizes at three times the pilots' budget: writes bench/planning.csv.

What is best is known from the study's experiments depth and width, as they are published; the pilots are the same runs
with a third of the budget:

    make study EXPERIMENT=depth,width SET="budget=100s out=runs/pilots"
    PYTHONPATH=.:user_dir_examples/study .venv/bin/python bench/planning.py runs/pilots

For each seed the plan is made from its pilots alone, of all sizes and of the smaller half. Beside its pick stands that
of the simplest rule: the size whose pilot ended best. A size's measured perplexity is the mean over the seeds.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import measurements
import table

from train_large import machine, pilot_runs
from train_large.pilot_runs import Pilot
from train_large.planner import plan_from

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("pilots", type=Path, help="the folder of the study of short runs")
    parser.add_argument("--results", type=Path, default=HERE.parent / "docs/results/pocket", help="the study's results")
    parser.add_argument("--out", type=Path, default=HERE / "planning.csv")
    args = parser.parse_args()
    pilots, ends = read(args.pilots), ends_of(args.results)
    budget = max(point.seconds for point in ends)
    measured = {
        size: statistics.fmean(point.perplexity for point in ends if point.size == size)
        for size in {point.size for point in ends}
    }
    rows = [
        row
        for seed, of_seed in sorted(pilots.items())
        for some in (of_seed, of_seed[: (len(of_seed) + 1) // 2])
        for row in rows_of(seed, some, of_seed, measured, budget)
    ]
    table.write(rows, args.out)
    for row in rows:
        if row["pick"] or row["best_pilot"]:
            told = " ".join(name for name in ("pick", "best_pilot") if row[name])
            print(f"seed {row['seed']}, {row['pilots']} pilots: {told} {row['size']}, {row['regret']} above the best")


def read(folder: Path) -> dict[int, list[Pilot]]:
    """The pilots by their seeds, by rising size."""
    found: dict[int, list[Path]] = {}
    for done in sorted(folder.glob("pretrain/*-batch32-seed*/done")):  # of other batches, data or sharing: none
        found.setdefault(int(done.parent.name.rpartition("seed")[2]), []).append(done.parent)
    if not found:
        raise SystemExit(f"{folder} has no finished run of the experiments depth and width: run them first.")
    return {seed: pilot_runs.read_pilots(paths) for seed, paths in found.items()}


def ends_of(results: Path) -> list[measurements.Point]:
    """The last point of every curve of depth and width."""
    ends: dict[str, measurements.Point] = {}
    for experiment in ("depth", "width"):
        for point in measurements.read(results / experiment, measurements.Point):
            ends[point.run] = max(point, ends.get(point.run, point), key=lambda each: each.updates)
    return list(ends.values())


def end(run: Pilot) -> float:
    return math.exp(float(run.losses[-1]))


def rows_of(
    seed: int, pilots: Sequence[Pilot], every: Sequence[Pilot], measured: dict[str, float], budget: float
) -> Iterator[dict[str, object]]:
    """One row for each size: what was predicted and what was measured."""
    sizes = [pilot.size for pilot in every]
    plan = plan_from(pilots, budget, None, sizes, None, None)
    best = min(measured.values())
    nearest = min(pilots, key=end).size.name
    for option in plan.options:
        if option.size not in measured:
            continue
        low, high = option.interval
        yield {
            "seed": seed,
            "pilots": len(pilots),
            "pilot_seconds": round(max(float(pilot.seconds[-1]) for pilot in pilots)),
            "budget_seconds": round(budget),
            "size": option.size,
            "predicted": f"{option.perplexity:.2f}",
            "low": f"{low:.2f}",
            "high": f"{high:.2f}",
            "measured": f"{measured[option.size]:.2f}",
            "regret": f"{measured[option.size] / best - 1:.3f}",
            "pick": int(option.size == plan.pick.size),
            "best_pilot": int(option.size == nearest),
            "machine": machine.describe(1),
        }


if __name__ == "__main__":
    main()
