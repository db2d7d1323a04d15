"""Codes of 1 to 8 bits in bytes that are full, laid out so that whole arrays unpack in a few vector instructions.

A code is cut into fields of 8, 4, 2 and 1 bits, the widest from its top: 7 bits are 4 + 2 + 1, 5 bits 4 + 1. A plane
holds the fields of one width of N codes. Its byte j has the fields of the codes j, j + N/P, j + 2N/P, ... for P fields
a byte, the first in the highest bits, so one shift and one mask unpack N/P codes that lie side by side:

    8 codes of 3 bits       110 001 111 000 010 101 011 100

    plane of 2 bits         codes 0 2 4 6 -> 11 11 01 01     codes 1 3 5 7 -> 00 00 10 10
    plane of 1 bit          codes 0 to 7  -> 0 1 1 0 0 1 1 0

Unpacked codes are at the top of their byte, 110 as 1100 0000, with zeros below.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WIDTHS = (8, 4, 2, 1)
MULTIPLE = 8  # codes of a row fill up to this many, so that fields of one bit fill their bytes

_WORD = 8  # bytes in the words that are shifted at once


def pack(codes: Tensor, bits: int) -> tuple[Tensor, ...]:
    """The planes of `codes`, uint8 (..., N) below 2^bits: for each field of w bits uint8 (..., N * w / 8).

    N is a multiple of 8. Rows are packed by themselves.
    """
    planes, above = [], 0
    for width in fields(bits):
        field = (codes >> (bits - above - width)) & (2**width - 1)
        parts = field.unflatten(-1, (8 // width, -1))
        plane = torch.zeros_like(parts[..., 0, :])
        for i in range(8 // width):
            plane |= parts[..., i, :] << (8 - width * (i + 1))
        planes.append(plane)
        above += width
    return tuple(planes)


def unpack(planes: Sequence[Tensor], bits: int) -> Tensor:
    """The inverse of `pack`: uint8 (..., N), with each code at the top of its byte."""
    widths = fields(bits)
    if widths == (8,):
        return planes[0]
    *rows, size = planes[0].shape
    codes = torch.empty(*rows, size * 8 // widths[0], dtype=torch.uint8)
    above = 0
    for width, plane in zip(widths, planes, strict=True):
        mask = (2**width - 1) << (8 - above - width)
        if plane.shape[-1] % _WORD == 0:  # whole words: what a shift carries from byte to byte, the mask takes away
            plane, whole = plane.view(torch.int64), codes.view(torch.int64)
            mask = int.from_bytes(bytes([mask]) * _WORD, "little", signed=True)
        else:
            whole = codes
        parts = whole.unflatten(-1, (8 // width, -1))
        spare = torch.empty_like(plane) if above else None
        for i in range(8 // width):
            part = parts[..., i, :]
            out = part if spare is None else spare
            if width * i == above:  # in its place already
                torch.bitwise_and(plane, mask, out=out)
            else:
                _shift(plane, width * i - above, out).bitwise_and_(mask)
            if spare is not None:
                part.bitwise_or_(spare)
        above += width
    return codes


def take(planes: Sequence[Tensor], bits: int, places: Tensor) -> Tensor:
    """`unpack(planes, bits)[places]` of one row of codes, without unpacking the others. places: int64."""
    codes = torch.zeros(places.shape, dtype=torch.uint8)
    above = 0
    for width, plane in zip(fields(bits), planes, strict=True):
        field = plane[places % len(plane)] << (width * (places // len(plane))).to(torch.uint8)
        codes |= (field & (0xFF << (8 - width) & 0xFF)) >> above
        above += width
    return codes


def fields(bits: int) -> tuple[int, ...]:
    """The widths that `bits` is the sum of."""
    return tuple(width for width in WIDTHS if bits & width)


def fill_up(codes: Tensor, multiple: int) -> Tensor:
    """`codes` with zeros at the end of the last dimension, up to a multiple of `multiple`."""
    return torch.nn.functional.pad(codes, (0, -codes.shape[-1] % multiple))


def _shift(plane: Tensor, left: int, out: Tensor) -> Tensor:
    if left < 0:
        return torch.bitwise_right_shift(plane, -left, out=out)
    return torch.bitwise_left_shift(plane, left, out=out)
