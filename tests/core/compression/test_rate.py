from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train_large.compression import rate
from train_large.compression.inspection import entropy_bound, inspect
from train_large.compression.packed import read_packed, write_packed
from train_large.compression.quantization import dequantize, quantize_tensor
from train_large.compression.rate import (
    quantize_by_trellis,
    quantize_to_step,
    quantizer_for,
    relative_error,
    steps_for,
)
from train_large.errors import UserError


def entropy_bytes(q) -> float:
    """The entropy of the indices in plain Python, and the range."""
    counts = Counter(q.indices.reshape(-1).tolist()).values()
    return sum(count * math.log2(q.indices.numel() / count) for count in counts) / 8 + 8


@st.composite
def weights(draw, most=3000):
    """As trained models have them: heavy tails, any scale, some pruned."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    w = rng.standard_t(draw(st.sampled_from([3, 30])), draw(st.integers(1, most)))
    w = (w + draw(st.sampled_from([0, 0, 5]))) * 10.0 ** draw(st.integers(-30, 20))
    w[rng.random(w.size) < draw(st.sampled_from([0, 0.5, 0.95, 1]))] = 0
    return torch.from_numpy(w.astype(np.float32))


def model(seed=0, pruned=0.0):
    """A state dict of a few matrices with different scales, a tie, vectors and a buffer."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        w = torch.randn(shape, generator=random) * scale
        return w.masked_fill(w.abs() < torch.quantile(w.abs(), pruned), 0) if pruned else w

    embedding = normal(400, 64, scale=0.1)
    return {
        "embed_tokens.weight": embedding,
        "fc1.weight": normal(256, 64, scale=0.05),
        "fc1.bias": torch.randn(256, generator=random) * 0.02,
        "layer_norm.weight": torch.randn(64, generator=random) * 0.1 + 1,
        "zeros.bias": torch.zeros(10),
        "fc2.weight": normal(64, 256, scale=0.02),
        "version": torch.tensor([3.0]),
        "lm_head.weight": embedding,
    }


@settings(deadline=None, max_examples=300)
@given(weights(), st.floats(2e-4, 3))
def test_zero_is_exactly_zero_with_fused_arithmetic_too(w, share):
    step = share * max(float(w.abs().max()), 1e-30)
    q = quantize_to_step(w, step)
    other = dequantize(q)
    zeros = other == 0
    beside = int((other.abs() - float(q.step)).abs().lt(float(q.step) / 4).sum())
    stand_out = 10 * int(zeros.sum()) >= len(w) and int(zeros.sum()) >= 2 * beside
    assert torch.equal(q.mask, ~zeros) if q.bits > 8 and stand_out else q.mask is None
    assert other[w == 0].tolist() == [0.0] * int((w == 0).sum())
    assert not torch.signbit(other[w == 0]).any()
    grid, minimum = Fraction(float(q.step)), Fraction(float(q.minimum))
    n = minimum / grid
    assert n.denominator == 1  # zero is a point
    for index in {0, int(q.indices.max())}:
        exact = minimum + index * grid  # what one rounding, at the end, would start from
        assert float(exact) == np.float32(index) * np.float32(q.step) + np.float32(q.minimum)


@settings(deadline=None, max_examples=300)
@given(weights(), st.floats(2e-4, 3))
def test_indices_are_rounded_weights_and_the_step_is_refitted(w, share):
    step = share * max(float(w.abs().max()), 1e-30)
    q = quantize_to_step(w, step)
    n = (q.indices.long() + round(float(q.minimum) / float(q.step))).double()
    n = n if q.mask is None else n * q.mask
    assert (n - w.double() / step).abs().max() <= 0.5 + n.abs().max() * 2.0**-8  # the step is shortened
    assert int(q.indices.min()) == 0
    top = max(int(q.indices.max()), 0 if q.mask is None else round(-float(q.minimum) / float(q.step)))  # zero's index
    assert 2**q.bits > top >= (2 ** (q.bits - 1) if q.bits > 2 else 0)
    assert 2 <= q.bits <= 15
    assert q.indices.dtype == (torch.uint8 if q.bits <= 8 else torch.int16)
    error = float((dequantize(q).double() - w.double()).square().sum())
    for factor in (0.9, 0.97, 1.03, 1.1):
        other = float((n * float(q.step) * factor - w.double()).square().sum())
        assert error <= other * (1 + 1e-6)


