from __future__ import annotations

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from train_large.compression.coding import (
    PER_BYTE,
    RAW,
    SPLIT,
    SYMBOLS_PER_BYTE,
    decode,
    encode,
    pack_bits,
    unpack_bits,
)


@st.composite
def symbols(draw, most=20_000):
    """Numbers of a width, from all alike to spread evenly; and the width."""
    width = draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.one_of(st.integers(0, 70), st.integers(0, most)))
    drawn = rng.geometric(draw(st.sampled_from([0.01, 0.3, 0.9, 0.999, 1])), count) - 1
    return np.minimum(drawn, 2**width - 1).astype(np.uint8), width


def bits_by_hand(values: np.ndarray, width: int) -> bytes:
    """The bit string by Python's whole numbers: the sum of symbol i times 2^(i * width), lowest byte first."""
    number = sum(int(value) << i * width for i, value in enumerate(values))
    return number.to_bytes((len(values) * width + 7) // 8, "little")


@settings(deadline=None, max_examples=300)
@given(symbols())
def test_what_is_encoded_comes_back(drawn):
    values, width = drawn
    block = encode(values, width)
    assert np.array_equal(decode(block, len(values), width), values)
    assert len(values) <= SYMBOLS_PER_BYTE * len(block)
    # Never more than the bit string and the byte that says so.
    assert len(block) <= 1 + (len(values) * width + 7) // 8


@settings(deadline=None, max_examples=200)
@given(symbols(most=300))
def test_bit_strings_are_numbers_lowest_bit_first(drawn):
    values, width = drawn
    assert pack_bits(values, width) == bits_by_hand(values, width)
    assert np.array_equal(unpack_bits(bits_by_hand(values, width), len(values), width), values)


def test_every_method_is_as_the_format_says():
    """Read with nothing but zstandard: the first symbol of a byte in its lowest bits."""
    rng = np.random.default_rng(0)
    found = {}
    for width, odds in [(8, 0.03), (4, 0.15), (2, 0.5), (1, 0.5), (3, 0.9)]:
        values = np.minimum(rng.geometric(odds, 100_000) - 1, 2**width - 1).astype(np.uint8)
        block = encode(values, width)
        found[block[0]] = (values, width, block[1:])
    found[RAW] = (np.arange(8, dtype=np.uint8), 3, encode(np.arange(8, dtype=np.uint8), 3)[1:])
    assert found[RAW][2] == bits_by_hand(found[RAW][0], 3)
    assert SPLIT in found
    assert len(set(found) & set(PER_BYTE)) >= 2
    for method in set(found) & set(PER_BYTE):
        values, _, frame = found[method]
        expected = [
            sum(int(value) << j * (8 // method) for j, value in enumerate(values[i : i + method]))
            for i in range(0, len(values), method)
        ]
        assert list(zstandard.ZstdDecompressor().decompress(frame)) == expected
    values, width, body = found[SPLIT]
    common, length = body[0], int.from_bytes(body[1:5], "little")
    assert common == np.bincount(values).argmax()
    assert np.array_equal(decode(body[5 : 5 + length], len(values), 1), values != common)
    rest = values[values != common]
    assert np.array_equal(decode(body[5 + length :], len(rest), width), rest)


@pytest.mark.parametrize(
    ("bits", "most"), [(2, 1.11), (3, 1.11), (4, 1.05), (5, 1.05), (6, 1.05), (7, 1.05), (8, 1.05)]
)
def test_within_a_few_per_cent_of_the_entropy(bits, most):
    """Weights as trained ones are: a bell with heavy tails, cut into 2^bits steps from the smallest to the largest."""
    weights = np.random.default_rng(1).standard_t(5, 400_000)
    codes = np.rint((weights - weights.min()) / (np.ptp(weights) / (2**bits - 1))).astype(np.uint8)
    counts = np.unique(codes, return_counts=True)[1]
    entropy = (counts * np.log2(codes.size / counts)).sum() / 8
    assert len(encode(codes, bits)) < most * entropy


@pytest.mark.parametrize(
    ("block", "count", "width", "why"),
    [
        (b"", 0, 4, "cannot hold"),
        (b"\x03abc", 5, 4, "no method"),
        (b"\x00abc", 5, 4, None),
        (b"\x00abc", 7, 4, "bit string"),
        (b"\x01" + zstandard.compress(b"\x05\x01"), 2, 3, None),
        (b"\x01" + zstandard.compress(b"\x05\x09"), 2, 3, "wider than 3"),
        (b"\x01" + zstandard.compress(b"\x05\x01"), 3, 3, "does not hold"),
        (b"\x01" + zstandard.compress(b"\x05\x01")[:-1], 2, 3, "frame"),
        (b"\x01nonsense", 2, 3, "frame"),
        (b"\x01" + zstandard.compress(bytes(600 * SYMBOLS_PER_BYTE)), 600 * SYMBOLS_PER_BYTE, 3, "cannot hold"),
        (b"\xff\x01", 2, 3, "cut short"),
        (b"\xff\x09" + (2).to_bytes(4, "little") + b"\x00\x01\x00\x05", 2, 3, "no such symbol"),
        (b"\xff\x01" + (2).to_bytes(4, "little") + b"\x00\x01\x00\x05", 2, 3, None),
        (b"\xff\x01" + (2).to_bytes(4, "little") + b"\x00\x01\xff\x05\x00\x00", 2, 3, "within a split"),
        (b"\xff\x01" + (2).to_bytes(4, "little") + b"\x00\x01", 2, 3, "cannot hold"),
    ],
)
def test_what_is_no_block(block, count, width, why):
    if why is None:  # the good neighbour of the next one, so that it fails for the reason given
        assert len(decode(block, count, width)) == count
        return
    with pytest.raises(ValueError, match=why):
        decode(block, count, width)
