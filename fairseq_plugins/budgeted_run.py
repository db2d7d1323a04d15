"""A fairseq run under a budget: the clocks, the counters, the stop and the run log, whatever the criterion.

fairseq offers a criterion no object of the run, so there is one per process, `current`: a criterion makes it when it
is built, its `reduce_metrics` (which fairseq calls on the class) feeds it, the `budget_linear` scheduler reads it, and
`patches` tell it of validation and saving.
"""

from __future__ import annotations

import atexit
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from fairseq.logging.meters import AverageMeter
from omegaconf import DictConfig

from fairseq_plugins.device import timer_for
from fairseq_plugins.run import (
    do_not_train,
    encoder_size,
    fail,
    layer_shapes,
    root_config,
    shape_facts,
    stop_after_this_update,
    user_errors_end_the_run,
)
from train_large import runlog
from train_large.budget import Budget, TrainClock, WallClock, parse_duration

logger = logging.getLogger(__name__)

current: BudgetedRun | None = None

# What is kept in every checkpoint, as meters of fairseq's "default" group: they are saved and restored with the run
# (`Trainer.state_dict`, fairseq/trainer.py:430, 0.12.3.1) and, as a fresh finetuning run needs, not restored under
# --reset-meters and --finetune-from-model. A criterion's own state is no place for them: fairseq saves it only where
# the criterion has parameters.
_METER = "budget_{}"
_REPEATS = 10.0  # seconds in which a second SIGTERM is the same one: torchrun hands on what its workers have had, too


