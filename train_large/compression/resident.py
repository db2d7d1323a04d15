"""Quantized tensors as they stay in memory while a model predicts: k bits a weight, and no copy in floating point.

Three kinds, each with `shape` (N, K), `nbytes`, and `blocks`, which goes through the float32 weights a few rows at a
time:

    Dense       the weight of a linear map, not pruned and of at most 8 bits: unpacks to int8 codes
    Table       anything else that is quantized: rows can be taken out one by one, as an embedding needs
    Plain       float32, for what is not quantized

Zeros that a tensor keeps off its grid are a mask of one bit a weight, which leaves k bits for each of the others; a
few, such as the row of an embedding that stands for padding, are a list of their places.

The float32 weights are bit for bit what `quantization.dequantize` gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, Union

import torch
from torch import Tensor

from train_large.compression import onednn, planes
from train_large.compression.quantization import Quantized
from train_large.compression.storage import block_size

# Weights made in floating point at once: 1 MB of float32, in a multiple of 64 rows, but of wide matrices enough rows
# for quick products. With MKL on AVX2, 128 rows of input and 3,072 columns, 64 rows at a time took 1.35 times as long
# as 192 at a time.
_AT_ONCE = 1 << 18
_ROWS, _FEWEST_ROWS = 64, 192

_PLACE_BITS = 32
_ALIGNED = 64  # codes; fields of one bit then fill whole words


class Tiles(Protocol):
    """int8 codes (K, N) in the order in which a CPU multiplies them."""

    def to_dense(self) -> Tensor: ...


@dataclass(frozen=True)
class Dense:
    """A matrix (N, K) of codes on one grid, or on a grid for each row.

    minimum, step: float32 (1, 1) or (N, 1). zeros: int32, places in the order of rows; their codes are the nearest to
    zero that there are. In int8, weight[n, k] is centre[n] + code_step[n] * codes()[k, n], both float32 (1,) or (N,),
    and sums, int32 (N,), are those of each row's codes.

    Codes are kept row after row, or for oneDNN `by_columns`: its products with rows of 2,048 codes, one below the other
    in memory, are up to a fifth slower. They can be in `tiles` instead of planes: a byte each, whatever their bits
    (`kernels.in_tiles`), or in that order at their bits (`kernels.folded`).
    """

    shape: tuple[int, int]
    bits: int
    planes: tuple[Tensor, ...]
    by_columns: bool
    minimum: Tensor
    step: Tensor
    zeros: Tensor
    centre: Tensor
    code_step: Tensor
    sums: Tensor
    tiles: Tiles | None = None
    codes_nbytes: int = 0

    @property
    def nbytes(self) -> int:
        ranges = _bytes(self.minimum, self.step, self.centre, self.code_step, self.sums, self.zeros)
        return ranges + self.codes_nbytes

    def with_tiles(self, tiles: Tiles, nbytes: int) -> Dense:
        """With `tiles` of so many bytes instead of planes."""
        return replace(self, planes=(), tiles=tiles, codes_nbytes=nbytes)

    def codes(self) -> Tensor:
        """int8 (K, N), whatever the number of bits; of 8 bits not a copy, unless they are in tiles."""
        if self.tiles is not None:
            return self.tiles.to_dense()
        return self._eight_bits if self.bits == 8 else self._unpacked()

    @cached_property
    def _eight_bits(self) -> Tensor:
        return self._unpacked()

    def _unpacked(self) -> Tensor:
        rows, columns = self.shape
        codes = planes.unpack(self.planes, self.bits).view(torch.int8)[: rows * columns]
        return codes.view(columns, rows) if self.by_columns else codes.view(rows, columns).t()

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        codes = self.codes().view(torch.uint8).t()
        for block in row_slices(*self.shape):
            step, minimum = (
                (self.step, self.minimum) if len(self.step) == 1 else (self.step[block], self.minimum[block])
            )
            # Powers of two round nothing: this is step * index + minimum to the last bit, with few passes.
            weight = (codes[block] ^ 128).float().mul_(step * 2.0 ** (self.bits - 8)).add_(minimum)
            yield block, _clear(weight, self.zeros, block.start)


@dataclass(frozen=True)
class Codes:
    """Rows of codes of 1 to 16 bits. Above 8 bits the highest 8 are apart from the rest: `levels` has their planes."""

    bits: int
    levels: tuple[tuple[Tensor, ...], ...]

    @classmethod
    def pack(cls, codes: Tensor, bits: int) -> Codes:
        """codes: integers (..., N) with N a multiple of `planes.MULTIPLE`."""
        if bits <= 8:
            return cls(bits, (planes.pack(codes.to(torch.uint8), bits),))
        high, low = codes.int() >> (bits - 8), codes.int() & (2 ** (bits - 8) - 1)
        return cls(bits, (planes.pack(high.to(torch.uint8), 8), planes.pack(low.to(torch.uint8), bits - 8)))

    @property
    def nbytes(self) -> int:
        return sum(_bytes(*level) for level in self.levels)

    def rows(self, rows: Tensor | slice) -> Tensor:
        """float32 (R, N)."""
        # index_select copies whole rows; indexing by a tensor goes element by element.
        chosen = [
            [p[rows] if isinstance(rows, slice) else p.index_select(0, rows) for p in level] for level in self.levels
        ]
        return self._value([planes.unpack(level, bits) for level, (_, bits) in zip(chosen, self._by_level())])

    def take(self, places: Tensor) -> Tensor:
        """float32 of the shape of `places`, of a single row."""
        return self._value([planes.take(level, bits, places) for level, bits in self._by_level()])

    def _by_level(self) -> list[tuple[tuple[Tensor, ...], int]]:
        return list(zip(self.levels, (min(self.bits, 8), self.bits - 8)))

    def _value(self, at_the_top: Sequence[Tensor]) -> Tensor:
        value = at_the_top[0].float().mul_(2.0 ** (self.bits - 8))
        for lower in at_the_top[1:]:  # has the bits below the first eight: its own top is where theirs ends
            value.add_(lower.float().mul_(2.0 ** (self.bits - 16)))
        return value


@dataclass(frozen=True)
class Table:
    """A matrix (N, K) whose rows can be taken out, on any grids (see `quantization.Quantized`).

    codes: (N, K filled up) without a mask, else one row of the codes that are kept. mask: one bit a weight, (N, K
    filled up); starts: int32 (N + 1,), how many codes are kept before each row. zeros: int32, places in the order of
    rows, where there is no mask.
    """

    shape: tuple[int, int]
    codes: Codes
    minimum: Tensor
    step: Tensor
    range_size: int
    zeros: Tensor
    mask: Codes | None = None
    starts: Tensor | None = None

    @property
    def nbytes(self) -> int:
        mask = 0 if self.mask is None else self.mask.nbytes
        return self.codes.nbytes + mask + _bytes(self.minimum, self.step, self.zeros, *_given(self.starts))

    def rows(self, rows: Tensor) -> Tensor:
        """float32 (R, K) at the int64 `rows` (R,)."""
        if self.mask is None or self.starts is None:
            return self._clear_rows(self._weights(self.codes.rows(rows)[:, : self.shape[1]], rows), rows)
        kept = self._kept(rows)
        places = self.starts[rows, None] + kept.cumsum(1) - 1
        index = self.codes.take(places.clamp_(min=0)) if int(self.starts[-1]) else torch.zeros(kept.shape)
        return self._weights(index, rows).masked_fill_(~kept, 0)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        rows, columns = self.shape
        all_kept = None if self.mask is None else [planes.unpack(p, b) for p, b in self.codes._by_level()]
        for block in row_slices(rows, columns):
            where = torch.arange(block.start, block.stop)
            if self.mask is None or self.starts is None or all_kept is None:
                yield block, _clear(self._weights(self.codes.rows(block)[:, :columns], where), self.zeros, block.start)
                continue
            kept = self._kept(block)
            first, last = int(self.starts[block.start]), int(self.starts[block.stop])
            index = self.codes._value([level[first:last] for level in all_kept])
            index = torch.zeros(kept.shape).masked_scatter_(kept, index)
            yield block, self._weights(index, where).masked_fill_(~kept, 0)

    def _kept(self, rows: Tensor | slice) -> Tensor:
        assert self.mask is not None
        return self.mask.rows(rows)[:, : self.shape[1]] != 0

    def _clear_rows(self, w: Tensor, rows: Tensor) -> Tensor:
        """Set the zeros in the weights w (R, K) of `rows` (R,), in place."""
        if len(self.zeros):
            columns = self.shape[1]
            first, last = (torch.searchsorted(self.zeros, row * columns) for row in (rows, rows + 1))
            for i in (first < last).nonzero().flatten().tolist():
                w[i, self.zeros[first[i] : last[i]] - rows[i] * columns] = 0
        return w

    def _weights(self, index: Tensor, rows: Tensor) -> Tensor:
        """`index` (R, K) on the grids of `rows` (R,)."""
        if len(self.step) == 1:
            return index.mul_(self.step).add_(self.minimum)
        columns = self.shape[1]
        if self.range_size == columns:
            return index.mul_(self.step[rows, None]).add_(self.minimum[rows, None])
        ranges = (rows[:, None] * columns + torch.arange(columns)).div_(self.range_size, rounding_mode="floor")
        return index.mul_(self.step[ranges]).add_(self.minimum[ranges])


@dataclass(frozen=True)
class Plain:
    """A float32 matrix (N, K)."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.weight.shape
        return rows, columns

    @property
    def nbytes(self) -> int:
        return _bytes(self.weight)

    def rows(self, rows: Tensor) -> Tensor:
        return self.weight[rows]

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for block in row_slices(*self.shape):
            yield block, self.weight[block]


