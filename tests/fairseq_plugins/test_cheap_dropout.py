"""Cheap dropout is dropout: its rates, its independence, its gradients, and its seed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_plugins.models.cheap_dropout import dropout, dropped, keep_, keep_mask, mark_, marked_mask

TYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_the_rate_is_met_within_chance(rate):
    torch.manual_seed(1)
    number = 400_000
    share = float((dropped((400, 1000), rate) < 0).float().mean())
    # Five standard deviations, and the rounding of the rate.
    assert abs(share - rate) <= 5 * math.sqrt(rate * (1 - rate) / number) + 1 / 65536


def test_neighbours_are_independent():
    torch.manual_seed(2)
    drops = (dropped((1000, 1000), 0.1) < 0).float() - 0.1
    for one, other in ((drops[:, 1:], drops[:, :-1]), (drops[1:], drops[:-1]), (drops[:, 4:], drops[:, :-4])):
        assert abs(float((one * other).mean()) / 0.09) < 5 / 1000


def test_it_follows_the_seed():
    torch.manual_seed(3)
    first, second = dropped((50, 50), 0.5), dropped((50, 50), 0.5)
    torch.manual_seed(3)
    assert torch.equal(first, dropped((50, 50), 0.5))
    assert not torch.equal(first, second)


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.sampled_from(TYPES), st.floats(0, 1))
def test_a_marked_tensor_tells_what_was_there_and_what_is_left(shape, dtype, rate):
    x = torch.rand(shape).to(dtype)
    marked = mark_(x.clone(), rate)
    assert torch.equal(marked.abs(), x)
    kept = marked_mask(marked)
    assert torch.equal(keep_(x.clone(), kept), marked.clamp(min=0))
    assert set(kept.flatten().tolist()) <= {0, -1}


@pytest.mark.parametrize("dtype", TYPES)
def test_kept_numbers_stay_and_others_are_zero(dtype):
    x = torch.randn(40, 30).to(dtype)
    mask = keep_mask(x.shape, 0.3)
    assert torch.equal(keep_(x.clone(), mask), x * (mask != 0))
    assert 0 < int((mask == 0).sum()) < x.numel()


def test_dropout_and_its_gradient():
    x = torch.randn(30, 20, requires_grad=True)
    y = dropout(x, 0.25)
    kept = y != 0
    assert torch.allclose(y[kept], x[kept] / 0.75)
    y.sum().backward()
    assert torch.allclose(x.grad, kept / 0.75)
    assert dropout(x, 0.0) is x
