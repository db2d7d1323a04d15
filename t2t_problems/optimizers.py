"""The optimizer of the `_tpu` sets, on both generations of TensorFlow."""

from __future__ import annotations

import tensorflow.compat.v1 as tf
from tensor2tensor.utils import adafactor, registry


class GraphAdafactorOptimizer(adafactor.AdafactorOptimizer):
    """Tensor2Tensor's Adafactor, with the one method that its trainer asks for on TensorFlow 2."""

    def get_gradients(self, loss, variables):
        """As a Keras optimizer has it; `ConditionalOptimizer` calls it (utils/optimize.py:242, 1.15.7)."""
        return tf.gradients(loss, variables)


@registry.register_optimizer
def graph_adafactor(learning_rate, hparams):
    """Adafactor as `hparams` say, from Tensor2Tensor's own reading of them."""
    optimizer = adafactor.adafactor_optimizer_from_hparams(hparams, learning_rate)
    optimizer.__class__ = GraphAdafactorOptimizer
    return optimizer
