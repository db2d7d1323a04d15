from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from formula import BITS, paper, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from train_large.compression.quantization import (
    dequantize,
    quantize_state,
    quantize_tensor,
)
from train_large.errors import UserError


@st.composite
def heavy_tails(draw, most=2000):
    """Weights as trained models have them: many small, few very large, some pruned, any offset and scale."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weights = rng.standard_t(draw(st.sampled_from([1.5, 3, 30])), draw(st.integers(1, most)))
    weights = (weights + draw(st.sampled_from([0, 0, 5]))) * 10.0 ** draw(st.integers(-8, 3))
    weights[rng.random(weights.size) < draw(st.sampled_from([0, 0, 0.5, 0.95, 1]))] = 0
    return weights.astype(np.float32)


@settings(deadline=None, max_examples=300)
@given(heavy_tails(), st.sampled_from(BITS))
def test_agrees_with_the_formula_to_the_last_bit(weights, bits):
    assert same_bits(dequantize(quantize_tensor(torch.from_numpy(weights), bits)), paper(weights, bits))


@settings(deadline=None)
@given(heavy_tails(), st.sampled_from(BITS), st.integers(1, 40), st.sampled_from(["row", "group"]))
def test_every_row_and_group_has_its_own_grid(weights, bits, size, kind):
    if kind == "row":
        weights = np.resize(weights, (max(1, weights.size // size), size))
    q = quantize_tensor(torch.from_numpy(weights), bits, "row" if kind == "row" else f"group:{size}")
    flat = weights.reshape(-1)
    parts = [paper(flat[start : start + size], bits) for start in range(0, flat.size, size)]
    assert len(q.minimum) == len(q.step) == len(parts)
    assert same_bits(dequantize(q).reshape(-1), np.concatenate(parts))


@settings(deadline=None)
@given(heavy_tails(), st.sampled_from(BITS))
def test_indices_fit_and_errors_are_at_most_half_a_step(weights, bits):
    q = quantize_tensor(torch.from_numpy(weights), bits)
    assert q.indices.dtype == torch.uint8
    assert int(q.indices.max()) <= 2**bits - 1
    error = np.abs(dequantize(q).numpy().astype(np.float64) - weights)
    assert error.max() <= float(q.step[0]) * 0.5 + 1e-6 * np.abs(weights).max()


def test_a_pruned_weight_stays_zero_and_the_grid_spans_the_rest():
    q = quantize_tensor(torch.tensor([0.9, 0.0, -0.6, 0.0, 0.3]), 2)  # the picture in the module
    assert q.mask is not None
    assert q.mask.tolist() == [True, False, True, False, True]
    assert q.indices.tolist() == [3, 0, 0, 0, 2]
    assert dequantize(q).tolist() == pytest.approx([0.9, 0, -0.6, 0, 0.4])
    assert dequantize(q)[1].item() == 0
    only_large = dequantize(quantize_tensor(torch.tensor([0.0, 5.0, 6.0, 8.0]), 2)).tolist()
    assert only_large == [0, 5, 6, 8]  # a grid from 0 to 8 would have no 5


def test_half_a_step_rounds_to_the_even_index():
    q = quantize_tensor(torch.tensor([1.0, 1.5, 2.5, 3.5, 4.0]), 2)
    assert q.indices.tolist() == [0, 0, 2, 2, 3]


@pytest.mark.parametrize(
    "weights",
    [
        torch.full((3, 4), 0.1),
        torch.zeros(5),
        torch.empty(0),
        torch.tensor(0.7),
        torch.tensor([0.0, 0.3, 0.3]),
        -torch.ones(1),
    ],
)
@pytest.mark.parametrize("granularity", ["tensor", "row", "group:2"])
def test_constants_are_unchanged(weights, granularity):
    assert torch.equal(dequantize(quantize_tensor(weights, 4, granularity)), weights)


def test_the_smallest_numbers_stay_in_range():
    weights = torch.arange(1, 12) * 2.0**-149
    q = quantize_tensor(weights, 3)
    assert int(q.indices.max()) <= 7
    assert (dequantize(q) - weights).abs().max() < 1e-44
    underflow = quantize_tensor(torch.tensor([1.0, 2.0]) * 2.0**-149, 8)  # a 255th of this range is no float32
    assert underflow.step.tolist() == [0]
    assert underflow.indices.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_is_quantized_and_kept_in_float32(dtype):
    weights = torch.randn(50, 20).to(dtype)
    state = quantize_state({"w": weights}, 8)
    assert same_bits(state["w"], paper(weights.to(torch.float32).numpy(), 8))
    assert torch.equal(quantize_state({"w": weights}, 32)["w"], weights.to(torch.float32))


def test_a_transposed_view_is_quantized_in_its_own_order():
    weights = torch.randn(6, 9).t()
    assert same_bits(dequantize(quantize_tensor(weights, 4, "row"))[2], paper(weights[2].numpy(), 4))


def test_every_parameter_but_no_buffer_is_quantized_and_ties_stay(tmp_path):
    shared = torch.randn(200, 50)
    state = {
        "encoder.version": torch.tensor([3.0]),
        "encoder.embed_tokens.weight": shared,
        "encoder.layer_norm.weight": torch.randn(50),
        "encoder.fc.bias": torch.randn(50),
        "encoder.lm_head.weight": shared,
        "encoder.from_gpu.weight": shared.clone(),
    }
    before = {name: tensor.clone() for name, tensor in state.items()}
    result = quantize_state(state, 4)
    assert list(result) == list(state)
    for name in state:
        expected = before[name].numpy() if name.endswith("version") else paper(before[name].numpy(), 4)
        assert same_bits(result[name], expected), name
        assert torch.equal(state[name], before[name]), f"{name}: the input was changed"
    addresses = {result[name].data_ptr() for name in state if state[name].shape == shared.shape}
    assert len(addresses) == 1
    torch.save(result, tmp_path / "state.pt")
    assert (tmp_path / "state.pt").stat().st_size < 1.2 * shared.nbytes + 4096


def test_32_bits_change_nothing_and_copy():
    state = {"w": torch.randn(4, 4), "pruned": torch.tensor([0.0, -0.0, 1.0])}
    result = quantize_state(state, 32)
    assert all(same_bits(result[name], state[name].numpy()) for name in state)
    result["w"].zero_()
    assert state["w"].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_without_a_range_are_refused(bad):
    with pytest.raises(UserError, match=r"layer\.weight.*not finite"):
        quantize_state({"layer.weight": torch.tensor([1.0, bad, 2.0])}, 4)
    with pytest.raises(UserError, match="more than float32"):
        quantize_tensor(torch.tensor([-3e38, 3e38]), 4)


@settings(deadline=None, max_examples=60)
@given(heavy_tails(), st.sampled_from(BITS), st.sampled_from(["tensor", "row", "group:24"]))
def test_a_clipped_range_is_never_worse(weights, bits, kind):
    w = torch.from_numpy(weights)
    errors = [
        (dequantize(quantize_tensor(w, bits, kind, clip)).double() - w.double()).square().sum().item()
        for clip in (False, True)
    ]
    assert errors[1] <= errors[0] * (1 + 1e-6)


def test_what_fills_up_the_last_group_is_no_weight():
    w = 5 + torch.rand(80, generator=torch.Generator().manual_seed(0))
    whole, tail = (quantize_tensor(part, 8, "group:64", clip=True) for part in (w, w[64:]))
    assert torch.equal(dequantize(whole)[64:], dequantize(tail))
    assert (dequantize(whole) - w).abs().max() < 0.003


def test_what_is_zero_in_float32_is_zero():
    q = quantize_tensor(torch.tensor([[1.0, -1.0, 1e-50, 0.0, 0.5]], dtype=torch.float64), 4)
    assert dequantize(q)[0, 2] == 0
    with pytest.raises(UserError, match="not finite"):
        quantize_tensor(torch.tensor([1.0, 1e39], dtype=torch.float64), 4)
