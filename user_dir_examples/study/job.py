"""Run one job of a study to its end: python job.py SETTINGS.yaml KIND/NAME

A job that is done, with the settings and the inputs that it would have now, is not done again; one that was killed goes
on from what it has saved. Where settings or inputs are others, what is there is of no use and is removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import about
import experiments
import jobs
from omegaconf import DictConfig

from train_large.errors import UserError
from train_large.files import remove, whole
from train_large.processes import environment, started

MADE = "made.json"  # from what a folder was made: settings, and the same of every input
DONE = "done"  # what the workflow looks for
FINISHED = ".finished"  # where its process came to its end (`about.here`)
LOG = "log.txt"


def main() -> int:
    settings_file, path = sys.argv[1:]
    try:
        settings = experiments.load(Path(settings_file))
        run(settings, jobs.find(settings, path))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(settings: DictConfig, job: jobs.Job) -> None:
    """Do the job in its folder, alone. Raises UserError where it fails: the sentence names the log."""
    folder = jobs.folder(settings, job.work)
    folder.mkdir(parents=True, exist_ok=True)
    locks = jobs.study_folder(settings) / "locks"
    locks.mkdir(exist_ok=True)
    with open(locks / job.path.replace("/", "."), "w") as lock:
        # Held by every process that is started too: where only its parent was killed, it is waited for here.
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = identity(settings, job)
        if made_from(folder) != made:
            remove(folder)
            folder.mkdir()
            with whole(folder / MADE) as aside:
                aside.write_text(made)
        finished = folder / FINISHED
        if not finished.exists():
            _execute(jobs.command(settings, job.work), folder / LOG, lock.fileno(), job.path)
            with whole(finished) as aside:
                aside.write_text(json.dumps(about.here()) + "\n")
    (folder / DONE).touch()


def noted(folder: Path) -> dict[str, str]:
    """Where the job in this folder ran; empty where nothing says so."""
    path = folder / FINISHED
    return json.loads((path.read_text() if path.exists() else "") or "{}")


def made_from(folder: Path) -> str | None:
    """The identity of the job that left what is in this folder; None where nothing says so."""
    path = folder / MADE
    return path.read_text() if path.exists() else None


def identity(settings: DictConfig, job: jobs.Job) -> str:
    """What the outcome of a job depends on: its settings, and those of everything that it is made from."""
    inputs = {}
    for need in job.needs:
        path = jobs.study_folder(settings) / need / MADE
        if not path.exists():
            raise UserError(f"{job.path}: {need} comes first and is not there.")
        inputs[need] = hashlib.sha256(path.read_bytes()).hexdigest()
    return json.dumps({"settings": jobs.settings_of(settings, job.work), "inputs": inputs}, indent=1) + "\n"


def _execute(command: list[str], log: Path, lock: int, name: str) -> None:
    options = {
        "stdin": subprocess.DEVNULL,
        "env": one_thread(),
        "pass_fds": (lock,),
        "start_new_session": True,  # Ctrl-C comes as SIGTERM, as what a budgeted run saves itself at
    }
    with open(log, "ab") as output, started(command, stdout=output, stderr=output, **options) as (process, asked):
        status = process.wait()
    if status and asked:
        raise UserError(f"{name} was stopped; the next run goes on from what it saved.")
    if status:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1][:300] if lines else "it printed nothing"
        raise UserError(f"{name} ended with status {status}; {log} says why: {last}")


def one_thread() -> dict[str, str]:
    """The environment of a job: several small models at a time, one core each, do more than one of several threads."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    return {**environment(experiments.ROOT), **threads, "PYTHONWARNINGS": "ignore"}


if __name__ == "__main__":
    sys.exit(main())
