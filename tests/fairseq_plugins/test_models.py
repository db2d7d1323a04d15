from __future__ import annotations

import argparse
import io
import os
import sys
from pathlib import Path

import forked
import pytest
import torch
from fairseq import models, options
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks.masked_lm import MaskedLMConfig, MaskedLMTask
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from fairseq.trainer import _catalog_shared_params
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import fairseq_plugins.models  # noqa: F401
from train_large.compression.checkpoint import read_checkpoint
from train_large.sizes import (
    ROBERTA,
    SHARING,
    Size,
    parameters,
    parameters_without_embeddings,
    translation_parameters,
)

ROOT = Path(__file__).parents[2]
SMALL = (
    "--encoder-layers",
    "3",
    "--encoder-embed-dim",
    "32",
    "--encoder-attention-heads",
    "4",
    "--max-positions",
    "20",
)


def dictionary(words: int = 50) -> Dictionary:
    result = Dictionary()
    for word in range(words):
        result.add_symbol(f"w{word}")
    return result


def command_line(arch: str, *flags: str) -> argparse.Namespace:
    """What `fairseq-train --arch ARCH FLAGS` makes of it, the architecture's defaults filled in."""
    words = ["data", "--task", "masked_lm", "--arch", arch, *flags]
    return options.parse_args_and_arch(options.get_training_parser("masked_lm"), words)


def task(words: int = 50) -> MaskedLMTask:
    return MaskedLMTask(MaskedLMConfig(data="data", tokens_per_sample=20), dictionary(words))


def build(arch: str, *flags: str, words: int = 50):
    torch.manual_seed(0)
    config = convert_namespace_to_omegaconf(command_line(arch, *flags))
    return task(words).build_model(config.model)


def logits(model, rows: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, 50, (rows, 12), generator=generator)
    tokens[1, 9:] = 1  # padding
    with torch.no_grad():
        return model.eval()(tokens)[0]


