"""What the budget costs an update of Tensor2Tensor's Transformer: `make bench` writes bench/translation_step.csv.

The stock model and the budgeted one at the same size train on the same batch in one process, each in its own session
with the hooks that its run has. They take turns, a few updates at a time; the ratios are of the turns' medians.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from t2t_problems import tensorflow_two

tensorflow_two.behave_as_one()

import numpy as np  # noqa: E402
import table  # noqa: E402
import tensorflow.compat.v1 as tf  # noqa: E402
from tensor2tensor.data_generators import translate_enfr  # noqa: E402
from tensor2tensor.utils import hparams_lib, registry, t2t_model  # noqa: E402

from t2t_problems import plugin  # noqa: E402, F401
from train_large import machine  # noqa: E402

SIZES = ("2l_128h", "2l_256h")
VOCABULARY, SENTENCES, LENGTH = 4096, 32, 16
TURNS, UPDATES = 30, 5


class Problem(translate_enfr.TranslateEnfrWmt32k):
    """The shapes of the problem, without its data."""

    def get_hparams(self, model_hparams=None):
        entry = SimpleNamespace(vocab_size=VOCABULARY)
        self._encoders = {"inputs": entry, "targets": entry}
        return super().get_hparams(model_hparams)


def session(model: str, size: str, folder: str):
    """A training session of one model, and the operation of an update."""
    hparams = registry.hparams("transformer_enfr_" + size)
    hparams.add_hparam("model_dir", folder)
    hparams.add_hparam("warm_start_from", None)
    hparams_lib.add_problem_hparams(hparams, Problem())
    config = tf.estimator.RunConfig(folder, save_checkpoints_steps=10**9, log_step_count_steps=100)
    model_fn = t2t_model.T2TModel.make_estimator_model_fn(model, hparams)
    with tf.Graph().as_default():
        tf.set_random_seed(1)
        pieces = np.random.RandomState(1).randint(2, VOCABULARY, [SENTENCES, LENGTH, 1, 1]).astype(np.int32)
        features = {"inputs": pieces, "targets": pieces, "target_space_id": 1}
        batch = tf.data.Dataset.from_tensors(features).repeat().make_one_shot_iterator().get_next()
        tf.train.get_or_create_global_step()
        spec = model_fn(batch, batch["targets"], tf.estimator.ModeKeys.TRAIN)
        context = SimpleNamespace(
            estimator=SimpleNamespace(model_dir=folder, config=config), hparams=hparams, problem=hparams.problem
        )
        hooks = registry.model(model).train_hooks(context) or [
            tf.train.CheckpointSaverHook(folder, save_steps=10**9, saver=tf.train.Saver(sharded=True))
        ]
        if not tf.get_collection(tf.GraphKeys.SAVERS):
            tf.add_to_collection(tf.GraphKeys.SAVERS, tf.train.Saver(sharded=True, defer_build=True))
        made = tf.train.MonitoredTrainingSession(
            hooks=hooks, save_summaries_steps=100, checkpoint_dir=folder, save_checkpoint_secs=None
        )
    return made, spec.train_op


def measure(size: str) -> dict[str, list[float]]:
    """Seconds for an update of each model in each turn."""
    turns: dict[str, list[float]] = {"transformer": [], "transformer_budgeted": []}
    with tempfile.TemporaryDirectory() as folder:
        sessions = {model: session(model, size, f"{folder}/{model}") for model in turns}
        for turn in range(-3, TURNS):
            for model in sorted(turns, reverse=bool(turn % 2)):
                made, train_op = sessions[model]
                began = time.perf_counter()
                for _ in range(UPDATES):
                    made.run(train_op)
                if turn >= 0:
                    turns[model].append((time.perf_counter() - began) / UPDATES)
    return turns


def main() -> None:
    rows = []
    for size in SIZES:
        turns = measure(size)
        ratios = [b / a for a, b in zip(turns["transformer"], turns["transformer_budgeted"])]
        rows.append(
            {
                "size": size,
                "seconds_transformer": round(statistics.median(turns["transformer"]), 5),
                "seconds_budgeted": round(statistics.median(turns["transformer_budgeted"]), 5),
                "ratio": round(statistics.median(ratios), 4),
                "ratio_of_minima": round(min(turns["transformer_budgeted"]) / min(turns["transformer"]), 4),
                "tensorflow": tf.__version__,
                "machine": machine.describe(os.cpu_count() or 1),
            }
        )
        print(rows[-1], file=sys.stderr)
    table.write(rows, Path(__file__).with_suffix(".csv"))


if __name__ == "__main__":
    main()
