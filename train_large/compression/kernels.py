"""Linear maps whose weights are resident at k bits, by the integer and floating-point kernels that PyTorch has.

In int8 a weight is centre + step * code, with int8 codes, and each row of the input is rounded by itself, to codes i of
8 bits (of 7 where FBGEMM multiplies weights of 8) on a grid of its own. So with x = offset + scale * i the product
needs no weights in floating point, and is exact in the weights:

    W x + b  =  scale * step * (codes . i)  +  centre * sum(x)     +  offset * step * sum(codes)  +  b
                               int32           sum before rounding

int16 and int24 are two and three such products: what rounding has left, in 254ths of a code, is rounded to codes of 8
bits too. Of the same weights in the same place that comes as near to float32 as is wanted, in less time and with
nothing beside them (oneDNN alone: FBGEMM is no quicker than float32 twice).

Rows do not see each other, so it does not matter which sentences are computed together.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train_large.compression import fbgemm, onednn
from train_large.compression.products import is_quick_by_onednn, product
from train_large.compression.resident import Dense, Matrix, Tiles, row_slices

INT8, INT16, INT24, BFLOAT16, FLOAT32 = PRECISIONS = ("int8", "int16", "int24", "bfloat16", "float32")
IN_CODES = {INT8: 1, INT16: 2, INT24: 3}  # and how many codes each number of the input has
WIDE = 512  # with so many numbers in a hidden state FBGEMM is quicker than float32; with 256 as quick, with 64 half so

# Tensors, since for one sentence an operation takes about as long as turning a number into one. _SMALLEST: a scale for
# rows of zeros; added to others it changes nothing.
_SMALLEST, _HALF_OF_CODES, _SIGN = torch.tensor(1e-30), torch.tensor(128.0), torch.tensor(128, dtype=torch.uint8)
_FINER = 254  # steps of a code in one of the code before: rounding leaves half of one, and codes go up to 127


@dataclass(frozen=True)
class Linear:
    """weight (N, K) and bias (N,)."""

    weight: Matrix
    bias: Tensor

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.bias.numel() * self.bias.element_size()


@dataclass(frozen=True)
class Loaded:
    """A linear map made ready for several products. codes: those of its weight, int8 (K, N), in the order of memory or
    in tiles; None where they are made anew for each product."""

    linear: Linear
    codes: Tensor | Tiles | None


def supported(precision: str) -> bool:
    """Whether this CPU has instructions for it."""
    if precision in IN_CODES:
        return onednn.available() or (precision == INT8 and fbgemm.available())
    # Without its instructions, bfloat16 is slower than float32.
    bf16 = torch.backends.mkldnn.is_available() and bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())
    return precision == FLOAT32 or bf16


def finer(precision: str, exact: bool = True) -> tuple[str, ...]:
    """In what to decide again what is too close in `precision`, one after another: the last is as good as float32.
    exact: whether all weights are where their codes say (`is_of_codes`); else no sum of codes is as good."""
    if precision in IN_CODES and supported(INT24) and exact:
        return tuple(other for other, parts in IN_CODES.items() if parts > IN_CODES[precision])
    return () if precision == FLOAT32 else (FLOAT32,)


def is_quick(precision: str, width: int) -> bool:
    """Whether `precision`, which the CPU has, takes less time than float32 in layers of so many numbers: what FBGEMM
    does around its products costs more than it gains for narrow ones (docs/benchmarks.md)."""
    return precision != INT8 or onednn.available() or width >= WIDE


def in_tiles_nbytes(weight: Dense) -> int:
    """Bytes of the codes of `weight` in tiles."""
    return (onednn if onednn.available() else fbgemm).nbytes(*weight.shape)


def in_tiles(weight: Matrix) -> Matrix:
    """`weight` with codes of a byte each in the order in which this CPU multiplies them, if there is one, instead of
    its planes, which are unpacked for every product."""
    if not isinstance(weight, Dense):
        return weight
    tiles: Tiles | None = None
    if onednn.available() and onednn.has_tiles():
        tiles = onednn.tiles(weight.codes())
    elif not onednn.available() and fbgemm.available():
        tiles = fbgemm.pack(weight.codes(), weight.bits)
    return weight if tiles is None else weight.with_tiles(tiles, in_tiles_nbytes(weight))


def folded(weight: Matrix, rooms: dict[tuple[int, ...], onednn.Room | None], number: int) -> Matrix:
    """`weight` with its codes in the order of tiles at their bits, if this CPU multiplies in tiles and it has less than
    8, to be unpacked into one of `rooms`, which is made if it is not there: the one of its shape for weights of a
    `number`, since those that are multiplied in turn can be there at the same time."""
    if not isinstance(weight, Dense) or weight.tiles is not None or weight.bits == 8:
        return weight
    if not (onednn.available() and onednn.has_tiles()):
        return weight
    key = (*weight.shape, number)
    if key not in rooms:
        rooms[key] = onednn.room(*weight.shape)
    place = rooms[key]
    if place is None:
        return weight
    return weight.with_tiles(onednn.fold(weight.codes(), weight.bits, weight.sums, place), weight.codes_nbytes)


def room(weight: Matrix) -> onednn.Room | None:
    """What `weight` is unpacked into, if it shares that with others."""
    return weight.tiles.room if isinstance(weight, Dense) and isinstance(weight.tiles, onednn.Folded) else None


def load(linear: Linear, precision: str, many: bool = True) -> Loaded:
    """Make `linear` ready. For products of codes its own are unpacked, a byte each, until the result is forgotten, or
    the next weight is unpacked into the same room; for FBGEMM only if it is for `many` rows, since that takes longer
    than to multiply few ones by them in float32.
    """
    weight, codes = linear.weight, None
    if precision in IN_CODES and isinstance(weight, Dense):
        if weight.tiles is not None:
            codes = weight.tiles.unfold() if isinstance(weight.tiles, onednn.Folded) else weight.tiles
        elif onednn.available():
            codes = weight.codes()
        elif many:
            codes = fbgemm.pack(weight.codes(), weight.bits)
    return Loaded(linear, codes)


def scratch_nbytes(weights: Sequence[Matrix], precision: str) -> int:
    """Bytes that `weights` take beside those they have and their rooms, loaded together and multiplied in turn."""
    in_codes = precision in IN_CODES
    in_blocks = [w for w in weights if not in_codes or not isinstance(w, Dense)]
    waiting = [w for w in weights if in_codes and isinstance(w, Dense) and w.tiles is None]
    if onednn.available():
        return sum(map(_unpacked_nbytes, waiting)) + _blocks_nbytes(in_blocks, precision)
    packed = sum(map(in_tiles_nbytes, waiting))
    packing = max((_unpacked_nbytes(w) + fbgemm.pack_nbytes(*w.shape) for w in waiting), default=0)
    return max(packed + packing, _blocks_nbytes([*in_blocks, *waiting], precision))  # for many rows, and for few ones


def _blocks_nbytes(weights: Sequence[Matrix], precision: str) -> int:
    """Bytes of a few rows in floating point, of that of `weights` which needs the most."""
    needs = [0]
    for weight in weights:
        rows, columns = weight.shape
        each = _dtype(precision).itemsize
        if not is_of_codes(weight):
            each += 5 if each < 4 else 1
        needs.append(_unpacked_nbytes(weight) + next(row_slices(rows, columns)).stop * columns * each)
    return max(needs)


def _unpacked_nbytes(weight: Matrix) -> int:
    rows, columns = weight.shape
    at_hand = isinstance(weight, Dense) and weight.tiles is None and weight.bits == 8
    return 0 if at_hand else rows * columns


def _dtype(precision: str) -> torch.dtype:
    """In which what is not in codes is multiplied."""
    return torch.bfloat16 if precision in (INT8, BFLOAT16) and supported(BFLOAT16) else torch.float32


def is_of_codes(weight: Matrix) -> bool:
    """Whether all of `weight` is where its codes say: those of a few pruned weights are only near to zero."""
    return isinstance(weight, Dense) and not len(weight.zeros)


def project(x: Tensor, maps: Sequence[Loaded], precision: str, lowest: float | None = None) -> list[Tensor]:
    """The images of x, float32 (M, K), under several maps: float32 (M, N) each.

    lowest: what no element of x lies below, where that is much nearer to zero than the highest ones are; int8 then has
    twice as many steps, and uses x up. Weights that have no codes are multiplied in bfloat16 beside int8, if the
    CPU has it, else in float32.
    """
    sums = x.sum(1, keepdim=True)
    by_codes = {i: m for i, m in enumerate(maps) if precision in IN_CODES and isinstance(m.linear.weight, Dense)}
    results = {
        i: _in_floating_point(x, sums, m.linear, _dtype(precision)) for i, m in enumerate(maps) if i not in by_codes
    }
    if by_codes:
        if onednn.available():
            rounded = _round(x, lowest, IN_CODES[precision])
        else:
            rounded = _round_from_zero(x, min(map(_highest_code, by_codes.values())))
        results |= {i: _by_codes(rounded, sums, m) for i, m in by_codes.items()}
    return [results[i] for i in range(len(maps))]


def _in_floating_point(x: Tensor, sums: Tensor, linear: Linear, dtype: torch.dtype) -> Tensor:
    """sums: float32 (M, 1), of x."""
    weight, x = linear.weight, x.to(dtype)
    if isinstance(weight, Dense) and is_of_codes(weight):
        y = _times_codes(x, weight)
        return _add_outer(torch.addcmul(linear.bias, y, weight.code_step, out=y), sums, weight.centre)
    y = torch.empty(len(x), weight.shape[0])
    for block, rows in weight.blocks():
        _multiply(x, rows.to(dtype).t(), y[:, block])
    return y.add_(linear.bias)


def _times_codes(x: Tensor, weight: Dense) -> Tensor:
    """x times the codes of `weight`, some of its rows at a time: float32. They are exact in bfloat16 too."""
    y, codes = torch.empty(len(x), weight.shape[0]), weight.codes()
    for block in row_slices(*weight.shape):
        _multiply(x, codes[:, block].to(x.dtype), y[:, block])
    return y


def _multiply(x: Tensor, w: Tensor, y: Tensor) -> None:
    """y, float32, becomes x times w, which are both of any one type."""
    if x.dtype == y.dtype and not is_quick_by_onednn():
        torch.mm(x, w, out=y)
    else:
        y.copy_(product(x, w))


@dataclass(frozen=True)
class _Rounded:
    """x, (M, K), as offset + scale * codes. scale and offset are float32 (M, 1), None for an offset of zeros.

    codes: int8 for oneDNN, (M, K), or `parts` of those one below the other, each in 254ths of the one before. For
    FBGEMM float32 (M, K), whole numbers from 0 to `highest`.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    parts: int = 1
    highest: int = 127

    @functools.cached_property
    def unsigned(self) -> Tensor:
        """codes + 128, uint8."""
        return self.codes.view(torch.uint8) ^ _SIGN


