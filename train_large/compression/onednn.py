"""int8 products by oneDNN, for CPUs that have VNNI. Without it they saturate in int16, or are done one by one."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


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


def nbytes(rows: int, columns: int) -> int:
    """Bytes of a weight (N, K) in tiles, with the sum of each row in int32."""
    return rows * columns + 4 * rows


def tiles(codes: Tensor) -> Tensor:
    """int8 (K, N) in the order in which oneDNN multiplies them; `to_dense` gives them back."""
    return torch.ops.onednn.qlinear_prepack(codes.t().contiguous(), None)


def times_tiles(codes: Tensor, weight: Tensor, step: Tensor) -> Tensor:
    """codes - 128, for uint8 codes (M, K), times those in tiles (K, N), times `step` (N,) or (1,): float32.

    The operation takes signed codes too, but with VNNI and no AMX there is no kernel for those: 10,000 times slower.
    """
    none = torch.zeros(len(step), dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, 128, weight, step, none, None, 1.0, 0, torch.float32, "none", [], ""
    )
