"""The model `transformer_budgeted`: Tensor2Tensor's Transformer, its training limited by a clock and logged."""

from __future__ import annotations

import tensorflow.compat.v1 as tf
from tensor2tensor.layers import common_layers
from tensor2tensor.models import transformer
from tensor2tensor.utils import registry

from t2t_problems import measures
from t2t_problems.budget_hook import BudgetHook, saver_hook
from t2t_problems.checks import check_run
from t2t_problems.score_hook import ScoreHook


@registry.register_model
class TransformerBudgeted(transformer.Transformer):
    """The stock Transformer. The hparams budget_seconds, budget_clock, budget_seconds_per_update and bleu_sentences say
    how long it is trained and how much of the dev set is translated at each evaluation (`hparams.with_budget`).
    """

    @classmethod
    def estimator_model_fn(cls, hparams, features, labels, mode, *args, **kwargs):
        """As upstream's (tensor2tensor/utils/t2t_model.py:1426, 1.15.7), leaving what the hooks read in the graph."""
        # On a TPU the graph runs many updates in one call, and nothing of a single one can be fetched.
        on_host = not common_layers.is_xla_compiled() and not kwargs.get("use_tpu")
        if mode == tf.estimator.ModeKeys.TRAIN and on_host:
            features = measures.begin_update(features)
        spec = super().estimator_model_fn(hparams, features, labels, mode, *args, **kwargs)
        if mode == tf.estimator.ModeKeys.TRAIN and on_host:
            measures.end_update(spec)
        if mode == tf.estimator.ModeKeys.EVAL and on_host:
            measures.keep_metrics(spec.eval_metric_ops)
        return spec

    @staticmethod
    def train_hooks(hook_context):
        """The clock, and a saver that comes after it. Ends the process with a sentence where the run cannot be."""
        budget = check_run(hook_context)
        hook = BudgetHook(hook_context, budget)
        saver = saver_hook(hook_context.estimator.config, hook)
        return [hook] if saver is None else [hook, saver]

    @staticmethod
    def eval_hooks(hook_context):
        """Loss, perplexity and BLEU into the run log."""
        return [ScoreHook(hook_context)]


# Its variables are named as the stock model's, so that `--model=transformer` decodes what this one has trained.
TransformerBudgeted.REGISTERED_NAME = "transformer"
