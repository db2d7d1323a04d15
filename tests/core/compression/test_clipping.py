from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.formula import BITS
from train_large.compression import clipping
from train_large.compression.clipping import clipped_range


def formula(weights: np.ndarray, low: np.float32, high: np.float32, bits: int) -> np.ndarray:
    """Section 4.2 with its Clamp, in NumPy."""
    if low == high:
        return np.full_like(weights, low)
    step = (high - low) / np.float32(2**bits - 1)
    clamped = np.minimum(np.maximum(weights, low), high)
    index = np.clip(np.rint((clamped - low) / step), 0, 2**bits - 1) if step else np.zeros_like(weights)
    return (step * index + low).astype(np.float32)


def error(weights: np.ndarray, low, high, bits: int) -> float:
    return float(np.square((formula(weights, low, high, bits) - weights).astype(np.float64)).sum())


@st.composite
def ranges(draw):
    """Some ranges of weights, zeros among them, of any tails, scale and offset."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.integers(1, 6)), draw(st.integers(1, 300))
    weights = rng.standard_t(draw(st.sampled_from([1.5, 3, 30])), shape)
    weights = (weights + draw(st.sampled_from([0, 0, 5, 1e4]))) * 10.0 ** draw(st.integers(-8, 3))
    weights[rng.random(shape) < draw(st.sampled_from([0, 0, 0.5, 1]))] = 0
    return weights.astype(np.float32)


@pytest.mark.parametrize("histogram", [0, 1 << 17, 50])  # bins; so few mislead the search
@settings(deadline=None, max_examples=150)
@given(weights=ranges(), bits=st.sampled_from(BITS))
def test_never_worse_than_min_and_max_and_within_them(histogram, weights, bits):
    zero = weights == 0
    if histogram:
        with mock.patch.object(clipping, "_BINS", histogram):
            found = [clipping._of_long(*row, bits) for row in zip(torch.from_numpy(weights), torch.from_numpy(zero))]
        low, high = (torch.stack(ends) for ends in zip(*found))
    else:
        low, high = (end[:, 0] for end in clipped_range(torch.from_numpy(weights), torch.from_numpy(zero), bits))
    assert low.dtype == high.dtype == torch.float32
    for row, a, b in zip(weights, low.numpy(), high.numpy()):
        kept = row[row != 0]
        if not kept.size:
            assert a == b == 0
            continue
        assert kept.min() <= a <= b <= kept.max()
        assert error(kept, a, b, bits) <= error(kept, kept.min(), kept.max(), bits) * (1 + 1e-9)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("tails", [3, 30])
@pytest.mark.parametrize("size", [500, 1 << 16])
def test_near_the_best_of_all_pairs_of_ends(bits, tails, size):
    weights = np.random.default_rng(bits).standard_t(tails, size).astype(np.float32)
    low, high = (end[0, 0].numpy() for end in clipped_range(torch.from_numpy(weights)[None], None, bits))
    shares = 0.85 ** np.arange(28)
    best = min(
        error(weights, np.float32(weights.min() * a), np.float32(weights.max() * b), bits)
        for a in shares
        for b in shares[:: 1 if size < 1000 else 2]
        if a / 3 < b < 3 * a
    )
    assert error(weights, low, high, bits) < best * 1.06


def test_what_counts_as_zero_does_not_count():
    weights = torch.tensor([[5.0, 0.0, 6.0, 8.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    low, high = clipped_range(weights, weights == 0, 2)
    alone = clipped_range(torch.tensor([[5.0, 6.0, 8.0]]), None, 2)
    assert (low[0], high[0]) == (alone[0][0], alone[1][0])
    assert low[1] == high[1] == 0


def test_an_outlier_is_cut_off():
    weights = torch.cat([torch.linspace(-1, 1, 5000), torch.tensor([100.0])])
    low, high = clipped_range(weights[None], None, 8)
    assert high.item() == 100  # at 8 bits a hundred to one is still worth a point
    low, high = clipped_range(torch.cat([weights[:-1].repeat(20), weights[-1:]])[None], None, 4)
    assert -1 <= low.item() < -0.8
    assert 0.8 < high.item() < 8


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1)])
def test_nothing_to_choose(shape):
    weights = torch.ones(shape)
    low, high = clipped_range(weights, None, 4)
    assert low.shape == high.shape == (shape[0], 1)
    assert torch.equal(low, torch.full((shape[0], 1), float(shape[1] > 0)))
    assert torch.equal(low, high)


@pytest.mark.parametrize("size", [3, 1 << 16, 1 << 18])
def test_weights_that_are_not_finite_give_no_range(size):
    weights = torch.ones(1, size)
    weights[0, -2] = torch.nan
    low, high = clipped_range(weights, None, 4)
    assert not (high - low).isfinite().all()
    assert torch.isfinite(weights).sum() == size - 1  # and the input is as it was


def test_half_precision_and_the_input_stays():
    weights = torch.randn(4, 100).to(torch.float16)
    before = weights.clone()
    found = clipped_range(weights, None, 3)
    assert all(map(torch.equal, found, clipped_range(weights.float(), None, 3)))
    assert torch.equal(weights, before)
