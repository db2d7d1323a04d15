"""The places where fairseq 0.12.3.1 itself must be mended or listened to, one function each, all applied when the
plugin is imported.

`tests/fairseq_plugins/test_patches.py` says when one of them is no longer needed.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import logging
import os
import queue
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, tasks
from fairseq.data.iterators import BackgroundConsumer
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.logging import metrics
from fairseq.trainer import Trainer

from fairseq_plugins import budgeted_run, keys
from fairseq_plugins.lazy_run import LazyRun
from fairseq_plugins.loading import check_before_loading, misfit
from fairseq_plugins.masking import make_masked_batches_whole
from fairseq_plugins.run import fail, root_config, user_errors_end_the_run
from train_large.compression.checkpoint import PLAIN_CLASSES


def allow_namespace_in_checkpoints() -> None:
    """Let fairseq resume under torch 2.6 and later.

    Mends `load_checkpoint_to_cpu` (fairseq/checkpoint_utils.py:340, 0.12.3.1), which calls `torch.load` with that
    release's new default `weights_only=True`. A checkpoint's `cfg.model` is an `argparse.Namespace`, and its scores may
    be NumPy's numbers.
    """
    torch.serialization.add_safe_globals(list(PLAIN_CLASSES))


def copy_whole_or_not_at_all() -> None:
    """Keep the previous checkpoint when the disk fills up.

    Mends `PathManager.copy` (fairseq/file_io.py:57, 0.12.3.1), by which `save_checkpoint` makes checkpoint_last.pt and
    checkpoint_best.pt: it writes over the old file, so a full disk leaves neither.
    """
    upstream = PathManager.copy

    @functools.wraps(upstream)
    def copy(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
        if PathManager.path_requires_pathmanager(dst_path):
            return upstream(src_path, dst_path, overwrite)
        aside = dst_path + ".tmp"
        try:
            shutil.copyfile(src_path, aside)
            os.replace(aside, dst_path)
        except OSError:
            Path(aside).unlink(missing_ok=True)
            raise
        return True

    PathManager.copy = staticmethod(copy)


def take_torchrun_on_a_cpu() -> None:
    """Let the processes of torchrun train together where there is no GPU.

    Mends `_infer_torch_distributed_launch_init` (fairseq/distributed/utils.py:87, 0.12.3.1), which divides by their
    number.
    """
    upstream = distributed_utils._infer_torch_distributed_launch_init

    @functools.wraps(upstream)
    def infer(config: Any) -> None:
        if torch.cuda.device_count():
            upstream(config)
            return
        config.distributed_init_method = "env://"
        config.distributed_world_size = int(os.environ["WORLD_SIZE"])
        config.distributed_rank = int(os.environ["RANK"])
        config.device_id = 0  # of any other, `infer_init_method` makes a CUDA device
        config.distributed_no_spawn = True  # the processes are there already

    distributed_utils._infer_torch_distributed_launch_init = infer


def announce_validation() -> None:
    """Tell the budget when validation begins, and of which subset.

    Listens at `Trainer.get_valid_iterator` (fairseq/trainer.py:739, 0.12.3.1), the first thing that `validate` does
    for a subset; fairseq tells a criterion neither.
    """
    upstream = Trainer.get_valid_iterator

    @functools.wraps(upstream)
    def get_valid_iterator(self: Trainer, subset: str, *args: object, **kwargs: object) -> object:
        if budgeted_run.current is not None:
            budgeted_run.current.validation_begins(subset)
        return upstream(self, subset, *args, **kwargs)

    Trainer.get_valid_iterator = get_valid_iterator


def validate_no_more_than_asked() -> None:
    """Leave no thread behind that makes validation batches while the model trains.

    Mends `validate` (fairseq_cli/train.py:516, 0.12.3.1): under --max-valid-steps it breaks off, and the iterator's
    thread (`BufferedIterator`, fairseq/data/iterators.py:691) goes on to fill its buffer, on training's time, and then
    waits for ever. Here the iterator ends after as many batches as `validate` looks at, one more than it is told.
    """
    upstream = Trainer.get_valid_iterator

    @functools.wraps(upstream)
    def get_valid_iterator(self: Trainer, *args: object, **kwargs: object) -> object:
        batches = upstream(self, *args, **kwargs)
        steps = self.cfg.dataset.max_valid_steps
        if steps is not None and "next_epoch_itr" not in vars(batches):  # fairseq hands out the same one again
            whole = batches.next_epoch_itr
            batches.next_epoch_itr = lambda *args, **kwargs: whole(*args, **kwargs).take(steps + 1)
        return batches

    Trainer.get_valid_iterator = get_valid_iterator


def announce_loading() -> None:
    """Refuse a checkpoint that cannot be the right one, and tell the budget when a run has been taken up.

    Listens at `load_checkpoint` (fairseq/checkpoint_utils.py:210, 0.12.3.1), which meets a truncated file, pickled
    code or other sizes with a traceback, and the same number of entries in another order with nothing at all.
    """
    upstream = checkpoint_utils.load_checkpoint

    @functools.wraps(upstream)
    def load_checkpoint(cfg: object, trainer: Trainer, **kwargs: object) -> object:
        path = _path_to_load(cfg, trainer.checkpoint_suffix)
        if path is not None and not PathManager.path_requires_pathmanager(path):
            check_before_loading(Path(path), trainer.get_model(), trainer.task)
        try:
            loaded = upstream(cfg, trainer, **kwargs)
        except Exception as error:  # of no kind of its own (fairseq/trainer.py:597)
            if path is None or "Cannot load model parameters" not in str(error):
                raise
            fail(misfit(Path(path), trainer.get_model(), _why(error)))
        if budgeted_run.current is not None:
            extra_state, _ = loaded
            goes_on = extra_state is not None and not cfg.reset_meters and path != cfg.finetune_from_model
            budgeted_run.current.loaded(extra_state.get("metrics", {}) if goes_on else {})
        return loaded

    checkpoint_utils.load_checkpoint = load_checkpoint


def _why(error: Exception) -> str:
    """What went wrong before `error`, in one line."""
    lines = str(error.__context__ or error).splitlines()
    return lines[min(1, len(lines) - 1)].strip()  # torch's first line names the class


def begin_with_no_scores() -> None:
    """Let each run of a process have its own best checkpoint and its own patience.

    Mends `save_checkpoint` (fairseq/checkpoint_utils.py:35, 0.12.3.1) and `should_stop_early`
    (fairseq_cli/train.py:232), which keep the best score of the run before: under `fairseq-hydra-train --multirun` a
    later one that did not beat it had no checkpoint_best.pt. Every run comes to `load_checkpoint` first.
    """
    upstream = checkpoint_utils.load_checkpoint

    @functools.wraps(upstream)
    def load_checkpoint(*args: object, **kwargs: object) -> object:
        programs = (sys.modules.get(name) for name in ("fairseq_cli.train", "__main__"))  # the one that runs
        stops = [program.should_stop_early for program in programs if hasattr(program, "should_stop_early")]
        for function in (checkpoint_utils.save_checkpoint, *stops):
            for name in ("best", "num_runs"):
                vars(function).pop(name, None)
        return upstream(*args, **kwargs)

    checkpoint_utils.load_checkpoint = load_checkpoint


def tell_the_task_without_the_iterator() -> None:
    """Take a pruning ladder up under --reset-dataloader too.

    Mends `load_checkpoint` (fairseq/checkpoint_utils.py:295, 0.12.3.1), which tells the task what it had saved only
    where it restores the iterator; a ladder then took the pruned model for the unpruned one, and began anew.
    """
    upstream = checkpoint_utils.load_checkpoint

    @functools.wraps(upstream)
    def load_checkpoint(cfg: Any, trainer: Trainer, **kwargs: object) -> Any:
        extra_state, batches = upstream(cfg, trainer, **kwargs)
        saved = (extra_state or {}).get(type(trainer.task).__name__)
        goes_on = _path_to_load(cfg, trainer.checkpoint_suffix) == _last(cfg, trainer.checkpoint_suffix)
        if saved and cfg.reset_dataloader and goes_on and hasattr(trainer.task, "set_checkpoint_dict"):
            trainer.task.set_checkpoint_dict(saved)
        return extra_state, batches

    checkpoint_utils.load_checkpoint = load_checkpoint


def _path_to_load(cfg: Any, suffix: str) -> str | None:
    """The checkpoint that a run begins from, if any, by upstream's rules (fairseq/checkpoint_utils.py:227). `suffix`:
    --checkpoint-suffix."""
    if cfg.restore_file != "checkpoint_last.pt":
        return cfg.restore_file.replace(".pt", suffix + ".pt")
    if os.path.exists(_last(cfg, suffix)):
        return _last(cfg, suffix)
    return getattr(cfg, "continue_once", None) or cfg.finetune_from_model


def _last(cfg: Any, suffix: str) -> str:
    return os.path.join(cfg.save_dir, f"checkpoint_last{suffix}.pt")


def announce_end() -> None:
    """Tell the budget when training has come to its end, and not to an exception's.

    Listens at the log of fairseq_cli/train.py, whose `main` ends with these words (line 220, 0.12.3.1) and calls
    nothing after them that could be listened at; how it is left otherwise depends on who called it. Where fairseq is
    told to say less (LOGLEVEL=WARNING), it speaks all the same, and is heard here alone.
    """
    log = logging.getLogger("fairseq_cli.train")
    own = log.level

    def hear(record: logging.LogRecord) -> bool:
        if budgeted_run.current is not None and str(record.msg).startswith("done training"):
            budgeted_run.current.trained = True
        return record.levelno >= (own or logging.getLogger("fairseq_cli").getEffectiveLevel())

    if log.getEffectiveLevel() > logging.INFO:
        log.setLevel(logging.INFO)
    log.addFilter(hear)


def keep_at_the_end_of_an_epoch() -> None:
    """Keep the checkpoints that --keep-interval-updates-pattern asks for where an epoch ends with that update too.

    `save_checkpoint` (fairseq/checkpoint_utils.py:77, 0.12.3.1) writes checkpoint_EPOCH_UPDATES.pt within epochs alone.
    """
    upstream = checkpoint_utils.save_checkpoint

    @functools.wraps(upstream)
    def save_checkpoint(cfg: Any, trainer: Trainer, epoch_itr: Any, *args: object) -> str | None:
        path = upstream(cfg, trainer, epoch_itr, *args)
        updates, every, keep = trainer.get_num_updates(), cfg.save_interval_updates, cfg.keep_interval_updates_pattern
        if path is not None and epoch_itr.end_of_epoch() and every > 0 < keep and not updates % every + updates % keep:
            name = f"checkpoint_{epoch_itr.epoch}_{updates}{trainer.checkpoint_suffix}.pt"
            PathManager.copy(path, os.path.join(cfg.save_dir, name), overwrite=True)
        return path

    checkpoint_utils.save_checkpoint = save_checkpoint


def announce_saving() -> None:
    """Tell the budget when a checkpoint is saved, and end with one sentence, not a traceback, when the disk is full.

    Listens at `save_checkpoint` (fairseq/checkpoint_utils.py:35, 0.12.3.1); fairseq tells a criterion nothing of it.
    The unfinished file is removed: upstream leaves it on the full disk.
    """
    upstream = checkpoint_utils.save_checkpoint

    # Upstream keeps the best score so far as an attribute of whatever goes by this name, so the wrapper carries it
    # from here on.
    @functools.wraps(upstream)
    def save_checkpoint(cfg: object, trainer: Trainer, *args: object) -> str | None:
        run = budgeted_run.current
        if run is not None:
            run.saving_begins()
        try:
            path = upstream(cfg, trainer, *args)
        except (OSError, RuntimeError) as error:
            if not _is_disk_full(error):
                raise
            for unfinished in Path(cfg.save_dir).glob("*.pt.tmp"):
                unfinished.unlink()
            earlier = os.path.exists(_last(cfg, trainer.checkpoint_suffix))
            before = "the one before it is whole" if earlier else "there is none before it"
            fail(
                f"{cfg.save_dir}: the disk is full, so the checkpoint was not saved; {before}. Make room and run the "
                "same command again."
            )
        if run is not None:
            run.saved(path)
        return path

    checkpoint_utils.save_checkpoint = save_checkpoint


def announce_updates_of_a_lazy_device() -> None:
    """Tell the budget of every update on an XLA device, and fairseq's log of those that it leaves out.

    Listens at `Trainer._check_xla_compilation`, which ends an update there, and at `_reduce_and_log_stats`
    (fairseq/trainer.py:1565 and 1521, 0.12.3.1), which that device comes to once every --log-interval updates, with the
    statistics of one of them.
    """
    check, upstream = Trainer._check_xla_compilation, Trainer._reduce_and_log_stats

    @functools.wraps(check)
    def check_xla_compilation(self: Trainer) -> None:
        check(self)
        if isinstance(budgeted_run.current, LazyRun):
            budgeted_run.current.issued()

    @functools.wraps(upstream)
    def reduce_and_log_stats(
        self: Trainer, logging_outputs: object, sample_size: object, grad_norm: object = None
    ) -> object:
        run = budgeted_run.current
        if isinstance(run, LazyRun) and grad_norm is not None:
            *earlier, logging_outputs = run.updates_to_log()
            for update in earlier:
                upstream(self, update, sample_size)
            metrics.log_speed("ups", float(len(earlier)), priority=100, round=2)
        return upstream(self, logging_outputs, sample_size, grad_norm)

    Trainer._check_xla_compilation = check_xla_compilation
    Trainer._reduce_and_log_stats = reduce_and_log_stats


def end_data_threads() -> None:
    """Let a run that stops in the middle of an epoch end with its own exit status.

    Mends `BufferedIterator` (fairseq/data/iterators.py:691, 0.12.3.1): it leaves a daemon thread making batches, and
    when the interpreter ends while that is inside torch, the process aborts with "terminate called without an active
    exception".
    """
    for thread in threading.enumerate():
        if isinstance(thread, BackgroundConsumer):
            thread._max_len = 0  # it ends after the batch in hand, once there is room for that
            while thread.is_alive():
                with contextlib.suppress(queue.Empty):
                    thread._queue.get(timeout=0.1)


def broadcast_without_classes() -> None:
    """Let several workers load a checkpoint under torch 2.6 and later.

    Mends `_broadcast_object_slow` (fairseq/distributed/utils.py:805, 0.12.3.1), by which the first worker hands what it
    loaded to the others: they read it with that release's `weights_only=True`, which refuses the configuration's
    classes and fairseq's own place holder for a tensor.
    """
    torch.serialization.add_safe_globals([distributed_utils._TensorPlaceholder])
    upstream = distributed_utils.broadcast_object

    @functools.wraps(upstream)
    def broadcast_object(obj: object, *args: object, **kwargs: object) -> object:
        if isinstance(obj, dict) and "cfg" in obj and "model" in obj:
            obj = {**obj, "cfg": None, "args": None}  # `Trainer.load_checkpoint`, the one who sends such, reads neither
        return upstream(obj, *args, **kwargs)

    distributed_utils.broadcast_object = broadcast_object


def refuse_unknown_keys() -> None:
    """Refuse what a Hydra configuration has and nothing reads, before anything is built.

    Mends `main` (fairseq_cli/train.py:87, 0.12.3.1): `fairseq-hydra-train` takes any key of the sections that are
    fairseq's own and of a model that has arguments. `setup_task` is the first that `main` calls with its configuration
    once this plugin is there.
    """
    upstream = tasks.setup_task

    @functools.wraps(upstream)
    def setup_task(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        root = root_config(cfg)
        if root is not None:
            with user_errors_end_the_run():
                keys.refuse_unknown(root)
        return upstream(cfg, *args, **kwargs)

    tasks.setup_task = setup_task


def explain_the_data() -> None:
    """End with one sentence where the data is not where the task looks for it, and where the number of classes is
    missing.

    Listens at `setup_task`, by which every task of `main` reads its dictionaries (fairseq_cli/train.py:100, 0.12.3.1).
    """
    upstream = tasks.setup_task

    @functools.wraps(upstream)
    def setup_task(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        if root_config(cfg) is None:
            return upstream(cfg, *args, **kwargs)
        if getattr(cfg, "num_classes", None) == -1:
            fail("--num-classes: give the number of classes, or 1 with --regression-target.")
        try:
            return upstream(cfg, *args, **kwargs)
        except FileNotFoundError as error:
            if error.filename is None:
                raise
            missing = Path(error.filename)
            inside = missing.parent / "data-bin"
            fail(
                f"{missing} is not there: give "
                + (f"{inside}." if (inside / missing.name).exists() else "the folder that the data was prepared in.")
            )

    tasks.setup_task = setup_task


def explain_the_save_dir() -> None:
    """End with one sentence where checkpoints cannot be written.

    Listens at `verify_checkpoint_directory` (fairseq/checkpoint_utils.py:872, 0.12.3.1), which lets the system's error
    out.
    """
    upstream = checkpoint_utils.verify_checkpoint_directory

    @functools.wraps(upstream)
    def verify_checkpoint_directory(save_dir: str) -> None:
        try:
            upstream(save_dir)
        except OSError as error:
            fail(f"--save-dir {save_dir} cannot be written ({error.strerror}): give another folder.")

    checkpoint_utils.verify_checkpoint_directory = verify_checkpoint_directory


def _is_disk_full(error: BaseException) -> bool:
    """Whether `error`, or what it came from, says so: torch's own writer hides it in a RuntimeError."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno == errno.ENOSPC:
            return True
        seen = seen.__cause__ or seen.__context__
    return "PytorchStreamWriter failed" in str(error) or "unexpected pos" in str(error)


broadcast_without_classes()
atexit.register(end_data_threads)
allow_namespace_in_checkpoints()
copy_whole_or_not_at_all()
validate_no_more_than_asked()
take_torchrun_on_a_cpu()
explain_the_data()
explain_the_save_dir()
refuse_unknown_keys()
announce_validation()
announce_loading()
begin_with_no_scores()
tell_the_task_without_the_iterator()
announce_end()
keep_at_the_end_of_an_epoch()
announce_saving()
announce_updates_of_a_lazy_device()
make_masked_batches_whole()
