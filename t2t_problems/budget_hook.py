"""The clock of a run: what it has used, when it stops, and the lines it leaves in the run log.

A hook of the training session. What counts: from the start of an update, waiting for data included, to the end of its
optimizer step, as `measures` times them inside the graph. Not counted: building and optimizing the graph, evaluation,
translation, saving. The first update of a session, in which TensorFlow still sets up kernels, functions and the input
pipeline, counts as much as its second; that of a resumed run no more than its updates before did on average. On a TPU
nothing inside the graph can be timed: there the calls count, each of many updates, and the first, which compiles, as
much as the second.
"""

from __future__ import annotations

import os
import signal
import threading
import time

import tensorflow.compat.v1 as tf
from absl import flags

from t2t_problems import measures
from t2t_problems.counters import Counters
from t2t_problems.failure import user_errors_end_the_process
from t2t_problems.hparams import size_of
from train_large import runlog
from train_large.budget import WallClock
from train_large.flops import translation_train_flops


class BudgetHook(tf.train.SessionRunHook):
    """Stops the session at the end of the update with which the budget is used up, and writes the log.

    It has to come before the saver among the hooks: the saver's listeners evaluate inside its own `after_run`.
    """

    def __init__(self, hook_context, budget) -> None:
        hparams, config = hook_context.hparams, hook_context.estimator.config
        self.budget = budget
        self._hparams = hparams
        self._size = size_of(hparams)
        self._vocabulary = hparams.problem_hparams.vocab_size["targets"]
        self._problem = getattr(hook_context.problem, "name", None)
        self.evaluations = hparams.budget_evaluations
        self._is_chief = config.is_chief
        self._workers = max(1, config.num_worker_replicas)
        self._threads = getattr(config.session_config, "intra_op_parallelism_threads", 0) or os.cpu_count()
        self._log_path = os.path.join(hook_context.estimator.model_dir, runlog.NAME)
        self._log_interval = config.log_step_count_steps or 100
        self._updates_per_call = _updates_per_call(config) if _on_tpu() else 1
        self._wall = None  # made once in a process
        self._reason = None
        self.saves = True

    # -- what TensorFlow calls --

    def begin(self) -> None:
        self._counters = Counters()
        self._fetches = measures.of_update()
        self._global_step = tf.train.get_global_step()
        self._parameters = sum(int(v.shape.num_elements()) for v in tf.trainable_variables())
        self._charge = Charge(None)
        self._loss_sum = self._loss_tokens = 0.0
        self._has_ended = self._terminated = False

    def after_create_session(self, session, coord) -> None:
        values = self._counters.read(session)
        self.updates = int(session.run(self._global_step))
        self.tokens, self.flops = values["tokens"], values["flops"]
        self._train_seconds = values["train_seconds"]
        if self.updates:
            self._charge = Charge(self._train_seconds / self.updates)
        self._saved = self.updates
        if self._wall is None:
            before = max(values["wall_seconds"], self._logged_wall_seconds() if self.updates else 0.0)
            self._wall = WallClock(before)
            self._log("resume" if self.updates else "start", **self._facts())
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, self._on_sigterm)
        if self.budget.is_over(self.used):
            tf.logging.info("the budget of %g s is used up already: nothing to train", self.budget.seconds)
            self._reason = "budget"
            coord.request_stop()

    def before_run(self, run_context):
        self._call_began = time.perf_counter()
        return tf.train.SessionRunArgs(self._fetches)

    def after_run(self, run_context, run_values) -> None:
        results = run_values.results
        seconds = results["ended"] - results["began"] if results else time.perf_counter() - self._call_began
        self._train_seconds += self._charge.of(max(0.0, seconds))
        before = self.updates
        self.updates += self._updates_per_call
        if self._workers > 1 or self._updates_per_call > 1:
            self.updates = int(run_context.session.run(self._global_step))
        self._count(results)
        if self._terminated:
            self._stop("SIGTERM", run_context)
        elif self.budget.is_over(self.used):
            self._stop("budget", run_context)
        if self.updates // self._log_interval > before // self._log_interval or self._reason:
            self._log_training()

    def end(self, session) -> None:
        if not self.saves:
            self.ends()

    # -- what the saver tells --

    def before_save(self, session, step) -> None:
        self.updates = int(step)
        self._train_seconds += self._charge.rest()
        self._counters.write(session, self._values())

    def after_save(self, step) -> None:
        self._saved = int(step)
        self._log("checkpoint", file=f"model.ckpt-{step}")
        if self._terminated:  # before the saver's other listeners, of which one evaluates
            self._reason = "SIGTERM"
            self.ends()

    def ends(self) -> None:
        """The session has saved for the last time."""
        if not self._has_ended:
            self._has_ended = True
            self._log("stop", reason=self._reason or "ended")
        if self._reason == "SIGTERM":
            # The run is not finished, so the process must not say that it succeeded; nor evaluate, for whoever sent
            # the signal may send SIGKILL next.
            _die_of_sigterm()

    # -- the clocks --

    @property
    def used(self) -> float:
        """Seconds used on the clock that the budget is counted on."""
        return self.budget.used(self.updates, self._train_seconds, self._wall.seconds)

    @property
    def is_evaluated(self) -> bool:
        """Whether the log has an evaluation of the checkpoint that the session began with."""
        lines = runlog.read_all(self._log_path) if os.path.exists(self._log_path) else []
        return any(line["kind"] == "valid" and line["updates"] == self.updates for line in lines)

    @property
    def shares(self) -> int:
        """How many of the budget's `evaluations` shares are used up."""
        return int(self.evaluations * self.used / self.budget.seconds)

    def _stop(self, reason, run_context) -> None:
        """End the run after the call in hand."""
        if self._reason is None:
            self._reason = reason
            tf.logging.info(
                "stopping: %s after %d updates, %.2f s of training", reason, self.updates, self._train_seconds
            )
        run_context.request_stop()

    def _on_sigterm(self, signum, frame) -> None:
        if self._saved == self.updates:  # evaluating, or translating: nothing would be lost
            self._reason = "SIGTERM"
            self.ends()
        tf.logging.warning("SIGTERM: saving after the update in hand; a second one ends the run at once")
        self._terminated = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _count(self, results) -> None:
        if not results:
            return
        tokens = int(results["tokens"])
        self.tokens += tokens
        self.flops += translation_train_flops(
            self._size,
            self._vocabulary,
            int(results["source_length"]),
            int(results["target_length"]),
            int(results["sentences"]),
        )
        self._loss_sum += float(results["loss"]) * tokens
        self._loss_tokens += tokens

    # -- the log --

    def _values(self) -> dict:
        return {
            "updates": self.updates,
            "train_seconds": self._train_seconds,
            "wall_seconds": self._wall.seconds,
            "tokens": self.tokens,
            "flops": self.flops,
        }

    def _log_training(self) -> None:
        if self._loss_tokens:
            self._log("train", loss=self._loss_sum / self._loss_tokens)
        self._loss_sum = self._loss_tokens = 0.0

    def _log(self, kind, **fields) -> None:
        if self._is_chief:
            with user_errors_end_the_process():
                runlog.append(self._log_path, kind, self._values(), **fields)

    def _logged_wall_seconds(self) -> float:
        """The wall clock goes on through work that a kill has lost; only the log knows of it."""
        if not os.path.exists(self._log_path):
            return 0.0
        return max((line["wall_seconds"] for line in runlog.read_all(self._log_path)), default=0.0)

    def _facts(self) -> dict:
        """What the log's reader wants to know of the run."""
        return {
            "size": self._size.name,
            "arch": "transformer_budgeted",
            "layers": self._size.layers,
            "hidden": self._size.hidden,
            "ffn": self._size.ffn,
            "heads": self._size.heads,
            "parameters": self._parameters,
            "vocabulary": self._vocabulary,
            "problem": self._problem,
            "budget_seconds": self.budget.seconds,
            "budget_clock": self.budget.clock,
            "seconds_per_update": self.budget.seconds_per_update,
            "batch_tokens": self._hparams.batch_size,
            "workers": self._workers,
            "threads": self._threads,
        }


