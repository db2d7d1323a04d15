"""Loss, perplexity and BLEU of an evaluation, into the run log."""

from __future__ import annotations

import contextlib
import math
import os

import tensorflow.compat.v1 as tf
from absl import flags
from tensor2tensor.data_generators.problem import DatasetSplit
from tensor2tensor.data_generators.text_encoder import EOS_ID
from tensor2tensor.utils import decoding, expert_utils

from t2t_problems import counters, measures
from t2t_problems.bleu import paper_bleu
from t2t_problems.failure import user_errors_end_the_process
from train_large import runlog


class ScoreHook(tf.train.SessionRunHook):
    """A hook of the evaluation's session. The line that it writes carries the counters of the checkpoint evaluated."""

    def __init__(self, hook_context) -> None:
        self._estimator = hook_context.estimator
        self._hparams = hook_context.hparams
        self._model_dir = hook_context.estimator.model_dir
        self._scored = None  # the checkpoint that was scored last

    def begin(self) -> None:
        self._metrics = measures.of_evaluation()
        self._global_step = tf.train.get_global_step()

    def end(self, session) -> None:
        step = int(session.run(self._global_step))
        path = os.path.join(self._model_dir, f"model.ckpt-{step}")
        used = counters.in_checkpoint(path)
        # On training data, by continuous_eval_on_train_data (trainer_lib.py:546, 1.15.7), the model looks better.
        if self._hparams.get("eval_dir_name") == "eval_train":
            return
        # T2T evaluates the last checkpoint twice (trainer_lib.py:421, 1.15.7).
        if used is None or path == self._scored or not self._metrics:
            return
        self._scored = path
        metrics = session.run(self._metrics)
        loss = -float(metrics["neg_log_perplexity"])
        fields = {
            "subset": "test" if _on_test_set() else "dev",
            "loss": loss if math.isfinite(loss) else None,
            "perplexity": math.exp(loss) if loss < 700 else None,
            "accuracy": float(metrics["accuracy"]),
            "approx_bleu": 100 * float(metrics["approx_bleu_score"]),
        }
        fields.update(self._translation_scores(path))
        with user_errors_end_the_process():
            runlog.append(os.path.join(self._model_dir, runlog.NAME), "valid", used, **fields)

    def _translation_scores(self, checkpoint) -> dict:
        sentences = self._hparams.bleu_sentences
        if not sentences:
            return {}
        decode_hparams = _decode_hparams()
        split = DatasetSplit.TEST if _on_test_set() else DatasetSplit.EVAL
        translations, references = translate(self._estimator, self._hparams, checkpoint, split, sentences)
        return {
            "bleu": paper_bleu(translations, references, "fr"),
            "bleu_sentences": len(references),
            "beam_size": decode_hparams.beam_size,
            "alpha": decode_hparams.alpha,
        }


def translate(estimator, hparams, checkpoint, split, sentences):
    """Translations of the first `sentences` pairs of a split, and their references, as two lists of text.

    Line n of the one belongs to line n of the other; their order is that of T2T's batches, not the split's. They are
    made as t2t-decoder makes them, with the --decode_hparams of this process.
    """
    input_fn = hparams.problem.make_estimator_input_fn(
        tf.estimator.ModeKeys.PREDICT,
        hparams,
        # Taken before the batches are made: those come in the order of their sentences' lengths.
        dataset_kwargs={"dataset_split": split, "max_records": sentences},
    )
    vocabulary = hparams.problem_hparams.vocabulary["targets"]
    with _one_shard(estimator):
        predictions = list(estimator.predict(input_fn, checkpoint_path=checkpoint))
    return tuple([_text(vocabulary, one[name]) for one in predictions] for name in ("outputs", "targets"))


@contextlib.contextmanager
def _one_shard(estimator):
    """One device in the place of --worker_gpu: T2T's fast decoding refuses more (models/transformer.py:707, 1.15.7)."""
    config = estimator._config  # estimator.config is a copy
    before = getattr(config, "data_parallelism", None)  # a TPU's has none
    config.data_parallelism = expert_utils.Parallelism([""])
    try:
        yield
    finally:
        config.data_parallelism = before


def _text(vocabulary, ids) -> str:
    """The text of word pieces up to the end of the sentence."""
    ids = [int(i) for i in ids.flatten()]
    return vocabulary.decode(ids[: ids.index(EOS_ID)] if EOS_ID in ids else ids)


def _decode_hparams():
    return decoding.decode_hparams(_flag("decode_hparams", ""))


def _on_test_set() -> bool:
    return _flag("eval_use_test_set", False)


def _flag(name, default):
    """A flag of t2t-trainer; in another program the default."""
    return flags.FLAGS[name].value if flags.FLAGS.is_parsed() and name in flags.FLAGS else default
