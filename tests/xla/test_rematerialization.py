"""Translation with its layers computed again in the backward pass, the decoder's too: the same losses and gradients.

The encoder's layers alone, and why fairseq's own checkpoints will not do: `test_patches.py`.
"""

from __future__ import annotations

import random
import re
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
import torch
import torch_xla
import torch_xla.core.xla_model as xm
from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerModel, base_architecture
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase
from launching import COMMON, losses, observe
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from xla.rematerialization import recompute_layers

WORDS = 20
DECODER_LAYERS = 2
# Of one decoder layer: four projections of each attention, its scores and its sums, and the two of the feed-forward.
PRODUCTS = 4 + 2 + 4 + 2 + 2

Change = Callable[[nn.Module], Any]


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PJRT_DEVICE", "CPU")


def nothing(model: nn.Module) -> None:
    pass


def encoder_only(model: nn.Module) -> None:
    recompute_layers(model.encoder)


def translator(dropout: float = 0.0) -> TransformerModel:
    """One encoder layer, two decoder layers."""
    dictionary = Dictionary()
    for word in range(WORDS - len(dictionary)):
        dictionary.add_symbol(f"w{word}")
    args = Namespace(encoder_layers=1, decoder_layers=DECODER_LAYERS, share_all_embeddings=True)
    for side in ("encoder", "decoder"):
        for name, value in (("embed_dim", 8), ("ffn_embed_dim", 16), ("attention_heads", 2)):
            setattr(args, f"{side}_{name}", value)
    args.dropout = args.attention_dropout = args.activation_dropout = dropout
    args.max_source_positions = args.max_target_positions = 16
    base_architecture(args)
    torch.manual_seed(1)
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    return TransformerModel.build_model(args, task)


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Three sentences of up to 6 words, some padded: the source, its lengths, the target's beginning, the target."""
    generator = torch.Generator().manual_seed(2)
    source, before, target = (torch.randint(4, WORDS, (3, length), generator=generator) for length in (6, 5, 5))
    source[0, :2] = before[1, 3:] = 1  # fairseq pads sources on the left
    return source, torch.tensor([4, 6, 6]), before, target


def backward(change: Change, dropout: float = 0.0) -> dict[str, Tensor]:
    """The loss, the attention weights that are handed out, and the gradients of a model that `change` was done to.

    Of every weight, by name. They are not computed yet.
    """
    model = translator(dropout)
    change(model)
    model.to(torch_xla.device())
    source, lengths, before, target = (tensor.to(torch_xla.device()) for tensor in batch())
    torch_xla.sync()
    xm.set_rng_state(5)
    logits, extra = model(source, lengths, before)
    loss = cross_entropy(logits.flatten(0, 1), target.flatten())
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    return {"loss": loss.detach(), "attention": extra["attn"][0].detach(), **gradients}