class Charge:
    """Seconds to charge for the updates of one session, the first taken to be as long as the second, or as `usual`,
    the mean of those before a resume."""

    def __init__(self, usual) -> None:
        self._usual = usual
        self._updates = 0
        self._first = 0.0  # what the first took, as long as it has not been charged

    def of(self, seconds: float) -> float:
        """What to charge once an update that took `seconds` is done."""
        self._updates += 1
        if self._updates == 1 and self._usual is None:
            self._first = seconds
            return 0.0
        if self._updates == 1:
            return min(seconds, self._usual)
        return seconds + min(seconds, self.rest())

    def rest(self) -> float:
        """What is left to charge where no second update follows: all that the first took."""
        seconds, self._first = self._first, 0.0
        return seconds


class _Listener(tf.train.CheckpointSaverListener):
    """What the saver tells, to the hook."""

    def __init__(self, hook) -> None:
        self._hook = hook

    def before_save(self, session, global_step_value) -> None:
        self._hook.before_save(session, global_step_value)

    def after_save(self, session, global_step_value) -> None:
        self._hook.after_save(global_step_value)

    def end(self, session, global_step_value) -> None:
        self._hook.ends()


def saver_hook(config, hook):
    """The run's saver, to be put behind `hook`, which it tells before and after it saves; None where nothing is saved.

    The Estimator then makes none of its own (tensorflow_estimator/python/estimator/estimator.py:1452, 2.12.0), and adds
    its evaluation to the listeners of this one.
    """
    if not config.is_chief or not (config.save_checkpoints_secs or config.save_checkpoints_steps):
        hook.saves = False
        return None
    saver = (_Saver if hook.evaluations else tf.train.CheckpointSaverHook)(
        config.model_dir,
        save_secs=config.save_checkpoints_secs,
        save_steps=config.save_checkpoints_steps,
        listeners=[_Listener(hook)],
    )
    if hook.evaluations:
        saver.budget_hook, saver._timer = hook, _ShareTimer(hook)
    return saver


