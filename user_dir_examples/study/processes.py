"""A process that is asked to end when this one is."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any


@contextlib.contextmanager
def started(command: Sequence[str], **options: Any) -> Iterator[tuple[subprocess.Popen, list[int]]]:
    """A process, to be waited for in the block, and the signals that came meanwhile: each SIGTERM or Ctrl-C is handed
    on to it as SIGTERM, at which a budgeted run saves itself. `options` are those of Popen."""
    came: list[int] = []
    running: list[subprocess.Popen] = []

    def hand_on(signum: int, frame: object) -> None:
        came.append(signum)
        for process in running:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGTERM)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        process = subprocess.Popen(command, **options)
        running.append(process)
        if came:  # while it was started
            os.kill(process.pid, signal.SIGTERM)
        yield process, came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
