"""The quick way through the model: the same losses and gradients, taken where it can be, and a reason where not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import ROOT, SMALL, build
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_plugins.models import fast_encoder
from fairseq_plugins.models.fast_layer import SAME_QUERIES, SAME_ROWS, rounded_up
from train_large import runlog

WITHOUT_DROPOUT = ("--dropout", "0", "--attention-dropout", "0", "--matmul-precision", "fp32")


def tokens(padded: bool = True) -> Tensor:
    drawn = torch.randint(4, 50, (3, 12), generator=torch.Generator().manual_seed(1))
    if padded:
        drawn[1, 9:] = drawn[2, 5:] = 1
    return drawn


def pair(*flags: str) -> tuple[nn.Module, nn.Module]:
    """The model as it is and by fairseq's own layers, with the same weights."""
    mine, theirs = (
        build("prenorm_roberta", *SMALL, *flags),
        build("prenorm_roberta", *SMALL, *flags, "--no-fast-layers"),
    )
    assert mine.is_fast()
    assert not theirs.is_fast()
    theirs.load_state_dict(mine.state_dict())
    return mine, theirs


def assert_same_gradients(mine: nn.Module, theirs: nn.Module) -> None:
    for (name, one), other in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        if other.grad is None:
            assert one.grad is None, name
        else:
            # Relative to the gradient, for those of queries and keys are small; the bias of keys has none but rounding.
            size = float(other.grad.abs().max()) if "k_proj.bias" not in name else 1.0
            assert float((one.grad - other.grad).abs().max()) < 2e-4 * size, name


@pytest.mark.parametrize(
    "flags",
    [(), ("--share-layers", "all"), ("--layer-heads", "2,4,1", "--layer-ffn", "9,128,64"), ("--no-embedding-norm",)],
)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("device", ["CPU", "GPU"])
def test_logits_loss_and_gradients_are_those_of_fairseqs_layers(flags, padded, device, monkeypatch):
    """By the layers for either device, here on a CPU."""
    if device == "GPU":
        monkeypatch.setattr(fast_encoder, "encoder_layer", fast_encoder.sdpa_layer.encoder_layer)
    mine, theirs = pair(*WITHOUT_DROPOUT, *flags)
    source = tokens(padded)
    real = source.ne(1)
    with torch.no_grad():
        found, expected = (model.train()(source)[0][real] for model in (mine, theirs))
        assert torch.allclose(found, expected, atol=1e-5)
    masked = real & (torch.rand(source.shape) < 0.4)
    targets = torch.randint(4, 50, (int(masked.sum()),))
    loss, _ = mine.train()(source, masked_tokens=masked, masked_targets=targets)
    logits, _ = theirs.train()(source, masked_tokens=masked)
    expected = F.cross_entropy(logits, targets, reduction="sum")
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    (loss / 3).backward()
    (expected / 3).backward()
    assert_same_gradients(mine, theirs)


def test_without_masked_positions_the_loss_is_zero_and_every_weight_has_a_gradient():
    """Which several workers wait for."""
    mine, _ = pair(*WITHOUT_DROPOUT)
    source = tokens()
    loss, _ = mine.train()(source, masked_tokens=torch.zeros_like(source).bool(), masked_targets=source[:0, 0])
    loss.backward()
    assert float(loss) == 0
    assert all(float(parameter.grad.abs().sum()) == 0 for parameter in mine.parameters())


