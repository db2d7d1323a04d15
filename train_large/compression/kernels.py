"""Linear maps whose weights are resident at k bits, by the integer and floating-point kernels that PyTorch has.

In int8 a weight is centre + step * code, with int8 codes, and each row of the input is rounded to int8 by itself, on a
scale of its own. So with x = scale * i the product needs no weights in floating point, and is exact in the weights:

    W x + b  =  scale * step * (codes . i)  +  centre * sum(x)  +  b
                               int32           sum before rounding

Rows do not see each other, so it does not matter which sentences are computed together.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from train_large.compression.resident import FEW, MANY, Dense, Matrix

INT8, BFLOAT16, FLOAT32 = PRECISIONS = ("int8", "bfloat16", "float32")

_SMALLEST = 1e-30  # a scale for rows of zeros


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
    """A linear map made ready for several products. codes: those of its weight, int8 (K, N), where it is for int8; in
    the order of memory, or in tiles."""

    linear: Linear
    codes: Tensor | None


def supported(precision: str) -> bool:
    """Whether this CPU has instructions for it."""
    if precision == FLOAT32:
        return True
    # Without VNNI, int8 products saturate in int16; without its instructions, bfloat16 is slower than float32.
    test = {INT8: "_is_vnni_supported", BFLOAT16: "_is_avx512_bf16_supported"}[precision]
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.cpu, test, bool)())


def at_once() -> int:
    """Weights to make in floating point at once. Where int8 is to be had that is the exception, and memory is of better
    use for tiles."""
    return FEW if supported(INT8) else MANY


def in_tiles(weight: Matrix) -> Matrix:
    """`weight` with codes of a byte each in the order in which oneDNN multiplies them, if it has one here, instead of
    its planes, which are unpacked and put in order anew for every product."""
    if not isinstance(weight, Dense) or not _has_tiles():
        return weight
    return replace(weight, planes=(), tiles=_tiles(weight.codes()))


def _tiles(codes: Tensor) -> Tensor:
    return torch.ops.onednn.qlinear_prepack(codes.t().contiguous(), None)


def _times_tiles(codes: Tensor, tiles: Tensor, step: Tensor) -> Tensor:
    """codes - 128, for uint8 codes (M, K), times those in tiles (K, N), times `step` (N,) or (1,): float32.

    The operation takes signed codes too, but with VNNI and no AMX there is no kernel for those: 10,000 times slower.
    """
    none = torch.zeros(len(step), dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, 128, tiles, step, none, None, 1.0, 0, torch.float32, "none", [], ""
    )


@functools.cache
def _has_tiles() -> bool:
    """Whether this torch has the operations that its compiler makes of int8 linear maps (onednn::qlinear_pointwise,
    aten/src/ATen/native/quantized/cpu/qlinear.cpp, torch 2.13.0), and they come out right."""
    x = torch.arange(-128, 128, dtype=torch.int32).view(8, 32)
    w = torch.arange(128, -128, -1, dtype=torch.int32).sub(1).view(32, 8)
    codes = w.to(torch.int8)
    try:
        found = _times_tiles((x + 128).to(torch.uint8), _tiles(codes), torch.full((1,), 0.5))
        same = _tiles(codes).to_dense()
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return torch.equal(found, (x @ w).float() * 0.5) and torch.equal(same, codes)


def load(linear: Linear, precision: str) -> Loaded:
    """Make `linear` ready. In int8 its codes are unpacked, a byte each, until the result is forgotten."""
    if precision != INT8 or not isinstance(linear.weight, Dense):
        return Loaded(linear, None)
    tiles = linear.weight.tiles
    return Loaded(linear, linear.weight.codes() if tiles is None else tiles)


def project(x: Tensor, maps: Sequence[Loaded], precision: str, lowest: float | None = None) -> list[Tensor]:
    """The images of x, float32 (M, K), under several maps: float32 (M, N) each.

    lowest: what no element of x lies below, where that is much nearer to zero than the highest ones are; int8 then has
    twice as many steps, and uses x up. What is not ready for int8 is computed in bfloat16, or in float32 if the CPU has
    no bfloat16.
    """
    results = {i: _by_blocks(x, m.linear, precision) for i, m in enumerate(maps) if m.codes is None}
    if len(results) < len(maps):
        rounded = _round(x, lowest)
        results |= {i: _by_codes(rounded, m, lowest) for i, m in enumerate(maps) if m.codes is not None}
    return [results[i] for i in range(len(maps))]


def _by_blocks(x: Tensor, linear: Linear, precision: str) -> Tensor:
    """In floating point, a few rows of the weight at a time."""
    y = x.new_empty(len(x), linear.weight.shape[0])
    half = precision != FLOAT32 and supported(BFLOAT16)
    x = x.bfloat16() if half else x
    for block, weight in linear.weight.blocks(at_once()):
        if half:
            y[:, block] = F.linear(x, weight.bfloat16())
            y[:, block] += linear.bias[block]
        else:
            torch.addmm(linear.bias[block], x, weight.t(), out=y[:, block])
    return y


@dataclass(frozen=True)
class _Rounded:
    """codes int8 (M, K); scale and sums float32 (M, 1). x is scale * codes, or
    lowest + scale * (codes + 128). sums are those of x itself, before rounding.
    """

    codes: Tensor
    scale: Tensor
    sums: Tensor

    @functools.cached_property
    def unsigned(self) -> Tensor:
        """codes + 128, uint8."""
        return self.codes.view(torch.uint8) ^ 128


def _round(x: Tensor, lowest: float | None) -> _Rounded:
    # For one sentence, calling an operation takes about as long as doing it: so there are few.
    sums = x.sum(1, keepdim=True)
    if lowest is None:
        scale = x.abs().amax(1, keepdim=True).mul_(1 / 127).clamp_min_(_SMALLEST)
        steps = x * scale.reciprocal()
    else:
        scale = x.amax(1, keepdim=True).sub_(lowest).mul_(1 / 255).clamp_min_(_SMALLEST)
        each = scale.reciprocal()
        steps = x.mul_(each).sub_(each.mul_(lowest).add_(128))
    return _Rounded(steps.round_().to(torch.int8), scale, sums)


def _by_codes(x: _Rounded, loaded: Loaded, lowest: float | None) -> Tensor:
    weight, codes = loaded.linear.weight, loaded.codes
    assert isinstance(weight, Dense)
    assert codes is not None
    step, scale = weight.code_step, x.scale
    if codes.is_mkldnn:
        products = _times_tiles(x.unsigned, codes, step)
    else:
        products = torch._int_mm(x.codes, codes).float()
        if len(step) == 1:  # all rows of the weight are on one grid
            scale = scale * step
        else:
            products.mul_(step)
    # Bias and scale in one pass, and in place: for one sentence these take as long as a tenth of the product.
    y = torch.addcmul(loaded.linear.bias, products, scale, out=products)
    # Passes with one number for a row are quick, those with one for a row and one for all are not.
    _add_outer(y, x.sums, weight.centre)
    if lowest is not None:
        y.addcmul_((128 * x.scale).add_(lowest), weight.sums)
    return y


def _add_outer(y: Tensor, column: Tensor, row: Tensor) -> None:
    """y (M, N) += column (M, 1) times row (N,) or (1,)."""
    if len(row) == 1:
        y.add_(column * row)
    else:
        y.addcmul_(column, row)
