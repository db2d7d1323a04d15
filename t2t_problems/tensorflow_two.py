"""What Tensor2Tensor 1.15.7 needs of TensorFlow 2 (2.12.1) to work. Under TensorFlow 1 nothing is done."""

from __future__ import annotations

import functools
import sys

import tensorflow as tf


def is_two() -> bool:
    """Whether TensorFlow is of the second generation."""
    return tf.__version__.startswith("2.")


def mend_warm_starts() -> None:
    """Mends `contrib.framework` (tensor2tensor/utils/contrib.py:76, 1.15.7), whose stand-in under TensorFlow 2 lacks
    what `initialize_from_ckpt` (tensor2tensor/utils/t2t_model.py:2341) asks for: --warm_start_from was a traceback."""
    if not is_two():
        return
    from tensor2tensor.utils import contrib

    upstream = contrib.framework

    @functools.wraps(upstream)
    def framework(*args, **kwargs):
        module = upstream(*args, **kwargs)
        module.load_checkpoint = tf.train.load_checkpoint
        module.get_trainable_variables = tf.compat.v1.trainable_variables
        return module

    contrib.framework = framework


def mend_waiting_for_checkpoints() -> None:
    """Mends `contrib.training` (tensor2tensor/utils/contrib.py:132, 1.15.7), an error under TensorFlow 2: by it
    t2t-eval and the schedules that only evaluate wait for checkpoints (`next_checkpoint`, utils/trainer_lib.py:63)."""
    if not is_two():
        return
    from tensor2tensor.utils import contrib
    from tensorflow.python.training import checkpoint_utils

    contrib.training = lambda: checkpoint_utils  # `wait_for_new_checkpoint` has moved there


def behave_as_one() -> None:
    """Graphs and sessions as in TensorFlow 1, and variables as Tensor2Tensor's LazyAdam wants them.

    To be called before a graph is built. Where Tensor2Tensor was imported first, as by the plain `t2t-trainer`, it may
    have chosen Keras' layers already (tensor2tensor/layers/common_layers.py:44, 1.15.7, keeps its choice); they give
    variables other names, and a checkpoint of them cannot be decoded from.
    """
    if not is_two():
        return
    tf.compat.v1.disable_v2_behavior()
    tf.compat.v1.enable_resource_variables()
    common_layers = sys.modules.get("tensor2tensor.layers.common_layers")
    if common_layers is not None:
        common_layers._cached_layers = tf.compat.v1.layers
