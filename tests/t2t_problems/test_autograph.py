from __future__ import annotations

import inspect
import traceback

import pytest
import tensorflow.compat.v1 as tf
from tensor2tensor.data_generators import translate_enfr
from tensor2tensor.utils import hparams_lib, registry, t2t_model

from t2t_problems import plugin  # noqa: F401


@pytest.mark.parametrize("mended", [True, False])
def test_models_are_not_rewritten(monkeypatch, mended):
    """And would be without the mend: where that fails, `autograph.leave_models_alone` is no longer needed."""
    if not mended:
        monkeypatch.setattr(t2t_model.T2TModel, "call", inspect.unwrap(t2t_model.T2TModel.call))
    found = []

    def model_fn_sharded(self, features):
        found.extend(frame.name for frame in traceback.extract_stack())
        return tf.zeros([2, 7, 1, 1, 501]), {"training": tf.constant(0.0)}

    monkeypatch.setattr(t2t_model.T2TModel, "model_fn_sharded", model_fn_sharded)
    with tf.Graph().as_default():
        hparams = registry.hparams("transformer_enfr_2l_128h")
        hparams_lib.add_problem_hparams(hparams, WithAVocabulary())
        features = {name: tf.ones([2, 7, 1, 1], tf.int32) for name in ("inputs", "targets")}
        registry.model("transformer")(hparams, tf.estimator.ModeKeys.TRAIN)(features)
    assert ("call" in found, "tf__call" in found) == (mended, not mended)


class WithAVocabulary(translate_enfr.TranslateEnfrWmt32k):
    """A problem whose vocabulary need not be learned."""

    def get_hparams(self, model_hparams=None):
        entry = type("Vocabulary", (), {"vocab_size": 501})()
        self._encoders = {"inputs": entry, "targets": entry}
        return super().get_hparams(model_hparams)
