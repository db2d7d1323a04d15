from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from train_large.compression import fbgemm, kernels, onednn, products
from train_large.compression.kernels import (
    BFLOAT16,
    FLOAT32,
    INT8,
    INT16,
    INT24,
    PRECISIONS,
    WIDE,
    Linear,
    finer,
    in_tiles,
    in_tiles_nbytes,
    is_of_codes,
    is_quick,
    load,
    project,
    scratch_nbytes,
    supported,
)
from train_large.compression.quantization import dequantize, quantize_tensor
from train_large.compression.resident import Dense, linear_weight

LOWEST = -0.17
BITS = 4


@pytest.fixture(params=[onednn, fbgemm], ids=["onednn", "fbgemm"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What multiplies in int8: where a CPU has both, FBGEMM is taken as where there is no VNNI."""
    # Not by `available`, which is False where the code is wrong.
    if not {onednn: torch.cpu._is_vnni_supported, fbgemm: torch.cpu._is_avx2_supported}[request.param]():
        pytest.skip("not on this CPU")
    assert request.param.available()
    if request.param is fbgemm:
        monkeypatch.setattr(onednn, "available", lambda: False)
    return request.param


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


def by_formula(x: np.ndarray, w: np.ndarray, bias: np.ndarray, lowest: float | None, bits: int | None) -> np.ndarray:
    """Each row of x rounded times w, all else in double precision; `w` is the float32 weight.

    bits: of the codes of x, from its lowest to its highest; None for 8 bits, from `lowest`, or as much below zero as
    above.
    """
    if bits is not None:
        low = x.min(1, keepdims=True)
        scale = np.maximum((x.max(1, keepdims=True) - low) / (2**bits - 1), 1e-30)
        rounded = low + scale * np.rint((x - low) / scale)
    elif lowest is None:
        scale = np.maximum(np.abs(x).max(1, keepdims=True) / 127, 1e-30)
        rounded = scale * np.rint(x / scale)
    else:
        scale = (x.max(1, keepdims=True) - lowest) / 255
        rounded = lowest + scale * np.rint((x - lowest) / scale)
    step = (w.max() - w.min()) / (2**BITS - 1)
    centre = (w.max() + w.min() + step) / 2
    return rounded @ (w - centre).T + centre * x.sum(1, keepdims=True) + bias


@pytest.mark.parametrize("lowest", [None, LOWEST])
@pytest.mark.parametrize("count", [1, 16, 37])
def test_int8_is_exact_in_the_weights(lowest: float | None, count: int, library: ModuleType) -> None:
    one, w = linear(BITS, "tensor")
    x = rows(count, lowest)
    [y] = project(x.clone(), [load(one, INT8)], INT8, lowest)
    bits = 8 if library is fbgemm else None
    expected = by_formula(x.double().numpy(), w.double().numpy(), one.bias.double().numpy(), lowest, bits)
    # A value on the edge between two steps may be rounded to either.
    close = np.abs(y.numpy() - expected) < 1e-4
    assert close.mean() > 0.97
    assert np.abs(y.numpy() - expected).max() < np.abs(x.numpy()).max() / 127 * np.abs(w.numpy()).max() * 2


def test_weights_of_8_bits_leave_fbgemm_7_for_the_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cpu._is_avx2_supported():
        pytest.skip("not on this CPU")
    monkeypatch.setattr(onednn, "available", lambda: False)
    x, errors = rows(37, None), {}
    for bits in (7, 8):
        one, w = linear(bits, "tensor")
        exact = F.linear(x, w, one.bias)
        errors[bits] = float((project(x, [load(one, INT8)], INT8)[0] - exact).norm() / exact.norm())
    assert 1.8 < errors[8] / errors[7] < 2.3  # the grid is twice as coarse
    together = [load(linear(bits, "tensor")[0], INT8) for bits in (7, 8)]  # and then for all of the same input
    alone = project(x, together[1:], INT8)[0]
    assert torch.equal(project(x, together, INT8)[1], alone)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(("granularity", "sparsity"), [("tensor", 0), ("row", 0), ("group:16", 0), ("tensor", 0.5)])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("lowest", [None, LOWEST])
def test_products(
    bits: int, granularity: str, sparsity: float, precision: str, lowest: float | None, library: ModuleType
) -> None:
    if not supported(precision):
        pytest.skip("not on this CPU")
    one, w = linear(bits, granularity, sparsity)
    x = rows(37, lowest)
    [y, again] = project(x.clone(), [load(one, precision)] * 2, precision, lowest)
    expected = F.linear(x, w, one.bias)
    # Half a step of a 127th of the largest number, of a 254th of that, and so on; then of float32.
    tolerance = {INT8: 0.02, INT16: 8e-5, INT24: 1e-6, BFLOAT16: 0.02, FLOAT32: 1e-6}[precision]
    assert (y - expected).norm() <= tolerance * expected.norm()
    assert torch.equal(y, again)


@pytest.mark.parametrize(("granularity", "sparsity"), [("tensor", 0), ("tensor", 0.5)])
@pytest.mark.parametrize("by_onednn", [True, False])
def test_float32_is_of_the_quicker_library(
    monkeypatch: pytest.MonkeyPatch, granularity: str, sparsity: float, by_onednn: bool
) -> None:
    made, product = [], products.product
    monkeypatch.setattr(kernels, "is_quick_by_onednn", lambda: by_onednn)
    monkeypatch.setattr(kernels, "product", lambda a, b: made.append(b) or product(a, b))
    one, w = linear(8, granularity, sparsity)
    x = rows(5, None)
    [y] = project(x, [load(one, FLOAT32)], FLOAT32)
    torch.testing.assert_close(y, F.linear(x, w, one.bias), rtol=1e-5, atol=1e-5)
    assert bool(made) is by_onednn


@pytest.mark.parametrize("lowest", [None, LOWEST])
def test_each_code_more_is_256_times_as_near(lowest: float | None) -> None:
    if not supported(INT16):
        pytest.skip("not on this CPU")
    one, w = linear(6, "row")
    x = rows(300, lowest)
    exact = F.linear(x.double(), w.double(), one.bias.double())
    errors = [
        float((project(x.clone(), [load(one, precision)], precision, lowest)[0] - exact).norm() / exact.norm())
        for precision in (INT8, INT16, INT24, FLOAT32)
    ]
    assert errors[0] / errors[1] == pytest.approx(254 if lowest is None else 127, rel=0.2)  # int8 has an offset there
    assert errors[2] < 1.5 * errors[3]


def test_what_decides_close_calls(library: ModuleType) -> None:
    assert finer(INT8) == ((INT16, INT24) if library is onednn else (FLOAT32,))
    if library is onednn:
        assert finer(INT16) == (INT24,)
        assert finer(INT24) == ()
    assert finer(BFLOAT16) == (FLOAT32,)
    assert finer(FLOAT32) == ()


def test_sums_of_codes_do_not_decide_where_codes_are_not_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few pruned weights are listed beside their codes, which are the nearest to zero."""
    one, w = linear(4, "tensor", sparsity=0.02)
    assert isinstance(one.weight, Dense)
    assert not is_of_codes(one.weight)
    assert is_of_codes(linear(4, "tensor")[0].weight)
    [y] = project(rows(5, None), [load(one, FLOAT32)], FLOAT32)
    torch.testing.assert_close(y, F.linear(rows(5, None), w, one.bias), rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(kernels, "supported", lambda precision: True)
    assert finer(INT8, exact=False) == finer(INT24, exact=False) == (FLOAT32,)
    assert finer(INT8) == (INT16, INT24)


def test_int8_rows_do_not_see_each_other(library: ModuleType) -> None:
    one, _ = linear(6, "row")
    x = rows(50, None)
    [together] = project(x, [load(one, INT8)], INT8)
    for part in (x[:1], x[3:20]):
        [alone] = project(part, [load(one, INT8)], INT8)
        start = 0 if len(part) == 1 else 3
        assert torch.equal(alone, together[start : start + len(part)])


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("lowest", [None, LOWEST])
@pytest.mark.parametrize("bits", [3, 6, 8])
def test_codes_in_tiles(bits: int, granularity: str, lowest: float | None, library: ModuleType) -> None:
    plain, w = linear(bits, granularity)
    tiled = replace(plain, weight=in_tiles(plain.weight))
    assert isinstance(plain.weight, Dense)
    assert isinstance(tiled.weight, Dense)
    assert load(tiled, INT8).codes is tiled.weight.tiles  # this CPU has them, and they are used
    assert torch.equal(tiled.weight.codes(), plain.weight.codes())
    more = tiled.weight.nbytes - plain.weight.nbytes
    assert more == in_tiles_nbytes(plain.weight) - 96 * 64 * bits // 8
    if library is onednn:
        assert more == torch.ops.mkldnn._nbytes(tiled.weight.tiles) - 96 * 64 * bits // 8
    x = rows(37, lowest)
    [y] = project(x.clone(), [load(tiled, INT8)], INT8, lowest)
    [expected] = project(x.clone(), [load(plain, INT8)], INT8, lowest)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=4e-5)  # sums of parts of some hundreds
    for precision in filter(supported, (INT16, INT24)):
        [y_finer], [expected] = (project(x.clone(), [load(m, precision)], precision, lowest) for m in (tiled, plain))
        torch.testing.assert_close(y_finer, expected, rtol=1e-5, atol=4e-5)
    for part in (slice(0, 1), slice(3, 20)):
        assert torch.equal(project(x[part].clone(), [load(tiled, INT8)], INT8, lowest)[0], y[part])
    assert torch.equal(*(project(x, [load(one, FLOAT32)], FLOAT32)[0] for one in (plain, tiled)))


def test_tiles_are_of_dense_weights(library: ModuleType) -> None:
    for one in (linear(8, "group:16")[0], linear(8, "tensor", 0.5)[0]):
        assert in_tiles(one.weight) is one.weight


def test_for_few_rows_fbgemm_packs_nothing(library: ModuleType) -> None:
    for bits in (6, 8):
        one = linear(bits, "row")[0]
        assert (load(one, INT8, many=False).codes is None) == (library is fbgemm)
        x = rows(37, None)
        [few], [many] = (project(x, [load(one, INT8, many=many)], INT8) for many in (False, True))
        torch.testing.assert_close(few, many, rtol=1e-6, atol=1e-6)  # of the same codes
        ready = replace(one, weight=in_tiles(one.weight))
        assert load(ready, INT8, many=False).codes is not None


def test_scratch(library: ModuleType) -> None:
    six, eight, pruned = (linear(bits, "tensor", sparsity)[0].weight for bits, sparsity in ((6, 0), (8, 0), (6, 0.5)))
    size = 96 * 64
    assert scratch_nbytes([in_tiles(six), in_tiles(eight)], INT8) == 0
    if library is onednn:
        assert scratch_nbytes([six, six, eight], INT8) == 2 * size
    elif not supported(BFLOAT16):
        packed = fbgemm.nbytes(96, 64)
        assert scratch_nbytes([six, six, eight], INT8) == max(3 * packed + size, size + 4 * size)
    assert scratch_nbytes([eight], FLOAT32) == 4 * size
    assert scratch_nbytes([six, eight], FLOAT32) == scratch_nbytes([in_tiles(eight)], FLOAT32) == 5 * size
    assert scratch_nbytes([pruned], FLOAT32) == 6 * size


def test_int8_of_a_constant_weight(library: ModuleType) -> None:
    one = Linear(linear_weight(quantize_tensor(torch.full((96, 64), 0.7), 4)), torch.zeros(96))
    x = rows(5, None)
    [y] = project(x, [load(one, INT8)], INT8)
    torch.testing.assert_close(y, 0.7 * x.sum(1, keepdim=True).expand(5, 96), rtol=1e-5, atol=1e-5)


def test_narrow_models_are_not_for_fbgemm(library: ModuleType) -> None:
    assert is_quick(INT8, WIDE)
    assert is_quick(INT8, WIDE - 1) == (library is onednn)
    assert is_quick(FLOAT32, 1)
