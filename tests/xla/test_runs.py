"""Whole runs of `python -m xla.pretrain`: how often they compile, wait, resume, stop, and what they leave behind."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from launching import MLM, ROOT, environment, launch, lines, losses, observe, observing, plain

from train_large.compression.checkpoint import read_checkpoint

BATCH = ["--batch-size", "16"]
UPDATES_PER_EPOCH = 34  # of `text`
DROPOUT = ["--dropout", "0.1", "--attention-dropout", "0.1", "--num-workers", "2"]


# -- a run of ten epochs --


@pytest.fixture(scope="module", params=[1, 4], ids=["single", "spmd"])
def long_run(
    text: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """Dropout, workers, validation after every epoch, and checkpoints at other times."""
    save_dir = tmp_path_factory.mktemp("long")
    flags = [*BATCH, *DROPOUT, "--max-epoch", "10", "--save-interval-updates", "25", "--keep-interval-updates", "1"]
    found = observe("pretrain", text, *MLM, *flags, "--log-interval", "50", save_dir=save_dir, devices=request.param)
    assert len(found) == 10 * UPDATES_PER_EPOCH + 1
    return save_dir, found


@pytest.mark.slow
def test_a_run_compiles_at_its_beginning_only(long_run):
    save_dir, found = long_run
    assert len(lines(save_dir, "valid")) >= 10
    assert 1 <= found[5 * UPDATES_PER_EPOCH - 1]["compilations"] <= 15
    assert found[-1]["compilations"] == found[5 * UPDATES_PER_EPOCH - 1]["compilations"]
    assert "compiled anew" not in (save_dir / "output").read_text()


@pytest.mark.slow
def test_the_host_waits_for_the_device_only_to_log_to_validate_and_to_save(long_run):
    """And to read the clock, which is done less and less often."""
    save_dir, found = long_run
    occasions = sum(len(lines(save_dir, kind)) for kind in ("train", "valid", "checkpoint"))
    assert occasions < len(found) / 5
    for what, others in (("fetched", 0), ("waited", 10)):
        times = sum(1 for before, after in zip(found, found[1:], strict=False) if after[what] > before[what])
        assert 0 < times <= occasions + others, f"{what} after {times} of {len(found)} updates"


@pytest.mark.slow
def test_every_update_is_one_execution(long_run):
    save_dir, found = long_run
    # Ten updates with no validation among them. What is counted may lag behind by one where the machine is busy.
    ten = min(found[i + 10]["issued"] - found[i]["issued"] for i in range(100, 120))
    assert 9 <= ten <= 11


@pytest.mark.slow
def test_every_epoch_goes_through_all_samples_once(long_run):
    _, found = long_run
    for epoch in range(10):
        ids = [number for line in found[epoch * UPDATES_PER_EPOCH :][:UPDATES_PER_EPOCH] for number in line["ids"]]
        assert sorted(ids) == list(range(len(ids)))


@pytest.mark.slow
def test_saving_a_run_in_bf16_compiles_nothing(text, tmp_path):
    flags = [*MLM, *BATCH, "--bf16", "--max-update", "16", "--save-interval-updates", "12", "--disable-validation"]
    found = observe("pretrain", text, *flags, save_dir=tmp_path)
    assert len(lines(tmp_path, "checkpoint")) == 2
    assert found[10]["compilations"] == found[-1]["compilations"] > 0
    model = read_checkpoint(tmp_path / "checkpoint_last.pt")["model"]
    assert {str(weight.dtype) for weight in model.values()} == {"torch.float32"}


# -- resuming --


@pytest.mark.slow
def test_a_run_resumed_in_mid_epoch_goes_on_as_if_it_had_not_ended(text, tmp_path):
    """From update 20 of 34 to beyond the end of the epoch, with dropout, to the last bit."""
    flags = [*MLM, *BATCH, *DROPOUT, "--max-update", "40", "--save-interval-updates", "20"]
    whole = observe("pretrain", text, *flags, save_dir=tmp_path / "whole")
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "whole" / "checkpoint_1_20.pt", tmp_path / "resumed" / "checkpoint_last.pt")
    resumed = observe("pretrain", text, *flags, save_dir=tmp_path / "resumed")
    assert [line["ids"] for line in resumed] == [line["ids"] for line in whole[20:]]
    first_epoch = [number for line in [*whole[:20], *resumed[:14]] for number in line["ids"]]
    assert sorted(first_epoch) == list(range(len(first_epoch)))
    assert len(losses(tmp_path / "resumed")) == 20
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")[20:]


# -- the budget --


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4], ids=["single", "spmd"])
def test_a_budget_is_kept_within_an_update_though_the_run_is_killed(text, tmp_path, devices):
    budget = 4.0
    flags = [*MLM, *BATCH, "--lr-scheduler", "budget_linear", "--budget", f"{budget:g}s", "--log-interval", "50"]
    flags = [flag for flag in flags if flag not in ("--warmup-updates", "10")]
    flags += ["--save-interval-updates", "15", "--keep-interval-updates", "1", "--disable-validation"]
    command = observing("pretrain", text, *flags, save_dir=tmp_path)
    with open(tmp_path / "output", "w") as output:
        env = environment(devices)
        child = subprocess.Popen(command, stdout=output, stderr=output, env=env, cwd=ROOT)
    try:
        while not any(line["train_seconds"] > budget / 3 for line in saved(tmp_path)):
            assert child.poll() is None, (tmp_path / "output").read_text()[-4000:]
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
    finally:
        child.kill()
        child.wait()
    assert not lines(tmp_path, "stop")
    (tmp_path / "record").unlink()

    found = observe("pretrain", text, *flags, save_dir=tmp_path, devices=devices)
    [resume], [stop] = lines(tmp_path, "resume"), lines(tmp_path, "stop")
    assert budget / 3 < resume["train_seconds"] < budget
    assert resume["train_seconds"] == pytest.approx(
        next(line for line in saved(tmp_path) if line["updates"] == resume["updates"])["train_seconds"], abs=0.1
    )
    assert stop["reason"] == "budget"
    clock = [resume["train_seconds"], *(line["seconds"] for line in found[:-1])]
    longest = max(after - before for before, after in zip(clock, clock[1:], strict=False))
    assert stop["updates"] == resume["updates"] + len(found) - 1
    assert budget <= stop["train_seconds"] <= budget + 1.05 * longest
    assert lines(tmp_path, "train")[-1]["lr"] < 0.1 * 0.001


def saved(save_dir: Path) -> list[dict[str, Any]]:
    return lines(save_dir, "checkpoint") if (save_dir / "run.jsonl").exists() else []


# -- checkpoints --


@pytest.mark.slow
def test_checkpoints_go_from_spmd_to_the_cpu_and_on_to_one_device(text, tmp_path):
    flags = [*MLM, *BATCH, "--max-epoch", "3", "--disable-validation", "--save-interval-updates", "10"]
    plain(text, *flags, "--max-update", "45", save_dir=tmp_path / "plain")
    parts = tmp_path / "parts"
    launch("pretrain", text, *flags, "--max-update", "15", save_dir=parts, devices=4)
    state = read_checkpoint(parts / "checkpoint_last.pt")
    assert {tensor.device.type for tensor in state["model"].values()} == {"cpu"}
    plain(text, *flags, "--max-update", "30", save_dir=parts)
    launch("pretrain", text, *flags, "--max-update", "45", save_dir=parts)
    assert len(lines(parts, "resume")) == 2
    assert losses(parts) == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert {path.suffix for path in parts.iterdir()} == {".pt", ".jsonl"}
    assert [line["file"] for line in lines(parts, "checkpoint") if line["updates"] == 15] == ["checkpoint_last.pt"]
