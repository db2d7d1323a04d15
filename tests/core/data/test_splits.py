from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from train_large.data.splits import share, split_indices, subset_name

FRACTIONS = st.lists(st.sampled_from([0.5, 0.3, 0.1, 0.05, 0.01]), unique=True).map(lambda f: sorted(f, reverse=True))


@given(st.integers(1, 3000), st.data(), FRACTIONS, st.integers(0, 2**31))
def test_splits_are_disjoint_cover_everything_and_nest(
    count: int, data: st.DataObject, subsets: list[float], seed: int
) -> None:
    held_out = data.draw(st.integers(0, count - 1))
    depth = split_indices(count, held_out, subsets, seed)
    assert depth.shape == (count,)  # one number per document: held out and training are disjoint and cover
    valid, train = set(np.flatnonzero(depth < 0)), set(np.flatnonzero(depth >= 0))
    assert len(valid) == held_out
    larger = train
    for rank, fraction in enumerate(subsets, start=1):
        subset = set(np.flatnonzero(depth >= rank))
        assert subset <= larger
        assert abs(len(subset) - Fraction(str(fraction)) * len(train)) <= 1 / 2 or len(subset) == 1
        larger = subset


def test_the_same_seed_gives_the_same_split_and_another_seed_another() -> None:
    first, again, other = (split_indices(1000, 5, (0.05, 0.01), seed) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_the_held_out_are_drawn_from_the_whole() -> None:
    """Over many seeds every document is held out about as often: 4000 draws of 20 in 200 are 400 +- 19 each."""
    times = sum((split_indices(200, 20, (), seed) < 0).astype(int) for seed in range(4000))
    assert times.min() > 300
    assert times.max() < 500


def test_shares_and_names() -> None:
    assert [share(n, 0.005) for n in (1, 100, 300, 1000, 100_000)] == [1, 1, 2, 5, 500]
    assert [subset_name(f) for f in (0.05, 0.01, 0.07, 0.005, 0.5)] == ["5pct", "1pct", "7pct", "0.5pct", "50pct"]