def trained(model):
    """The model after one step on some loss, away from its initial state (biases zero, norms one)."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.train()(torch.arange(4, 28).view(2, 12))[0].logsumexp(-1).sum().backward()
    optimizer.step()
    return model


@pytest.mark.parametrize("size", ROBERTA, ids=lambda size: size.name)
def test_every_size_of_the_paper_is_an_architecture(size):
    args = command_line(f"prenorm_roberta_{size.name}")
    assert Size(
        args.encoder_layers, args.encoder_embed_dim, args.encoder_ffn_embed_dim, args.encoder_attention_heads
    ) == Size(size.layers, size.hidden)
    assert args.encoder_normalize_before
    assert args.layernorm_embedding
    assert args.share_layers == "none"
    assert (args.dropout, args.attention_dropout, args.activation_fn) == (0.1, 0.1, "gelu")


def test_free_sizes_follow_the_hidden_size_and_flags_win():
    args = command_line("prenorm_roberta", "--encoder-embed-dim", "1024")
    assert (args.encoder_layers, args.encoder_ffn_embed_dim, args.encoder_attention_heads) == (12, 4096, 16)
    assert command_line("prenorm_roberta", "--encoder-embed-dim", "16").encoder_attention_heads == 1
    args = command_line(
        "prenorm_roberta_12l_768h",
        *("--encoder-layers", "5", "--encoder-embed-dim", "128", "--encoder-attention-heads", "8", "--dropout", "0.3"),
        *("--no-embedding-norm", "--share-layers", "attention"),
    )
    assert (args.encoder_layers, args.encoder_embed_dim, args.encoder_ffn_embed_dim) == (5, 128, 512)
    assert (args.encoder_attention_heads, args.dropout) == (8, 0.3)
    assert (args.layernorm_embedding, args.share_layers) == (False, "attention")
    assert command_line("prenorm_roberta_3l_256h", "--encoder-ffn-embed-dim", "7").encoder_ffn_embed_dim == 7


@settings(max_examples=25, deadline=None)
@given(
    layers=st.integers(1, 4),
    heads=st.integers(1, 4),
    width=st.integers(1, 8),
    ffn=st.integers(1, 40),
    positions=st.integers(1, 30),
    words=st.integers(1, 60),
    norm=st.booleans(),
    share=st.sampled_from(SHARING),
)
def test_parameters_are_counted_to_the_last_one(layers, heads, width, ffn, positions, words, norm, share):
    size = Size(layers, heads * width, ffn, heads)
    args = argparse.Namespace(
        arch="prenorm_roberta",
        encoder_layers=layers,
        encoder_embed_dim=size.hidden,
        encoder_ffn_embed_dim=ffn,
        encoder_attention_heads=heads,
        max_positions=positions,
        no_embedding_norm=not norm,
        share_layers=share,
    )
    model = task(words).build_model(args)
    vocabulary = words + 5  # fairseq's four special symbols and the mask
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert sum(counts.values()) == parameters(size, vocabulary, positions, norm, share)
    without = sum(count for name, count in counts.items() if ".embed_" not in name)
    assert without == parameters_without_embeddings(size, vocabulary, norm, share)


def test_positions_are_the_length_of_the_sequences_unless_given():
    model = build("prenorm_roberta_3l_256h", "--tokens-per-sample", "128", words=995)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters(Size(3, 256), 1000)


@settings(max_examples=10, deadline=None)
@given(layers=st.integers(1, 3), heads=st.integers(1, 3), width=st.integers(4, 8), words=st.integers(1, 60))
def test_translation_parameters_are_counted_to_the_last_one(layers, heads, width, words):
    size, shape = Size(layers, heads * width, heads=heads), {}
    for side in ("encoder", "decoder"):
        shape |= {f"{side}_layers": layers, f"{side}_embed_dim": size.hidden, f"{side}_ffn_embed_dim": size.ffn}
        shape |= {f"{side}_attention_heads": heads}
    args = argparse.Namespace(arch="transformer", share_all_embeddings=True, **shape)
    entries = dictionary(words)
    model = TranslationTask(TranslationConfig(), entries, entries).build_model(args)
    assert sum(parameter.numel() for parameter in model.parameters()) == translation_parameters(size, words + 4)


@pytest.mark.parametrize("norm", [True, False])
def test_stock_fairseq_computes_the_same(norm):
    ours = trained(build("prenorm_roberta", *SMALL, *([] if norm else ["--no-embedding-norm"])))
    stock = build(
        "roberta_prenorm", *SMALL, "--encoder-ffn-embed-dim", "128", *(["--layernorm-embedding"] if norm else [])
    )
    assert type(stock) is models.MODEL_REGISTRY["roberta"]
    assert not torch.equal(logits(stock), logits(ours))
    stock.load_state_dict(ours.state_dict(), strict=True)
    assert torch.equal(logits(stock), logits(ours))


def test_norms_stand_before_the_sub_layers_and_at_the_end():
    """With the last projections of every layer zero, what comes out is the final norm of the embedding."""
    model = trained(build("prenorm_roberta", *SMALL)).eval()
    encoder = model.encoder.sentence_encoder
    for layer in encoder.layers:
        for module in (layer.self_attn.out_proj, layer.fc2):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    tokens = torch.arange(4, 28).view(2, 12)
    with torch.no_grad():
        features, _ = model(tokens, features_only=True)
        embedded = encoder.embed_tokens(tokens) + encoder.embed_positions(tokens)
        assert torch.allclose(features, encoder.layer_norm(encoder.layernorm_embedding(embedded)), atol=1e-6)


@pytest.mark.parametrize("share", ["all", "attention"])
def test_sharing_survives_conversion_training_and_files(share):
    model = build("prenorm_roberta", *SMALL, "--share-layers", share)
    assert len(model.encoder.sentence_encoder.layers) == 3
    groups = _catalog_shared_params(model)
    tied = {name for group in groups for name in group if ".layers." in name}
    attention = {name for name in tied if ".self_attn." in name}
    assert len(attention) == 3 * 8  # query, key, value, output: weight and bias in each of three layers
    assert (tied == attention) == (share == "attention")

    model.half().float().double().float()
    assert _catalog_shared_params(model) == groups
    trained(model)
    assert _catalog_shared_params(model) == groups

    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    again = build("prenorm_roberta", *SMALL, "--share-layers", share)
    again.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert _catalog_shared_params(again) == groups
    assert torch.equal(logits(again), logits(model))
    # The names are stock RoBERTa's: an unshared model of the same shape computes the same from the same file.
    plain = build("prenorm_roberta", *SMALL)
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(plain), logits(model))


def test_a_shared_layer_learns_from_all_its_uses():
    """The gradient of the one layer is the sum over the layers of an unshared model with the same weights."""
    shared = build("prenorm_roberta", *SMALL, "--share-layers", "all").eval()
    plain = build("prenorm_roberta", *SMALL).eval()
    plain.load_state_dict(shared.state_dict())
    for model in (shared, plain):
        model(torch.arange(4, 28).view(2, 12))[0].logsumexp(-1).sum().backward()
    weights = [layer.fc1.weight.grad for layer in plain.encoder.sentence_encoder.layers]
    assert torch.allclose(shared.encoder.sentence_encoder.layers[0].fc1.weight.grad, sum(weights), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", ["all", "attention"])
def test_weights_that_differ_do_not_load_into_a_shared_layer(share):
    plain = trained(build("prenorm_roberta", *SMALL))
    with pytest.raises(ValueError, match=f"--share-layers {share}: .*layers 0 and 1 differ"):
        build("prenorm_roberta", *SMALL, "--share-layers", share).load_state_dict(plain.state_dict())


@pytest.mark.parametrize("share", SHARING)
def test_a_model_is_built_again_from_a_checkpoint(share, tmp_path):
    """From the Namespace that fairseq saves, and from the plain dictionary that other tools make of it."""
    args = command_line("prenorm_roberta", *SMALL, "--share-layers", share, "--no-embedding-norm")
    config = convert_namespace_to_omegaconf(args)
    model = trained(task().build_model(config.model))
    assert isinstance(config.model, argparse.Namespace)
    for saved in (config.model, OmegaConf.create({k: v for k, v in vars(config.model).items() if k != "cfg"})):
        again = task().build_model(saved, from_checkpoint=True)
        again.load_state_dict(model.state_dict(), strict=True, model_cfg=config.model)
        assert torch.equal(logits(again), logits(model))
        assert _catalog_shared_params(again) == _catalog_shared_params(model)


def test_a_bare_namespace_is_filled_in():
    args = argparse.Namespace(arch="prenorm_roberta_3l_256h", tokens_per_sample=20)
    model = models.build_model(args, task())
    assert sum(p.numel() for p in model.parameters()) == parameters(Size(3, 256), 55, max_positions=20)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--encoder-layers", "0"], "--encoder-layers 0"),
        (["--encoder-embed-dim", "-8"], "--encoder-embed-dim -8"),
        (["--encoder-attention-heads", "0"], "--encoder-attention-heads 0"),
        (["--encoder-ffn-embed-dim", "0"], "--encoder-ffn-embed-dim 0"),
        (["--encoder-embed-dim", "200"], "--encoder-embed-dim 200 .* 3 heads: .*--encoder-attention-heads"),
        (["--encoder-attention-heads", "5"], "5 heads"),
        (["--no-embedding-norm", "--layernorm-embedding"], "--no-embedding-norm"),
    ],
)
def test_what_cannot_be_built_is_refused_by_the_name_of_its_flag(flags, named):
    with pytest.raises(SystemExit, match=named):
        command_line("prenorm_roberta", *flags)


def test_classification_heads_are_inherited():
    model = build("prenorm_roberta", *SMALL, "--share-layers", "all")
    model.register_classification_head("task", num_classes=3)
    model.eval()
    tokens = torch.arange(4, 28).view(2, 12)
    assert model(tokens, classification_head_name="task")[0].shape == (2, 3)


def run(*command: str, **environment: str) -> str:
    done = forked.run([sys.executable, "-m", *command], cwd=ROOT, env=os.environ | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A data-bin for masked LM in `lm`, and sentences with labels in `task`, by fairseq-preprocess."""
    folder = tmp_path_factory.mktemp("texts")
    words = [f"w{i % 7} w{i % 5} w{i % 3}" for i in range(60)]
    (folder / "text").write_text("\n".join(words) + "\n")
    (folder / "labels").write_text("\n".join("yes" if i % 2 else "no" for i in range(60)) + "\n")
    preprocess = ("fairseq_cli.preprocess", "--only-source", "--workers", "1")
    splits = ("--trainpref", str(folder / "text"), "--validpref", str(folder / "text"))
    run(*preprocess, *splits, "--destdir", str(folder / "lm"))
    entries = ("--srcdict", str(folder / "lm" / "dict.txt"))
    run(*preprocess, *splits, *entries, "--destdir", str(folder / "task" / "input0"))
    labels = ("--trainpref", str(folder / "labels"), "--validpref", str(folder / "labels"))
    run(*preprocess, *labels, "--destdir", str(folder / "task" / "label"))
    return folder


