"""The processes of `--mode spawn` end together, whatever ends one of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import MLM, ROOT, environment, lines, run, starting_two, two_processes

from train_large.compression.checkpoint import read_checkpoint

pytestmark = pytest.mark.slow

BATCH = ["--batch-size", "8", "--disable-validation", "--encoder-layers", "1"]
LATE = {"LATE": "1"}
FOREVER = 600
TIMEOUT = 120


# -- the processes, without fairseq --


def processes(*words: str, number: int = 2) -> list[str]:
    """A program that calls `act`, below, in `number` processes."""
    code = "import sys; sys.path[:0] = ['tests', 'tests/xla']; import test_spawn; test_spawn.start(*sys.argv[1:])"
    return [sys.executable, "-c", code, str(number), *words]


def start(number: str, folder: str, *what: str) -> None:
    """What each of the processes is to do."""
    from xla import spawn

    spawn.local_processes = lambda: int(number)
    spawn.pjrt.run_multiprocess = spawn.run_processes
    spawn.xmp.spawn(act, (folder, what))
    print("went on", flush=True)


def act(index: int, folder: str, what: tuple[str, ...]) -> None:
    import torch_xla

    rank = int(os.environ["PJRT_LOCAL_PROCESS_RANK"])
    assert float(torch.ones(2, device=torch_xla.device()).sum()) == 2
    Path(folder, f"pid{rank}").write_text(str(os.getpid()))
    if what[rank] == "wait":
        time.sleep(FOREVER)
    elif what[rank] == "refuse":
        raise SystemExit("error: this cannot be: give another.")
    elif what[rank] == "fail":
        raise ValueError("a fault")
    elif what[rank] == "die":
        os.kill(os.getpid(), signal.SIGKILL)


def ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in sorted(folder.glob("pid*")) if path.read_text()]


@pytest.mark.parametrize("number", [1, 2])
def test_every_process_has_its_device_and_the_program_goes_on_after_them(tmp_path, number):
    done = run(processes(str(tmp_path), *["end"] * number, number=number), environment(), check=True)
    assert done.stdout == "went on\n"
    assert len(set(pids(tmp_path))) == number


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        (["refuse", "refuse"], "error: this cannot be: give another."),
        (["wait", "refuse"], "error: this cannot be: give another."),
        (
            ["wait", "die"],
            "error: worker 1 of 2 was killed by SIGKILL, so the others were ended too; run the same command again to "
            "go on from the last checkpoint.",
        ),
    ],
)
def test_one_that_cannot_go_on_ends_all_with_one_sentence(tmp_path, what, sentence):
    done = run(processes(str(tmp_path), *what), environment(), check=False)
    assert done.returncode == 1
    assert (done.stdout, done.stderr.strip()) == ("", sentence)
    assert all(ended(pid) for pid in pids(tmp_path))


def test_a_fault_is_told_with_its_traceback_once(tmp_path):
    done = run(processes(str(tmp_path), "wait", "fail"), environment(), check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("worker 1 of 2 has failed:")
    assert done.stderr.count("Traceback") == done.stderr.count("ValueError: a fault") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_none_is_left_behind_when_the_program_is_ended(tmp_path, number):
    with started(processes(str(tmp_path), "wait", "wait"), tmp_path) as child:
        wait_for(lambda: len(pids(tmp_path)) == 2, child, tmp_path)
        child.send_signal(number)
        assert child.wait(TIMEOUT) == -number
        wait_for(lambda: all(ended(pid) for pid in pids(tmp_path)))


# -- SIGTERM to a run --


class started:
    """A process in a group of its own, which is killed in the end. What it prints goes to FOLDER/output."""

    def __init__(self, command: list[str], folder: Path) -> None:
        with open(folder / "output", "w") as output:
            self.child = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment(), cwd=ROOT, start_new_session=True
            )

    def __enter__(self) -> subprocess.Popen[bytes]:
        return self.child

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()


def wait_for(condition: Callable[[], bool], child: subprocess.Popen[bytes] | None = None, folder: Any = None) -> None:
    until = time.monotonic() + TIMEOUT
    while not condition():
        assert child is None or child.poll() is None, (folder / "output").read_text()[-4000:]
        assert time.monotonic() < until, (folder / "output").read_text()[-4000:] if folder else "too late"
        time.sleep(0.02)


def logged(save_dir: Path, kind: str) -> list[dict[str, Any]]:
    return lines(save_dir, kind) if (save_dir / "run.jsonl").exists() else []


def to_the_parent(child: subprocess.Popen[bytes], save_dir: Path) -> None:
    child.terminate()


def to_all(child: subprocess.Popen[bytes], save_dir: Path) -> None:
    """As a batch system does: to each process by itself, in no order that could be relied on."""
    os.killpg(child.pid, signal.SIGTERM)


def to_a_worker(child: subprocess.Popen[bytes], save_dir: Path) -> None:
    os.kill(pids(save_dir)[1], signal.SIGTERM)


def to_a_worker_then_to_the_parent(child: subprocess.Popen[bytes], save_dir: Path) -> None:
    """The worker is told twice: once for all, and it must not be ended while the first one saves."""
    to_a_worker(child, save_dir)
    wait_for(lambda: "SIGTERM" in (save_dir / "output").read_text(), child, save_dir)
    child.terminate()


@pytest.mark.parametrize("send", [to_the_parent, to_all, to_a_worker, to_a_worker_then_to_the_parent])
def test_at_sigterm_all_save_and_end_and_the_run_can_be_taken_up(text, tmp_path, send):
    flags = [*MLM, *BATCH, "--budget", "1h", "--max-epoch", "1000"]
    with started(starting_two(text, *flags, save_dir=tmp_path), tmp_path) as child:
        wait_for(lambda: len(logged(tmp_path, "train")) > 5, child, tmp_path)
        send(child, tmp_path)
        assert child.wait(TIMEOUT) == -signal.SIGTERM, (tmp_path / "output").read_text()[-4000:]
        wait_for(lambda: all(ended(pid) for pid in pids(tmp_path)))
    assert "Traceback" not in (tmp_path / "output").read_text()
    [stop] = lines(tmp_path, "stop")
    assert stop["reason"] == "SIGTERM"
    assert [len(rates) for rates in seen(tmp_path, "rates")] == [stop["updates"]] * 2
    history = read_checkpoint(tmp_path / "checkpoint_last.pt")["optimizer_history"]
    assert history[-1]["num_updates"] == stop["updates"]

    after = int(stop["updates"]) + 3
    two_processes(text, *flags, "--max-update", str(after), save_dir=tmp_path)
    [resume] = lines(tmp_path, "resume")
    assert resume["updates"] == stop["updates"]
    assert lines(tmp_path, "stop")[-1]["updates"] == after


def test_a_second_sigterm_ends_all_at_once(text, tmp_path):
    """The clock is looked at seldom here, so the first one alone would not."""
    flags = [*MLM, *BATCH, "--max-epoch", "100000", "--log-interval", "1000000"]
    with started(starting_two(text, *flags, save_dir=tmp_path), tmp_path) as child:
        wait_for(lambda: logged(tmp_path, "start"), child, tmp_path)
        time.sleep(5)  # so that the next look is some seconds away
        child.terminate()
        wait_for(lambda: "SIGTERM" in (tmp_path / "output").read_text(), child, tmp_path)
        child.terminate()
        assert child.wait(TIMEOUT) == -signal.SIGTERM
        wait_for(lambda: all(ended(pid) for pid in pids(tmp_path)))
    assert not lines(tmp_path, "stop")


def test_a_users_error_in_the_workers_is_one_sentence(text, tmp_path):
    done = two_processes(text, *MLM, *BATCH, "--budget", "1x", save_dir=tmp_path, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: --budget '1x' is not a duration")
    assert done.stderr.count("error:") == 1


# -- one clock --


def seen(save_dir: Path, what: str) -> list[Any]:
    return [json.loads((save_dir / f"seen{rank}.json").read_text())[what] for rank in range(2)]


def test_workers_that_go_on_begin_with_the_same_wall_clock(text, tmp_path):
    """Though the first one has written to the log when the second one begins."""
    flags = [flag for flag in [*MLM, *BATCH] if flag not in ("--warmup-updates", "10")]
    flags += ["--lr-scheduler", "budget_linear", "--budget", "300s", "--budget-clock", "wall"]
    two_processes(text, *flags, "--max-update", "5", save_dir=tmp_path)
    used = lines(tmp_path, "stop")[-1]["wall_seconds"]
    two_processes(text, *flags, "--max-update", "20", save_dir=tmp_path, env=LATE)
    began_at, rates = seen(tmp_path, "began_at"), seen(tmp_path, "rates")
    assert began_at == [used, used]
    assert rates[0] == rates[1]
    assert len(rates[0]) == 15
