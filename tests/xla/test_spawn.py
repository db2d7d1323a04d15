"""`--mode spawn`: what happens to the parent or to one process happens to all, and nothing that was trained is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from launching import MLM, ROOT, environment, lines

pytestmark = pytest.mark.slow

FLAGS = [
    *MLM,
    "--encoder-layers",
    "1",
    "--batch-size",
    "8",
    "--max-epoch",
    "1000",
    "--disable-validation",
    "--log-interval",
    "5",
]


class Run:
    """Two processes of `two_processes.py` and their parent, in a session of their own."""

    def __init__(self, data: Path, save_dir: Path, *flags: str) -> None:
        self.save_dir = save_dir
        script = Path(__file__).with_name("two_processes.py")
        command = [sys.executable, script, save_dir, data, *FLAGS, "--save-dir", save_dir, *flags]
        self.output = open(save_dir / "output", "w+")  # noqa: SIM115
        self.parent = subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=environment(),
            stdout=self.output,
            stderr=self.output,
            start_new_session=True,
        )

    def wait_for_updates(self, number: int) -> None:
        for _ in range(3000):
            train = lines(self.save_dir, "train") if (self.save_dir / "run.jsonl").exists() else []
            if train and train[-1]["updates"] >= number:
                return
            assert self.parent.poll() is None, self.said()
            time.sleep(0.1)
        raise AssertionError(self.said())

    def workers(self) -> list[psutil.Process]:
        """The processes of the devices: of those that Python has spawned, the ones that train."""
        spawned = [
            child for child in psutil.Process(self.parent.pid).children() if "spawn_main" in str(child.cmdline())
        ]
        assert len(spawned) == 2
        return spawned

    def status(self) -> int:
        return self.parent.wait(timeout=120)

    def said(self) -> str:
        self.output.seek(0)
        return self.output.read()

    def end(self) -> None:
        if self.parent.poll() is None:
            os.killpg(self.parent.pid, signal.SIGKILL)
        self.output.close()


@pytest.fixture
def start(text: Path, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def start(*flags: str) -> Run:
        runs.append(Run(text, tmp_path, *flags))
        return runs[-1]

    yield start
    for run in runs:
        run.end()


def to_the_parent(run: Run) -> None:
    run.parent.terminate()


def to_the_session(run: Run) -> None:
    """As SLURM does, or a terminal."""
    os.killpg(run.parent.pid, signal.SIGTERM)


def to_one_worker(run: Run) -> None:
    run.workers()[1].terminate()


@pytest.mark.parametrize("send", [to_the_parent, to_the_session, to_one_worker])
def test_sigterm_saves_and_ends_all_and_the_run_goes_on_from_there(start, tmp_path, send):
    run = start()
    run.wait_for_updates(10)
    workers = run.workers()
    send(run)
    assert run.status() == -signal.SIGTERM, run.said()
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    assert "Traceback" not in run.said()
    [stop] = lines(tmp_path, "stop")
    saved = lines(tmp_path, "checkpoint")[-1]
    assert stop["reason"] == "SIGTERM"
    assert stop["updates"] == saved["updates"] > 0
    if send is not to_the_parent:
        return
    (tmp_path / "rendezvous").unlink()
    again = start("--max-update", str(int(stop["updates"]) + 3))
    assert again.status() == 0, again.said()
    [resume] = lines(tmp_path, "resume")
    assert resume["updates"] == stop["updates"]
    assert lines(tmp_path, "stop")[-1]["updates"] == stop["updates"] + 3


def test_when_a_worker_is_killed_all_end_and_it_is_said(start):
    run = start()
    run.wait_for_updates(5)
    first, second = run.workers()
    second.kill()
    assert run.status() == 1, run.said()
    assert "error: a process of --mode spawn was killed" in run.said()
    assert not first.is_running() or first.status() == psutil.STATUS_ZOMBIE


def test_an_error_of_the_user_is_a_sentence(start):
    run = start("--budget", "10 parsecs")
    assert run.status() == 1
    assert "error: " in run.said()
    assert "parsecs" in run.said()
    assert "Traceback" not in run.said()
