"""Run the stages of every size, several sizes at a time, one core each; what is done already is not done again."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_large import processes
from train_large.data.documents import digest
from train_large.errors import UserError
from train_large.files import remove, whole

PATIENCE = 20  # seconds that a process has to save and end


@dataclass(frozen=True)
class Stage:
    """One process: `name` for the screen, `folder` for what it leaves, `command` made when it is its turn.

    `data` are files that tell the data it reads from any other: a prepared folder's record, a test set. What the
    stages before it leave is not among them.
    """

    name: str
    folder: Path
    command: Callable[[], list[str]]
    data: Sequence[Path] = ()


class Chains:
    """The stages of each size in order, `slots` sizes at a time, the largest first.

    A stage is done once, for one command and one state of its data. Where either is another, what it and the stages
    after it left is removed: those were made from it.

    Every process has one thread: at these sizes two processes of one thread do nearly twice the work of one of two,
    and each size gets the same core for its budget. They inherit `lock`.
    """

    def __init__(self, stages: dict[str, Sequence[Stage]], slots: int, logs: Path, lock: int) -> None:
        self.stages = stages
        self.logs = logs
        self.lock = lock
        self.at: dict[str, str] = dict.fromkeys(stages, "waiting")
        self.failed: str | None = None
        self._slots = threading.Semaphore(slots)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()
        self._stopping = False

    def run(self, watch: Callable[[], None], every: float = 1.0) -> None:
        """Run them all, calling `watch` every so many seconds.

        Raises UserError if a process fails; stops them all on Ctrl-C and whatever else ends it.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        threads = [threading.Thread(target=self._chain, args=(size,), daemon=True) for size in self.stages]
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                watch()
                time.sleep(every)
        except BaseException:
            self._stop()
            for thread in filter(threading.Thread.is_alive, threads):
                thread.join(1)  # it may have a stage to call done
            raise
        watch()
        if self.failed:
            raise UserError(self.failed)

    def _chain(self, size: str) -> None:
        with self._slots:
            for number, stage in enumerate(self.stages[size]):
                if self._stopping:
                    return
                self.at[size] = stage.name
                try:
                    self._stage(size, stage, self.stages[size][number + 1 :])
                except Exception as error:  # a thread's exception would be lost
                    self._fail(f"{size}, {stage.name}: {error}")
                    return
            self.at[size] = "done"

    def _stage(self, size: str, stage: Stage, following: Sequence[Stage]) -> None:
        command = stage.command()
        made_from = {"command": command, "data": {str(path): digest(path) for path in stage.data}}
        started, done = stage.folder / "command.json", stage.folder / "done.json"
        is_same = _read(started) == made_from
        if is_same and done.exists():
            return
        for later in reversed(following):
            remove(later.folder)
        if not is_same:
            remove(stage.folder)
            stage.folder.mkdir(parents=True)
            with whole(started) as aside:
                aside.write_text(json.dumps(made_from))
        log = self.logs / f"{size}-{stage.name}.log"
        with open(log, "wb") as output:
            with self._lock:
                if self._stopping:
                    return
                process = self._processes[size] = subprocess.Popen(
                    command,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env=_one_thread(),
                    pass_fds=(self.lock,),
                    start_new_session=True,  # Ctrl-C comes as SIGTERM, at which a budgeted run saves itself
                )
            status = process.wait()
        if status == 0:
            with whole(done) as aside:
                aside.write_text(json.dumps({"status": status}))
        elif not self._stopping:
            self._fail(f"{size}: {stage.name} failed with status {status}; the end of {log}:\n{_tail(log)}")

    def _fail(self, sentence: str) -> None:
        if self.failed is None:
            self.failed = sentence
        self._stop()

    def _stop(self) -> None:
        """SIGTERM: a budgeted run saves, so that the next `make demo` goes on from there.

        SIGKILL for what is left after PATIENCE, or when this is interrupted again.
        """
        with self._lock:
            is_first, self._stopping = not self._stopping, True
            running = [process for process in self._processes.values() if process.poll() is None]
        processes.end(running, PATIENCE, ask=is_first)  # a second SIGTERM would end a run before it has saved


def _read(path: Path) -> Any:
    """What is in a JSON file; None where it is not there or torn."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def _tail(log: Path, lines: int = 12) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