def _round(x: Tensor, lowest: float | None, parts: int) -> _Rounded:
    # For one sentence, calling an operation takes about as long as doing it: so there are few.
    if lowest is None or parts > 1:  # twice as many steps are not worth what adding the offset rounds
        scale = torch.add(_SMALLEST, x.abs().amax(1, keepdim=True), alpha=1 / 127)
        return _Rounded(_nearest_codes(x * scale.reciprocal(), parts), scale, None, parts)
    below = torch.tensor(lowest)
    scale = torch.add(_SMALLEST, x.amax(1, keepdim=True).sub_(below), alpha=1 / 255)
    each = scale.reciprocal()
    steps = x.mul_(each).sub_(torch.add(_HALF_OF_CODES, each, alpha=lowest))
    return _Rounded(_nearest_codes(steps, 1), scale, torch.add(below, scale, alpha=128))


def _nearest_codes(steps: Tensor, parts: int) -> Tensor:
    """int8 (parts * M, K) of float32 (M, K), which is used up."""
    codes = []
    for _ in range(parts - 1):
        whole = steps.round()
        codes.append(whole.to(torch.int8))
        steps.sub_(whole).mul_(_FINER)
    codes.append(steps.round_().to(torch.int8))
    return torch.cat(codes) if len(codes) > 1 else codes[0]


