"""A study's jobs: which of them count as done, and what becomes of those that are stopped or of other settings."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import about
import experiments
import gather
import job
import jobs
import memory
import psutil
import pytest
import translation
from waiting import wait_for

from train_large import runlog

ROOT = Path(__file__).parents[2]
SIZES = "experiments.finetuning.pretrain.size=[1l_16h]"


@pytest.fixture
def changes(tmp_path) -> list[str]:
    return [f"out={tmp_path}/out", "step_times=0.02", "seeds=[1]", SIZES, "experiments.finetuning.pretrain.target=60"]


def plan_of(changes: list[str]):
    settings = experiments.load(None, changes)
    return settings, jobs.all_jobs(settings, ["finetuning"])


def do(settings, plan, path: str) -> None:
    """What a job leaves when it is done, without what it measures."""
    folder = jobs.study_folder(settings) / path
    for need in plan[path].needs:
        if not (jobs.study_folder(settings) / need / job.DONE).exists():
            do(settings, plan, need)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / job.MADE).write_text(job.identity(settings, plan[path]))
    (folder / job.DONE).touch()


def all_done(changes: list[str]):
    settings, plan = plan_of(changes)
    for path in plan:
        do(settings, plan, path)
    return settings, plan


# ------------------------------------------------------------------------------------------------ what counts


def test_jobs_of_other_settings_do_not_count(changes):
    settings, plan = all_done(changes)
    assert gather.finished(settings, plan) == set(plan)
    data = {path for path in plan if path.startswith("data/")}
    assert gather.finished(*plan_of([*changes, "budget=60s"])) == data
    finetunings = {path for path in plan if path.startswith(("finetune/", "measure/"))}
    assert gather.finished(*plan_of([*changes, "finetune.epochs=9"])) == set(plan) - finetunings


def test_what_needs_a_job_that_is_not_done_does_not_count(changes):
    """A pretraining that was begun anew, and the measurements made of the one before."""
    settings, plan = all_done(changes)
    (pretraining,) = (path for path in plan if path.startswith("pretrain/"))
    (jobs.study_folder(settings) / pretraining / job.DONE).unlink()
    assert gather.finished(settings, plan) == {path for path in plan if path.startswith("data/")}
    missing = gather.gather(settings, ["finetuning"], jobs.study_folder(settings) / "results")
    assert missing == {"finetuning": sorted(path for path in plan if not path.startswith("data/"))}


def test_what_is_published_is_what_make_was_told():
    told = ["EXPERIMENT=depth", "CONFIG=mine.yaml", "SET=out=runs/mine seeds=[1]"]
    command = ["make", "--no-print-directory", "-n", "study-publish", *told]  # below `make test`, make says where it is
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    words = done.stdout.replace("\\\n", " ").split("study.py")[1].split()
    assert words[:3] == ["--report-only", "--publish", "docs/results"]
    settings = ["--config", '"mine.yaml"', "--set", "out=runs/mine", "seeds=[1]"]
    assert words[3:] == ["--experiment", '"depth"', *settings]
    done = subprocess.run([*command[:3], "study-times", *told], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.replace("\\\n", " ").split("step_times.py")[1].split() == [
        *("--experiment", '"depth"'),
        *settings,
    ]


# ------------------------------------------------------------------------------------------------ begun anew


@pytest.fixture
def one(changes, monkeypatch):
    """A job whose command only says that it was run: the job, its folder, and how to run it with other settings."""
    settings, plan = plan_of(changes)
    monkeypatch.setattr(jobs, "command", lambda settings, work: [sys.executable, "-c", "print('run')"])

    def run(*others: str) -> None:
        job.run(experiments.load(None, [*changes, *others]), plan["data/text"])

    return jobs.folder(settings, plan["data/text"].work), run


def times_run(folder: Path) -> int:
    return (folder / job.LOG).read_text().count("run")


def test_other_settings_begin_anew(one):
    folder, run = one
    run()
    assert job.noted(folder) == about.here()
    (folder / job.FINISHED).write_text('{"machine": "another"}')
    run()
    assert times_run(folder) == 1
    assert job.noted(folder) == {"machine": "another"}
    (folder / "checkpoint").touch()
    run("text.vocabulary=500")
    assert times_run(folder) == 1, "of the log before nothing is left"
    assert sorted(path.name for path in folder.iterdir()) == [".finished", job.DONE, job.LOG, job.MADE]
    assert [path.name for path in folder.parent.iterdir()] == ["text"]


def test_what_does_not_say_from_what_it_was_made_is_not_gone_on_with(one):
    """Such as what is left where a removal was killed."""
    folder, run = one
    folder.mkdir(parents=True)
    for name in (".finished", "checkpoint"):
        (folder / name).touch()
    run()
    assert times_run(folder) == 1
    assert not (folder / "checkpoint").exists()


def test_a_removal_that_is_killed_leaves_nothing_under_the_name(one, monkeypatch):
    folder, run = one
    run()

    def killed(path: Path, **_) -> None:
        if path.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run("text.vocabulary=500")
    assert not folder.exists()
    run("text.vocabulary=500")
    assert times_run(folder) == 1
    assert [path.name for path in folder.parent.iterdir()] == ["text"]


# ------------------------------------------------------------------------------------------------ stopped

TRAINER = """#!/bin/sh
# In the place of a trainer: runs until SIGTERM, at which it saves.
trap 'sleep 0.3; echo saved >> FILE; exit 143' TERM
echo $$ >> FILE
while :; do sleep 0.1; done
"""


@pytest.fixture
def trainer(tmp_path):
    """The trainer, and the file that tells of it: its process, and whether it saved."""
    path, told = tmp_path / "trainer", tmp_path / "told"
    path.write_text(TRAINER.replace("FILE", str(told)))
    path.chmod(0o755)
    yield path, told
    if told.exists():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(told.read_text().split()[0]), signal.SIGKILL)


def translating(changes: list[str], trainer: Path) -> tuple[subprocess.Popen, Path]:
    """job.py with a translation whose trainer is that; and the job's lock."""
    settings = experiments.load(None, [*changes, f"translate.python={trainer}"])
    plan = jobs.all_jobs(settings, ["translation"])
    name = "translate/1l_32h-seed1"
    for need in plan[name].needs:
        do(settings, plan, need)
    jobs.save_settings(settings)
    command = [sys.executable, str(Path(job.__file__)), str(jobs.settings_file(settings)), name]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    return process, jobs.study_folder(settings) / "locks" / name.replace("/", ".")


