"""What evaluate.py finds in a checkpoint besides accuracy."""

from __future__ import annotations

import os
from argparse import Namespace

import pytest
import torch
from evaluate import file_bytes, weight_errors

from train_large.compression.conversion import unpack_checkpoint
from train_large.compression.quantization import quantize_state
from train_large.report.results import WeightError


@pytest.fixture
def state():
    generator = torch.Generator().manual_seed(0)
    layer = "encoder.sentence_encoder.layers.0."
    shapes = {"embed_tokens.weight": (50, 16), "layers.0.fc1.weight": (64, 16), "layers.0.fc1.bias": (64,)}
    state = {f"encoder.sentence_encoder.{name}": torch.randn(s, generator=generator) for name, s in shapes.items()}
    return {**state, f"{layer}self_attn.q_proj.weight": torch.randn(16, 16, generator=generator)}


@pytest.fixture
def checkpoint(state, tmp_path):
    model = Namespace(_name="roberta_prenorm", arch="roberta_prenorm", encoder_layers=1, encoder_embed_dim=16)
    sections = {"task": {"_name": "sentence_prediction"}, "criterion": {"_name": "sentence_prediction"}}
    cfg = {"common": {}, "model": model, "lr_scheduler": {"_name": "polynomial_decay"}, **sections}
    torch.save({"cfg": cfg, "model": state}, tmp_path / "checkpoint.pt")
    return str(tmp_path / "checkpoint.pt")


@pytest.fixture
def task(tmp_path):
    for folder, text in (("input0", "".join(f"{i} 1\n" for i in range(45))), ("label", "bad 2\ngood 2\n")):
        (tmp_path / "task" / folder).mkdir(parents=True)
        (tmp_path / "task" / folder / "dict.txt").write_text(text)
    return str(tmp_path / "task")


def test_the_files_are_whole_models(state, checkpoint, task, tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    sizes = file_bytes(checkpoint, [32, 8, 4], task, kept)
    assert sizes == {bits: (kept / f"packed_{bits}.safetensors").stat().st_size for bits in (32, 8, 4)}
    assert sizes[4] < sizes[8] < sizes[32]
    unpack_checkpoint(kept / "packed_4.safetensors", tmp_path / "unpacked.pt")
    found = torch.load(tmp_path / "unpacked.pt", weights_only=True)["model"]
    wanted = quantize_state(state, 4)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    # Measured and removed: the same sizes, nothing left behind.
    before = sorted(os.listdir(tmp_path))
    assert file_bytes(checkpoint, [32, 8, 4], task, None) == sizes
    assert sorted(os.listdir(tmp_path)) == before


def test_weight_errors_are_those_of_each_bit_width_and_of_pruning(state, checkpoint):
    errors = [WeightError(**error) for error in weight_errors(checkpoint, [32, 8, 4], 0.6)]
    kinds = ["attention q, k, v", "fc1", "token embeddings", "biases", "all"]
    assert [(e.sparsity, e.bits, e.kind) for e in errors] == [
        (sparsity, bits, kind) for sparsity, bits in ((0.0, 8), (0.0, 4), (0.6, 32)) for kind in kinds
    ]
    name = "encoder.sentence_encoder.layers.0.fc1.weight"
    difference = (state[name] - quantize_state(state, 4)[name]).double()
    assert errors[6].mean_absolute == pytest.approx(difference.abs().mean().item(), rel=1e-6)
    weights = torch.cat([w.flatten() for n, w in state.items() if "bias" not in n]).abs().sort().values
    gone = weights[: round(0.6 * len(weights))].double().sum().item()
    assert errors[-1].mean_absolute * errors[-1].parameters == pytest.approx(gone, rel=1e-6)
