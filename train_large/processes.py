"""Processes that this one starts, and that are not left behind when it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any


def environment(*places: Path) -> dict[str, str]:
    """This process's environment, with `places` before what Python finds modules in."""
    paths = [*map(str, places), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a terminal that is closed, end the block as Ctrl-C does.

    A second one, as shells send, does not cut the end short. What is ignored, as SIGHUP is below nohup, stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return

    def end(signum: int, frame: object) -> None:
        for number in before:
            signal.signal(number, lambda *_: None)  # not SIG_IGN, which processes would inherit
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end(processes: Sequence[subprocess.Popen[Any]], patience: float, ask: bool = True) -> None:
    """SIGTERM, unless not to `ask`, then SIGKILL to what is left after `patience` seconds, or when this is interrupted.

    Each process is the first of a session of its own: its data loaders end with it.
    """
    try:
        if ask:
            for process in processes:
                process.terminate()
        until = time.monotonic() + patience
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
    finally:
        for process in processes:
            if process.returncode is None or not ask:  # not asked, it may have left loaders behind
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _terminate(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)


@contextlib.contextmanager
def started(
    command: Sequence[str], ask: Callable[[int], None] = _terminate, **options: Any
) -> Iterator[tuple[subprocess.Popen, list[int]]]:
    """A process, to be waited for in the block, and the signals that came meanwhile: at each SIGTERM, Ctrl-C or SIGHUP
    (unless that is ignored, as below nohup) it is asked to end, by SIGTERM unless `ask`, which is given its process id,
    does something else. A budgeted run saves itself then. `options` are those of Popen.
    """
    came: list[int] = []
    running: list[subprocess.Popen] = []

    def hand_on(signum: int, frame: object) -> None:
        came.append(signum)
        for process in running:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    ask(process.pid)

    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, hand_on) for number in numbers}
    try:
        process = subprocess.Popen(command, **options)
        running.append(process)
        if came:  # while it was started
            ask(process.pid)
        yield process, came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