@pytest.mark.parametrize("pruned", [0.0, 0.3, 0.75, 0.9])
@pytest.mark.parametrize("step", [0.2, 0.05, 0.01, 0.002])
def test_a_file_is_near_its_entropy_with_and_without_a_peak_of_zeros(tmp_path, pruned, step):
    w = torch.randn(256, 512, generator=torch.Generator().manual_seed(1))
    w[w.abs() < torch.quantile(w.abs(), pruned)] = 0
    q = quantize_to_step(w, step)
    write_packed([("w", q)], {}, {}, tmp_path / "w.safetensors")
    total = inspect(tmp_path / "w.safetensors").total
    n = (w / step).round()
    assert total.bytes_file <= 1.04 * entropy_bytes(replace(q, indices=n))


def test_a_peak_that_is_no_spike_needs_no_mask(tmp_path):
    """Trained weights have a peak at zero and long tails; without its top it would be coded less well."""
    w = torch.from_numpy(np.random.default_rng(2).standard_t(2.2, (512, 512)).clip(-120, 120).astype(np.float32))
    q = quantize_to_step(w, 0.7)
    assert q.bits > 8
    assert 10 * int((dequantize(q) == 0).sum()) > w.numel()
    assert q.mask is None


def test_the_example_of_the_module():
    q = quantize_to_step(torch.tensor([0.31, 0, -0.07, 0.12, -0.48]), 0.1)
    assert q.indices.tolist() == [8, 5, 4, 6, 0]
    assert q.bits == 4
    assert float(q.step) == pytest.approx(0.0978, abs=1e-4)
    assert dequantize(q).tolist() == pytest.approx([0.293, 0, -0.098, 0.098, -0.489], abs=6e-4)


@pytest.mark.parametrize("share", [0.002, 0.02, 0.15])
@pytest.mark.parametrize("pruned", [0.0, 0.6])
def test_a_trellis_leaves_less_error_in_as_much_information(share, pruned):
    w = torch.randn(200, 100, generator=torch.Generator().manual_seed(1))
    w[w.abs() < torch.quantile(w.abs(), pruned)] = 0
    step = share * float(w.abs().max())
    rounded, q = quantize_to_step(w, step), quantize_by_trellis(w, step)
    assert q.trellis
    assert torch.equal(dequantize(q) == 0, w == 0) or not pruned
    kept = w != 0
    assert (q.mask is None) == bool(kept.all())
    errors = [float((dequantize(each) - w)[kept].square().sum()) for each in (rounded, q)]
    counts = [Counter((indices[kept]).tolist()).values() for indices in (rounded.indices, q.indices >> 1)]
    bits = [sum(n * math.log2(sum(of) / n) for n in of) for of in counts]
    won = (bits[0] - bits[1]) / int(kept.sum()) + math.log2(errors[0] / errors[1]) / 2
    assert 0.12 < won < 0.26 or pruned  # 0.2546 is all that there is at a fine step
    assert won > 0.12


@settings(deadline=None, max_examples=30)
@given(weights(most=60), st.floats(2e-3, 0.05))
def test_what_a_trellis_makes_is_exact(some, share):
    w = torch.cat([torch.randn(4200), some / max(float(some.abs().max()), 1e-30)]).view(1, -1)
    q = quantize_by_trellis(w, share)
    assert q.trellis
    other = dequantize(q)
    assert (other[w == 0] == 0).all()
    grid, minimum = Fraction(float(q.step)), Fraction(float(q.minimum))
    assert (minimum / grid).denominator == 1
    for index in {0, int(q.indices.max())}:
        assert float(minimum + index * grid) == np.float32(index) * np.float32(q.step) + np.float32(q.minimum)
    assert int(q.indices.max()) < 2**q.bits <= 2**15


