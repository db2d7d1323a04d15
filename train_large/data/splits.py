"""Which documents are held out, and which belong to the nested subsets (section 5.1): a matter of their index alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from train_large.errors import UserError


def share(count: int, fraction: float) -> int:
    """The fraction of `count` as a whole number, at least 1."""
    return max(1, round(count * fraction))


def subset_name(fraction: float) -> str:
    """0.05 -> '5pct', 0.005 -> '0.5pct'."""
    return f"{100 * fraction:g}pct"


def split_indices(count: int, held_out: int, subsets: Sequence[float], seed: int) -> NDArray[np.int8]:
    """Draw one random order of the documents and cut it: first the held-out ones, then the nested subsets.

    count: number of documents; held_out: how many of them are kept for validation; subsets: fractions of the others,
    falling. Returns an array of shape (count,): -1 held out; 0 training only; d > 0 also in the d largest subsets.
    Raises UserError for a negative seed.
    """
    if seed < 0:
        raise UserError(f"--seed {seed} is negative: give 0 or more")
    order = np.random.default_rng(seed).permutation(count)
    training = order[held_out:]
    depth = np.zeros(count, dtype=np.int8)
    depth[order[:held_out]] = -1
    for fraction in subsets:
        depth[training[: share(len(training), fraction)]] += 1
    return depth
