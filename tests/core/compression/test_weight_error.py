"""The errors of weights, against NumPy on the weights themselves."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary
from fairseq.models.roberta import RobertaModel
from fairseq.models.roberta.model import roberta_base_architecture
from fairseq.models.transformer import TransformerModel, base_architecture
from hypothesis import given, settings
from hypothesis import strategies as st

from train_large.compression.quantization import quantize_state
from train_large.compression.weight_error import (
    KINDS,
    OTHER,
    kind_of,
    layer_of,
    pruning_error,
    quantization_error,
    weight_errors,
)
from train_large.errors import UserError

E, LAYER = "encoder.sentence_encoder.", "encoder.sentence_encoder.layers."


def make_state(seed=0, scale=1.0, dtype=torch.float32):
    """A small RoBERTa's state dict; every kind of module has another scale and mean."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, std, mean=0.0):
        return (scale * (mean + std * torch.randn(shape, generator=generator))).to(dtype)

    state = {f"{E}version": torch.tensor([3.0]), f"{E}embed_tokens.weight": draw(30, 8, std=0.2)}
    state[f"{E}embed_positions.weight"] = draw(10, 8, std=0.1)
    for layer in range(2):
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            state[f"{LAYER}{layer}.self_attn.{part}.weight"] = draw(8, 8, std=0.05 + 0.01 * layer, mean=0.01)
            state[f"{LAYER}{layer}.self_attn.{part}.bias"] = draw(8, std=0.02)
        state[f"{LAYER}{layer}.self_attn_layer_norm.weight"] = draw(8, std=0.1, mean=1.0)
        state[f"{LAYER}{layer}.fc1.weight"] = draw(32, 8, std=0.07)
        state[f"{LAYER}{layer}.fc2.weight"] = draw(8, 32, std=0.06)
    state["encoder.lm_head.weight"] = state[f"{E}embed_tokens.weight"]
    state["encoder.lm_head.dense.weight"] = draw(8, 8, std=0.08)
    state["encoder.lm_head.bias"] = draw(30, std=0.7)
    state["classification_heads.sentence_classification_head.out_proj.weight"] = draw(2, 8, std=0.05)
    return state


def together(state, names):
    return np.concatenate([state[name].double().numpy().ravel() for name in names])


def expected(original, compressed, names):
    w, v = together(original, names), together(compressed, names)
    return {
        "parameters": w.size,
        "mean": (w - v).mean(),
        "mean_absolute": np.abs(w - v).mean(),
        "variance": (w - v).var(),
        "deviation": w.std(),
        "relative": np.linalg.norm(w - v) / np.linalg.norm(w),
    }