@pytest.mark.parametrize(
    ("w", "step"),
    [
        (torch.randn(5000), 0.01),  # a vector
        (torch.randn(64, 64), 0.01),  # small
        (torch.randn(100, 64), 1.5),  # of little information
        (torch.randn(100, 64), 5e-4),  # of 14 bits, which would be 16
        (torch.zeros(100, 64), 0.1),
    ],
)
def test_where_a_trellis_does_not_pay(w, step):
    q, rounded = quantize_by_trellis(w, step), quantize_to_step(w, step)
    assert not q.trellis
    assert torch.equal(dequantize(q), dequantize(rounded))


@pytest.mark.parametrize("target", [0.01, 0.1])
def test_errors_are_met_by_a_trellis_with_fewer_bytes(target):
    random = torch.Generator().manual_seed(1)
    state = {"a.weight": torch.randn(300, 100, generator=random), "b.bias": torch.randn(100, generator=random)}
    made = [quantizer_for(state, target_error=target, trellis=trellis) for trellis in (False, True)]
    for quantizer in made:
        assert 0.98 * target < relative_error(state, quantizer) <= target
    rounded, q = (quantizer("a.weight", state["a.weight"]) for quantizer in made)
    indices = replace(q, indices=q.indices >> 1)
    assert entropy_bytes(indices) < entropy_bytes(rounded) - 0.15 * 30_000 / 8


@pytest.mark.parametrize("w", [torch.zeros(2, 3), torch.empty(0, 4), torch.tensor(0.5), -torch.ones(1)])
def test_degenerate_tensors(w):
    other = dequantize(quantize_to_step(w, 0.5))
    assert torch.equal(other, w)


def test_half_precision_and_the_input_stays():
    w = torch.randn(30, 20).to(torch.bfloat16)
    before = w.clone()
    assert torch.equal(dequantize(quantize_to_step(w, 0.1)), dequantize(quantize_to_step(w.float(), 0.1)))
    assert torch.equal(w, before)


def test_a_shortened_step_does_not_make_indices_wrap():
    """A step of few digits is up to 0.4 % smaller, and the indices are as many more."""
    with pytest.raises(UserError, match="more than 15 bits"):
        quantize_to_step(torch.tensor([0, 16412.13, 50.19]), 0.5019)


def test_steps_that_cannot_be():
    with pytest.raises(UserError, match="15 bits"):
        quantize_to_step(torch.tensor([-1.0, 1.0]), 1e-5)
    with pytest.raises(UserError, match="not finite"):
        quantize_to_step(torch.tensor([1.0, torch.nan]), 0.1)
    for step in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="above 0"):
            quantize_to_step(torch.ones(2), step)


def test_relative_error_counts_tied_weights_once_and_no_buffer():
    state = model()
    quantizer = lambda name, w: quantize_tensor(w, 4)  # noqa: E731
    once = [name for name in state if name not in ("version", "lm_head.weight")]
    error = sum(float((dequantize(quantize_tensor(state[n], 4)) - state[n]).double().square().sum()) for n in once)
    norm = sum(float(state[n].double().square().sum()) for n in once)
    assert relative_error(state, quantizer) == pytest.approx(math.sqrt(error / norm), rel=1e-5)
    assert relative_error({"w": torch.zeros(3)}, quantizer) == 0


def size(state, quantizer):
    return sum(entropy_bytes(quantizer(n, w)) for n, w in state.items() if n not in ("version", "lm_head.weight"))


