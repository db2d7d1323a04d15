"""Codes of 1 to 8 bits in bytes that are full, laid out so that whole arrays unpack in a few vector instructions.

Codes of 4, 6 and 7 bits stand one in a byte at its top. What is free below, 4, 2 or 1 bits of 1, 3 or 7 bytes, is such
that all those bytes, times powers of two and added up modulo 256, are one code more. So N codes of 6 bits are four
quarters, of which three are bytes, byte j with code j of its quarter, and no bit need be masked for the fourth:

    4 codes of 6 bits       110001 001110 111001 011011

    one plane of 3 bytes    110001 01   001110 01   111001 11

    01000000  64 times the first, modulo 256
    10010000  16 times the second
    10011100  4 times the third
    011011 00 their sum: the fourth code

Of 1 or 2 bits a byte has 8 or 4 codes, byte j of P codes a byte the codes j, j + N/P, j + 2N/P, ..., the first in the
highest bits, so one shift and one mask unpack N/P codes that lie side by side. 3 bits are 2 + 1, 5 bits 4 + 1, a plane
for each:

    8 codes of 3 bits       110 001 111 000 010 101 011 100

    plane of 2 bits         codes 0 2 4 6 -> 11 11 01 01     codes 1 3 5 7 -> 00 00 10 10
    plane of 1 bit          codes 0 to 7  -> 0 1 1 0 0 1 1 0

Unpacked codes are at the top of their byte, 110 as 1100 0000, with zeros below.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

MULTIPLE = 8  # codes of a row fill up to this many, so that the bytes of a plane are full

_FIELDS = {8: (8,), 7: (7,), 6: (6,), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,), 1: (1,)}
_BYTES = {4: 1, 6: 3, 7: 7}  # whose free bits have one code more


def pack(codes: Tensor, bits: int) -> tuple[Tensor, ...]:
    """The planes of `codes`, uint8 (..., N) below 2^bits: for each field of w bits uint8 (..., N * w / 8).

    N is a multiple of 8. Rows are packed by themselves.
    """
    planes, above = [], 0
    for width in _FIELDS[bits]:
        field = (codes >> (bits - above - width)) & (2**width - 1)
        planes.append(_with_one_more(field, width) if width in _BYTES else _side_by_side(field, width))
        above += width
    return tuple(planes)


def unpack(planes: Sequence[Tensor], bits: int, out: Tensor | None = None) -> Tensor:
    """The inverse of `pack`: uint8 (..., N), with each code at the top of its byte. Of 8 bits not a copy without `out`.

    ATen divides large tensors among the cores in the order of memory, so that each has the same rows in all operations
    here. What another core has just written takes several times as long to read: so there should be some rows.
    """
    if bits == 8:
        return planes[0] if out is None else out.copy_(planes[0])
    *rows, size = planes[0].shape
    codes = torch.empty(*rows, size * 8 // _FIELDS[bits][0], dtype=torch.uint8) if out is None else out
    above = 0
    for width, plane in zip(_FIELDS[bits], planes, strict=True):
        (_unpack_with_one_more if width in _BYTES else _unpack_side_by_side)(plane, width, above, codes)
        above += width
    return codes


def take(planes: Sequence[Tensor], bits: int, places: Tensor) -> Tensor:
    """`unpack(planes, bits)[places]` of one row of codes, without unpacking the others. places: int64."""
    codes = torch.zeros(places.shape, dtype=torch.uint8)
    above = 0
    for width, plane in zip(_FIELDS[bits], planes, strict=True):
        codes |= (_take_with_one_more if width in _BYTES else _take_side_by_side)(plane, width, places) >> above
        above += width
    return codes


def fill_up(codes: Tensor, multiple: int) -> Tensor:
    """`codes` with zeros at the end of the last dimension, up to a multiple of `multiple`."""
    return torch.nn.functional.pad(codes, (0, -codes.shape[-1] % multiple))


def _side_by_side(field: Tensor, width: int) -> Tensor:
    parts = field.unflatten(-1, (8 // width, -1))
    plane = torch.zeros_like(parts[..., 0, :])
    for i in range(8 // width):
        plane |= parts[..., i, :] << (8 - width * (i + 1))
    return plane


def _unpack_side_by_side(plane: Tensor, width: int, above: int, codes: Tensor) -> None:
    """Put the fields into `codes`, below the `above` bits that are there."""
    mask = (2**width - 1) << (8 - above - width)
    parts = codes.unflatten(-1, (8 // width, -1))
    spare = torch.empty_like(plane) if above else None
    for i in range(8 // width):
        part = parts[..., i, :]
        out = part if spare is None else spare
        if width * i == above:  # in its place already
            torch.bitwise_and(plane, _byte(mask), out=out)
        else:
            _shift(plane, width * i - above, out).bitwise_and_(_byte(mask))
        if spare is not None:
            part.bitwise_or_(spare)


def _take_side_by_side(plane: Tensor, width: int, places: Tensor) -> Tensor:
    size = plane.shape[-1]
    field = plane[places % size] << (width * (places // size)).to(torch.uint8)
    return field & (0xFF << (8 - width) & 0xFF)


def _with_one_more(field: Tensor, width: int) -> Tensor:
    free = 8 - width
    *tops, more = field.unflatten(-1, (_BYTES[width] + 1, -1)).unbind(-2)
    left, found = more << free, []
    for top, shift in zip(reversed(tops), _shifts(width)):  # the last decides the lowest bits
        found.append(top << free | (left >> shift) & (2**free - 1))
        left = left - found[-1] * 2**shift
    return torch.cat(found[::-1], -1)


def _shifts(width: int) -> range:
    """The powers of two of the bytes whose sum is one code more, from the last to the first."""
    free = 8 - width
    return range(free, 8, free)


def _unpack_with_one_more(plane: Tensor, width: int, above: int, codes: Tensor) -> None:
    """Put the fields, at the top of their bytes, into `codes`, where nothing is."""
    assert above == 0
    count, free = _BYTES[width], 8 - width
    tops, parts = plane.unflatten(-1, (count, -1)), codes.unflatten(-1, (count + 1, -1))
    torch.bitwise_and(tops, _byte(0xFF << free & 0xFF), out=parts[..., :-1, :])
    more = parts[..., -1, :]
    last, *others = reversed(tops.unbind(-2))
    least, *shifts = _shifts(width)
    torch.mul(last, _byte(2**least), out=more)
    for byte, shift in zip(others, shifts):
        torch.add(more, byte, alpha=2**shift, out=more)


def _take_with_one_more(plane: Tensor, width: int, places: Tensor) -> Tensor:
    count, free = _BYTES[width], 8 - width
    size = plane.shape[-1] // count
    place, byte = places // size, places % size
    more = torch.zeros(places.shape, dtype=torch.uint8)
    for i, shift in enumerate(reversed(_shifts(width))):
        more += plane[i * size + byte] * 2**shift
    return torch.where(place == count, more, plane[places.clamp(max=count * size - 1)] & (0xFF << free & 0xFF))


def _shift(plane: Tensor, left: int, out: Tensor) -> Tensor:
    if left < 0:
        return torch.bitwise_right_shift(plane, -left, out=out)
    return torch.mul(plane, _byte(2**left), out=out)  # twice as quick as a shift, of bytes


@functools.cache
def _byte(value: int) -> Tensor:
    """uint8: to turn a number into a tensor takes as long as unpacking some thousand codes."""
    return torch.tensor(value, dtype=torch.uint8)