@pytest.mark.slow
def test_pretrained_resumed_and_finetuned_by_fairseq_train(texts, tmp_path):
    size = ("--arch", "prenorm_roberta", "--encoder-layers", "2", "--encoder-embed-dim", "16")
    common = (
        "--optimizer",
        "adam",
        "--lr",
        "0.01",
        "--batch-size",
        "4",
        "--required-batch-size-multiple",
        "1",
        "--cpu",
    )
    train = ("fairseq_cli.train", "--user-dir", "fairseq_plugins", *size, "--share-layers", "attention", *common)
    last, finetuned = tmp_path / "checkpoint_last.pt", tmp_path / "finetuned"

    text = (str(texts / "lm"), "--task", "masked_lm", "--tokens-per-sample", "16", "--save-dir", str(tmp_path))
    run(*train, *text, "--criterion", "masked_lm", "--max-update", "2", OMP_NUM_THREADS="1")
    assert "Loaded checkpoint" in run(
        *train, *text, "--criterion", "masked_lm", "--max-update", "4", OMP_NUM_THREADS="1"
    )
    saved = read_checkpoint(last)
    assert saved["optimizer_history"][-1]["num_updates"] == 4
    attention = [saved["model"][f"encoder.sentence_encoder.layers.{i}.self_attn.k_proj.weight"] for i in range(2)]
    feed_forward = [saved["model"][f"encoder.sentence_encoder.layers.{i}.fc1.weight"] for i in range(2)]
    assert torch.equal(*attention)
    assert not torch.equal(*feed_forward)

    sentences = (str(texts / "task"), "--task", "sentence_prediction", "--num-classes", "2", "--max-positions", "16")
    restore = ("--restore-file", str(last), "--reset-optimizer", "--reset-dataloader", "--reset-meters")
    printed = run(
        *(*train, *sentences, "--criterion", "sentence_prediction", *restore),
        *("--max-update", "3", "--save-dir", str(finetuned)),
        OMP_NUM_THREADS="1",
    )
    assert "Loaded checkpoint" in printed
    head = read_checkpoint(finetuned / "checkpoint_last.pt")["model"]
    assert head["classification_heads.sentence_classification_head.out_proj.weight"].shape == (2, 16)