COUNTED = [name for name in make_state() if name not in (f"{E}version", "encoder.lm_head.weight")]
MEMBERS = {
    "attention q, k, v": [
        name for name in COUNTED if name.endswith(("k_proj.weight", "q_proj.weight", "v_proj.weight"))
    ],
    "attention out": [f"{LAYER}{layer}.self_attn.out_proj.weight" for layer in range(2)],
    "fc1": [f"{LAYER}{layer}.fc1.weight" for layer in range(2)],
    "fc2": [f"{LAYER}{layer}.fc2.weight" for layer in range(2)],
    "token embeddings": [f"{E}embed_tokens.weight"],
    "position embeddings": [f"{E}embed_positions.weight"],
    "LM head": ["encoder.lm_head.dense.weight"],
    "classification head": ["classification_heads.sentence_classification_head.out_proj.weight"],
    "norms": [f"{LAYER}{layer}.self_attn_layer_norm.weight" for layer in range(2)],
    "biases": [name for name in COUNTED if name.endswith("bias")],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_errors_are_those_of_numpy(dtype):
    original = make_state(dtype=dtype)
    compressed = {name: tensor + 0.01 * torch.randn_like(tensor) + 0.003 for name, tensor in original.items()}
    found = weight_errors(original, compressed)
    assert list(found.kinds) == list(MEMBERS)  # in the order of a report
    for kind, names in MEMBERS.items():
        assert asdict(found.kinds[kind]) == pytest.approx(expected(original, compressed, names), rel=1e-9), kind
    layers = {f"encoder {i}": [name for name in COUNTED if name.startswith(f"{LAYER}{i}.")] for i in range(2)}
    assert list(found.layers) == list(layers)
    for layer, names in layers.items():
        assert asdict(found.layers[layer]) == pytest.approx(expected(original, compressed, names), rel=1e-9)
    assert asdict(found.all) == pytest.approx(expected(original, compressed, COUNTED), rel=1e-9)
    assert found.all.normalized == found.all.mean_absolute / found.all.deviation


def test_the_example_of_the_docstring():
    error = pruning_error({"encoder.layers.0.fc1.weight": torch.tensor([[0.30, -0.10], [0.02, -0.50]])}, 0.5).all
    assert error.mean_absolute == pytest.approx(0.03)
    assert round(error.deviation, 2) == 0.29
    assert round(error.normalized, 2) == 0.10


def test_weights_that_are_not_changed_have_no_error():
    state = make_state()
    for error in (weight_errors(state, state), quantization_error(state, 32), pruning_error(state, 0.0)):
        assert (error.all.mean, error.all.mean_absolute, error.all.variance, error.all.relative) == (0, 0, 0, 0)
        assert error.all.deviation > 0


@pytest.mark.parametrize("bits", [4, 8])
def test_quantization_error_is_within_half_a_step(bits):
    state = make_state()
    errors = quantization_error(state, bits)
    assert errors == weight_errors(state, quantize_state(state, bits))
    w = state[f"{E}embed_tokens.weight"]
    step = (w.max() - w.min()).item() / (2**bits - 1)
    error = errors.kinds["token embeddings"]
    # Rounding to a grid much finer than the weights spread: uniform within half a step of either side.
    assert error.mean_absolute == pytest.approx(step / 4, rel=0.15)
    assert error.variance == pytest.approx(step**2 / 12, rel=0.25)
    assert abs(error.mean) < step / 8


def test_pruning_error_is_the_weights_that_went():
    state = make_state()
    errors = pruning_error(state, 0.6)
    matrices = [name for name in COUNTED if state[name].dim() == 2 and "classification" not in name]
    w = np.sort(np.abs(together(state, matrices)))
    gone = w[: round(0.6 * w.size)]
    assert errors.all.mean_absolute * errors.all.parameters == pytest.approx(gone.sum())
    assert errors.all.relative == pytest.approx(np.sqrt((gone**2).sum() / (together(state, COUNTED) ** 2).sum()))
    for kind in ("norms", "biases", "classification head"):
        assert errors.kinds[kind].mean_absolute == errors.kinds[kind].variance == 0


def test_tied_weights_count_once_whether_they_share_memory_or_values():
    state = make_state()
    copied = {name: tensor.clone() for name, tensor in state.items()}  # as a checkpoint from a GPU has them
    for function, argument in ((quantization_error, 4), (pruning_error, 0.6)):
        assert function(copied, argument) == function(state, argument)
    assert quantization_error(state, 4).all.parameters == sum(state[name].numel() for name in COUNTED)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 50), st.sampled_from([0.25, 4.0, 1024.0]), st.sampled_from([(4, 0.0), (8, 0.0), (32, 0.6)]))
def test_raw_errors_scale_with_the_weights_and_normalized_ones_do_not(seed, factor, how):
    bits, sparsity = how
    one, other = (
        pruning_error(state, sparsity) if sparsity else quantization_error(state, bits)
        for state in (make_state(seed), make_state(seed, scale=factor))
    )
    for kind in one.kinds:
        a, b = one.kinds[kind], other.kinds[kind]
        assert b.mean_absolute == pytest.approx(factor * a.mean_absolute, rel=1e-6)
        assert b.variance == pytest.approx(factor**2 * a.variance, rel=1e-6)
        assert (b.normalized, b.relative) == pytest.approx((a.normalized, a.relative), rel=1e-6)


