"""Layers of different shapes: the attention against fairseq's own, and models that pruning and shrinking have made."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils, options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.modules import MultiheadAttention
from omegaconf import OmegaConf
from torch import Tensor

from fairseq_plugins.models.narrow_attention import NarrowAttention
from train_large.compression.conversion import Method, quantize_checkpoint
from train_large.compression.shrink import shrink_checkpoint
from train_large.compression.structures import blocks, smallest_structures, spread
from train_large.sizes import Size, parameters

HIDDEN, WIDTH, LENGTH, BATCH = 24, 4, 7, 3


def attentions(heads: int, kept: list[int], dropout: float = 0.0) -> tuple[MultiheadAttention, NarrowAttention]:
    """fairseq's attention whose other heads put nothing out, and the narrow one that has not got them."""
    torch.manual_seed(1)
    full = MultiheadAttention(HIDDEN, heads, dropout=dropout, self_attention=True)
    for parameter in full.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    narrow = NarrowAttention(HIDDEN, len(kept), HIDDEN // heads, dropout)
    mine = torch.cat([torch.arange(HIDDEN // heads) + head * (HIDDEN // heads) for head in kept])
    others = torch.ones(HIDDEN, dtype=torch.bool).index_fill(0, mine, False)
    with torch.no_grad():
        full.out_proj.weight[:, others] = 0
        for part in ("q_proj", "k_proj", "v_proj"):
            for kind in ("weight", "bias"):
                getattr(getattr(narrow, part), kind).copy_(getattr(getattr(full, part), kind)[mine])
        narrow.out_proj.weight.copy_(full.out_proj.weight[:, mine])
        narrow.out_proj.bias.copy_(full.out_proj.bias)
    return full.eval(), narrow.eval()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(2)
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[1, 4:] = True
    return torch.randn(LENGTH, BATCH, HIDDEN), padding, torch.randn(LENGTH, LENGTH).triu(1).mul(-1e8)


@pytest.mark.parametrize("kept", [[1], [0, 4, 5], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_it_computes_what_fairseqs_own_does(kept, padded, masked, need_weights):
    full, narrow = attentions(6, kept)
    x, padding, mask = inputs()
    flags = {"key_padding_mask": padding if padded else None, "attn_mask": mask if masked else None}
    with torch.no_grad():
        right = full(x, x, x, need_weights=need_weights, **flags)[0]
        found, weights = narrow(x, x, x, need_weights=need_weights, **flags)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    if len(kept) == 6 and not need_weights:
        assert torch.equal(found, right)
    assert (weights is not None) == need_weights
    if need_weights:
        assert weights.shape == (BATCH, LENGTH, LENGTH)


def test_gradients_are_those_of_the_full_one():
    full, narrow = attentions(6, [2, 3])
    x, padding, _ = inputs()
    for module in (full, narrow):
        module(x, x, x, padding, need_weights=False)[0].pow(2).sum().backward()
    own = slice(2 * WIDTH, 4 * WIDTH)
    for part in ("q_proj", "k_proj", "v_proj"):
        right = getattr(full, part).weight.grad[own]
        torch.testing.assert_close(getattr(narrow, part).weight.grad, right, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(narrow.out_proj.weight.grad, full.out_proj.weight.grad[:, own], rtol=1e-4, atol=1e-3)


def test_dropout_drops_in_training_and_not_after():
    full, narrow = attentions(6, [0, 3], dropout=1.0)
    x, _, _ = inputs()
    with torch.no_grad():
        for module in (full, narrow):
            trained = module.train()(x, x, x, need_weights=False)[0]
            assert torch.equal(trained, module.out_proj.bias.expand_as(trained))
        results = [module.eval()(x, x, x, need_weights=False)[0] for module in (full, narrow)]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


# -- models --

SIZE = "--encoder-layers 3 --encoder-embed-dim 32 --encoder-attention-heads 4 --encoder-ffn-embed-dim 40"
SIZE += " --max-positions 20 --tokens-per-sample 20 --load-checkpoint-heads"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "dict.txt").write_text("".join(f"w{i} {100 - i}\n" for i in range(50)))
    return folder


def configuration(data: Path, *flags: str) -> argparse.Namespace:
    words = " ".join(("--task masked_lm --criterion masked_lm --cpu", SIZE, *flags)).split()
    return options.parse_args_and_arch(options.get_training_parser("masked_lm"), [str(data), *words])


def build(data: Path, *flags: str, arch: str = "prenorm_roberta"):
    """A model with every bias and norm away from its first value, and its configuration."""
    cfg = convert_namespace_to_omegaconf(configuration(data, f"--arch {arch}", *flags))
    torch.manual_seed(1)
    model = tasks.setup_task(cfg.task).build_model(cfg.model)
    model.register_classification_head("labels", num_classes=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval(), cfg


@torch.no_grad()
def outputs(model) -> list[Tensor]:
    tokens = torch.randint(4, 50, (4, 12), generator=torch.Generator().manual_seed(1))
    tokens[1, 9:] = 1  # padding
    return [model.eval()(tokens)[0], model(tokens, classification_head_name="labels")[0]]


def prune(model, sparsity: float, kinds: str = "heads+ffn", scope: str = "global") -> None:
    names = dict(model.named_parameters())
    heads = {name: module.num_heads for name, module in model.named_modules() if hasattr(module, "num_heads")}
    found = blocks(names, heads, kinds)
    with torch.no_grad():
        for name, mask in spread(found, smallest_structures(found, sparsity, scope)).items():
            names[name].masked_fill_(mask, 0)


def save(model, cfg, path: Path) -> Path:
    history = {"criterion_name": "M", "optimizer_name": "A", "lr_scheduler_state": {}, "num_updates": 7}
    plain = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    torch.save({"args": None, "cfg": plain, "model": model.state_dict(), "optimizer_history": [history]}, path)
    return path


def load(path: Path):
    return checkpoint_utils.load_model_ensemble_and_task([str(path)])[0][0]


@pytest.mark.parametrize("share", ["none", "all", "attention"])
@pytest.mark.parametrize("kinds", ["heads", "ffn", "heads+ffn"])
def test_a_shrunk_model_computes_what_the_pruned_one_does(data, tmp_path, share, kinds):
    model, cfg = build(data, f"--share-layers {share}")
    prune(model, 0.5, kinds)
    pruned = outputs(model)
    summary = shrink_checkpoint(save(model, cfg, tmp_path / "in.pt"), tmp_path / "out.pt")
    assert sum(summary.heads) < 12 if "heads" in kinds else sum(summary.heads) == 12
    assert sum(summary.ffn) < 120 if "ffn" in kinds else sum(summary.ffn) == 120
    shrunk = load(tmp_path / "out.pt")
    for found, right in zip(outputs(shrunk), pruned, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-5)
    if share == "none" or not summary.stock:  # stock has no shared layers: as many layers of the same weights
        assert sum(parameter.numel() for parameter in shrunk.parameters()) == summary.parameters
    layers = shrunk.encoder.sentence_encoder.layers
    assert tuple(layer.self_attn.num_heads for layer in layers) == summary.heads
    assert tuple(layer.fc1.out_features for layer in layers) == summary.ffn
    assert (layers[0] is layers[2]) == (share == "all" and not summary.stock)
    # Names are those of before, so whatever reads checkpoints of this model reads this one.
    assert shrunk.state_dict().keys() == model.state_dict().keys()


def test_shapes_that_stock_has_load_there(data, tmp_path):
    model, cfg = build(data)
    prune(model, 0.5, "ffn", "layer")
    pruned = outputs(model)
    summary = shrink_checkpoint(save(model, cfg, tmp_path / "in.pt"), tmp_path / "out.pt")
    assert summary.stock
    stock = load(tmp_path / "out.pt")
    assert type(stock).__name__ == "RobertaModel"
    for found, right in zip(outputs(stock), pruned, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-5)
    size = Size(3, 32, 20, 4)
    assert sum(p.numel() for n, p in stock.named_parameters() if "classification" not in n) == parameters(size, 55, 20)


def test_a_shrunk_model_is_quantized_and_pruned_further(data, tmp_path):
    model, cfg = build(data)
    prune(model, 0.4)
    shrink_checkpoint(save(model, cfg, tmp_path / "in.pt"), tmp_path / "small.pt")
    quantize_checkpoint(tmp_path / "small.pt", tmp_path / "quantized.pt", Method(bits=8))
    small, quantized = load(tmp_path / "small.pt"), load(tmp_path / "quantized.pt")
    assert not torch.equal(outputs(small)[0], outputs(quantized)[0])
    torch.testing.assert_close(outputs(small), outputs(quantized), rtol=0, atol=0.5)
    # A ladder goes on from here: what is left is pruned, and removed.
    prune(small, 0.3)
    pruned = outputs(small)
    again = shrink_checkpoint(
        save(small, OmegaConf.create({"model": small.args}), tmp_path / "in.pt"), tmp_path / "2.pt"
    )
    assert sum(again.ffn) < sum(again.ffn_before) < 120
    assert sum(again.heads_before) < 12
    result = torch.load(tmp_path / "2.pt", weights_only=True)
    smaller, _ = build(data, again.flags)
    smaller.load_state_dict(result["model"], strict=True)
    for found, right in zip(outputs(smaller), pruned, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-5)


def test_the_flags_of_the_summary_build_the_shape(data, tmp_path):
    model, cfg = build(data)
    prune(model, 0.5)
    summary = shrink_checkpoint(save(model, cfg, tmp_path / "in.pt"), tmp_path / "out.pt")
    again, _ = build(data, summary.flags)
    small = load(tmp_path / "out.pt")
    again.load_state_dict(small.state_dict(), strict=True)
    assert all(torch.equal(*pair) for pair in zip(outputs(again), outputs(small), strict=True))


def test_a_narrow_model_starts_as_any_other(data):
    """Weights of 0.02, biases of zero; and layers that keep their shape are fairseq's own."""
    cfg = convert_namespace_to_omegaconf(
        configuration(data, "--arch prenorm_roberta --layer-heads 2,4,1 --layer-ffn 40,60,7")
    )
    layers = tasks.setup_task(cfg.task).build_model(cfg.model).encoder.sentence_encoder.layers
    assert [type(layer.self_attn) for layer in layers] == [NarrowAttention, MultiheadAttention, NarrowAttention]
    for name, parameter in layers.named_parameters():
        if "norm" not in name and parameter.dim() == 1:
            assert parameter.eq(0).all()
        if parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2)


def test_only_other_shapes_draw_random_numbers(data):
    """A seed gives the model that it gives without the flags."""
    every, last = "--layer-heads 4,4,4 --layer-ffn 40,40,40", "--layer-heads 4,4,3 --layer-ffn 40,40,40"
    plain, same, other = (build(data, given)[0].state_dict() for given in ("", every, last))
    assert all(torch.equal(tensor, same[name]) for name, tensor in plain.items())
    assert not torch.equal(plain["encoder.lm_head.dense.weight"], other["encoder.lm_head.dense.weight"])


def test_shapes_that_all_layers_have_are_those_of_the_whole_model(data):
    args = configuration(data, "--arch prenorm_roberta --layer-heads 4,4,4 --layer-ffn 7,7,7")
    assert (args.layer_heads, args.layer_ffn, args.encoder_ffn_embed_dim) == (None, None, 7)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--layer-heads 1,2", "--layer-heads 1,2: give 3 numbers"),
        ("--layer-heads 1,2,0", "--layer-heads 1,2,0"),
        ("--layer-ffn 5,x,5", "--layer-ffn 5,x,5"),
        ("--share-layers attention --layer-heads 1,2,3", "--share-layers attention and --layer-heads 1,2,3"),
        ("--share-layers all --layer-ffn 1,2,3", "--share-layers all and --layer-ffn 1,2,3"),
        ("--encoder-layers-to-keep 0,2 --layer-ffn 1,2,3", "--encoder-layers-to-keep and --layer-ffn"),
    ],
)
def test_shapes_that_cannot_be_built_are_refused_by_their_flag(data, flags, named):
    with pytest.raises(SystemExit, match=named):
        configuration(data, "--arch prenorm_roberta", flags)


def test_shared_attention_leaves_the_feed_forward_networks_free(data):
    model, _ = build(data, "--share-layers attention --layer-heads 3,3,3 --layer-ffn 9,8,7")
    layers = model.encoder.sentence_encoder.layers
    assert layers[0].self_attn is layers[2].self_attn
    assert [layer.fc1.out_features for layer in layers] == [9, 8, 7]
