from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from train_large.compression.kernels import BFLOAT16, FLOAT32, INT8, Linear, in_tiles, load, project, supported
from train_large.compression.quantization import dequantize, quantize_tensor
from train_large.compression.resident import Dense, linear_weight

vnni = pytest.mark.skipif(not supported(INT8), reason="the CPU has no int8 products")
LOWEST = -0.17
BITS = 4


def linear(bits: int, granularity: str, sparsity: float = 0.0) -> tuple[Linear, Tensor]:
    """A linear map of 64 to 96, and its weight in float32."""
    generator = torch.Generator().manual_seed(bits)
    w = torch.randn(96, 64, generator=generator) + 0.4
    w[torch.rand(96, 64, generator=generator) < sparsity] = 0
    q = quantize_tensor(w, bits, granularity)
    return Linear(linear_weight(q), torch.randn(96, generator=generator)), dequantize(q)


def rows(count: int, lowest: float | None) -> Tensor:
    x = 3 * torch.randn(count, 64, generator=torch.Generator().manual_seed(count))
    x[1:2] = 0
    return x if lowest is None else F.gelu(x)


def by_formula(x: np.ndarray, w: np.ndarray, bias: np.ndarray, lowest: float | None) -> np.ndarray:
    """Each row of x rounded to 8 bits times w, all else in double precision; `w` is the float32 weight."""
    if lowest is None:
        scale = np.maximum(np.abs(x).max(1, keepdims=True) / 127, 1e-30)
        rounded = scale * np.rint(x / scale)
    else:
        scale = (x.max(1, keepdims=True) - lowest) / 255
        rounded = lowest + scale * np.rint((x - lowest) / scale)
    centre = (w.max() + w.min() + (w.max() - w.min()) / (2**BITS - 1)) / 2
    return rounded @ (w - centre).T + centre * x.sum(1, keepdims=True) + bias


@vnni
@pytest.mark.parametrize("lowest", [None, LOWEST])
@pytest.mark.parametrize("count", [1, 16, 37])
def test_int8_is_exact_in_the_weights(lowest: float | None, count: int) -> None:
    one, w = linear(BITS, "tensor")
    x = rows(count, lowest)
    [y] = project(x.clone(), [load(one, INT8)], INT8, lowest)
    expected = by_formula(x.double().numpy(), w.double().numpy(), one.bias.double().numpy(), lowest)
    # A value on the edge between two steps may be rounded to either.
    close = np.abs(y.numpy() - expected) < 1e-4
    assert close.mean() > 0.97
    assert np.abs(y.numpy() - expected).max() < np.abs(x.numpy()).max() / 127 * np.abs(w.numpy()).max() * 2


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(("granularity", "sparsity"), [("tensor", 0), ("row", 0), ("group:16", 0), ("tensor", 0.5)])
@pytest.mark.parametrize("precision", [INT8, BFLOAT16, FLOAT32])
@pytest.mark.parametrize("lowest", [None, LOWEST])
def test_products(bits: int, granularity: str, sparsity: float, precision: str, lowest: float | None) -> None:
    if not supported(precision):
        pytest.skip("not on this CPU")
    one, w = linear(bits, granularity, sparsity)
    x = rows(37, lowest)
    [y, again] = project(x.clone(), [load(one, precision)] * 2, precision, lowest)
    expected = F.linear(x, w, one.bias)
    tolerance = {INT8: 0.02, BFLOAT16: 0.02, FLOAT32: 1e-6}[precision]
    assert (y - expected).norm() <= tolerance * expected.norm()
    assert torch.equal(y, again)


@vnni
def test_int8_rows_do_not_see_each_other() -> None:
    one, _ = linear(6, "row")
    x = rows(50, None)
    [together] = project(x, [load(one, INT8)], INT8)
    for part in (x[:1], x[3:20]):
        [alone] = project(part, [load(one, INT8)], INT8)
        start = 0 if len(part) == 1 else 3
        assert torch.equal(alone, together[start : start + len(part)])


@vnni
@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("lowest", [None, LOWEST])
@pytest.mark.parametrize("bits", [3, 6, 8])
def test_codes_in_tiles(bits: int, granularity: str, lowest: float | None) -> None:
    plain, w = linear(bits, granularity)
    tiled = replace(plain, weight=in_tiles(plain.weight))
    assert isinstance(plain.weight, Dense)
    assert isinstance(tiled.weight, Dense)
    assert load(tiled, INT8).codes is tiled.weight.tiles  # this CPU has them, and they are used
    assert torch.equal(tiled.weight.codes(), plain.weight.codes())
    assert tiled.weight.nbytes == plain.weight.in_tiles_nbytes == plain.weight.nbytes + 96 * (64 * (8 - bits) // 8 + 4)
    x = rows(37, lowest)
    [y] = project(x.clone(), [load(tiled, INT8)], INT8, lowest)
    [expected] = project(x.clone(), [load(plain, INT8)], INT8, lowest)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=4e-5)  # sums of parts of some hundreds
    for part in (slice(0, 1), slice(3, 20)):
        assert torch.equal(project(x[part].clone(), [load(tiled, INT8)], INT8, lowest)[0], y[part])
    assert torch.equal(*(project(x, [load(one, FLOAT32)], FLOAT32)[0] for one in (plain, tiled)))


def test_tiles_are_of_dense_weights() -> None:
    for one in (linear(8, "group:16")[0], linear(8, "tensor", 0.5)[0]):
        assert in_tiles(one.weight) is one.weight


@vnni
def test_int8_of_a_constant_weight() -> None:
    one = Linear(linear_weight(quantize_tensor(torch.full((96, 64), 0.7), 4)), torch.zeros(96))
    x = rows(5, None)
    [y] = project(x, [load(one, INT8)], INT8)
    torch.testing.assert_close(y, 0.7 * x.sum(1, keepdim=True).expand(5, 96), rtol=1e-5, atol=1e-5)
