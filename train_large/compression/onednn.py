"""int8 products by oneDNN, for CPUs that have VNNI. Without it they saturate in int16, or are done one by one.

oneDNN multiplies weights in an order of its own, in tiles. Those that do not stay ready in it are kept in that order
too, at their bits, and unpacked into memory from which they can be multiplied at once: in any other order each core
would first have to read what others have just unpacked.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train_large.compression import planes

_PARTS = 8  # of a weight's memory, for `planes.unpack` to divide among cores as products do


@dataclass(frozen=True)
class Room:
    """Memory for one weight in tiles: `tiles`, (K, N), is what `codes`, uint8 (_PARTS, K * N / _PARTS), and `sums`,
    int32 (N,), the codes of a row added up and negated, make of it."""

    tiles: Tensor
    codes: Tensor
    sums: Tensor

    @property
    def nbytes(self) -> int:
        return self.codes.numel() + 4 * self.sums.numel()


@dataclass(frozen=True)
class Folded:
    """int8 codes (K, N) in the order of tiles at their `bits`, to unpack into a room that other weights use too.

    sums: int32 (N,), of the codes of each row.
    """

    planes: Sequence[Tensor]
    bits: int
    sums: Tensor
    room: Room

    def unfold(self) -> Tensor:
        """The codes in tiles, until another weight takes the room."""
        planes.unpack(self.planes, self.bits, out=self.room.codes)
        torch.neg(self.sums, out=self.room.sums)
        return self.room.tiles

    def to_dense(self) -> Tensor:
        return self.unfold().to_dense()


def available() -> bool:
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.cpu, "_is_vnni_supported", bool)())


@functools.cache
def has_tiles() -> bool:
    """Whether this torch has the operations that its compiler makes of int8 linear maps (onednn::qlinear_pointwise,
    aten/src/ATen/native/quantized/cpu/qlinear.cpp, torch 2.13.0), and they come out right."""
    x = torch.arange(-128, 128, dtype=torch.int32).view(8, 32)
    w = torch.arange(128, -128, -1, dtype=torch.int32).sub(1).view(32, 8)
    codes = w.to(torch.int8)
    try:
        found = times_tiles((x + 128).to(torch.uint8), tiles(codes), torch.full((1,), 0.5))
        same = tiles(codes).to_dense()
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return torch.equal(found, (x @ w).float() * 0.5) and torch.equal(same, codes)


@functools.cache
def nbytes(rows: int, columns: int) -> int:
    """Bytes of a weight (N, K) in tiles, with the sum of each row in int32; N and K are filled up to whole tiles."""
    try:
        return len(_memory(tiles(torch.zeros(columns, rows, dtype=torch.int8))))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return -(-rows // 64) * 64 * (-(-columns // 64) * 64 + 4)  # as far as is known


def tiles(codes: Tensor) -> Tensor:
    """int8 (K, N) in the order in which oneDNN multiplies them; `to_dense` gives them back."""
    return torch.ops.onednn.qlinear_prepack(codes.t().contiguous(), None)


def room(rows: int, columns: int) -> Room | None:
    """Memory for weights (N, K). None where tiles of this shape are not kept in memory as they are known to be, codes
    of one byte each, then negated sums, or not all of them are full."""
    draw = torch.Generator().manual_seed(1)
    one, other = (torch.randint(-128, 128, (columns, rows), generator=draw, dtype=torch.int8) for _ in range(2))
    made, example = tiles(one), tiles(other)
    try:
        memory, content = _memory(made), _memory(example)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return None
    size = rows * columns
    if len(memory) != size + 4 * rows or size % (_PARTS * planes.MULTIPLE):
        return None
    found = Room(made, memory[:size].view(_PARTS, -1), memory[size:].view(torch.int32))
    memory.copy_(content)
    right = torch.equal(made.to_dense(), other) and torch.equal(found.sums, -other.sum(0, dtype=torch.int32))
    return found if right else None


def fold(codes: Tensor, bits: int, sums: Tensor, place: Room) -> Folded:
    """int8 (K, N), multiples of 2^(8 - bits), and the sums of their rows, int32 (N,)."""
    ordered = _memory(tiles(codes))[: codes.numel()].view(_PARTS, -1)
    return Folded(planes.pack(ordered >> (8 - bits), bits), bits, sums, place)


def _memory(weight: Tensor) -> Tensor:
    """All bytes of a weight in tiles, uint8, which keep it alive (mkldnn::data_ptr, aten/src/ATen/native/mkldnn,
    torch 2.13.0)."""
    count = torch.ops.mkldnn._nbytes(weight)
    memory = (ctypes.c_uint8 * count).from_address(torch.ops.mkldnn.data_ptr(weight))
    memory.owner = weight  # type: ignore[attr-defined]
    return torch.frombuffer(memory, dtype=torch.uint8)


def times_tiles(codes: Tensor, weight: Tensor, step: Tensor) -> Tensor:
    """codes - 128, for uint8 codes (M, K), times those in tiles (K, N), times `step` (N,) or (1,): float32.

    The operation takes signed codes too, but with VNNI and no AMX there is no kernel for those: 10,000 times slower.
    """
    none = _zeros(len(step))
    return torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, 128, weight, step, none, None, 1.0, 0, torch.float32, "none", [], ""
    )


@functools.cache
def _zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32)