class _Saver(tf.train.CheckpointSaverHook):
    """A saver whose every checkpoint is evaluated, the one that a run is resumed from too if it was ended before that.

    T2T's --eval_throttle_seconds, 600 unless given, would leave out those that come sooner after an evaluation
    (`_NewCheckpointListenerForEvaluate`, tensorflow_estimator/python/estimator/training.py:523, 2.12.0).
    """

    def begin(self):
        for listener in self._listeners:
            if getattr(listener, "_eval_throttle_secs", 0):
                tf.logging.info("budget_evaluations: evaluating as if with --eval_throttle_seconds=0")
                listener._eval_throttle_secs = 0
        super().begin()

    def after_create_session(self, session, coord):
        if self.budget_hook.updates and not self.budget_hook.is_evaluated:
            for listener in self._listeners:
                if getattr(listener, "_is_first_run", False):  # would leave out what is saved first
                    listener._is_first_run = False
        super().after_create_session(session, coord)


class _ShareTimer:
    """When to save: each time another share of the budget is used, so that all sizes are evaluated at the same times.

    In the place of the saver's own, which goes by updates or by the time of day
    (`SecondOrStepTimer`, tensorflow/python/training/basic_session_run_hooks.py:82, 2.12.1).
    """

    def __init__(self, hook) -> None:
        self._hook = hook
        self.reset()

    def reset(self) -> None:
        self._last_step = None
        self._shares = 0

    def should_trigger_for_step(self, step) -> bool:
        return step != self._last_step and (self._last_step is None or self._hook.shares > self._shares)

    def update_last_triggered_step(self, step) -> None:
        self._last_step = step
        self._shares = self._hook.shares

    def last_triggered_step(self):
        return self._last_step


def _on_tpu() -> bool:
    return bool(flags.FLAGS.is_parsed() and getattr(flags.FLAGS, "use_tpu", False))


def _updates_per_call(config) -> int:
    """A TPU makes so many updates in one call of the training operation."""
    tpu_config = getattr(config, "tpu_config", None)
    return tpu_config.iterations_per_loop if tpu_config is not None else 1


def _die_of_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