def test_errors_are_met_closely_and_smaller_ones_take_more_bytes():
    state = model()
    bytes_before = math.inf
    for target in (0.003, 0.01, 0.03, 0.1, 0.12, 0.2, 0.4):
        quantizer = quantizer_for(state, target_error=target)
        assert 0.98 * target < relative_error(state, quantizer) <= target
        assert size(state, quantizer) < bytes_before
        bytes_before = size(state, quantizer)


@pytest.mark.parametrize("target", [0.01, 0.1, 0.2])
def test_pruned_tensors_take_no_more_than_at_a_common_step(target):
    """Their best steps fit the gap about zero, so an error may be undercut by far at no cost."""
    state = {name: w for name, w in model(pruned=0.6).items() if w.dim() > 1}
    quantizer = quantizer_for(state, target_error=target)
    assert relative_error(state, quantizer) <= target

    def common(step):
        def to_step(name, w):
            return quantize_to_step(w, step)

        return size(state, to_step) if relative_error(state, to_step) <= target else math.inf

    best = min(common(target * 2 ** (i / 16)) for i in range(-64, 16))
    assert size(state, quantizer) < 1.01 * best < math.inf


@pytest.mark.parametrize("pruned", [0, 0.6])
def test_sizes_are_met_closely_and_more_bytes_leave_less_error(pruned):
    state = model(pruned=pruned)
    error_before = math.inf
    for target in (9_000, 12_000, 18_000, 30_000):
        quantizer = quantizer_for(state, target_bytes=target)
        assert (0.95 if pruned else 0.98) * target < size(state, quantizer) <= target
        assert relative_error(state, quantizer) < error_before
        error_before = relative_error(state, quantizer)


@settings(deadline=None, max_examples=6)
@given(st.integers(0, 1000), st.floats(0.004, 0.5), st.floats(1.02, 4))
def test_any_target(seed, target, factor):
    state = model(seed)
    fine, coarse = (quantizer_for(state, target_error=error) for error in (target, min(0.9, target * factor)))
    assert relative_error(state, fine) <= target
    assert size(state, fine) >= size(state, coarse)


def test_the_callers_size_counts():
    state = model()
    asked = []

    def twice(quantizer):
        asked.append(2 * size(state, quantizer) + 1000)
        return asked[-1]

    quantizer = quantizer_for(state, target_bytes=30_000, size=twice)
    assert 29_000 < 2 * size(state, quantizer) + 1000 <= 30_000
    assert len(asked) <= 10


@pytest.mark.parametrize("target", [0.02, 0.3])
def test_no_choice_of_steps_on_a_grid_has_fewer_bytes(target):
    """All combinations of 25 steps for each of two tensors, by exact entropies."""
    random = torch.Generator().manual_seed(3)
    state = {"a.weight": torch.randn(60, 60, generator=random), "b.weight": torch.randn(80, 60, generator=random) * 0.3}
    ladder = [
        target * 3.46 * 0.8 * 2 ** (i / 8) for i in range(-12, 13)
    ]  # about the common step that high-rate theory gives
    norm = sum(float(w.double().square().sum()) for w in state.values())
    points = {name: [] for name in state}
    for name, w in state.items():
        for step in ladder:
            q = quantize_to_step(w, step)
            error = float((dequantize(q).double() - w.double()).square().sum())
            points[name].append((entropy_bytes(q), error))
    best = min(a[0] + b[0] for a, b in itertools.product(*points.values()) if math.sqrt((a[1] + b[1]) / norm) <= target)
    quantizer = quantizer_for(state, target_error=target)
    assert sum(entropy_bytes(quantizer(name, w)) for name, w in state.items()) < 1.005 * best


def test_at_high_rate_matrices_share_a_step_and_vectors_have_an_eighth():
    random = torch.Generator().manual_seed(4)
    state = {
        "a.weight": torch.randn(300, 100, generator=random),
        "b.weight": torch.randn(300, 100, generator=random) * 0.2,
        "bias": torch.randn(20_000, generator=random),
    }
    steps = steps_for(state, target_error=0.004)
    assert steps["a.weight"] / steps["b.weight"] == pytest.approx(1, abs=0.12)
    assert steps["a.weight"] / steps["bias"] == pytest.approx(8, rel=0.12)