def saved_bytes(model: nn.Module, source: Tensor, masked: Tensor) -> int:
    """One training step: of the tensors that are kept for its backward pass, which then runs."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    torch.manual_seed(8)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = model.train()(source, masked_tokens=masked, masked_targets=source[masked])
    loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize("padded", [False, True])
def test_checkpointed_activations_are_computed_again_with_the_same_dropout(padded):
    flags = ("--dropout", "0.2", "--attention-dropout", "0.3")
    kept, again = (build("prenorm_roberta", *SMALL, *flags, *more) for more in ((), ("--checkpoint-activations",)))
    again.load_state_dict(kept.state_dict())
    assert again.is_fast()
    source = tokens(padded)
    masked = source.ne(1) & (torch.rand(source.shape) < 0.4)
    assert saved_bytes(again, source, masked) < 0.5 * saved_bytes(kept, source, masked)
    for (name, one), other in zip(again.named_parameters(), kept.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


def test_the_positions_that_are_wanted_are_all_that_the_last_layer_is_asked_for(monkeypatch):
    mine, _ = pair(*WITHOUT_DROPOUT)
    computed = []
    upstream = fast_encoder.encoder_layer

    def encoder_layer(*args: Any) -> Tensor:
        computed.append(upstream(*args))
        return computed[-1]

    monkeypatch.setattr(fast_encoder, "encoder_layer", encoder_layer)
    source = tokens()
    masked = torch.zeros_like(source, dtype=torch.bool)
    masked[0, 3] = masked[0, 7] = masked[1, 0] = True
    mine.train()(source, masked_tokens=masked)
    rows = min(source.numel(), rounded_up(int(source.ne(1).sum()), SAME_ROWS))
    assert [len(each) for each in computed] == [*[rows] * (len(computed) - 1), 3 * rounded_up(2, SAME_QUERIES)]


def test_classification_heads_get_the_same_features():
    mine, theirs = pair(*WITHOUT_DROPOUT)
    for model in (mine, theirs):
        torch.manual_seed(3)
        model.register_classification_head("topic", num_classes=3)
    found, expected = (model.train()(tokens(), classification_head_name="topic")[0] for model in (mine, theirs))
    assert torch.allclose(found, expected, atol=1e-5)
    for logits in (found, expected):
        (logits * torch.arange(9.0).view(3, 3)).sum().backward()
    assert_same_gradients(mine, theirs)


def test_hidden_states_are_fairseqs_to_tell():
    mine, _ = pair()
    _, extra = mine.train()(tokens(), return_all_hiddens=True)
    assert len(extra["inner_states"]) == 4


def test_validation_is_fairseqs_to_the_last_bit_whatever_training_is():
    mine, theirs = pair("--matmul-precision", "bf16", "--dropout", "0", "--attention-dropout", "0")
    real = tokens().ne(1)
    with torch.no_grad():
        expected = theirs.eval()(tokens())[0][real]
        assert torch.equal(mine.eval()(tokens())[0][real], expected)
        in_training = mine.train()(tokens())[0][real]
    assert not torch.allclose(in_training, expected, atol=1e-5)
    assert torch.allclose(in_training, expected, atol=0.1)


def test_auto_is_bf16_where_the_cpu_multiplies_it(monkeypatch):
    assert [fast_encoder.products_dtype(name) for name in ("bf16", "fp32")] == [torch.bfloat16, torch.float32]
    for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(fast_encoder, "has_bf16_instructions", lambda has=has: has)
        assert fast_encoder.products_dtype("auto") == expected


def test_auto_is_bf16_on_a_gpu_that_multiplies_it_itself(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: asked.append(including_emulation))
    assert fast_encoder.products_dtype("auto", "cuda") == torch.float32
    assert asked == [False]


def test_a_cpu_that_multiplies_bf16_is_known():
    """Against what the kernel of Linux says of it."""
    with open("/proc/cpuinfo") as info:
        flags = next((line.split() for line in info if line.startswith("flags")), None)
    if flags is None:
        pytest.skip("this kernel does not tell")
    assert fast_encoder.has_bf16_instructions() == bool({"avx512_bf16", "amx_bf16", "amx_tile"} & set(flags))


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--activation-fn", "relu"), "gelu"),
        (("--activation-dropout", "0.1"), "dropout of activations"),
        (("--quant-noise-pq", "0.1"), "quantization noise"),
        (("--encoder-layerdrop", "0.1"), "dropped"),
    ],
)
def test_what_the_quick_way_cannot_do_goes_fairseqs(flags, reason):
    model = build("prenorm_roberta", *SMALL, *flags)
    assert reason in fast_encoder.unsupported(model.encoder)
    assert not model.is_fast()
    model.train()(tokens())[0].sum().backward()


@pytest.mark.parametrize("name", ["sentence_encoder.layers.1.fc1", "sentence_encoder.layers.1", "lm_head.dense"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_full_backward_hook"])
def test_hooks_are_called(name, kind):
    model = build("prenorm_roberta", *SMALL)
    called: list[nn.Module] = []
    getattr(model.encoder.get_submodule(name), kind)(lambda module, *_: called.append(module))
    model(tokens())[0].sum().backward()
    assert len(called) == 1


def test_an_encoder_in_evaluation_drops_nothing():
    model = build("prenorm_roberta", *SMALL).train()
    model.encoder.eval()
    first, second = (model(tokens())[0] for _ in range(2))
    assert torch.equal(first, second)


class Mean(nn.Module):
    """A head that looks at all tokens."""

    def forward(self, features):
        return features.mean(1)


def test_a_head_of_ones_own_sees_all_features():
    model = build("prenorm_roberta", *SMALL, *WITHOUT_DROPOUT)
    model.classification_heads["mine"] = Mean()
    source = tokens(padded=False)
    trained, evaluated = (
        getattr(model, mode)()(source, features_only=True, classification_head_name="mine")[0]
        for mode in ("train", "eval")
    )
    assert torch.allclose(trained, evaluated, atol=1e-5)


def test_sequences_padded_on_the_left_are_classified_as_fairseq_does():
    mine, theirs = pair(*WITHOUT_DROPOUT)
    for model in (mine, theirs):
        model.register_classification_head("two", num_classes=2)
    theirs.load_state_dict(mine.state_dict())
    source = tokens().flip(1)
    assert source[:, 0].eq(1).any()
    found, expected = (
        model.train()(source, features_only=True, classification_head_name="two")[0] for model in (mine, theirs)
    )
    assert torch.allclose(found, expected, atol=1e-5)


def test_second_derivatives_are_refused():
    model = build("prenorm_roberta", *SMALL, *WITHOUT_DROPOUT).train()
    assert model.is_fast()
    masked = tokens().ne(1)
    loss, _ = model(tokens(), masked_tokens=masked, masked_targets=tokens()[masked])
    parameter = model.encoder.sentence_encoder.layers[0].fc1.weight
    [gradient] = torch.autograd.grad(loss, parameter, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_masked_lms_head_of_another_kind_goes_fairseqs():
    model = build("prenorm_roberta", *SMALL)
    model.encoder.lm_head = type("Other", (type(model.encoder.lm_head),), {})(64, 50, "gelu")
    assert "head of another kind" in fast_encoder.unsupported(model.encoder)


def test_weights_that_are_not_fp32_and_autocast_go_fairseqs():
    model = build("prenorm_roberta", *SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in fast_encoder.unsupported(model.encoder)
    assert "float64" in fast_encoder.unsupported(model.double().encoder)
    assert "meta" in fast_encoder.unsupported(model.to("meta").encoder)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 9), st.integers(0, 6), st.integers(1, 4), st.floats(0.1, 3))
def test_the_loss_of_the_vocabulary_is_its_cross_entropy_whatever_the_rows_at_a_time(number, more, rows, scale):
    """Of the rows that have targets; `more` come behind them."""
    torch.manual_seed(number)
    x, weight, bias = torch.randn(number + more, 5), torch.randn(11, 5), torch.randn(11)
    things = [thing.requires_grad_() for thing in (x, weight, bias)]
    targets = torch.randint(11, (number,))
    expected = F.cross_entropy(x[:number] @ weight.t() + bias, targets, reduction="sum")
    kept, fast_encoder.ROWS = fast_encoder.ROWS, rows
    try:
        found = fast_encoder.VocabularyLoss.apply(*things, targets, torch.float32)
    finally:
        fast_encoder.ROWS = kept
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-6)
    for mine, theirs in zip(
        torch.autograd.grad(found * scale, things), torch.autograd.grad(expected * scale, things), strict=True
    ):
        assert torch.allclose(mine, theirs, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "layers: fast, products in {auto}"),
        (("--matmul-precision", "fp32"), "layers: fast, products in float32"),
        (("--no-fast-layers",), "layers: of fairseq, because of --no-fast-layers"),
        (("--activation-dropout", "0.1"), "layers: of fairseq, because of dropout of activations"),
    ],
)
def test_a_run_says_which_way_it_goes(text, tmp_path, flags, said):
    """And it does not leave the quick way without a reason."""
    run = train(text, tmp_path, "--max-update", "3", "--no-save", *flags)
    bf16 = fast_encoder.has_bf16_instructions()
    [line] = [line for line in (run.stdout + run.stderr).splitlines() if "layers: " in line]
    assert said.format(auto="bfloat16" if bf16 else "float32") in line
    assert "fused_adam: torch's fused kernel" in run.stdout + run.stderr


@pytest.mark.slow
def test_a_run_that_is_resumed_drops_the_same_numbers(text, tmp_path):
    def losses(folder: Path) -> list[float]:
        return [line["loss"] for line in runlog.read(str(folder / runlog.NAME)) if line["kind"] == "train"]

    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(text, whole, "--max-update", "8", "--save-interval-updates", "4")
    resumed.mkdir()
    shutil.copy(whole / "checkpoint_1_4.pt", resumed / "checkpoint_last.pt")
    train(text, resumed, "--max-update", "8")
    assert len(losses(resumed)) == 4
    assert losses(resumed) == losses(whole)[4:]


def train(text: Path, save_dir: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fairseq_cli.train", str(text), "--user-dir", "fairseq_plugins", "--cpu"]
    command += ["--task", "masked_lm", "--criterion", "budgeted_masked_lm", "--arch", "prenorm_roberta", *SMALL]
    command += ["--tokens-per-sample", "16", "--batch-size", "4", "--lr", "0.001", "--optimizer", "fused_adam"]
    command += ["--save-dir", str(save_dir), "--disable-validation", "--log-interval", "1", *flags]
    run = forked.run(command, cwd=ROOT, timeout=300)
    assert run.returncode == 0, run.stderr
    return run


def test_the_rates_of_dropout_are_not_confused():
    model = build("prenorm_roberta", *SMALL, "--dropout", "0.2", "--attention-dropout", "0.3")
    setting = fast_encoder._setting(model.encoder.sentence_encoder.layers[0], torch.float32)
    assert (setting.dropout, setting.attention_dropout) == (0.2, 0.3)


def test_the_embeddings_are_dropped_too():
    model = build("prenorm_roberta", *SMALL, "--dropout", "0.5", "--attention-dropout", "0")
    for layer in model.encoder.sentence_encoder.layers:
        layer.dropout_module.p = 0.0
    assert model.train().is_fast()
    with torch.no_grad():
        first, second = (model(tokens())[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_hooks_before_a_layer_are_called():
    model = build("prenorm_roberta", *SMALL)
    called: list[object] = []
    model.encoder.sentence_encoder.layers[1].fc1.register_forward_pre_hook(lambda module, *_: called.append(module))
    model(tokens())
    assert len(called) == 1
