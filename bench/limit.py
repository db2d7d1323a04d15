"""How small rate and distortion let a file be: `make bench` writes bench/limit.csv, after bench/file_size.csv.

    PYTHONPATH=. .venv-peers/bin/python bench/limit.py

For each setting of a library, on MiniLM, the fewest bytes that any coder can take which treats weights as independent,
at the error of that setting. A weight of density f needs at least h(f) - 1/2 log2(2 pi e D) bits at a mean squared
error of D (Shannon's lower bound, Cover and Thomas, Elements of Information Theory, 10.3 and 10.4). Each row has a mean
and a spread of its own, given for nothing, and all rows of a tensor one shape, whose differential entropy h is that of
a fine histogram; the vectors have one shape together. One D for all is the best division of the error at high rate, and
rows whose variance is below D take no bits (reverse water-filling).

A grid of single weights with a perfect entropy coder takes 1/2 log2(2 pi e / 12) = 0.2546 bits more at that error.
"""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path

import numpy as np
import table
import torch
from file_size import models
from torch import Tensor

MODEL = "MiniLM"
STEP = 0.02  # standard deviations, of the histogram
GRID_LOSS = math.log2(2 * math.pi * math.e / 12) / 2
FIGURES = ("bytes", "relative_error", "ours_bytes", "ours_over_peer")


def main(downloads: Path, sizes: Path, out: Path) -> None:
    name, tensors = next(models(Path(), downloads))
    assert name == MODEL
    variances, entropies, counts = rows_of(tensors)
    weights = sum(float(w.double().square().sum()) for w in tensors.values())
    with sizes.open(newline="") as file:
        found = [row for row in csv.DictReader(file) if row["model"] == MODEL and row["ours_over_peer"]]
    rows = []
    for row in sorted(found, key=lambda row: -float(row["ours_over_peer"])):
        distortion = float(row["relative_error"]) ** 2 * weights / counts.sum()
        bits = bound(variances, entropies, counts, distortion)
        on_a_grid = bits + GRID_LOSS * counts.sum()
        rows.append(
            {name: row[name] for name in ("model", "peer", "setting", *FIGURES)}
            | {
                "bound_bytes": round(bits / 8),
                "bound_over_peer": f"{bits / 8 / float(row['bytes']):.3f}",
                "grid_bytes": round(on_a_grid / 8),
                "grid_over_peer": f"{on_a_grid / 8 / float(row['bytes']):.3f}",
                "ours_over_grid": f"{8 * float(row['ours_bytes']) / on_a_grid:.3f}",
            }
        )
        print(*rows[-1].values(), sep="  ")
    table.write(rows, out)


def rows_of(tensors: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Variance, differential entropy in bits, and number of weights of every row; a vector is one row."""
    shapes: dict[str, list[Tensor]] = {}
    for name, w in tensors.items():
        matrix = w.double().reshape(len(w), -1) if w.dim() > 1 else w.double().reshape(1, -1)
        shapes.setdefault(name if w.dim() > 1 else "vectors", []).append(matrix)
    variances, entropies, counts = [], [], []
    for matrices in shapes.values():
        spreads, alike = [], []
        for matrix in matrices:
            spread = matrix.std(1, correction=0)
            alike.append(((matrix - matrix.mean(1, keepdim=True)) / spread[:, None].clamp_min(1e-30)).flatten())
            spreads.append(spread)
            counts += [matrix.shape[1]] * len(matrix)
        spread = torch.cat(spreads).clamp_min(1e-30).numpy()
        h = differential_entropy(torch.cat(alike).numpy())
        variances.append(spread**2)
        entropies.append(h + np.log2(spread))
    return np.concatenate(variances), np.concatenate(entropies), np.array(counts)


def differential_entropy(values: np.ndarray) -> float:
    """Bits, of a histogram with bins `STEP` wide."""
    counts = np.unique(np.floor(values / STEP), return_counts=True)[1]
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum() + math.log2(STEP))


def bound(variances: np.ndarray, entropies: np.ndarray, counts: np.ndarray, distortion: float) -> float:
    """The bits of all rows together at a mean squared error of `distortion` over all weights."""
    low, high = 0.0, float(variances.max())
    for _ in range(100):  # the level of water at which the errors add up to what is allowed
        level = (low + high) / 2
        reached = float((np.minimum(level, variances) * counts).sum() / counts.sum())
        low, high = (level, high) if reached < distortion else (low, level)
    bits = entropies - math.log2(2 * math.pi * math.e * high) / 2
    return float((np.maximum(bits, 0) * counts).sum())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--downloads", type=Path, default=Path("runs/downloads"), help="where MiniLM's weights are")
    parser.add_argument("--sizes", type=Path, default=Path(__file__).with_name("file_size.csv"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    arguments = parser.parse_args()
    main(arguments.downloads, arguments.sizes, arguments.out)
