"""Models in a graph, without data: their vocabulary has a given size, and need not be learned from corpora."""

from __future__ import annotations

import tensorflow.compat.v1 as tf
from tensor2tensor.data_generators import translate_enfr
from tensor2tensor.utils import hparams_lib, registry


def build(set_name: str, vocabulary: int, model: str = "transformer_budgeted") -> None:
    """Put what `model` trains into the default graph, without its gradients, for two pairs of seven word pieces."""
    hparams = registry.hparams(set_name)
    hparams_lib.add_problem_hparams(hparams, _WithVocabulary(vocabulary))
    features = {name: tf.ones([2, 7, 1, 1], tf.int32) for name in ("inputs", "targets")}
    features["target_space_id"] = tf.constant(1, tf.int32)
    registry.model(model)(hparams, tf.estimator.ModeKeys.TRAIN)(features)


class _WithVocabulary(translate_enfr.TranslateEnfrWmt32k):
    def __init__(self, entries: int) -> None:
        super().__init__()
        self._entries = entries

    def get_hparams(self, model_hparams=None):
        entry = type("Vocabulary", (), {"vocab_size": self._entries})()
        self._encoders = {"inputs": entry, "targets": entry}
        return super().get_hparams(model_hparams)