def fetched(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(tensors, torch_xla._XLAC._xla_get_cpu_tensors(list(tensors.values())), strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_losses_and_gradients_are_the_same(dropout):
    """With dropout too: the same elements are dropped the second time."""
    expected, found = fetched(backward(nothing, dropout)), fetched(backward(recompute_layers, dropout))
    assert found["loss"] == pytest.approx(float(expected["loss"]), rel=1e-6)
    for name, theirs in expected.items():
        if name.endswith("k_proj.bias"):  # the softmax does not see it: rounding is all there is
            assert max(theirs.abs().max(), found[name].abs().max()) < 1e-6, name
            continue
        largest = float(theirs.abs().max())
        assert largest > 1e-4, name
        torch.testing.assert_close(found[name], theirs, rtol=0, atol=1e-6 * largest, msg=name)


def test_dropout_changes_the_loss():
    """What the equality with dropout would not be worth much without."""
    with_dropout, without = (float(fetched(backward(nothing, dropout))["loss"]) for dropout in (0.3, 0.0))
    assert abs(with_dropout - without) > 1e-3


def operations(change: Change) -> Counter[str]:
    """How often each operation is in the program of the loss and the gradients."""
    program = torch_xla._XLAC._get_xla_tensors_hlo(list(backward(change).values()))
    return Counter(re.findall(r" = \S+ ([a-z-]+)\(", program) + re.findall(r" (opt-barrier)\(", program))


def test_every_decoder_layer_is_computed_again_behind_a_barrier():
    whole, half, all_layers = operations(nothing), operations(encoder_only), operations(recompute_layers)
    assert (whole["opt-barrier"], half["opt-barrier"], all_layers["opt-barrier"]) == (0, 1, 1 + DECODER_LAYERS)
    assert all_layers["dot"] - half["dot"] == DECODER_LAYERS * PRODUCTS
    assert half["dot"] > whole["dot"] > 0


def test_all_layers_are_counted_and_weights_keep_their_names():
    model = translator()
    names = list(model.state_dict())
    assert recompute_layers(model) == 1 + DECODER_LAYERS
    assert list(model.state_dict()) == names


def test_a_layer_that_generates_is_computed_once(monkeypatch):
    """Token by token it writes into `incremental_state`, even where gradients are asked for; and nothing is computed
    again where they are not."""
    model = translator().eval()
    recompute_layers(model)
    monkeypatch.setattr("torch_xla.utils.checkpoint.checkpoint", None)  # whoever calls it fails
    source, lengths, before, _ = batch()
    with torch.no_grad():
        whole, _ = model(source, lengths, before)
        memory = model.encoder(source, lengths)
    state: dict[str, Any] = {}
    steps = [model.decoder(before[:, : i + 1], memory, incremental_state=state)[0] for i in range(before.size(1))]
    # A row that ends in pads is another matter: fairseq masks them in a whole sentence only.
    torch.testing.assert_close(torch.cat(steps, dim=1)[[0, 2]], whole[[0, 2]], rtol=1e-4, atol=1e-5)
    assert steps[0].requires_grad
    with pytest.raises(TypeError):
        model(source, lengths, before)


def test_a_decoder_layer_returns_what_it_did():
    """x, the attention weights where they are asked for, and None."""
    layer = next(module for module in translator().modules() if isinstance(module, TransformerDecoderLayerBase))
    layer.to(torch_xla.device())
    x, memory = (torch.randn(length, 2, 8, device=torch_xla.device(), requires_grad=True) for length in (3, 4))
    plain = [layer(x, encoder_out=memory, need_attn=need) for need in (False, True)]
    recompute_layers(layer)
    again = [layer(x, encoder_out=memory, need_attn=need) for need in (False, True)]
    for mine, theirs in zip(again, plain, strict=True):
        assert [value is None for value in mine] == [value is None for value in theirs]
        assert mine[2] is None
    assert plain[0][1] is None
    torch.testing.assert_close(again[1][1].cpu(), plain[1][1].cpu())
    again[1][0].sum().backward()
    assert x.grad is not None
    assert memory.grad is not None


# -- as a process --

UPDATES_PER_EPOCH = 3
TRANSLATE = ["--task", "translation", "--arch", "transformer", "--encoder-layers", "1", "--decoder-layers", "2"]
TRANSLATE += ["--encoder-embed-dim", "16", "--decoder-embed-dim", "16", "--encoder-ffn-embed-dim", "32"]
TRANSLATE += ["--decoder-ffn-embed-dim", "32", "--encoder-attention-heads", "2", "--decoder-attention-heads", "2"]
TRANSLATE += ["--share-all-embeddings", "--criterion", "budgeted_label_smoothed_cross_entropy", *COMMON]
TRANSLATE += ["--label-smoothing", "0.1", "--batch-size", "16", "--lr-scheduler", "fixed", "--max-epoch", "3"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A translation that reverses; both sides have many lengths, and the last batch of an epoch is a short one."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = random.Random(2)
    for split, count in (("train", 16 * UPDATES_PER_EPOCH - 6), ("valid", 10)):
        sources = [[str(rng.randrange(12)) for _ in range(rng.randint(3, 9))] for _ in range(count)]
        (folder / f"{split}.en").write_text("".join(" ".join(words) + "\n" for words in sources))
        (folder / f"{split}.fr").write_text("".join(" ".join(words[::-1]) + "\n" for words in sources))
    command = [sys.executable, "-m", "fairseq_cli.preprocess", "--joined-dictionary", "--destdir", str(folder / "bin")]
    command += ["--source-lang", "en", "--target-lang", "fr"]
    splits = [word for split in ("train", "valid") for word in (f"--{split}pref", str(folder / split))]
    forked.run([*command, *splits]).check_returncode()
    return folder / "bin"


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_translation_has_the_same_losses(pairs, tmp_path, devices):
    def run(name: str, *more: str) -> list[dict[str, Any]]:
        return observe("finetune", pairs, *TRANSLATE, *more, save_dir=tmp_path / name, devices=devices)

    whole, again = run("whole"), run("again", "--checkpoint-activations")
    for kind, count in (("train", 3 * UPDATES_PER_EPOCH), ("valid", 3)):
        expected = losses(tmp_path / "whole", kind)
        assert len(expected) == count
        assert losses(tmp_path / "again", kind) == pytest.approx(expected, rel=1e-5)
        assert min(expected) < expected[0]
    # Nor has the second computation a program of its own, or one for every update.
    assert [line["compilations"] for line in again] == [line["compilations"] for line in whole]