Matrix = Union[Dense, Table, Plain]


def linear_weight(q: Quantized | Tensor) -> Matrix:
    """The weight (N, K) of a linear map, as it stays in memory."""
    if not isinstance(q, Quantized) or q.bits > 8 or (len(q.step) > 1 and q.granularity != "row"):
        return table(q)
    zeros = _places(q)
    if zeros is None:
        return table(q)
    rows, columns = q.indices.shape
    minimum, step = q.minimum[:, None], q.step[:, None]
    index = q.indices
    if len(zeros):
        nearest = (-minimum / step).nan_to_num_(0).round_().clamp_(0, 2**q.bits - 1).expand(rows, 1)
        assert q.mask is not None
        index = torch.where(q.mask, index, nearest.to(torch.uint8))
    # Exclusive or with the highest bit takes half the range away: signed codes, with no work when they are unpacked.
    centred = index ^ 2 ** (q.bits - 1)
    by_columns = onednn.available()
    centred = (centred.t() if by_columns else centred).reshape(-1)
    packed = planes.pack(planes.fill_up(centred, _ALIGNED), q.bits)
    centre = (step.double() * 2 ** (q.bits - 1) + minimum).float().flatten()
    code_step = step.flatten() * 2.0 ** (q.bits - 8)
    dense = Dense((rows, columns), q.bits, packed, by_columns, minimum, step, zeros, centre, code_step, torch.empty(0))
    return replace(dense, codes_nbytes=_bytes(*packed), sums=dense.codes().sum(0, dtype=torch.int32))


