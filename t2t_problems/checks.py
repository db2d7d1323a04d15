"""Whether a run can be what its flags and hparams ask for, told before any graph is built."""

from __future__ import annotations

import json
import os

from absl import flags
from tensor2tensor.utils import registry

from t2t_problems import counters
from t2t_problems.failure import user_errors_end_the_process
from train_large.budget import Budget
from train_large.errors import UserError


def check_run(hook_context) -> Budget:
    """The budget of the run. Ends the process where the hparams or the folder of the run do not allow it."""
    with user_errors_end_the_process():
        model_dir = hook_context.estimator.model_dir
        _check_schedule()
        _check_size(model_dir)
        _check_checkpoint(model_dir)
        return budget_of(hook_context.hparams)


def budget_of(hparams) -> Budget:
    """The budget that the hparams give. Raises UserError for one that is none."""
    if "budget_seconds" not in hparams:
        raise UserError(
            "transformer_budgeted needs the hparams budget_seconds and budget_clock, which this --hparams_set lacks: "
            "take one of transformer_enfr_*, or add them to your own set with t2t_problems.hparams.with_budget."
        )
    seconds = hparams.budget_seconds
    if not seconds > 0:
        raise UserError(
            f"budget_seconds={seconds:g} leaves no time to train: give more than zero seconds, "
            "as in --hparams=budget_seconds=3600."
        )
    if hparams.budget_clock == "calibrated" and not hparams.budget_seconds_per_update > 0:
        raise UserError("budget_clock=calibrated needs budget_seconds_per_update, as in --hparams=...=0.25.")
    if hparams.budget_evaluations < 0:
        raise UserError(f"budget_evaluations={hparams.budget_evaluations} is below zero: 0 leaves it to the flags.")
    if hparams.budget_evaluations and seconds == float("inf"):
        raise UserError("budget_evaluations needs budget_seconds, of which each evaluation is a share.")
    if hparams.budget_evaluations:
        _check_throttle()
    if hparams.bleu_sentences < 0:
        raise UserError(f"bleu_sentences={hparams.bleu_sentences} is below zero: 0 translates none.")
    try:
        return Budget(
            None if seconds == float("inf") else seconds,
            hparams.budget_clock,
            hparams.budget_seconds_per_update or None,
        )
    except UserError as error:
        raise UserError(str(error).replace("--budget-clock ", "budget_clock=")) from None


def _check_schedule() -> None:
    """`T2TExperiment.train_eval_and_decode` (tensor2tensor/utils/trainer_lib.py:476, 1.15.7) trains, evaluates and
    decodes in turn until --train_steps, whatever ended the training."""
    schedule = "train_eval_and_decode"
    if flags.FLAGS.is_parsed() and getattr(flags.FLAGS, "schedule", None) == schedule:
        raise UserError(
            f"--schedule={schedule} goes on evaluating and decoding when the budget is used up: give "
            "continuous_train_and_eval."
        )


def _check_throttle() -> None:
    """The flag's default does not count: `budget_hook.saver_hook` has every checkpoint evaluated."""
    named = "eval_throttle_seconds"
    flag = flags.FLAGS[named] if flags.FLAGS.is_parsed() and named in flags.FLAGS else None
    if flag is not None and flag.value and not flag.using_default_value:
        raise UserError(
            f"budget_evaluations says when to evaluate, --{named}={flag.value} would leave some of that out: give one "
            f"of the two, or --{named}=0."
        )


def _check_size(model_dir: str) -> None:
    """Tensor2Tensor takes the hparams it finds in the folder over those of --hparams_set, without a word."""
    path = os.path.join(model_dir, "hparams.json")
    named = getattr(flags.FLAGS, "hparams_set", None) if flags.FLAGS.is_parsed() else None
    if named is None or not os.path.exists(path):
        return
    asked = registry.hparams(named)
    if flags.FLAGS.hparams:
        asked = asked.parse(flags.FLAGS.hparams)
    with open(path, encoding="utf-8") as file:
        saved = json.load(file)
    for name, what in _SHAPE.items():
        here, there = saved.get(name), getattr(asked, name)
        if here is not None and here != there:
            raise UserError(
                f"{model_dir} holds a model with {here} {what}; --hparams_set={named} asks for {there}: give another "
                "--output_dir, or the set that it was begun with."
            )


_SHAPE = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden dimensions",
    "filter_size": "dimensions in its feed-forward layers",
    "num_heads": "attention heads",
}


def _check_checkpoint(model_dir: str) -> None:
    path = counters.latest(model_dir)
    if path is not None and counters.in_checkpoint(path) is None:
        raise UserError(
            f"{path} was trained without transformer_budgeted, so that the time it took is not known: give another "
            f"--output_dir, with --warm_start_from={model_dir} to begin with its weights."
        )
