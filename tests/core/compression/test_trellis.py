"""The indices that a trellis allows, the nearest of them, and what they cost."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from train_large.compression import trellis
from train_large.compression.trellis import FEEDBACK, FORWARD, LENGTH, lowest_bits, nearest_indices


def register(stored):
    """The lowest bits, by the shift register as the format's page describes it; and what it holds at the end."""
    s, bits = 0, []
    for value in stored:
        bits.append(s & 1)
        s = (s >> 1) ^ (s & 1) * FEEDBACK ^ (int(value) & 1) * FORWARD
    return bits, s


def error(indices, x):
    return float(np.square(np.asarray(indices, dtype=np.float64) - x).sum())


def entropy(values):
    share = np.unique(values, return_counts=True)[1] / len(values)
    return float(-(share * np.log2(share)).sum())


@given(arrays(np.int16, st.integers(0, 300), elements=st.integers(-5, 5)))
def test_the_lowest_bits_are_the_shift_registers(stored):
    assert lowest_bits(stored).tolist() == register(stored)[0]


def test_the_lowest_bits_of_many():
    stored = np.random.default_rng(1).integers(0, 2, 100_003)
    assert lowest_bits(stored).tolist() == register(stored)[0]


def test_the_example_of_the_docstring():
    rows = re.findall(r"^ {4}(?:index|stored|lowest bit) +((?:\d +)+)", trellis.__doc__, re.M)
    index, stored, lowest = (list(map(int, row.split())) for row in rows)
    assert index == [2 * upper + bit for upper, bit in zip(stored, lowest, strict=True)]
    assert lowest == register(stored)[0]


def test_the_register_is_that_of_the_formats_page():
    page = (Path(__file__).parents[3] / "docs" / "packed.md").read_text(encoding="utf-8")
    (numbers,) = re.findall(r"s = \(s >> 1\) \^ \((\d+) if s & 1 else 0\) \^ \((\d+) if u & 1 else 0\)", page)
    assert tuple(map(int, numbers)) == (FEEDBACK, FORWARD)


@given(
    arrays(np.float32, st.integers(0, 3 * LENGTH), elements=st.floats(-50, 50, width=32)),
)
def test_what_is_found_is_allowed_and_ends_at_zero(x):
    found = nearest_indices(x)
    assert len(found) == len(x)
    bits, end = register(found >> 1)
    assert (found & 1).tolist() == bits
    assert end == 0


@pytest.mark.parametrize("seed", range(5))
def test_what_is_found_is_the_nearest_of_all(seed):
    """All sequences of eight indices, each of the nearest four, that leave the register at 0."""
    x = np.random.default_rng(seed).uniform(-3, 3, 8).astype(np.float32)
    near = [[int(np.floor(value)) + i for i in (-1, 0, 1, 2)] for value in x]
    allowed = (
        each
        for each in itertools.product(*near)
        if (lambda bits, end: end == 0 and bits == [i & 1 for i in each])(*register([i >> 1 for i in each]))
    )
    assert error(nearest_indices(x), x) == pytest.approx(min(error(each, x) for each in allowed), rel=1e-5)


def test_chains_do_not_touch_each_other():
    x = np.random.default_rng(1).normal(0, 9, 4 * LENGTH).astype(np.float32)
    apart = [nearest_indices(part) for part in np.split(x, 4)]
    assert np.array_equal(nearest_indices(x), np.concatenate(apart))


@pytest.mark.parametrize("step", [0.05, 0.4])
def test_a_fifth_of_a_bit_is_won(step):
    """At the entropy, over rounding to a grid with the same error: 0.2546 bits are all that there is at fine steps."""
    w = np.random.default_rng(1).standard_normal(1 << 17)
    rounded = np.rint(w / step)
    found = nearest_indices((w / step * 2).astype(np.float32))
    bits = [entropy(rounded), entropy(found >> 1)]
    errors = [error(rounded, w / step) * step**2, error(found, w / step * 2) * (step / 2) ** 2]
    won = bits[0] - bits[1] + np.log2(errors[0] / errors[1]) / 2
    assert 0.19 < won < 0.2546


def test_every_state_has_two_ways_into_it_with_indices_that_differ():
    assert trellis._FROM.shape == (2, trellis.STATES)
    assert sorted(trellis._FROM.reshape(-1).tolist()) == sorted([*range(trellis.STATES)] * 2)
    assert ((trellis._SUBSET[0] ^ trellis._SUBSET[1]) == 2).all()