def below_each_other(parts: Sequence[Quantized | Tensor]) -> Quantized | None:
    """The matrices (N, K) as one whose rows are all of theirs in order; None unless all are quantized at the same bits,
    each on one grid or one a row."""
    quantized = [q for q in parts if isinstance(q, Quantized)]
    if len(quantized) < len(parts) or len({(q.bits, q.indices.shape[1]) for q in quantized}) != 1:
        return None
    if any(len(q.step) > 1 and q.granularity != "row" for q in quantized):
        return None
    minimum, step = (
        torch.cat([getattr(q, name).expand(len(q.indices)) for q in quantized]) for name in ("minimum", "step")
    )
    mask = None
    if any(q.mask is not None for q in quantized):
        mask = torch.cat(
            [torch.ones_like(q.indices, dtype=torch.bool) if q.mask is None else q.mask for q in quantized]
        )
    return Quantized(torch.cat([q.indices for q in quantized]), minimum, step, mask, "row", quantized[0].bits)


def table(q: Quantized | Tensor) -> Table | Plain:
    """A matrix (N, K) whose rows can be taken out, as it stays in memory."""
    if isinstance(q, Tensor):
        return Plain(q.detach().float().contiguous())
    rows, columns = q.indices.shape
    size = block_size((rows, columns), q.granularity)
    zeros = _places(q)
    if zeros is not None:
        codes = Codes.pack(planes.fill_up(q.indices, planes.MULTIPLE), q.bits)
        return Table((rows, columns), codes, q.minimum, q.step, size, zeros)
    assert q.mask is not None
    kept = Codes.pack(planes.fill_up(q.indices[q.mask], _ALIGNED), q.bits)
    mask = Codes.pack(planes.fill_up(q.mask.to(torch.uint8), planes.MULTIPLE), 1)
    starts = torch.nn.functional.pad(q.mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return Table((rows, columns), kept, q.minimum, q.step, size, torch.empty(0, dtype=torch.int32), mask, starts)


def _places(q: Quantized) -> Tensor | None:
    """int32 places of the weights that are exactly zero; None where a mask takes less."""
    if q.mask is None:
        return torch.empty(0, dtype=torch.int32)
    count = q.mask.numel() - int(q.mask.sum())
    if (_PLACE_BITS + q.bits) * count > q.mask.numel():
        return None
    return (~q.mask).flatten().nonzero().flatten().to(torch.int32)


def _clear(w: Tensor, zeros: Tensor, start: int) -> Tensor:
    """Set the zeros in w (R, K), the weights of the rows from `start` on, in place."""
    if len(zeros):
        rows, columns = w.shape
        bounds = torch.tensor([start * columns, (start + rows) * columns])
        first, last = torch.searchsorted(zeros, bounds).tolist()
        places = zeros[first:last].long() - start * columns
        w[places // columns, places % columns] = 0
    return w


def row_slices(rows: int, columns: int) -> Iterator[slice]:
    """Runs of rows to make in floating point at once."""
    size = max(_FEWEST_ROWS, _AT_ONCE // columns // _ROWS * _ROWS)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _given(tensor: Tensor | None) -> tuple[Tensor, ...]:
    return () if tensor is None else (tensor,)
