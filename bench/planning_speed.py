"""How well the planner guesses the speed of sizes that were not run: writes bench/planning_speed.csv.

The study's seconds per update (user_dir_examples/study/step_times.csv) are the truth. Every choice of two sizes or more
predicts all that are larger than they are, by train_large.speed and, beside it, by a power law in FLOPs. Errors are of
the logarithm of seconds, by how far the predicted size is from the nearest that was chosen, in the logarithm of
parameters; what the planner assumes is beside them:

    PYTHONPATH=. .venv/bin/python bench/planning_speed.py
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import table

from train_large import flops, sizes, speed

HERE = Path(__file__).parent
DISTANCES = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0)
LENGTH, VOCABULARY = 16, 1000  # of the study's pretrainings


class Timed(NamedTuple):
    parameters: int
    layers: int
    flops: float
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=HERE / "planning_speed.csv")
    args = parser.parse_args()
    timed, processor = read(HERE.parent / "user_dir_examples/study/step_times.csv")
    errors = errors_of(timed)
    rows = []
    for low, high in itertools.pairwise(DISTANCES):
        inside = [each for each in errors if low <= each[0] < high]
        rows.append(
            {
                "distance_from": low,
                "distance_below": high,
                "predictions": len(inside),
                "mean_error": f"{statistics.fmean(ours for _, ours, _ in inside):.3f}",
                "rms_error": f"{rms(ours for _, ours, _ in inside):.3f}",
                "rms_error_power_law": f"{rms(law for _, _, law in inside):.3f}",
                "assumed": f"{speed.NEAR_DEVIATION + speed.FAR_DEVIATION * (low + high) / 2:.3f}",
                "processor": processor,
            }
        )
    table.write(rows, args.out)
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items()))


def read(path: Path) -> tuple[list[Timed], str]:
    with open(path, newline="") as file:
        rows = [r for r in csv.DictReader(file) if (r["work"], r["batch"], r["share"]) == ("pretrain", "32", "none")]
    timed = []
    for row in rows:
        size = sizes.Size.parse(row["size"], head_width=int(row["head_width"]))
        parameters = sizes.parameters_without_embeddings(size, VOCABULARY)
        cost = flops.train_flops(size, VOCABULARY, LENGTH, int(row["batch"]))
        timed.append(Timed(parameters, size.layers, cost, float(row["seconds_per_update"])))
    return sorted(timed), rows[0]["processor"]


def errors_of(timed: Sequence[Timed]) -> list[tuple[float, float, float]]:
    """(distance, error of train_large.speed, error of the power law) of every prediction."""
    found = []
    for count in range(2, len(timed)):
        for chosen in itertools.combinations(timed, count):
            runs = [((each.layers, each.flops), each.seconds) for each in chosen]
            for other in (each for each in timed if each.parameters > chosen[-1].parameters):
                distance = math.log(other.parameters / chosen[-1].parameters)
                ours = speed.predicted((other.layers, other.flops), runs)
                law = power_law(other.flops, chosen)
                found.append((distance, math.log(ours / other.seconds), math.log(law / other.seconds)))
    return found


def power_law(cost: float, chosen: Sequence[Timed]) -> float:
    slope, level = np.polyfit(np.log([each.flops for each in chosen]), np.log([each.seconds for each in chosen]), 1)
    return math.exp(level + slope * math.log(cost))


def rms(errors: Iterable[float]) -> float:
    return math.sqrt(statistics.fmean(error**2 for error in errors))


if __name__ == "__main__":
    main()
