"""int8 products by FBGEMM, for CPUs that have AVX2 and no VNNI.

AVX2 adds two products of a byte each in int16, where they saturate (vpmaddubsw). With 7 bits for the activations that
cannot happen (127 * 128 * 2 < 2^15), nor with 8 bits where the weights have at most 7 (255 * 64 * 2 < 2^15).

PyTorch calls it by `quantized::linear_dynamic` (aten/src/ATen/native/quantized/cpu/qlinear_dynamic.cpp, torch 2.13.0),
which rounds what it is given to the range from the lowest to the highest of all numbers. Codes that reach from 0 to the
highest one come through unchanged, and so each row can have a scale of its own.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_COLUMNS = 512  # of FBGEMM's blocks (KCB of its kernels for AVX2); the last block takes as much memory as the others


@dataclass(frozen=True)
class Packed:
    """Codes of weights, int8 (K, N), in the order in which FBGEMM multiplies them.

    bits: of a weight; its code has 8, and the lowest of them are zeros. products: of the upper bits alone, of whole
    blocks of columns. Where half a block is left, a second product has those of the upper half of the rows beside those
    of the lower half, and is for [x, 0] and [0, x]: work for a block, in memory half a one.
    """

    products: tuple[Any, ...]
    bits: int

    def to_dense(self) -> Tensor:
        """The codes, int8 (K, N)."""
        parts = [_weight(product) for product in self.products]
        if len(parts) == 2:
            parts[1] = torch.cat(parts[1].split(_COLUMNS // 2, 1))
        return torch.cat(parts, 1).bitwise_left_shift_(8 - self.bits).t()


def highest_code(bits: int) -> int:
    """Of the activations, for weights of so many bits."""
    return 127 if bits == 8 else 255


def nbytes(rows: int, columns: int) -> int:
    """Bytes of a packed weight (N, K), with the sums of its rows."""
    if _is_halved(rows, columns):
        return rows * columns + 6 * rows
    return rows * -(-columns // _COLUMNS) * _COLUMNS + 4 * rows


def pack(codes: Tensor, bits: int) -> Packed:
    """codes: int8 (K, N), multiples of 2^(8 - bits); of less than 8 bits they are used up."""
    upper = (codes if bits == 8 else codes.bitwise_right_shift_(8 - bits)).t()
    rows, columns = upper.shape
    if not _is_halved(rows, columns):
        return Packed((_product(upper),), bits)
    half = _product(torch.cat(upper[:, -_COLUMNS // 2 :].chunk(2), 1))
    return Packed((_product(upper[:, : -_COLUMNS // 2]), half), bits)


def pack_nbytes(rows: int, columns: int) -> int:
    """Bytes that `pack` takes beside the codes and what it makes, at most: a copy of the whole blocks."""
    return rows * (columns - _COLUMNS // 2) if _is_halved(rows, columns) else 0


def times(codes: Tensor, weight: Packed, highest: int) -> Tensor:
    """codes, whole numbers in float32 (M, K) from 0 to `highest`, both of which are among them unless all are 0; times
    those of the weight, (K, N): float32 (M, N). highest: 127 or 255."""
    whole, *halved = weight.products
    result = _times_halved(codes, whole, halved[0], highest) if halved else _times(codes, whole, highest)
    return result if weight.bits == 8 else result.mul_(2 ** (8 - weight.bits))


def _times_halved(codes: Tensor, whole: Any, halved: Any, highest: int) -> Tensor:
    count, half = len(codes), _COLUMNS // 2
    blocks = codes.shape[1] - half
    # Parts of a row need not have the highest code: another row has, last, and is left out of the result.
    left = codes.new_zeros(count + 1, blocks)
    left[:-1], left[-1, 0] = codes[:, :blocks], highest
    right = codes.new_zeros(2 * count + 1, _COLUMNS)
    right[:count, :half] = right[count:-1, half:] = codes[:, blocks:]
    right[-1, 0] = highest
    result = _times(left, whole, highest)[:-1]
    rest = _times(right, halved, highest)
    rows = rest.shape[1]
    result[:, :rows] += rest[:count]
    result[:, rows:] += rest[count:-1]
    return result


def _times(codes: Tensor, product: Any, highest: int) -> Tensor:
    return torch.ops.quantized.linear_dynamic(codes, product, highest == 127)


def _is_halved(rows: int, columns: int) -> bool:
    return columns > _COLUMNS and columns % _COLUMNS == _COLUMNS // 2 and rows % 2 == 0


def _product(codes: Tensor) -> Any:
    """codes: int8 (N, K)."""
    weight = torch._make_per_tensor_quantized_tensor(codes, 1.0, 0)
    return torch.ops.quantized.linear_prepack(weight, None)


def _weight(product: Any) -> Tensor:
    weight, _ = torch.ops.quantized.linear_unpack(product)
    return torch.empty(0, dtype=torch.int8).set_(weight.untyped_storage(), 0, weight.shape, weight.stride())


@functools.cache
def available() -> bool:
    """Whether this torch and this CPU have it, and the largest products there are come out right."""
    if torch.backends.quantized.engine not in ("fbgemm", "x86"):
        return False
    draw = torch.Generator().manual_seed(1)
    for bits, columns in itertools.product((7, 8), (_COLUMNS, _COLUMNS * 3 // 2)):
        codes = torch.full((2, columns), highest_code(bits))
        codes[1].random_(highest_code(bits), generator=draw)[0] = 0
        weight = torch.full((columns, 8), 127)
        weight[:, 1], weight[:, 2] = -128, torch.randint(-128, 128, (columns,), generator=draw)
        weight = weight >> (8 - bits) << (8 - bits)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # quantized tensors will be gone from some later torch
                packed = pack(weight.to(torch.int8), bits)
                found, same = times(codes.float(), packed, highest_code(bits)), packed.to_dense()
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):
            return False
        if not torch.equal(found.long(), codes @ weight) or not torch.equal(same.long(), weight):
            return False
    return True
