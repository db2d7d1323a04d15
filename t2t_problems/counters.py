"""What a budgeted run has used, in a variable of its own, so that every checkpoint holds it."""

from __future__ import annotations

import os

import tensorflow.compat.v1 as tf

NAME = "train_large/counters"
NAMES = ("train_seconds", "wall_seconds", "tokens", "flops")


class Counters:
    """The variable in the graph under construction: one float64 for each of NAMES."""

    def __init__(self) -> None:
        with tf.variable_scope(tf.get_variable_scope(), reuse=tf.AUTO_REUSE):
            self._variable = tf.get_variable(
                NAME, [len(NAMES)], tf.float64, initializer=tf.zeros_initializer(), trainable=False
            )
        self._new = tf.placeholder(tf.float64, [len(NAMES)])
        self._assign = tf.assign(self._variable, self._new).op

    def read(self, session) -> dict:
        """The values of the variable, by name."""
        return dict(zip(NAMES, (float(value) for value in session.run(self._variable))))

    def write(self, session, values) -> None:
        """Put the values into the variable, for the saver."""
        session.run(self._assign, {self._new: [values[name] for name in NAMES]})


def in_checkpoint(path: str) -> dict | None:
    """The counters of a checkpoint, with its updates; None where it has none, as those of other models."""
    reader = tf.train.load_checkpoint(path)
    if not reader.has_tensor(NAME):
        return None
    values = dict(zip(NAMES, (float(value) for value in reader.get_tensor(NAME))))
    values["updates"] = int(reader.get_tensor("global_step"))
    return values


def latest(model_dir: str) -> str | None:
    """The latest checkpoint of the folder, or None."""
    return tf.train.latest_checkpoint(os.path.expanduser(model_dir))
