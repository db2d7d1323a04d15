"""Tensor2Tensor's models as they are written: in graph operations, which AutoGraph need not translate."""

from __future__ import annotations

import tensorflow as tf
from tensor2tensor.utils import t2t_model


def leave_models_alone() -> None:
    """Mends `T2TModel.call` (tensor2tensor/utils/t2t_model.py:315, 1.15.7): TensorFlow's layers have AutoGraph rewrite
    it and all that it calls, function by function, which changes nothing and takes half of the time before the first
    update."""
    t2t_model.T2TModel.call = tf.autograph.experimental.do_not_convert(t2t_model.T2TModel.call)
