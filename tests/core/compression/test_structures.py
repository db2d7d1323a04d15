"""Structured pruning against loops that know nothing of masks."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from train_large.compression.structures import (
    blocks,
    highest_sparsity,
    magnitudes,
    parse_per_layer,
    smallest_structures,
    spread,
    structured_sparsity_of,
)
from train_large.errors import UserError

VALUES = st.sampled_from([0.0, 0.0, 2.0**-140, 0.25, -0.5, 1.0])
SHARE = st.floats(0, 1)
KINDS = st.sampled_from(["heads", "ffn", "heads+ffn"])


def linear(name: str, inputs: int, outputs: int) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.empty(outputs, inputs), f"{name}.bias": torch.empty(outputs)}


def layer(name: str, hidden: int, width: int, heads: int, rows: int) -> dict[str, Tensor]:
    """fairseq's names and shapes, in fairseq's order; more in than belongs to structures."""
    attention = {}
    for part in ("k_proj", "v_proj", "q_proj"):
        attention |= linear(f"{name}.self_attn.{part}", hidden, heads * width)
    attention |= linear(f"{name}.self_attn.out_proj", heads * width, hidden)
    norm = {f"{name}.self_attn_layer_norm.weight": torch.empty(hidden)}
    return attention | norm | linear(f"{name}.fc1", hidden, rows) | linear(f"{name}.fc2", rows, hidden)


@st.composite
def models(draw) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Layers of different shapes whose structures are all of one value, so that there are ties, and zeros."""
    hidden, width = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    weights, heads = {"embed.weight": torch.ones(3, hidden)}, {}
    for i in range(draw(st.integers(1, 3))):
        heads[f"{i}.self_attn"] = draw(st.integers(1, 3))
        weights |= layer(f"{i}", hidden, width, heads[f"{i}.self_attn"], draw(st.integers(1, 5)))
    for block in blocks(weights, heads):
        for j in range(block.count):
            value = draw(VALUES)
            for part in parts(weights, block.name, block.kind, block.count, j):
                part.fill_(value)
    return weights, heads


def parts(weights: dict[str, Tensor], name: str, kind: str, count: int, j: int) -> list[Tensor]:
    """The weights of structure `j`, as views, sliced by hand."""
    if kind == "ffn":
        return [weights[f"{name}.fc1.weight"][j], weights[f"{name}.fc1.bias"][j : j + 1]] + [
            weights[f"{name}.fc2.weight"][:, j]
        ]
    width = weights[f"{name}.q_proj.weight"].shape[0] // count
    own = slice(j * width, (j + 1) * width)
    rows = [weights[f"{name}.{x}_proj.{y}"][own] for x in "qkv" for y in ("weight", "bias")]
    return [*rows, weights[f"{name}.out_proj.weight"][:, own]]


def by_hand(weights: dict[str, Tensor], heads: dict[str, int], kinds: str) -> dict[tuple[str, int], list[Tensor]]:
    """Every structure by its block and number, in the order of the weights (k_proj, which comes first, aside)."""
    found = {}
    for i in range(len(heads)):
        if "heads" in kinds:
            for j in range(heads[f"{i}.self_attn"]):
                found[f"{i}.self_attn", j] = parts(weights, f"{i}.self_attn", "heads", heads[f"{i}.self_attn"], j)
        if "ffn" in kinds:
            for j in range(len(weights[f"{i}.fc1.weight"])):
                found[f"{i}", j] = parts(weights, f"{i}", "ffn", len(weights[f"{i}.fc1.weight"]), j)
    return found


def chosen_by_hand(structures: dict[tuple[str, int], list[Tensor]], sparsity: float, scope: str) -> set:
    """Smallest first, each that fits and is not the last of its block."""
    sizes = {key: sum(part.numel() for part in found) for key, found in structures.items()}
    squares = {
        key: Fraction(sum(np.square(part.double().numpy()).sum() for part in found)) / sizes[key]
        for key, found in structures.items()
    }
    gone = set()
    for group in [None] if scope == "global" else {name for name, _ in structures}:
        members = [key for key in structures if group in (None, key[0])]
        room = round(sparsity * sum(sizes[key] for key in members))
        for key in sorted(members, key=lambda key: squares[key]):  # stable
            others = [other for other in structures if other[0] == key[0] and other != key and other not in gone]
            if others and sum(sizes[other] for other in gone if other in members) + sizes[key] <= room:
                gone.add(key)
    return gone