def test_weights_near_one_keep_their_precision():
    """A norm's weights are one and a little: their squares less the square of their mean would be nothing."""
    w = 1 + 1e-4 * torch.arange(1000.0).view(1, -1) / 1000
    error = weight_errors({"layer_norm.weight": w.double()}, {"layer_norm.weight": w.double() + 1})
    assert error.all.variance == pytest.approx(0, abs=1e-20)
    assert error.all.deviation == pytest.approx(w.double().numpy().std(), rel=1e-9)


def test_constant_weights_have_no_normalized_error():
    error = weight_errors({"fc1.bias": torch.zeros(3)}, {"fc1.bias": torch.ones(3)}).all
    assert (error.normalized, error.relative, error.mean) == (None, 0.0, -1.0)


def test_layers_come_in_the_order_of_their_numbers():
    state = {f"{part}.layers.{i}.fc1.weight": torch.rand(2, 2) for part in ("decoder", "encoder") for i in (10, 9, 0)}
    assert list(quantization_error(state, 4).layers) == [
        f"{part} {i}" for part in ("decoder", "encoder") for i in (0, 9, 10)
    ]
    assert layer_of("encoder.sentence_encoder.layers.3.self_attn.q_proj.weight") == "encoder 3"
    assert layer_of("encoder.lm_head.dense.weight") is None


def test_what_does_not_belong_together_is_named():
    state = make_state()
    with pytest.raises(UserError, match=r"layers\.1\.fc1\.weight is missing in the compressed model"):
        weight_errors(state, {name: tensor for name, tensor in state.items() if name != f"{LAYER}1.fc1.weight"})
    with pytest.raises(UserError, match=r"layers\.1\.fc1\.weight has shape \(8, 32\) in .*, \(32, 8\) in the original"):
        weight_errors(state, {**state, f"{LAYER}1.fc1.weight": torch.rand(8, 32)})
    with pytest.raises(UserError, match="no weights to compare"):
        weight_errors({f"{E}version": torch.tensor([3.0])}, {})


def test_every_parameter_of_fairseq_s_models_has_a_kind():
    """Of the models as fairseq builds them: RoBERTa with its heads, and the Transformer for translation."""
    dictionary = Dictionary()
    for i in range(20):
        dictionary.add_symbol(f"w{i}")

    class Task:
        source_dictionary = target_dictionary = dictionary

    sizes = {"encoder_layers": 2, "encoder_embed_dim": 8, "encoder_ffn_embed_dim": 16, "encoder_attention_heads": 2}
    args = Namespace(**sizes, max_positions=16, tokens_per_sample=16)
    roberta_base_architecture(args)
    roberta = RobertaModel.build_model(args, Task)
    roberta.register_classification_head("sentence_classification_head", num_classes=2)
    args = Namespace(**sizes, decoder_layers=1, max_source_positions=16, max_target_positions=16)
    base_architecture(args)
    translation = TransformerModel.build_model(args, Task)
    kinds = {}
    for model in (roberta, translation):
        for name, weight in model.named_parameters():
            kinds.setdefault(kind_of(name), []).append((name, weight.dim()))
    assert set(kinds) == set(KINDS)
    assert OTHER not in kinds
    assert all(dimensions == 1 for name, dimensions in kinds["norms"] + kinds["biases"])
    assert all(dimensions == 2 for kind in KINDS if kind not in ("norms", "biases") for _, dimensions in kinds[kind])
    assert {name.split(".")[-2] for name, _ in kinds["attention q, k, v"]} == {"q_proj", "k_proj", "v_proj"}
    assert any("encoder_attn" in name for name, _ in kinds["attention out"])
    assert not any("classification" in name for name, _ in kinds["attention out"])


def test_a_tensor_without_weights_has_no_error():
    from train_large.compression.weight_error import weight_errors

    state = {
        "encoder.layers.0.fc1.weight": torch.tensor([[1.0, 3.0]]),
        "encoder.layers.0.fc2.weight": torch.empty(0, 2),
    }
    found = weight_errors(state, {name: tensor + 0.5 for name, tensor in state.items()})
    assert (found.all.parameters, found.all.mean, found.all.deviation) == (2, -0.5, 1.0)
    assert list(found.kinds) == ["fc1"]
