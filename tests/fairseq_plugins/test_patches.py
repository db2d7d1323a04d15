"""Each patch mends what it says, and is still needed: upstream without it fails."""

from __future__ import annotations

import argparse
import errno
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.dataclass.configs import DistributedTrainingConfig
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.trainer import Trainer
from test_budgeted_run import MLM, run

from fairseq_plugins import patches


def stock(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` without the plugin."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_namespace_in_checkpoints(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"cfg": {"model": argparse.Namespace(layers=3)}}, path)
    assert torch.load(path, weights_only=True)["cfg"]["model"].layers == 3
    needed = stock(f"import torch, fairseq; torch.load({str(path)!r})")
    assert "weights_only" in needed.stderr, "no longer needed: allow_namespace_in_checkpoints"


def full_disk(*args: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_copying_on_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    new, old = tmp_path / "new.pt", tmp_path / "old.pt"
    new.write_text("new")
    old.write_text("old")

    def half(source: str, target: str) -> None:
        Path(target).write_text("n")
        full_disk()

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", half)
        with pytest.raises(OSError, match="No space"):
            PathManager.copy(str(new), str(old), overwrite=True)
    assert old.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["new.pt", "old.pt"]
    assert PathManager.copy(str(new), str(old), overwrite=True)
    assert old.read_text() == "new"
    upstream = inspect.getsource(inspect.unwrap(PathManager.copy))
    assert "rename" not in upstream, "perhaps no longer needed: copy_whole_or_not_at_all"
    assert "replace" not in upstream, "perhaps no longer needed: copy_whole_or_not_at_all"


def test_a_full_disk_ends_the_run_with_one_sentence_and_the_checkpoint_before_it(text, tmp_path, monkeypatch):
    flags = [text, *MLM, "--budget", "1h", "--max-update", "6", "--save-interval-updates", "3", "--disable-validation"]
    upstream = torch.save
    saved = []

    def save(state: object, file: object) -> None:
        saved.append(1)
        if len(saved) >= 2:
            file.write(b"half")
            full_disk()
        upstream(state, file)

    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(checkpoint_utils.time, "sleep", lambda seconds: None)  # upstream tries three times
    with pytest.raises(SystemExit, match="disk is full") as ending:
        run(*flags, save_dir=tmp_path)
    assert "\n" not in str(ending.value)
    assert not list(tmp_path.glob("*.tmp"))
    state = torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)
    assert state["optimizer_history"][-1]["num_updates"] == 3
    # With room again, the same command goes on from there.
    monkeypatch.setattr(torch, "save", upstream)
    lines = run(*flags, save_dir=tmp_path)
    assert [line["updates"] for line in lines if line["kind"] == "resume"] == [3]
    assert lines[-1]["updates"] == 6


def test_a_checkpoint_that_is_to_be_kept_is_kept_at_the_end_of_an_epoch_too(text, tmp_path):
    flags = [text, *MLM, "--budget", "1h", "--batch-size", "64", "--max-epoch", "2", "--disable-validation"]
    flags += ["--save-interval-updates", "1"]

    def kept(*more: str) -> set[str]:
        folder = tmp_path / str(len(more))
        updates = run(*flags, *more, save_dir=folder)[-1]["updates"]
        of_updates = {path.name for path in folder.glob("checkpoint_*_*.pt")}
        return {f"checkpoint_{1 + (n > updates / 2)}_{n}.pt" for n in range(1, int(updates) + 1)} - of_updates

    assert kept("--keep-interval-updates", "1", "--keep-interval-updates-pattern", "1") == set()
    assert len(kept()) == 2  # nobody has asked for more than fairseq does
    upstream = inspect.getsource(inspect.unwrap(checkpoint_utils.save_checkpoint))
    assert "not end_of_epoch\n        and cfg.save_interval_updates" in upstream, "perhaps no longer needed"


def test_with_no_checkpoint_yet_a_full_disk_does_not_speak_of_one(text, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "save_checkpoint", full_disk)
    with pytest.raises(SystemExit, match="the checkpoint was not saved; there is none before it"):
        run(text, *MLM, "--budget", "1h", "--max-update", "2", "--disable-validation", save_dir=tmp_path)


def test_data_that_is_not_there_is_named_and_what_is_meant(text, tmp_path):
    with pytest.raises(SystemExit, match=f"{tmp_path}/dict.txt is not there: give the folder"):
        run(tmp_path, *MLM, "--budget", "1s", save_dir=tmp_path / "run")
    (tmp_path / "data-bin").symlink_to(text)
    with pytest.raises(SystemExit, match=f"{tmp_path}/dict.txt is not there: give {tmp_path}/data-bin."):
        run(tmp_path, *MLM, "--budget", "1s", save_dir=tmp_path / "run")


def test_a_save_dir_that_cannot_be_made_is_named(text):
    with pytest.raises(SystemExit, match="--save-dir /proc/nothing cannot be written .*: give another folder"):
        run(text, *MLM, "--budget", "1s", save_dir="/proc/nothing")


def test_validation_and_saving_are_announced_at_functions_that_upstream_still_calls():
    from fairseq_cli import train

    assert "trainer.get_valid_iterator(subset)" in inspect.getsource(train.validate)
    assert "checkpoint_utils.save_checkpoint(" in inspect.getsource(train.validate_and_save)
    assert "checkpoint_utils.load_checkpoint(" in inspect.getsource(train.main)
    assert "self.criterion.train()" in inspect.getsource(Trainer.train_step)


def source(function: object) -> str:
    """Of upstream's function, without the patches around it."""
    return inspect.getsource(inspect.unwrap(function))


def test_what_is_mended_around_upstream_is_still_so_in_it():
    from fairseq_cli import train

    assert "break" in source(train.validate), "perhaps no longer needed: validate_no_more_than_asked"
    for function in (checkpoint_utils.save_checkpoint, train.should_stop_early):
        kept = f"{function.__name__}.best ="
        assert kept in source(function), "perhaps no longer needed: begin_with_no_scores"
    loading = source(checkpoint_utils.load_checkpoint)
    with_iterator = loading[loading.index("not reset_dataloader") : loading.index("epoch=1")]
    assert "set_checkpoint_dict" in with_iterator, "perhaps no longer needed: tell_the_task_without_the_iterator"


def test_processes_of_torchrun_find_each_other_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    config = DistributedTrainingConfig(distributed_world_size=2, tpu=False)
    distributed_utils.infer_init_method(config)
    assert (config.distributed_init_method, config.distributed_world_size) == ("env://", 2)
    assert (config.distributed_rank, config.device_id, config.distributed_no_spawn) == (1, 0, True)
    upstream = distributed_utils._infer_torch_distributed_launch_init.__wrapped__
    with pytest.raises(ZeroDivisionError):  # else the patch is no longer needed
        upstream(DistributedTrainingConfig(distributed_world_size=2, tpu=False))


def test_what_workers_are_sent_holds_no_classes(monkeypatch):
    sent = []
    monkeypatch.setattr(
        patches.distributed_utils, "broadcast_object", lambda state, *args, **kwargs: sent.append(state)
    )
    patches.broadcast_without_classes()
    state = {"model": {"w": torch.ones(1)}, "cfg": argparse.Namespace(), "args": argparse.Namespace()}
    patches.distributed_utils.broadcast_object(state)
    assert sent[0]["cfg"] is None
    assert sent[0]["model"] is state["model"]
    assert state["cfg"] is not None
    assert "weights_only" not in inspect.getsource(distributed_utils._broadcast_object_slow), "perhaps no longer needed"


def test_a_run_that_stops_within_an_epoch_has_no_data_thread_left(text, tmp_path):
    import threading

    from fairseq.data.iterators import BackgroundConsumer

    run(text, *MLM, "--budget", "1h", "--max-update", "2", "--disable-validation", save_dir=tmp_path)
    assert any(isinstance(thread, BackgroundConsumer) for thread in threading.enumerate()), "no longer needed"
    patches.end_data_threads()
    assert not any(isinstance(thread, BackgroundConsumer) for thread in threading.enumerate())


def test_validation_that_breaks_off_leaves_no_thread_making_batches(text, tmp_path):
    import threading

    from fairseq.data.iterators import BackgroundConsumer

    flags = ["--max-valid-steps", "1", "--validate-interval-updates", "1", "--batch-size-valid", "2"]
    patches.end_data_threads()
    lines = run(text, *MLM, "--budget", "1h", "--max-update", "3", *flags, save_dir=tmp_path)
    assert len([line for line in lines if line["kind"] == "valid"]) == 3
    left = [thread for thread in threading.enumerate() if isinstance(thread, BackgroundConsumer)]
    assert len(left) == 1  # training's own
    patches.end_data_threads()
