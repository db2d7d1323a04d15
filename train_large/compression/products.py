"""Matrix products in floating point on a CPU, by the library that is quicker there.

PyTorch leaves products in float32 to MKL, which has no AVX512 for processors of other makers than Intel: on AMD's Zen 5
it runs at 0.21 TFLOP/s on two cores, and oneDNN, which is in PyTorch too, at 0.49 (docs/benchmarks.md). Products in
bfloat16 are oneDNN's anyway.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from train_large.machine import maker

OPT_OUT = "TRAIN_LARGE_PRODUCTS"  # in the environment: `torch` leaves all to torch, as stock fairseq does
OTHER_MAKERS = ("AuthenticAMD", "HygonGenuine")  # of processors with AVX512, in the words of the processor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (M, K) @ weight (N, K).t() + bias (N,)."""
    # In bfloat16 torch's own writes the bias to the result first and adds the product to it: two passes more.
    if _are_onednns(x, weight) or (bias is not None and _can_be_onednns(torch.bfloat16, x, weight) and has_onednn()):
        return _onednn(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


def product(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """a (M, K) @ b (K, N) times `scale`. For b that is much smaller than the result."""
    if _are_onednns(a, b):
        return _onednn(a, (b if scale == 1 else b * scale).t())
    return torch.addmm(a.new_empty(1, 1), a, b, beta=0, alpha=scale)


def product_of_columns(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """a (M, N).t() @ b (M, K) times `scale`, as the gradient of a weight (N, K) is."""
    if not _are_onednns(a, b):
        return torch.addmm(a.new_empty(1, 1), a.t(), b, beta=0, alpha=scale)
    # oneDNN is up to twice as quick where the result is wide, so a high one is made on its side.
    high = a.size(1) > b.size(1)
    result = _onednn(b.t(), a.t()).t().contiguous() if high else _onednn(a.t(), b.t())
    return result if scale == 1 else result.mul_(scale)


def is_quick_by_onednn() -> bool:
    """Whether products in float32 are oneDNN's here, since they are quicker so."""
    return left_to_torch() is None


@functools.cache
def left_to_torch() -> str | None:
    """Why products in float32 are left to torch on this machine; None where oneDNN makes them."""
    if os.environ.get(OPT_OUT) == "torch":
        return f"{OPT_OUT}=torch says so"
    if not getattr(torch.cpu, "_is_avx512_supported", bool)():
        return "this CPU has no AVX512, without which oneDNN is no quicker"
    if not torch.backends.mkl.is_available():
        return "this torch has no MKL, and oneDNN was not compared with anything else"
    if maker() not in OTHER_MAKERS:
        return "MKL uses AVX512 on this CPU"
    return None if has_onednn() else "this torch lacks the operation mkldnn::_linear_pointwise"


def _are_onednns(one: Tensor, other: Tensor) -> bool:
    return _can_be_onednns(torch.float32, one, other) and is_quick_by_onednn()


def _can_be_onednns(dtype: torch.dtype, one: Tensor, other: Tensor) -> bool:
    """Of a product of nothing it makes an error."""
    return one.dtype == dtype and one.device.type == "cpu" and one.numel() > 0 and other.numel() > 0


@functools.cache
def has_onednn() -> bool:
    """Whether this torch has the operation that its compiler makes of linear maps (`_linear_pointwise`,
    aten/src/ATen/native/mkldnn/Linear.cpp, torch 2.13.0), and it comes out right."""
    try:
        for dtype in (torch.float32, torch.bfloat16):
            one = torch.arange(6, dtype=dtype).view(3, 2)
            if not torch.equal(_onednn(one, one[:2], one[2]), one @ one[:2].t() + one[2]):
                return False
            if not torch.equal(_onednn(one.t(), one.t()), one.t() @ one):
                return False
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return True


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
