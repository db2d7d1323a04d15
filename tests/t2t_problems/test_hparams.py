from __future__ import annotations

import math

import graphs
import pytest
import tensorflow.compat.v1 as tf
from tensor2tensor.models import transformer
from tensor2tensor.utils import registry

from t2t_problems import plugin, tensorflow_two  # noqa: F401
from t2t_problems.hparams import size_of, with_budget
from train_large.sizes import TRANSLATION, Size, tensor2tensor_parameters

NAMES = [f"transformer_enfr_{layers}l_{hidden}h" for layers in (2, 6, 8) for hidden in (128, 256, 512, 1024, 2048)]


def test_all_sizes_of_the_paper_are_registered():
    registered = {name for name in registry.list_hparams() if name.startswith("transformer_enfr_")}
    assert registered == {name + suffix for name in NAMES for suffix in ("", "_tpu")}
    assert "transformer_budgeted" in registry.list_models()


@pytest.mark.parametrize("name", NAMES)
def test_a_set_is_transformer_base_at_another_size(name):
    ours, base = registry.hparams(name).values(), transformer.transformer_base().values()
    layers, hidden = (int(part[:-1]) for part in name.split("_")[-2:])
    differ = {key: value for key, value in ours.items() if key not in base or base[key] != value}
    expected = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "filter_size": 4 * hidden,
        "num_heads": hidden // 64,
        "budget_seconds": math.inf,
        "budget_clock": "train",
        "budget_seconds_per_update": 0.0,
        "budget_evaluations": 0,
        "bleu_sentences": 3000,
    }
    assert differ == {key: value for key, value in expected.items() if base.get(key) != value}


@pytest.mark.parametrize("name", NAMES)
def test_a_tpu_set_is_adapted_as_upstream_adapts_its_own(name):
    ours = registry.hparams(name + "_tpu").values()
    upstream = transformer.update_hparams_for_tpu(registry.hparams(name)).values()
    assert upstream.pop("optimizer") == "Adafactor"
    assert ours.pop("optimizer") == "graph_adafactor"
    assert ours == upstream


def test_any_set_can_be_given_a_budget():
    hparams = with_budget(transformer.transformer_big())
    assert size_of(hparams) == Size(6, 1024)
    assert hparams.parse("budget_seconds=90,budget_clock=wall").budget_seconds == 90


def trainable(set_name: str, vocabulary: int, model: str = "transformer_budgeted") -> dict[str, int]:
    """The trainable variables of the training graph, without its gradients, by name, with their numbers of weights."""
    with tf.Graph().as_default():
        graphs.build(set_name, vocabulary, model)
        return {v.op.name: v.shape.num_elements() for v in tf.trainable_variables()}


# Building a graph takes seconds; on TensorFlow 1 the code that builds it is the same.
@pytest.mark.slow
@pytest.mark.parametrize(
    "size", TRANSLATION if tensorflow_two.is_two() else TRANSLATION[:1], ids=lambda size: size.name
)
def test_parameters_are_as_computed(size):
    variables = trainable("transformer_enfr_" + size.name, 32_777)
    assert sum(variables.values()) == tensor2tensor_parameters(size, 32_777)


def test_parameters_of_a_tpu_set_are_the_same():
    assert sum(trainable("transformer_enfr_2l_128h_tpu", 501).values()) == tensor2tensor_parameters(Size(2, 128), 501)


def test_variables_are_named_as_the_stock_models():
    ours = trainable("transformer_enfr_2l_128h", 501)
    assert ours == trainable("transformer_enfr_2l_128h", 501, model="transformer")
    assert all(name.startswith("transformer/") for name in ours)
