"""Linear maps whose weights are resident at k bits, by the integer and floating-point kernels that PyTorch has.

In int8 a weight is centre + step * code, with int8 codes, and each row of the input is rounded to int8 by itself, on a
scale of its own. So with x = scale * i the product needs no weights in floating point, and is exact in the weights:

    W x + b  =  scale * step * (codes . i)  +  centre * sum(x)  +  b
                               int32           sum before rounding

Rows do not see each other, so it does not matter which sentences are computed together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from train_large.compression.resident import Dense, Matrix

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
    """A linear map made ready for several products. codes: those of its weight, int8 (K, N), where it is for int8."""

    linear: Linear
    codes: Tensor | None


def supported(precision: str) -> bool:
    """Whether this CPU has instructions for it."""
    if precision == FLOAT32:
        return True
    # Without VNNI, int8 products saturate in int16; without its instructions, bfloat16 is slower than float32.
    test = {INT8: "_is_vnni_supported", BFLOAT16: "_is_avx512_bf16_supported"}[precision]
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.cpu, test, bool)())


def load(linear: Linear, precision: str) -> Loaded:
    """Make `linear` ready. In int8 its codes are unpacked, a byte each, until the result is forgotten."""
    if precision != INT8 or not isinstance(linear.weight, Dense):
        return Loaded(linear, None)
    return Loaded(linear, linear.weight.codes())


def project(x: Tensor, maps: Sequence[Loaded], precision: str, lowest: float | None = None) -> list[Tensor]:
    """The images of x, float32 (M, K), under several maps: float32 (M, N) each.

    lowest: what no element of x lies below, where that is much nearer to zero than the highest ones are; int8 then has
    twice as many steps. What is not ready for int8 is computed in bfloat16, or in float32 if the CPU has no bfloat16.
    """
    results: list[Tensor] = []
    rounded = _round(x, lowest) if any(loaded.codes is not None for loaded in maps) else None
    for loaded in maps:
        if loaded.codes is None or rounded is None:
            results.append(_by_blocks(x, loaded.linear, precision))
        else:
            results.append(_by_codes(rounded, loaded, lowest))
    return results


def _by_blocks(x: Tensor, linear: Linear, precision: str) -> Tensor:
    """In floating point, a few rows of the weight at a time."""
    y = x.new_empty(len(x), linear.weight.shape[0])
    half = precision != FLOAT32 and supported(BFLOAT16)
    x = x.bfloat16() if half else x
    for block, weight in linear.weight.blocks():
        if half:
            y[:, block] = F.linear(x, weight.bfloat16())
            y[:, block] += linear.bias[block]
        else:
            y[:, block] = F.linear(x, weight, linear.bias[block])
    return y


@dataclass(frozen=True)
class _Rounded:
    """codes int8 (M, K); scale and sums float32 (M, 1). x is scale * codes, or
    lowest + scale * (codes + 128). sums are those of x itself, before rounding.
    """

    codes: Tensor
    scale: Tensor
    sums: Tensor


def _round(x: Tensor, lowest: float | None) -> _Rounded:
    # For one sentence, calling an operation takes about as long as doing it: so there are few.
    if lowest is None:
        scale = x.abs().amax(1, keepdim=True).mul_(1 / 127).clamp_min_(_SMALLEST)
        steps = x / scale
    else:
        scale = x.amax(1, keepdim=True).sub_(lowest).mul_(1 / 255).clamp_min_(_SMALLEST)
        steps = (x - lowest).div_(scale).sub_(128)
    return _Rounded(steps.round_().to(torch.int8), scale, x.sum(1, keepdim=True))


def _by_codes(x: _Rounded, loaded: Loaded, lowest: float | None) -> Tensor:
    weight, bias = loaded.linear.weight, loaded.linear.bias
    assert isinstance(weight, Dense)
    assert loaded.codes is not None
    y = torch._int_mm(x.codes, loaded.codes).float()
    step = weight.code_step
    if lowest is not None:
        y.add_(weight.sums, alpha=128)
        bias = torch.addcmul(bias, step, weight.sums, value=lowest)
    # Scale and bias in one operation, in place: for one sentence these passes take as long as a tenth of the product.
    if len(step) == 1:  # all rows of the weight are on one grid: (M, 1)
        return torch.addcmul(bias, y, x.scale * step, out=y).add_(x.sums * weight.centre)
    return torch.addcmul(bias, y.mul_(x.scale), step, out=y).addcmul_(x.sums, weight.centre)
