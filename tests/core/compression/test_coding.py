from __future__ import annotations

import lzma

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from train_large.compression.coding import (
    LEVELS,
    LZMA,
    PER_BYTE,
    RAW,
    SPLIT,
    SYMBOLS_PER_BYTE,
    decode,
    encode,
    is_deep,
    pack_bits,
    to_lzma,
    unlzma,
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
    """Read with nothing but zstandard and lzma: the first symbol of a byte in its lowest bits."""
    rng = np.random.default_rng(0)
    found = {}
    for width, odds in [(8, 0.03), (4, 0.15), (2, 0.5), (1, 0.5), (3, 0.9)]:
        values = np.minimum(rng.geometric(odds, 100_000) - 1, 2**width - 1).astype(np.uint8)
        block = encode(values, width)
        found[block[0]] = (values, width, block[1:])
    mean = np.linspace(0.05, 0.95, 16)  # of each of sixteen columns
    columns = rng.normal(255 * mean, 9, (100, 16)).clip(0, 255).astype(np.uint8)
    for width, table in [(8, columns), (1, (rng.random((400, 16)) < mean).astype(np.uint8))]:
        block = encode(table.reshape(-1), width)
        found[block[0]] = (table.reshape(-1), width, block[1:])
    found[RAW] = (np.arange(8, dtype=np.uint8), 3, encode(np.arange(8, dtype=np.uint8), 3)[1:])
    assert found[RAW][2] == bits_by_hand(found[RAW][0], 3)
    assert SPLIT in found
    assert len(set(found) & set(PER_BYTE)) >= 2
    assert len(set(found) & {LZMA + n for n in PER_BYTE}) >= 2
    for method in set(found) - {RAW, SPLIT}:
        values, _, frame = found[method]
        n = method % LZMA
        expected = [
            sum(int(value) << j * (8 // n) for j, value in enumerate(values[i : i + n]))
            for i in range(0, len(values), n)
        ]
        # As an .lzma file: properties, the dictionary's size, the content's (not known: there is an end marker).
        alone = frame[:1] + (1 << 17).to_bytes(4, "little") + b"\xff" * 8 + frame[1:]
        if method > LZMA:
            content = lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(alone)
        else:
            content = zstandard.ZstdDecompressor().decompress(frame)
        assert list(content) == expected
    values, width, body = found[SPLIT]
    common, length = body[0], int.from_bytes(body[1:5], "little")
    assert common == np.bincount(values).argmax()
    assert np.array_equal(decode(body[5 : 5 + length], len(values), 1), values != common)
    rest = values[values != common]
    assert np.array_equal(decode(body[5 + length :], len(rest), width), rest)


def test_columns_of_a_narrow_matrix_take_less_than_their_entropy_together():
    """What LZMA is for: sixteen columns, each with a mean of its own, and few weights."""
    rng = np.random.default_rng(2)
    codes = np.rint(rng.normal(rng.uniform(20, 235, 16), 8, (1000, 16))).clip(0, 255).astype(np.uint8)
    counts = np.unique(codes, return_counts=True)[1]
    entropy = (counts * np.log2(codes.size / counts)).sum() / 8
    apart = sum(_entropy(column) for column in codes.T)
    block = encode(codes.reshape(-1), 8)
    assert block[0] == LZMA + 1
    assert apart < len(block) < 0.8 * entropy


def _entropy(values: np.ndarray) -> float:
    counts = np.unique(values, return_counts=True)[1]
    return float((counts * np.log2(values.size / counts)).sum() / 8)


@pytest.mark.parametrize(
    ("bits", "most"), [(2, 1.11), (3, 1.06), (4, 1.03), (5, 1.03), (6, 1.03), (7, 1.03), (8, 1.03)]
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
        (b"\x81" + to_lzma(b"\x05\x01", 0, 4), 2, 3, None),
        (b"\x81" + to_lzma(b"\x05\x09", 0, 4), 2, 3, "wider than 3"),
        (b"\x81" + to_lzma(b"\x05\x01", 0, 4), 3, 3, "does not hold"),
        (b"\x81" + to_lzma(b"\x05\x01" * 99, 0, 4), 2, 3, "longer than"),
        (b"\x81" + to_lzma(b"\x05\x01" * 99, 0, 4)[:-6], 198, 3, "cut short"),
        (b"\x81\xff" + to_lzma(b"\x05\x01", 0, 4)[1:], 2, 3, "no properties"),
        (b"\x81\x2c" + to_lzma(b"\x05\x01", 0, 4)[1:], 2, 3, "decompressed"),
        (b"\x81\x00nonsense, and more of it", 22, 3, "frame"),
        (b"\x81", 2, 3, "no properties"),
        (b"\x80abc", 2, 3, "no method"),
        (b"\xff\x01", 2, 3, "cut short"),
        (b"\xff\x09" + (2).to_bytes(4, "little") + b"\x00\x01\x00\x05", 2, 3, "no such symbol"),
        (b"\xff\x01" + (2).to_bytes(4, "little") + b"\x00\x01\x00\x05", 2, 3, None),
        (b"\xff\x01" + (2).to_bytes(4, "little") + b"\x00\x01\xff\x05\x00\x00", 2, 3, "split is cut short"),
        (b"\xfe\x00\x05", 3, 1, None),
        (b"\xfe\x00\x05", 9, 1, "bit string"),
        (b"\xfe\x00\x05", 3, 2, "symbols of 2 bits"),
        (b"\xfe\x02" + zstandard.compress(b"\x05"), 9, 1, None),
        (b"\xfe", 3, 1, "cannot hold"),
        (b"\xff\x01" + (2).to_bytes(4, "little") + b"\x00\x01", 2, 3, "cannot hold"),
    ],
)
def test_what_is_no_block(block, count, width, why):
    if why is None:  # the good neighbour of the next one, so that it fails for the reason given
        assert len(decode(block, count, width)) == count
        return
    with pytest.raises(ValueError, match=why):
        decode(block, count, width)


def split(common: int, where: list[int], rest: bytes) -> bytes:
    inner = bytes([RAW]) + pack_bits(np.array(where, dtype=np.uint8), 1)
    return bytes([SPLIT, common]) + len(inner).to_bytes(4, "little") + inner + rest


def test_splits_within_splits_as_the_format_says():
    block = split(0, [0, 1, 1, 0, 1], split(1, [1, 0, 1], b"\0" + pack_bits(np.array([7, 2], dtype=np.uint8), 3)))
    assert decode(block, 5, 3).tolist() == [0, 7, 1, 0, 2]
    assert decode(block, 5, 3, levels=2).tolist() == [0, 7, 1, 0, 2]
    with pytest.raises(ValueError, match="more levels"):
        decode(block, 5, 3, levels=1)
    deepest = b"\0\0"
    for _ in range(LEVELS + 1):
        deepest = split(0, [1], deepest)
    with pytest.raises(ValueError, match="more levels"):
        decode(deepest, 1, 3)


def test_outliers_and_few_ones_cost_no_more_than_their_entropy():
    """Where symbols are wide because of a few, and where hardly any bit is set: by splits of splits, and by bytes."""
    rng = np.random.default_rng(3)
    bell = np.rint(rng.standard_normal(300_000) * 0.6).astype(int)
    outliers = rng.random(bell.size) < 1e-3
    codes = np.where(outliers, rng.integers(-30, 30, bell.size), bell)
    for values, width in [((codes + 31).astype(np.uint8), 6), ((rng.random(300_000) < 0.03).astype(np.uint8), 1)]:
        block = encode(values, width)
        shallow = encode(values, width, levels=1 if width > 1 else 0)
        assert is_deep(block)
        assert not is_deep(shallow)
        assert len(block) < 1.04 * _entropy(values)
        assert len(shallow) > 1.05 * _entropy(values)
        assert np.array_equal(decode(block, len(values), width), values)
        assert np.array_equal(decode(shallow, len(values), width, levels=1), values)
        with pytest.raises(ValueError, match="more levels"):
            decode(block, len(values), width, levels=1 if width > 1 else 0)


def test_what_a_sample_lacks_does_not_mislead():
    """A few symbols are too wide for several to a byte, and stand where no sample is taken."""
    rng = np.random.default_rng(4)
    values = (np.rint(rng.standard_normal(600_000) * 0.6) + 8).astype(np.uint8)
    values[30_000:30_010] = 100
    assert len(encode(values, 7)) < 1.03 * _entropy(values)


def test_no_more_is_unfolded_than_asked_for():
    bomb = to_lzma(bytes(1 << 24), 0, 0)
    assert len(bomb) < 1 << 12
    with pytest.raises(ValueError, match="longer than"):
        unlzma(bomb, 100)
    assert unlzma(bomb, 1 << 24) == bytes(1 << 24)