def is_free(lock: Path) -> bool:
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_trainer_is_stopped_with_its_job_and_saves(changes, trainer, number):
    path, told = trainer
    process, lock = translating(changes, path)
    wait_for(told.exists)
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert told.read_text().split()[1:] == ["saved"], "before the job has ended"
    assert process.returncode == 1
    assert "translate/1l_32h-seed1 was stopped" in said
    assert is_free(lock)


def test_the_lock_is_held_as_long_as_the_trainer_lives(changes, trainer):
    path, told = trainer
    process, lock = translating(changes, path)
    wait_for(lambda: told.exists() and told.read_text())
    trains = int(told.read_text())
    for parent in (process.pid, parent_of(trains)):
        os.kill(parent, signal.SIGKILL)
    process.communicate(timeout=60)
    assert not is_free(lock)
    os.kill(trains, signal.SIGTERM)
    wait_for(lambda: is_free(lock))
    assert told.read_text().split()[1:] == ["saved"]


def parent_of(pid: int) -> int:
    return psutil.Process(pid).ppid()


def test_a_process_watched_for_its_memory_is_stopped_too(trainer):
    path, told = trainer
    code = f"import memory; memory.peak_bytes([{str(path)!r}])"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(job.__file__).parent, stderr=subprocess.PIPE)
    wait_for(told.exists)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert told.read_text().split()[1:] == ["saved"]


def test_a_folder_may_have_blanks_in_its_name():
    settings = experiments.load(None, [])
    words = memory.training(settings, experiments.MemoryRun("none", 1), Path("/tmp/my data/data-bin"))
    assert words[words.index("--save-dir") + 1] == "/tmp/my data/run"


IN_PIECES = """
from train_large.allocation import keep_freed_memory
keep_freed_memory()
blocks, between = [], []
for _ in range(16):
    blocks.append(b"x" * (8 << 20))
    between.append(b"x" * (32 << 10))
blocks.clear()
blocks = [b"x" * (9 << 20) for _ in range(16)]  # none fits where one of 8 MiB was
"""


def test_memory_that_was_freed_does_not_count():
    code = f"import memory, sys; print(memory.peak_bytes([sys.executable, '-c', {IN_PIECES!r}]))"
    # In a process of its own, since what it starts counts as no smaller than itself.
    told = subprocess.run([sys.executable, "-c", code], cwd=Path(job.__file__).parent, capture_output=True, text=True)
    assert 144 << 20 < int(told.stdout) < 200 << 20, told.stderr  # and not 272


@pytest.mark.parametrize(
    ("lines", "trained"),
    [
        ([], False),
        (["start"], False),
        (["start", "budget"], True),
        (["start", "budget", "valid"], True),
        (["start", "SIGTERM"], False),
        (["start", "SIGTERM", "resume"], False),
        (["start", "SIGTERM", "resume", "budget"], True),
    ],
)
def test_a_translation_model_is_trained_when_its_budget_is_used(tmp_path, lines, trained):
    for line in lines:
        kind = line if line in runlog.KINDS else "stop"
        told = {"reason": line} if kind == "stop" else {}
        runlog.append(tmp_path / runlog.NAME, kind, dict.fromkeys(runlog.COUNTERS, 1), **told)
    assert translation._is_trained(tmp_path) is trained
