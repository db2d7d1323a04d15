"""Removing zeroed structures, against a Transformer written out here head by head."""

from __future__ import annotations

import os
from argparse import Namespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from train_large.compression.checkpoint import flags_beyond_stock, read_checkpoint, stock_form
from train_large.compression.conversion import Method, quantize_checkpoint
from train_large.compression.shrink import describe, shrink_checkpoint, shrink_state
from train_large.errors import UserError

ENCODER = "encoder.sentence_encoder"
HIDDEN, WIDTH = 8, 4


def random_state(heads: list[int], ffn: list[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> dict:
    """A RoBERTa's state dict, as far as its layers go, with an embedding tied to the output."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    state = {f"{ENCODER}.version": torch.tensor([3.0]), f"{ENCODER}.embed_tokens.weight": normal(30, HIDDEN)}
    for i, (count, rows) in enumerate(zip(heads, ffn)):
        layer = f"{ENCODER}.layers.{i}"
        for part in "kvq":
            state[f"{layer}.self_attn.{part}_proj.weight"] = normal(count * WIDTH, HIDDEN)
            state[f"{layer}.self_attn.{part}_proj.bias"] = normal(count * WIDTH)
        state[f"{layer}.self_attn.out_proj.weight"] = normal(HIDDEN, count * WIDTH)
        state[f"{layer}.self_attn.out_proj.bias"] = normal(HIDDEN)
        state[f"{layer}.fc1.weight"], state[f"{layer}.fc1.bias"] = normal(rows, HIDDEN), normal(rows)
        state[f"{layer}.fc2.weight"], state[f"{layer}.fc2.bias"] = normal(HIDDEN, rows), normal(HIDDEN)
    return {**state, "encoder.lm_head.weight": state[f"{ENCODER}.embed_tokens.weight"]}


def output(state: dict, layers: int) -> Tensor:
    """What the layers make of eight vectors: one head, one row at a time."""
    x = torch.randn(8, HIDDEN, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for i in range(layers):
        own = {name.partition(f"layers.{i}.")[2]: tensor for name, tensor in state.items() if f"layers.{i}." in name}
        y = own["self_attn.out_proj.bias"].clone().expand(8, HIDDEN)
        for start in range(0, len(own["self_attn.q_proj.bias"]), WIDTH):
            part = slice(start, start + WIDTH)
            q, k, v = (
                x @ own[f"self_attn.{name}_proj.weight"][part].T + own[f"self_attn.{name}_proj.bias"][part]
                for name in "qkv"
            )
            y = y + (q @ k.T / WIDTH**0.5).softmax(1) @ v @ own["self_attn.out_proj.weight"][:, part].T
        x = torch.nn.functional.layer_norm(x + y, (HIDDEN,))
        z = own["fc2.bias"].clone().expand(8, HIDDEN)
        for row in range(len(own["fc1.bias"])):
            fires = torch.nn.functional.gelu(x @ own["fc1.weight"][row] + own["fc1.bias"][row])
            z = z + fires[:, None] * own["fc2.weight"][:, row]
        x = torch.nn.functional.layer_norm(x + z, (HIDDEN,))
    return x


def counts_of(heads: list[int]) -> dict[str, int]:
    return {f"{ENCODER}.layers.{i}.self_attn": count for i, count in enumerate(heads)}


# What may be zero of a head, of an FFN row, and whether it is then without effect.
OF_HEAD = {
    "nothing": ([], False),
    "all": (["q_proj.weight", "q_proj.bias", "k_proj.weight", "v_proj.weight", "v_proj.bias", "out_proj.weight"], True),
    "output": (["out_proj.weight"], True),
    "value": (["v_proj.weight", "v_proj.bias"], True),
    "value without its bias": (["v_proj.weight", "q_proj.weight", "k_proj.weight"], False),
    "value's bias": (["v_proj.bias"], False),
    "query and key": (["q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias"], False),
}
OF_ROW = {
    "nothing": ([], False),
    "all": (["fc1.weight", "fc1.bias", "fc2.weight"], True),
    "output": (["fc2.weight"], True),
    "input": (["fc1.weight", "fc1.bias"], True),
    "input without its bias": (["fc1.weight"], False),
    "bias": (["fc1.bias"], False),
}


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_what_has_no_effect_goes_and_the_rest_computes_the_same(data):
    heads = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3), "heads")
    ffn = [data.draw(st.integers(1, 5), "rows") for _ in heads]
    state = random_state(heads, ffn)
    expected = {}
    for i, (count, rows) in enumerate(zip(heads, ffn)):
        layer = f"{ENCODER}.layers.{i}"
        for name, structures, size, table in (
            (f"{layer}.self_attn", count, WIDTH, OF_HEAD),
            (layer, rows, 1, OF_ROW),
        ):
            gone = 0
            for j in range(structures):
                zeros, has_no_effect = table[data.draw(st.sampled_from(sorted(table)), f"{name} {j}")]
                gone += has_no_effect
                for part in zeros:
                    dim = -1 if part.startswith(("out_proj", "fc2")) else 0
                    state[f"{name}.{part}"].narrow(dim, j * size, size).fill_(-0.0 if j % 2 else 0.0)
            expected[name] = max(1, structures - gone)
    before = output(state, len(heads))
    smaller, counts = shrink_state(state, counts_of(heads))
    assert counts == expected
    assert smaller.keys() == state.keys()
    torch.testing.assert_close(output(smaller, len(heads)), before, rtol=1e-10, atol=1e-10)
    # Nothing without effect is left, so a second time changes nothing, unless it is the one that stays.
    again, same = shrink_state(smaller, {name: counts[name] for name in counts_of(heads)})
    assert same == counts
    assert all(again[name] is smaller[name] for name in smaller)


def test_tied_tensors_stay_tied_and_untouched_ones_are_not_copied():
    state = random_state([3, 2], [4, 4])
    for name in [name for name in state if "layers.0" in name]:
        state[name.replace("layers.0", "layers.1")] = state[name]
    state[f"{ENCODER}.layers.0.self_attn.out_proj.weight"][:, :WIDTH] = 0
    state[f"{ENCODER}.layers.0.fc2.weight"][:, 1] = 0
    smaller, counts = shrink_state(state, counts_of([3, 3]))
    assert list(counts.values()) == [2, 3, 2, 3]
    for name in (name for name in smaller if "layers.0" in name):
        assert smaller[name] is smaller[name.replace("layers.0", "layers.1")]
    assert smaller["encoder.lm_head.weight"] is state[f"{ENCODER}.embed_tokens.weight"]


def test_equal_weights_in_layers_that_lose_different_heads():
    state = random_state([2, 2], [3, 3])
    queries = [f"{ENCODER}.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)]
    state[queries[1]] = state[queries[0]]
    for i, own in enumerate((slice(0, WIDTH), slice(WIDTH, None))):
        state[f"{ENCODER}.layers.{i}.self_attn.out_proj.weight"][:, own] = 0
    before = output(state, 2)
    smaller, _ = shrink_state(state, counts_of([2, 2]))
    assert not torch.equal(smaller[queries[0]], smaller[queries[1]])
    torch.testing.assert_close(output(smaller, 2), before)


def checkpoint(state: dict, heads: int, **model) -> dict:
    layers = sum(name.endswith(".fc1.bias") for name in state)
    shape = {"encoder_layers": layers, "encoder_embed_dim": HIDDEN, "encoder_attention_heads": heads}
    shape |= {"encoder_ffn_embed_dim": 4, "encoder_normalize_before": True, "_name": "prenorm_roberta"}
    return {
        "args": None,
        "cfg": {
            "common": {"user_dir": "fairseq_plugins"},
            "model": Namespace(arch="prenorm_roberta", **{**shape, **model}),
            "task": {"_name": "pruning_masked_lm", "data": "d", "prune_structure": "heads"},
            "criterion": {"_name": "masked_lm"},
            "lr_scheduler": {"_name": "fixed", "lr": [0.1]},
        },
        "model": state,
        "optimizer_history": [
            {"criterion_name": "C", "optimizer_name": "A", "lr_scheduler_state": {}, "num_updates": 7}
        ],
        "extra_state": {"train_iterator": {"epoch": 3}},
        "last_optimizer_state": {"state": {0: torch.ones(10)}},
    }


def pruned(dtype: torch.dtype = torch.float32) -> dict:
    """Two layers of two heads and four rows; the first has lost a head and a row, the other two rows."""
    state = random_state([2, 2], [4, 4], dtype=dtype)
    attention = f"{ENCODER}.layers.0.self_attn"
    for name in [f"{attention}.{x}_proj.{kind}" for x in "qkv" for kind in ("weight", "bias")]:
        state[name][:WIDTH] = 0
    state[f"{attention}.out_proj.weight"][:, :WIDTH] = 0
    for i, rows in enumerate(([1], [0, 2])):
        for name in ("fc1.weight", "fc1.bias"):
            state[f"{ENCODER}.layers.{i}.{name}"][rows] = 0
        state[f"{ENCODER}.layers.{i}.fc2.weight"][:, rows] = 0
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_checkpoint_with_layers_of_different_shapes(tmp_path, dtype):
    source, target = tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save(checkpoint(pruned(dtype=dtype), 2), source)
    summary = shrink_checkpoint(source, target)
    assert (summary.heads_before, summary.heads) == ((2, 2), (1, 2))
    assert (summary.ffn_before, summary.ffn) == ((4, 4), (3, 2))
    head, row = 4 * HIDDEN * WIDTH + 3 * WIDTH, 2 * HIDDEN + 1
    assert summary.parameters_before - summary.parameters == head + 3 * row
    size = torch.empty(0, dtype=dtype).element_size()
    assert (summary.bytes_before, summary.bytes) == (summary.parameters_before * size, summary.parameters * size)
    assert summary.flags == "--layer-heads 1,2 --layer-ffn 3,2"
    assert not summary.stock

    assert torch.serialization.get_unsafe_globals_in_checkpoint(target) == []
    result = read_checkpoint(target)
    assert result["model"][f"{ENCODER}.layers.0.self_attn.q_proj.weight"].shape == (WIDTH, HIDDEN)
    assert {tensor.dtype for name, tensor in result["model"].items() if "version" not in name} == {dtype}
    model = result["cfg"]["model"]
    assert (model["_name"], model["arch"]) == ("prenorm_roberta", "prenorm_roberta")
    assert (model["layer_heads"], model["layer_ffn"]) == ("1,2", "3,2")
    assert model["encoder_attention_heads"] == 2  # which says how wide a head is
    assert result["cfg"]["task"]["_name"] == "masked_lm"
    assert "last_optimizer_state" not in result
    assert result["compression"] == [
        {"version": 1, "method": "structures", "heads": [1, 2], "ffn": [3, 2], "parameters": summary.parameters}
    ]
    assert sorted(os.listdir(tmp_path)) == ["in.pt", "out.pt"]

    # Once more, in place: as much as there is.
    again = shrink_checkpoint(target, target)
    assert again.heads == again.heads_before == summary.heads
    assert again.ffn == again.ffn_before == summary.ffn
    assert again.flags == summary.flags
    assert "Nothing to remove" in describe(again)
    twice = read_checkpoint(target)
    assert all(torch.equal(tensor, result["model"][name]) for name, tensor in twice["model"].items())


def test_the_file_is_as_small_as_its_tensors(tmp_path):
    """A slice of a tensor would take the whole tensor with it."""
    state = random_state([2, 2], [2000, 2000])
    for i in (0, 1):
        state[f"{ENCODER}.layers.{i}.fc2.weight"][:, : 1000 + i] = 0
    torch.save(checkpoint(state, 2), tmp_path / "in.pt")
    summary = shrink_checkpoint(tmp_path / "in.pt", tmp_path / "out.pt")
    assert summary.ffn == (1000, 999)
    assert summary.bytes <= (tmp_path / "out.pt").stat().st_size < summary.bytes + 20_000


def uniform(*zeros: int) -> dict:
    state = random_state([2, 2], [4, 4], dtype=torch.float32)
    for i in (0, 1):
        state[f"{ENCODER}.layers.{i}.fc2.weight"][:, list(zeros)] = 0
    return state


@pytest.mark.parametrize("name", ["prenorm_roberta", "roberta_prenorm", "roberta_base"])
def test_layers_that_stay_alike_are_stocks_own(tmp_path, name):
    made = checkpoint(uniform(1, 3), 2, _name=name, encoder_normalize_before=name != "roberta_base")
    torch.save(made, tmp_path / "in.pt")
    summary = shrink_checkpoint(tmp_path / "in.pt", tmp_path / "out.pt")
    assert summary.stock
    assert summary.flags == "--encoder-ffn-embed-dim 2"
    model = read_checkpoint(tmp_path / "out.pt")["cfg"]["model"]
    assert model["_name"] == ("roberta_base" if name == "roberta_base" else "roberta_prenorm")
    assert (model["encoder_ffn_embed_dim"], flags_beyond_stock(model)) == (2, "")
    assert "stock fairseq" in describe(summary)


def test_with_nothing_to_remove_the_model_is_as_it_was(tmp_path):
    state = uniform()
    torch.save(checkpoint(state, 2), tmp_path / "in.pt")
    summary = shrink_checkpoint(tmp_path / "in.pt", tmp_path / "out.pt")
    assert summary.parameters == summary.parameters_before
    assert summary.flags == ""
    assert "Nothing to remove" in describe(summary)
    result = read_checkpoint(tmp_path / "out.pt")["model"]
    assert all(torch.equal(tensor, result[name]) for name, tensor in state.items())


def test_a_stock_model_whose_layers_differ_becomes_ours(tmp_path):
    made = checkpoint(pruned(), 2)
    vars(made["cfg"]["model"]).update(_name="roberta_prenorm", arch="roberta_prenorm")
    torch.save(made, tmp_path / "in.pt")
    assert not shrink_checkpoint(tmp_path / "in.pt", tmp_path / "out.pt").stock
    model = read_checkpoint(tmp_path / "out.pt")["cfg"]["model"]
    assert (model["_name"], model["arch"], model["layernorm_embedding"]) == ("prenorm_roberta",) * 2 + (False,)


def test_quantized_before_or_after(tmp_path):
    """The grid is that of what is not zero, so the order does not matter."""
    torch.save(checkpoint(pruned(), 2), tmp_path / "in.pt")
    quantize_checkpoint(tmp_path / "in.pt", tmp_path / "q.pt", Method(bits=4))
    shrink_checkpoint(tmp_path / "q.pt", tmp_path / "qs.pt")
    shrink_checkpoint(tmp_path / "in.pt", tmp_path / "s.pt")
    quantize_checkpoint(tmp_path / "s.pt", tmp_path / "sq.pt", Method(bits=4))
    one, other = (read_checkpoint(tmp_path / name) for name in ("qs.pt", "sq.pt"))
    assert all(torch.equal(tensor, other["model"][name]) for name, tensor in one["model"].items())
    for result, methods in ((one, ["uniform", "structures"]), (other, ["structures", "uniform"])):
        assert [record["method"] for record in result["compression"]] == methods
        assert result["cfg"]["model"]["layer_heads"] == "1,2"
        assert result["cfg"]["model"]["_name"] == "prenorm_roberta"  # not a name under which stock builds another


def test_stock_form_keeps_the_name_that_can_build_the_model():
    state = random_state([1, 2], [4, 4])
    given = stock_form(checkpoint(state, 2, layer_heads="1,2", _name="prenorm_roberta_3l_256h"))["cfg"]["model"]
    assert (given["_name"], given["arch"]) == ("prenorm_roberta", "prenorm_roberta")
    plain = stock_form(checkpoint(state, 2, layer_heads=None, layer_ffn=None))["cfg"]["model"]
    assert (plain["_name"], plain["arch"]) == ("roberta_prenorm", "roberta_prenorm")


def translation() -> dict:
    state = random_state([2, 2], [4, 4])
    return {name.replace(ENCODER, side): tensor for side in ("encoder", "decoder") for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: checkpoint(translation(), 2, _name="transformer"), "only the layers of a RoBERTa"),
        (lambda: checkpoint(pruned(), 2, _name="roberta_base", encoder_normalize_before=False), "--prune-scope layer"),
        (lambda: checkpoint(random_state([3], [4]), 2), "layers.0.self_attn.q_proj.weight of shape"),
        (lambda: checkpoint(pruned(), 2, encoder_layers=3), r"no .*layers\.2\.self_attn\.q_proj\.weight"),
        (lambda: checkpoint(pruned(), 2, layer_heads="1"), "--layer-heads 1"),
        (lambda: checkpoint(pruned(), 2, encoder_attention_heads=None), "encoder_attention_heads"),
        (lambda: {"model": pruned(), "cfg": None}, "no configuration"),
    ],
)
def test_what_cannot_be_made_smaller_is_refused(tmp_path, made, words):
    state = made()
    torch.save(state, tmp_path / "in.pt")
    with pytest.raises(UserError, match=words) as caught:
        shrink_checkpoint(tmp_path / "in.pt", tmp_path / "out.pt")
    assert str(tmp_path / "in.pt") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["in.pt"]


def test_describe(tmp_path):
    torch.save(checkpoint(pruned(), 2), tmp_path / "in.pt")
    text = describe(shrink_checkpoint(tmp_path / "in.pt", tmp_path / "out.pt"))
    assert [line.split()[:2] for line in text.splitlines()[:2]] == [["heads", "4"], ["FFN", "rows"]]
    assert "4 ->              3  (75.0%)" in text
    assert "--user-dir fairseq_plugins" in text
    assert "--layer-heads 1,2 --layer-ffn 3,2" in text
