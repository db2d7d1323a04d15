from __future__ import annotations

import inspect
import traceback

import graphs
import pytest
import tensorflow.compat.v1 as tf
from tensor2tensor.utils import t2t_model

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
        graphs.build("transformer_enfr_2l_128h", 501)
    assert ("call" in found, "tf__call" in found) == (mended, not mended)