def as_set(chosen: dict[str, Tensor]) -> set:
    return {(name, j) for name, mask in chosen.items() for j in range(len(mask)) if mask[j]}


@settings(deadline=None, max_examples=150)
@given(models(), KINDS, SHARE, st.sampled_from(["global", "layer"]))
def test_the_smallest_are_those_that_sorting_by_hand_finds(model, kinds, sparsity, scope):
    weights, heads = model
    structures = by_hand(weights, heads, kinds)
    found = blocks(weights, heads, kinds)
    assert [(block.name, j) for block in found for j in range(block.count)] == list(structures)
    assert as_set(smallest_structures(found, sparsity, scope)) == chosen_by_hand(structures, sparsity, scope)


@settings(deadline=None, max_examples=50)
@given(models(), SHARE)
def test_masks_are_the_weights_of_the_chosen_structures(model, sparsity):
    weights, heads = model
    found = blocks(weights, heads)
    chosen = smallest_structures(found, sparsity)
    masks = spread(found, chosen)
    marks = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    for name, j in as_set(chosen):
        kind = "heads" if "attn" in name else "ffn"
        for part in parts(marks, name, kind, heads.get(name, len(marks.get(f"{name}.fc1.weight", ()))), j):
            part.fill_(1)
    for name, mark in marks.items():
        assert torch.equal(masks.get(name, torch.zeros_like(mark, dtype=torch.bool)), mark.bool())


@settings(deadline=None, max_examples=100)
@given(models(), KINDS, SHARE, st.sampled_from(["global", "layer"]), st.randoms(use_true_random=False))
def test_pruning_again_keeps_what_is_pruned_and_adds_nothing(model, kinds, sparsity, scope, rng):
    weights, heads = model
    for tensor in weights.values():
        tensor += 2 * (tensor == 0)  # nothing is zero at the start
    found = blocks(weights, heads, kinds)
    first = smallest_structures(found, sparsity, scope)
    for name, mask in spread(found, first).items():
        # Finetuning may do anything to the rest, but it does not come to be exactly zero.
        weights[name].apply_(lambda _: rng.choice([0.01, -0.3, 7.0]))
        weights[name].masked_fill_(mask, 0)
    again = smallest_structures(blocks(weights, heads, kinds), sparsity, scope)
    assert as_set(again) == as_set(first)
    zeros, total = structured_sparsity_of(found)
    assert zeros == sum(block.size * int(first[block.name].sum()) for block in found)
    groups = [found] if scope == "global" else [[block] for block in found]
    assert zeros <= sum(round(sparsity * sum(block.size * block.count for block in group)) for group in groups)
    assert scope == "layer" or zeros <= round(sparsity * total)


@settings(deadline=None, max_examples=50)
@given(models(), KINDS)
def test_each_block_keeps_one_whatever_is_asked(model, kinds):
    found = blocks(*model, kinds)
    chosen = smallest_structures(found, 1.0)
    assert all(int((~chosen[block.name]).sum()) == 1 for block in found)
    total = sum(block.size * block.count for block in found)
    gone = sum(block.size * int(chosen[block.name].sum()) for block in found)
    assert highest_sparsity(found) == gone / total
    assert highest_sparsity([]) == 0


def test_magnitudes_compare_structures_of_different_sizes():
    """Noise of one spread has one magnitude, in a head of 20,000 weights as in a row of 257."""
    generator = torch.Generator().manual_seed(1)
    weights = layer("0", 128, 32, 4, 300)
    for tensor in weights.values():
        tensor.normal_(std=0.3, generator=generator)
    [attention, feed_forward] = blocks(weights, {"0.self_attn": 4})
    assert (attention.size, feed_forward.size) == (4 * 128 * 32 + 3 * 32, 2 * 128 + 1)
    assert magnitudes(attention).mean().item() == pytest.approx(0.3, rel=0.01)
    assert magnitudes(feed_forward).mean().item() == pytest.approx(0.3, rel=0.01)
    for block in (attention, feed_forward):
        own = parts(weights, block.name, block.kind, block.count, 2)
        flat = torch.cat([part.flatten() for part in own]).double()
        assert magnitudes(block)[2].item() == pytest.approx((flat.norm() / len(flat) ** 0.5).item(), rel=1e-12)


