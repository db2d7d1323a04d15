"""How well the planner guesses the speed of sizes that were not run: writes bench/planning_speed.csv.

The study's seconds per update (user_dir_examples/study/step_times.csv) are the truth. Every choice of two sizes or more
predicts all that are larger than they are, by train_large.speed and, beside it, by a power law in FLOPs. Errors are of
the logarithm of seconds; `rms_deviation` is what the planner takes them to be, and `inside` the share of predictions
within the 90 % interval that follows. In sizes of one width, layers and FLOPs go together, and do not tell what a wider
one costs:

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


class Timed(NamedTuple):
    parameters: int
    layers: int
    hidden: int
    flops: float
    seconds: float


class Prediction(NamedTuple):
    """Errors are of the logarithm of seconds."""

    chosen: str
    error: float
    deviation: float
    error_power_law: float


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=HERE / "planning_speed.csv")
    args = parser.parse_args()
    timed, processor = read(HERE.parent / "user_dir_examples/study/step_times.csv")
    made = predictions(timed)
    rows = []
    for chosen in sorted({each.chosen for each in made}):
        of_kind = [each for each in made if each.chosen == chosen]
        rows.append(
            {
                "chosen": chosen,
                "predictions": len(of_kind),
                "mean_error": f"{statistics.fmean(each.error for each in of_kind):.3f}",
                "rms_error": f"{rms(each.error for each in of_kind):.3f}",
                "rms_deviation": f"{rms(each.deviation for each in of_kind):.3f}",
                "inside": f"{statistics.fmean(abs(each.error) < 1.645 * each.deviation for each in of_kind):.3f}",
                "rms_error_power_law": f"{rms(each.error_power_law for each in of_kind):.3f}",
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
        vocabulary, length = int(row["vocabulary"]), int(row["length"])
        parameters = sizes.parameters_without_embeddings(size, vocabulary)
        cost = flops.train_flops(size, vocabulary, length, int(row["batch"]))
        timed.append(Timed(parameters, size.layers, size.hidden, cost, float(row["seconds_per_update"])))
    return sorted(timed), rows[0]["processor"]


def predictions(timed: Sequence[Timed]) -> list[Prediction]:
    found = []
    for count in range(2, len(timed)):
        for chosen in itertools.combinations(timed, count):
            runs = {(each.layers, each.flops): each.seconds for each in chosen}
            for other in (each for each in timed if each.parameters > chosen[-1].parameters):
                ours, deviation = speed.predicted((other.layers, other.flops), runs)
                law = power_law(other.flops, chosen)
                errors = [math.log(each / other.seconds) for each in (ours, law)]
                found.append(Prediction(kind(chosen), errors[0], deviation, errors[1]))
    return found


def kind(chosen: Sequence[Timed]) -> str:
    if len({each.hidden for each in chosen}) == 1:
        return "of one width"
    return "of one depth" if len({each.layers for each in chosen}) == 1 else "of several"


def power_law(cost: float, chosen: Sequence[Timed]) -> float:
    slope, level = np.polyfit(np.log([each.flops for each in chosen]), np.log([each.seconds for each in chosen]), 1)
    return math.exp(level + slope * math.log(cost))


def rms(errors: Iterable[float]) -> float:
    return math.sqrt(statistics.fmean(error**2 for error in errors))


if __name__ == "__main__":
    main()