@pytest.mark.parametrize("positions", ["random", "sinusoidal"])
def test_embeddings_start_as_the_flags_say(positions):
    size = ("--encoder-layers", "1", "--encoder-embed-dim", "32", "--max-positions", "40")
    model = build("prenorm_roberta", *size, "--embedding-std", "0.1", "--position-init", positions, words=400)
    encoder = model.encoder.sentence_encoder
    tokens, places = encoder.embed_tokens, encoder.embed_positions
    for embedding in (tokens, places):
        weights = embedding.weight[embedding.padding_idx + 1 :]
        assert weights.std().item() == pytest.approx(0.1, rel=0.15)
        assert embedding.weight.requires_grad
        assert embedding.weight[embedding.padding_idx].eq(0).all()
    assert model.encoder.lm_head.weight is tokens.weight
    rows = torch.nn.functional.normalize(places.weight[2:], dim=1)
    near, far = (rows[:-6] * rows[1:-5]).sum(1).mean(), (rows[:-6] * rows[6:]).sum(1).mean()
    assert (near > 0.8 and near > far + 0.3) == (positions == "sinusoidal")


def test_embeddings_start_as_in_bert_unless_told():
    torch.manual_seed(1)
    ours = build("prenorm_roberta", "--encoder-layers", "1", "--encoder-embed-dim", "32", words=400)
    assert ours.encoder.sentence_encoder.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert ours.args.position_init == "random"


@pytest.mark.parametrize("flags", [("--embedding-std", "0"), ("--embedding-std", "-1")])
def test_an_embedding_without_spread_is_refused(flags):
    with pytest.raises(SystemExit, match="--embedding-std"):
        build("prenorm_roberta", *flags)
