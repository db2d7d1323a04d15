"""The paper's sizes for translation (section 2.1) as hparams sets: `transformer_enfr_{L}l_{H}h`, each with `_tpu`."""

from __future__ import annotations

import math
import re

from tensor2tensor.models import transformer
from tensor2tensor.utils import registry

from train_large.errors import UserError
from train_large.sizes import TRANSLATION, Size


def with_budget(hparams):
    """Add what `transformer_budgeted` reads to a set of hparams; for sets of your own."""
    hparams.add_hparam("budget_seconds", math.inf)  # no limit: the run is only logged
    hparams.add_hparam("budget_clock", "train")
    hparams.add_hparam("budget_seconds_per_update", 0.0)  # for the calibrated clock
    hparams.add_hparam("budget_evaluations", 0)  # this many, evenly over the budget; 0 for as often as the flags say
    hparams.add_hparam("bleu_sentences", 3000)  # of the dev set, translated at each evaluation; 0 for none
    return hparams


def sized(hparams, size: Size):
    """Give the Transformer of `hparams` this size."""
    hparams.num_hidden_layers = size.layers
    hparams.hidden_size = size.hidden
    hparams.filter_size = size.ffn
    hparams.num_heads = size.heads
    return hparams


def size_of(hparams) -> Size:
    """The size that `hparams` describe. Raises UserError for a shape that cannot be built."""
    return Size(hparams.num_hidden_layers, hparams.hidden_size, hparams.filter_size, hparams.num_heads)


def enfr(size: Size):
    """transformer_base's schedule and regularization at this size."""
    return sized(with_budget(transformer.transformer_base()), size)


def enfr_tpu(size: Size):
    """The same as Tensor2Tensor adapts its sets to TPUs, with an optimizer that TensorFlow 2 takes too."""
    hparams = transformer.update_hparams_for_tpu(enfr(size))
    hparams.optimizer = "graph_adafactor"
    return hparams


PREFIX = "transformer_enfr_"


def check_name(named: str) -> None:
    """Raise UserError where --hparams_set asks for a size that is none of the paper's.

    Tensor2Tensor would show a traceback with the names of all the sets that there are.
    """
    if named.startswith(PREFIX) and named not in registry.list_hparams():
        raise UserError(
            f"--hparams_set {named} is none of the sizes, {PREFIX}{{L}}l_{{H}}h with L of 2, 6, 8 and H of 128, 256, "
            "512, 1024, 2048, each also with _tpu; for another give --hparams=num_hidden_layers=...,hidden_size=...,"
            "filter_size=...,num_heads=... besides."
        )


def check_seconds(given: str) -> None:
    """Raise UserError where --hparams gives a budget in anything but seconds, of which Tensor2Tensor would show a
    traceback: fairseq's --budget takes 2h."""
    for name, value in re.findall(r"\b(budget_seconds(?:_per_update)?)=([^,]*)", given):
        try:
            float(value)
        except ValueError:
            raise UserError(f"--hparams={name}={value}: give a number of seconds, such as {name}=7200.") from None


def _register(size: Size) -> None:
    name = PREFIX + size.name
    registry.register_hparams(name)(lambda: enfr(size))
    registry.register_hparams(name + "_tpu")(lambda: enfr_tpu(size))


for _size in TRANSLATION:
    _register(_size)