def _round_from_zero(x: Tensor, highest: int) -> _Rounded:
    """With the codes 0 and `highest` in every row that is not constant."""
    offset = x.amin(1, keepdim=True)
    scale = torch.add(_SMALLEST, x.amax(1, keepdim=True).sub_(offset), alpha=1 / highest)
    return _Rounded((x - offset).mul_(scale.reciprocal()).round_(), scale, offset, highest=highest)


def _highest_code(loaded: Loaded) -> int:
    assert isinstance(loaded.linear.weight, Dense)
    return fbgemm.highest_code(loaded.linear.weight.bits)


def _by_codes(x: _Rounded, sums: Tensor, loaded: Loaded) -> Tensor:
    """sums: float32 (M, 1), of what x was before rounding."""
    weight, scale = loaded.linear.weight, x.scale
    assert isinstance(weight, Dense)
    products, times_step = _products(x, loaded.codes, weight)
    products = _added(products, x.parts)
    if not times_step:
        if len(weight.code_step) == 1:  # all rows of the weight are on one grid
            scale = scale * weight.code_step
        else:
            products.mul_(weight.code_step)
    # Bias and scale in one pass, and in place: for one sentence these take as long as a tenth of the product.
    y = torch.addcmul(loaded.linear.bias, products, scale, out=products)
    _add_outer(y, sums, weight.centre)
    return y if x.offset is None else y.addcmul_(x.offset, weight.sums * weight.code_step)


def _added(products: Tensor, parts: int) -> Tensor:
    """Those (M, N) of all `parts` (parts * M, N) of the input."""
    if parts == 1:
        return products
    *coarser, total = products.chunk(parts)
    for part in reversed(coarser):  # the smallest first
        total = part.add_(total, alpha=1 / _FINER)
    return total


def _products(x: _Rounded, codes: Tensor | Tiles | None, weight: Dense) -> tuple[Tensor, bool]:
    """The codes of x times those of `weight`, float32 (parts * M, N), and whether they are times its steps already."""
    if isinstance(codes, fbgemm.Packed):
        return fbgemm.times(x.codes, codes, x.highest), False
    if codes is None:
        return _times_codes(x.codes, weight), False
    assert isinstance(codes, Tensor)
    if codes.is_mkldnn:
        return onednn.times_tiles(x.unsigned, codes, weight.code_step), True
    return torch._int_mm(x.codes, codes).float(), False


def _add_outer(y: Tensor, column: Tensor, row: Tensor) -> Tensor:
    """y (M, N) += column (M, 1) times row (N,) or (1,)."""
    # Passes with one number for a row are quick, those with one for a row and one for all are not.
    return y.add_(column * row) if len(row) == 1 else y.addcmul_(column, row)