class BudgetedRun:
    """The budget and the log of the run in this process.

    `section` is the criterion's part of the configuration; `loss_name` the meter whose average is the loss in
    fairseq's base 2.
    """

    def __init__(self, section: DictConfig, loss_name: str) -> None:
        self.section = section
        self.root = root_config(section)
        _check_launch(self.root)
        self.loss_name = loss_name
        with user_errors_end_the_run():
            seconds = parse_duration(section.budget) if section.budget is not None else None
        if section.target_ppl is not None and not section.target_ppl > 1:
            fail(f"--target-ppl {section.target_ppl} can never be reached: a perplexity is above 1.")
        self._limit_seconds = seconds
        self.vocabulary: int | None = None
        self.task: Any = None
        self.counters: dict[str, float] = dict.fromkeys(runlog.COUNTERS, 0)
        self.has_begun = self._finished = False
        self._stop_reason: str | None = None
        self._terminated_at: float | None = None
        self.trained = False  # whether fairseq has said that training is done
        self._after_update: list[Callable[[], None]] = []
        self._validation: tuple[str, Any] | None = None  # subset in hand, and the meters of it
        self._agreed = 0.0  # seconds of budget used, as all workers see it
        self._tail = 0.0  # from the last forward of an update to its end
        self._forward_at = 0.0
        self._told: float | None = None  # what this update's micro-batches have told so far
        self._loss_sum: Any = 0.0
        self._loss_count: Any = 0.0

    # -- the criterion's side --

    def begin_update(self) -> None:
        """`Trainer.train_step` begins (it calls `criterion.train()`), before any forward."""
        if not self.has_begun:
            self._begin()
        self.finish_validation()
        self._told = None  # here, for an update whose gradients overflow has no end
        self.clock.begin_update()

    def interrupt(self) -> None:
        """Something that is not training begins."""
        if self.has_begun:
            self.clock.interrupt()

    def stamp(self, flops: float) -> dict[str, float]:
        """What one micro-batch adds to the logging output, to be summed over micro-batches and workers.

        The first worker tells the others when this update will end: its clock at the latest forward, and what came
        after that in the update before. It tells differences, so that their sum over the micro-batches is the latest
        reading. fairseq sums in double precision (`all_reduce_dict`, fairseq/distributed/utils.py:668, 0.12.3.1).
        """
        self._forward_at = self._now()
        end = self._forward_at + self._tail
        used = end - (self._told or 0.0) if self._is_master else 0.0
        self._told = end
        return {"budget_used": used, "budget_flops": flops, "budget_terminated": float(self._terminated)}

    def remember(self, logging_output: Mapping[str, Any]) -> None:
        """What one micro-batch has logged; `end_update` is told of it anyway."""

    def end_update(self, logging_outputs: Sequence[Mapping[str, Any]]) -> None:
        """The optimizer step is done; `logging_outputs` are summed over all workers, so all come to the same decision.

        Reading them costs no synchronisation of its own: just before, fairseq waits for the device to look at the norm
        of the gradients (`_reduce_and_log_stats`, fairseq/trainer.py:1521, 0.12.3.1).
        """

        def total(key: str) -> float:
            return float(sum(log.get(key, 0) for log in logging_outputs))

        self.clock.end_update()
        self.counters["updates"] += 1
        self.counters["tokens"] += total("ntokens")
        self.counters["flops"] += total("budget_flops")
        self._loss_sum += sum(log.get(self.loss_name, 0) for log in logging_outputs)
        self._loss_count += sum(
            log.get("ntokens" if self.loss_name == "nll_loss" else "sample_size", 0) for log in logging_outputs
        )
        self._read_clocks()
        own = self._used()
        if self._world_size == 1 or self.budget.clock == "calibrated":
            self._agreed = own
        else:
            # Not one's own clock: workers that stop at different updates wait for each other for ever.
            self._agreed = max(self._agreed, total("budget_used"))
        self._tail = own - self._forward_at
        for listener in self._after_update:
            listener()
        # A signal in the last update changes nothing: a run that is begun again there would not validate any more.
        if self.budget.is_over(self._agreed):
            self.stop("budget")
        elif self._max_update and self._fairseqs_updates() >= self._max_update:
            self._stop_reason = self._stop_reason or "max_update"
        elif total("budget_terminated") > 0:
            self._terminate()
        if self.counters["updates"] % self._log_interval == 0 or self._stop_reason:
            self._log_training()
        self._keep()

    def see_validation(self) -> None:
        """A validation batch has been reduced: remember whose meters it went to."""
        if self._validation is not None:
            self._validation = (self._validation[0], metrics.get_active_aggregators()[0])

    # -- the scheduler's side --

    def fraction(self) -> float:
        """Share of the budget used when the next update begins; the same on every worker."""
        self._prepare()
        with user_errors_end_the_run():
            return self.budget.fraction(self._agreed)

    def after_update(self, listener: Callable[[], None]) -> None:
        """Call `listener` at the end of every update, when the budget has been read."""
        self._after_update.append(listener)

    # -- what the patches tell --

    def loaded(self, saved: Mapping[str, Any]) -> None:
        """The checkpoint, if there was one, has been loaded; `saved` has the meters of the run that goes on from it.

        fairseq does not restore them from a checkpoint of the end of an epoch (fairseq/trainer.py:645, 0.12.3.1), and
        the budget would begin anew. The log is read here, before anybody has written to it, and by the first worker
        alone, who may be the only one that sees it: all must begin with the same budget used.
        """
        own = {_METER.format(name) for name in runlog.COUNTERS}
        for _, key, _, state in saved.get("default", []):
            if key in own:
                _put(key, state["val"])
        self._prepare()
        wall = max(self.counters["wall_seconds"], self._logged_wall_seconds() if self._is_master else 0.0)
        _put(_METER.format("wall_seconds"), self._of_first_worker(wall))
        self._prepare()
        if self.budget.is_over(self._agreed):
            logger.info(
                f"the budget of {self.section.budget} is used up already ({self._agreed:.2f} s): nothing to train"
            )
            do_not_train(self.root)
            self._log_the_end_if_it_is_missing()

    def _log_the_end_if_it_is_missing(self) -> None:
        """The last line of a run that was killed when all but that was done."""
        if self._is_master and self._log_path.exists():
            with user_errors_end_the_run():
                if not runlog.is_finished(runlog.read(str(self._log_path))):
                    runlog.append(str(self._log_path), "stop", self.counters, reason="budget")

    def validation_begins(self, subset: str) -> None:
        self.interrupt()
        self.finish_validation()
        self._validation = (subset, None)

    def saving_begins(self) -> None:
        self.interrupt()
        self.finish_validation()
        self._keep()

    def saved(self, path: str | None) -> None:
        if self.has_begun and self._is_master and path is not None:
            self._log("checkpoint", file=os.path.basename(path))

    def finish_validation(self) -> None:
        """A subset has been gone through: log what its meters say, and stop if the target is reached."""
        if self._validation is None:
            return
        (subset, meters), self._validation = self._validation, None
        if not self.has_begun or meters is None or self.loss_name not in meters:
            return
        loss = float(meters[self.loss_name].avg) * math.log(2)  # fairseq's meters hold bits
        scores = {}
        for name in meters.keys() & {"accuracy", "bleu"}:
            value = meters[name].avg if isinstance(meters[name], AverageMeter) else meters.get_smoothed_value(name)
            scores[name] = float(value) / 100 if name == "accuracy" else float(value)  # fairseq's are per cent
        perplexity = math.exp(loss) if loss < 700 else None
        self._log("valid", subset=subset, loss=loss, perplexity=perplexity, **scores)
        target = self.section.target_ppl
        if target is not None and perplexity is not None and perplexity <= target and subset == self._first_subset:
            self.stop("target_ppl")

    # -- stopping --

    def stop(self, reason: str) -> None:
        """End the run after the update in hand; `reason` goes into the log."""
        if self._stop_reason in (None, "max_update"):
            self._stop_reason = reason
            updates, seconds = self.counters["updates"], self.counters["train_seconds"]
            logger.info(f"stopping: {reason} after {updates:.0f} updates, {seconds:.2f} s of training")
        stop_after_this_update(self.root)

    def take_sigterm(self) -> None:
        """SIGTERM has come, to this process or to the one that started it: save at the next reading, and end."""
        if not self._terminated:
            self._terminated_at = time.monotonic()
            logger.warning(
                f"SIGTERM: saving after the update in hand; another one after {_REPEATS:.0f} s ends the run at once"
            )

    @property
    def _terminated(self) -> bool:
        return self._terminated_at is not None

    def _terminate(self) -> None:
        self.stop("SIGTERM")
        # Whoever sent the signal may send SIGKILL next: save at once, without the validation that fairseq does before
        # it stops.
        self.root.dataset.disable_validation = True

    def _on_sigterm(self, signum: int, frame: Any) -> None:
        if os.getpid() != self._pid:  # a data loader's worker has inherited the handler
            _die_of_sigterm()
        if self._terminated_at is not None and time.monotonic() > self._terminated_at + _REPEATS:
            _die_of_sigterm()
        self.take_sigterm()

    # -- inner workings --

    def _prepare(self) -> None:
        """Make the budget, and take up what a checkpoint brought, as often as asked until training begins."""
        if self.has_begun:
            return
        if self.root is None:
            fail("a budgeted criterion needs a fairseq-train run around it.")
        distributed = self.root.distributed_training
        self._world_size = distributed.distributed_world_size
        self._is_master = distributed.distributed_rank == 0
        with user_errors_end_the_run():
            self.budget = Budget(self._limit_seconds, str(self.section.budget_clock), self._seconds_per_update())
        meters = metrics.get_meters("default") or {}
        for name in runlog.COUNTERS:
            meter = meters.get(_METER.format(name))
            self.counters[name] = meter.val if meter is not None else 0
        self._agreed = self._used()

    def _begin(self) -> None:
        """The first update of this process is about to begin, and everything there was to load has been loaded."""
        self._prepare()
        if self.section.target_ppl is not None and self.root.dataset.disable_validation:
            fail("--target-ppl is looked for in validations, which --disable-validation turns off: give one of them.")
        self.has_begun = True
        self._log_interval = self.root.common.log_interval
        self._max_update = self.root.optimization.max_update
        self._first_subset = self.root.dataset.valid_subset.split(",")[0]
        self._pid = os.getpid()
        self.clock = TrainClock(self.counters["train_seconds"], timer_for(self.root))
        self._wall = WallClock(self.counters["wall_seconds"])
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_sigterm)
            if multiprocessing.parent_process() is not None:
                # When the process that spawned this one dies, of the same SIGTERM, the system sends this one a SIGINT
                # (torch/multiprocessing/spawn.py:84, 2.13.0).
                signal.signal(signal.SIGINT, self._on_sigterm)
        self._log("resume" if self.counters["updates"] else "start", **self._facts())
        atexit.register(self.finish)

    def finish(self) -> None:
        """The process ends: write what is still to be written. Does nothing the second time."""
        if not self.has_begun or self._finished or os.getpid() != self._pid:
            return
        self._finished = True
        self.interrupt()
        self.finish_validation()
        reason = self._stop_reason or "ended"
        self._log("stop", reason=reason if reason == "SIGTERM" or self.trained else _why_not())
        if self._stop_reason == "SIGTERM":
            _die_of_sigterm()  # the run is not finished, so the process must not say that it succeeded

    def _fairseqs_updates(self) -> float:
        """Those that --max-update limits: from 0 on again where a run goes on without its optimizer's state."""
        found = (meters["num_updates"].val for meters in metrics.get_active_aggregators() if "num_updates" in meters)
        return next(found, self.counters["updates"])

    def _now(self) -> float:
        """Seconds of budget used at this moment."""
        if self.budget.clock == "train":
            return self.clock.seconds_now()
        return self._wall.seconds

    def _used(self) -> float:
        return self.budget.used(*(self.counters[name] for name in ("updates", "train_seconds", "wall_seconds")))

    def _read_clocks(self) -> None:
        self.counters["train_seconds"] = self.clock.seconds
        self.counters["wall_seconds"] = self._wall.seconds

    def _keep(self) -> None:
        """Put the counters where fairseq saves them."""
        if not self.has_begun:
            return
        self._read_clocks()
        for name, value in self.counters.items():
            _put(_METER.format(name), value)

    def _log_training(self) -> None:
        count = float(self._loss_count)
        if count:
            # Not `get_meter`: after a resume that gives what was restored, and fairseq logs to others.
            lr = next((meters["lr"].val for meters in metrics.get_active_aggregators() if "lr" in meters), None)
            self._log("train", loss=float(self._loss_sum) / count, lr=lr)
        self._loss_sum = self._loss_count = 0.0

    def _log(self, kind: str, **fields: Any) -> None:
        if not self._is_master:
            return
        self._read_clocks()
        fields = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in fields.items()
        }
        with user_errors_end_the_run():
            runlog.append(str(self._log_path), kind, self.counters, **fields)

    @property
    def _log_path(self) -> Path:
        return Path(self.root.checkpoint.save_dir) / runlog.NAME

    def _logged_wall_seconds(self) -> float:
        """The wall clock goes on through work that a kill has lost; only the log knows of it."""
        if not self.counters["updates"] or not self._log_path.exists():
            return 0.0
        lines = runlog.read_all(str(self._log_path))
        starts = [i for i, line in enumerate(lines) if line["kind"] == "start"]  # before the last one: of other runs
        return max((line["wall_seconds"] for line in lines[max(starts, default=0) :]), default=0.0)

    def _of_first_worker(self, seconds: float) -> float:
        """What the first worker gives here, on every worker; all must ask."""
        if self._world_size == 1:
            return seconds
        group = distributed_utils.get_data_parallel_group()
        return distributed_utils.broadcast_object(seconds, src_rank=0, group=group)

    def _seconds_per_update(self) -> float | None:
        """--seconds-per-update as a number, or from the table of `train-large time-steps`."""
        given = self.section.seconds_per_update
        if given is None:
            return None
        if self.section.budget_clock != "calibrated":
            fail(f"--seconds-per-update {given} is for --budget-clock calibrated: add that, or leave it out.")
        try:
            return float(given)
        except ValueError:
            from train_large.step_times import seconds_per_update

            if len(self.root.optimization.update_freq) > 1:
                fail(f"--seconds-per-update {given}: a table is of one --update-freq; give the seconds as a number.")
            sequences = self.root.dataset.batch_size
            if sequences is None:
                fail("--seconds-per-update with a table needs --batch-size: the table is by sequences per update.")
            batch = (
                sequences
                * self.root.optimization.update_freq[0]
                * self.root.distributed_training.distributed_world_size
            )
            length = getattr(self.root.task, "tokens_per_sample", None)
            if length is None:
                fail(
                    f"--seconds-per-update {given}: a table is of masked language models; give the seconds as a number."
                )
            size = encoder_size(self.root.model)
            if set(layer_shapes(self.root.model)) != {(size.heads, size.ffn)}:
                fail(
                    f"--seconds-per-update {given}: a table has no models with --layer-heads or --layer-ffn; give the "
                    "seconds as a number."
                )
            return seconds_per_update(Path(given), size, batch, length, self.vocabulary)

    def _facts(self) -> dict[str, Any]:
        """What the log's reader wants to know of the run."""
        model = self.root.model
        layers, hidden = getattr(model, "encoder_layers", None), getattr(model, "encoder_embed_dim", None)
        return {
            "size": f"{layers}l_{hidden}h",
            "arch": getattr(model, "arch", None) or getattr(model, "_name", None),
            "layers": layers,
            "hidden": hidden,
            **shape_facts(model),
            "vocabulary": self.vocabulary,
            "dictionary": getattr(model, "dictionary_digest", None),
            "length": getattr(self.root.task, "tokens_per_sample", None),
            "masked": getattr(self.root.task, "mask_prob", None),
            "train_tokens": self._train_tokens(),
            "learning_rate": self.root.optimization.lr[0],
            "budget_seconds": self.budget.seconds,
            "budget_clock": self.budget.clock,
            "seconds_per_update": self.budget.seconds_per_update,
            "workers": self.root.distributed_training.distributed_world_size,
            "threads": torch.get_num_threads(),
        }

    def _train_tokens(self) -> int | None:
        """Of the training set, or of its first part where there are several; None where it does not say."""
        train = getattr(self.task, "datasets", {}).get(self.root.dataset.train_subset)
        lengths = getattr(train, "sizes", None)
        if isinstance(lengths, (list, tuple)) and lengths:  # of what the task is given, first
            lengths = lengths[0]
        return int(lengths.sum()) if isinstance(lengths, np.ndarray) and lengths.ndim == 1 else None


def _check_launch(root: DictConfig | None) -> None:
    """Several processes of torchrun that fairseq takes for a run each would write into one folder.

    `infer_init_method` (fairseq/distributed/utils.py:47, 0.12.3.1) looks at what torchrun says only where the world is
    larger than one, and by default it is as large as this host has GPUs."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if root is None or root.common.tpu or "RANK" not in os.environ or not processes.isdigit():
        return
    if int(processes) > 1 and root.distributed_training.distributed_world_size == 1:
        fail(
            f"torchrun has started {processes} processes, and fairseq would train a model in each: add "
            f"--distributed-world-size {processes}."
        )


def _put(key: str, value: float) -> None:
    """Set one of the meters that are saved with the run."""
    meters = metrics.get_meters("default")
    if key not in meters:
        meters.add_meter(key, AverageMeter(), 10_000)
    meters[key].update(value, 0)


def _why_not() -> str:
    """Why training has not come to its end: Ctrl-C, which the interpreter tells of, or something else."""
    uncaught = getattr(sys, "last_type", None)
    return "interrupted" if uncaught is not None and issubclass(uncaught, KeyboardInterrupt) else "failed"


def _die_of_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
