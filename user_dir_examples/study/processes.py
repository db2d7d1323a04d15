"""A process that is asked to end when this one is."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from typing import Any


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