def test_zero_and_only_zero_has_no_magnitude_and_nan_the_largest():
    weights = {name: torch.zeros_like(tensor) for name, tensor in layer("0", 2, 1, 1, 3).items()}
    weights["0.fc1.bias"][1] = torch.finfo(torch.float32).smallest_normal * 2**-23  # the smallest number there is
    weights["0.fc2.weight"][0, 2] = torch.nan
    found = blocks(weights, {}, "ffn")
    assert (magnitudes(found[0]) == 0).tolist() == [True, False, False]
    assert structured_sparsity_of(found) == (5, 15)
    assert as_set(smallest_structures(found, 0.67)) == {("0", 0), ("0", 1)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_precision(dtype):
    weights = {name: torch.ones_like(tensor, dtype=dtype) for name, tensor in layer("0", 2, 1, 2, 3).items()}
    weights["0.fc1.weight"][1] = 0.5
    assert as_set(smallest_structures(blocks(weights, {"0.self_attn": 2}), 0.2)) == {("0", 1)}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({f"{x}_proj": nn.Linear(4, 4) for x in ("q", "k", "v", "out")})
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 4)


def test_shared_layers_count_once():
    shared, one = Layer(), Layer()
    one.self_attn = shared.self_attn
    model = nn.ModuleDict({"a": shared, "b": shared, "c": one})
    names = dict(model.named_parameters())
    found = blocks(names, {"a.self_attn": 2})
    assert [block.name for block in found] == ["a.self_attn", "a", "c"]
    chosen = smallest_structures(found, 0.5)
    with torch.no_grad():
        for name, mask in spread(found, chosen).items():
            names[name].masked_fill_(mask, 0)
    # A state dict names what is shared under every layer.
    heads = {f"{name}.self_attn": 2 for name in "abc"}
    zero = [(block.name, (magnitudes(block) == 0).tolist()) for block in blocks(model.state_dict(), heads)]
    assert [name for name, _ in zero] == ["a.self_attn", "a", "b.self_attn", "b", "c.self_attn", "c"]
    for name, mask in zero:
        assert (
            mask
            == chosen[{"b": "a", "b.self_attn": "a.self_attn", "c.self_attn": "a.self_attn"}.get(name, name)].tolist()
        )


def test_without_biases():
    weights = {name: tensor.fill_(1) for name, tensor in layer("0", 4, 2, 2, 3).items() if "bias" not in name}
    assert [block.size for block in blocks(weights, {"0.self_attn": 2})] == [4 * 2 * 4, 8]


@pytest.mark.parametrize(("scope", "sparsity"), [("tensor", 0.5), ("global", -0.1), ("global", 1.1), ("layer", np.nan)])
def test_bad_arguments(scope, sparsity):
    with pytest.raises(ValueError, match="scope" if scope == "tensor" else "sparsity"):
        smallest_structures([], sparsity, scope)


def test_tensors_that_do_not_divide_are_refused_by_name():
    weights = layer("0", 4, 2, 2, 3)
    with pytest.raises(UserError, match=r"0\.self_attn\.q_proj\.weight of shape \(4, 4\) .* 3 heads"):
        blocks(weights, {"0.self_attn": 3})
    weights["0.fc2.weight"] = torch.ones(4, 5)
    with pytest.raises(UserError, match=r"0\.fc2\.weight of shape \(4, 5\) .* 3 FFN rows"):
        blocks(weights, {}, "ffn")
    del weights["0.self_attn.v_proj.weight"]
    with pytest.raises(UserError, match=r"0\.self_attn\.v_proj\.weight"):
        blocks(weights, {"0.self_attn": 2}, "heads")


def test_sizes_per_layer():
    assert parse_per_layer("4,2, 3", "--layer-heads", 3) == (4, 2, 3)
    for text in ("", "4,2", "4,2,3,4", "4,0,3", "4,-2,3", "4,x,3", "4,2,", "4,2.5,3", "4;2;3"):
        with pytest.raises(UserError, match="--layer-heads .*3 numbers"):
            parse_per_layer(text, "--layer-heads", 3)
