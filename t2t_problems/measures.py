"""Tensors of one update or evaluation that the hooks read, kept in the graph's own collections."""

from __future__ import annotations

import tensorflow.compat.v1 as tf

_UPDATE = "train_large/update/"
_METRIC = "train_large/metric/"


def begin_update(features) -> dict:
    """Keep the time at which an update begins, the shape of its batch, and its target word pieces.

    Gives the features as they are once the time has been taken: nothing can be computed of them before. Fetching the
    batch from the input pipeline begins at the same time, so that waiting for it is between the two times.
    """
    source, target = features["inputs"], features["targets"]
    with tf.control_dependencies(None):
        began = tf.timestamp()
    _keep(_UPDATE, "began", began)
    _keep(_UPDATE, "sentences", tf.shape(target)[0])
    _keep(_UPDATE, "source_length", tf.shape(source)[1])
    _keep(_UPDATE, "target_length", tf.shape(target)[1])
    _keep(_UPDATE, "tokens", tf.reduce_sum(tf.cast(tf.not_equal(target, 0), tf.int32)))
    with tf.control_dependencies([began]):
        return {name: tf.identity(feature) for name, feature in features.items()}


def end_update(spec) -> None:
    """Keep the loss (nats for a target word piece, label smoothing included) and the time at which the update ends.

    Both times are taken inside the graph: a session optimizes its graph within its first calls, once for every set of
    tensors that its hooks ask for, and that is no training.
    """
    _keep(_UPDATE, "loss", spec.loss)
    with tf.control_dependencies([spec.train_op]):
        _keep(_UPDATE, "ended", tf.timestamp())


def keep_metrics(eval_metric_ops) -> None:
    """The values that an evaluation comes to, by their names without task and feature."""
    for name, (value, _) in eval_metric_ops.items():
        _keep(_METRIC, name.rpartition("/")[2], value)


def of_update() -> dict:
    """What was kept of an update; empty on a TPU."""
    return _kept(_UPDATE)


def of_evaluation() -> dict:
    """What was kept of an evaluation, by the names of tensor2tensor/utils/metrics.py."""
    return _kept(_METRIC)


def _keep(prefix, name, tensor) -> None:
    tf.add_to_collection(prefix + name, tensor)


def _kept(prefix) -> dict:
    graph = tf.get_default_graph()
    keys = [key for key in graph.get_all_collection_keys() if key.startswith(prefix)]
    return {key[len(prefix) :]: graph.get_collection(key)[0] for key in keys}
