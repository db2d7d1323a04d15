from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train_large.compression import planes


def by_hand(codes: list[int], bits: int) -> list[bytes]:
    """The planes of one row, bit by bit, as the module's pictures have them."""
    result, texts = [], [f"{code:0{bits}b}" for code in codes]
    for width in {3: (2, 1), 5: (4, 1)}.get(bits, (bits,)):
        fields, texts = [text[:width] for text in texts], [text[width:] for text in texts]
        if width in (4, 6, 7):
            free = 8 - width
            apart = len(codes) // (width // free + 1)
            tops = [fields[i:-apart:apart] for i in range(apart)]
            found = [free_bits(*column) for column in zip(tops, fields[-apart:])]
            bits_of_bytes = [field + found[i % apart][i // apart] for i, field in enumerate(fields[:-apart])]
        else:
            apart = len(codes) * width // 8
            bits_of_bytes = ["".join(fields[byte::apart]) for byte in range(apart)]
        result.append(bytes(int(text, 2) for text in bits_of_bytes))
    return result


def free_bits(tops: list[str], more: str) -> tuple[str, ...]:
    """What is below the codes `tops` in their bytes, such that these give the code `more`: found by trying all."""
    free = 8 - len(more)
    for bits in itertools.product(map("".join, itertools.product("01", repeat=free)), repeat=len(tops)):
        total = sum(int(top + end, 2) << 8 - free * (i + 1) for i, (top, end) in enumerate(zip(tops, bits)))
        if total % 256 == int(more, 2) << free:
            return bits
    raise AssertionError("no free bits give that code")


def test_the_pictures_in_the_docstring() -> None:
    codes = torch.tensor([0b110001, 0b001110, 0b111001, 0b011011], dtype=torch.uint8)
    assert [f"{byte:08b}" for byte in planes.pack(codes, 6)[0].tolist()] == ["11000101", "00111001", "11100111"]
    codes = torch.tensor([0b110, 0b001, 0b111, 0b000, 0b010, 0b101, 0b011, 0b100], dtype=torch.uint8)
    two, one = planes.pack(codes, 3)
    assert [f"{byte:08b}" for byte in two.tolist()] == ["11110101", "00001010"]
    assert [f"{byte:08b}" for byte in one.tolist()] == ["01100110"]


@given(st.data(), st.integers(1, 8), st.integers(1, 30), st.integers(1, 3))
def test_planes(data: st.DataObject, bits: int, eighths: int, rows: int) -> None:
    seed = data.draw(st.integers(0, 2**32 - 1))
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, (rows, 8 * eighths)).astype(np.uint8))
    packed = planes.pack(codes, bits)
    for row in range(rows):
        assert [bytes(plane[row].tolist()) for plane in packed] == by_hand(codes[row].tolist(), bits)
    assert sum(plane.numel() for plane in packed) == rows * bits * eighths
    assert torch.equal(planes.unpack(packed, bits), codes << (8 - bits))
    places = torch.from_numpy(np.random.default_rng(seed).integers(0, 8 * eighths, (4, 5)))
    assert torch.equal(planes.take([plane[0] for plane in packed], bits, places), codes[0][places] << (8 - bits))


@pytest.mark.parametrize(("length", "multiple", "full"), [(5, 8, 8), (8, 8, 8), (65, 64, 128)])
def test_filled_up(length: int, multiple: int, full: int) -> None:
    filled = planes.fill_up(torch.ones(2, length, dtype=torch.uint8), multiple)
    assert filled.shape == (2, full)
    assert filled.sum() == 2 * length