def test_far_fewer_bytes_than_min_and_max_at_the_same_error():
    random = np.random.default_rng(0)
    state = {"w": torch.from_numpy(random.standard_t(4, (300, 200)).astype(np.float32))}
    plain = quantize_tensor(state["w"], 4)
    quantizer = quantizer_for(state, target_error=relative_error(state, lambda name, w: plain))
    assert entropy_bytes(quantizer("w", state["w"])) < 0.97 * entropy_bytes(plain)


def test_tied_parameters_have_a_step_too_and_buffers_none():
    steps = steps_for(model(), target_error=0.1)
    assert set(steps) == set(model()) - {"version"}
    assert steps["lm_head.weight"] == steps["embed_tokens.weight"]


def test_what_cannot_be_met_says_what_can():
    state = model()
    with pytest.raises(UserError, match=r"--target-bytes 100: the smallest .* is (\d+) bytes") as raised:
        steps_for(state, target_bytes=100)
    smallest = int(str(raised.value).split(" bytes: ")[0].split()[-1])
    assert size(state, quantizer_for(state, target_bytes=smallest)) <= smallest
    with pytest.raises(UserError, match=r"--target-error 1e-07: the finest steps leave 0\.00\d+: give") as raised:
        steps_for(state, target_error=1e-7)
    least = float(str(raised.value).split("leave ")[1].split(":")[0])
    assert relative_error(state, quantizer_for(state, target_error=1.05 * least)) <= 1.05 * least
    for bad in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(UserError, match="between 0 and 1"):
            steps_for(state, target_error=bad)
    for bad in (0, -5):
        with pytest.raises(UserError, match="above 0"):
            steps_for(state, target_bytes=bad)
    for both in ({}, {"target_error": 0.1, "target_bytes": 10_000}):
        with pytest.raises(UserError, match="not both"):
            steps_for(state, **both)
    with pytest.raises(UserError, match=r"broken\.weight.*not finite"):
        steps_for({"broken.weight": torch.full((3, 3), torch.inf)}, target_error=0.1)


@pytest.mark.parametrize("state", [{}, {"w": torch.zeros(3, 3)}, {"w": torch.empty(0, 3)}, {"w": torch.ones(3, 3)}])
def test_models_with_nothing_to_choose(state):
    quantizer = quantizer_for(state, target_error=0.1)
    for name, w in state.items():
        assert torch.allclose(dequantize(quantizer(name, w)), w, rtol=0.1)
    assert set(steps_for(state, target_bytes=1000)) == set(state)


def test_chunks_change_nothing(monkeypatch):
    state = model()
    before = steps_for(state, target_error=0.05)
    monkeypatch.setattr(rate, "_CHUNK", 1000)
    assert steps_for(state, target_error=0.05) == pytest.approx(before)


@pytest.mark.parametrize("largest", [58, 66, 74])
def test_the_error_that_is_named_can_be_had(largest):
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    w[0, 0] = largest
    with pytest.raises(UserError, match="give at least that") as raised:
        quantizer_for({"w": w}, target_error=1e-9)
    named = float(str(raised.value).partition("leave ")[2].partition(":")[0])
    quantizer_for({"w": w}, target_error=named)


def test_no_weights_have_no_range(tmp_path):
    """A parameter without elements is packed and read like any other."""
    empty = torch.empty(0, 8)
    q = quantize_to_step(empty, 0.1)
    assert (q.minimum.numel(), q.step.numel()) == (0, 0)
    path = tmp_path / "file"
    write_packed([("w", quantize_to_step(torch.randn(90, 64), 0.1)), ("small", q), ("none", empty)], {}, {}, path)
    read = read_packed(path).state()
    assert read["small"].shape == read["none"].shape == (0, 8)
    assert entropy_bound(q) == entropy_bound(empty) == 0
