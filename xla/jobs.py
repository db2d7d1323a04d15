"""Commands that run at once, one for each host of a pod: their output, their status, and their end.

Each is in a session of its own: Ctrl-C in the terminal is for whoever started them, who then ends them.
"""

from __future__ import annotations

import contextlib
import io
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO


def run_together(commands: list[list[str]]) -> list[subprocess.CompletedProcess[str]]:
    """Run all at once, each to its end, and keep what they print. Whatever interrupts this ends them."""
    kept: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, **kept, text=True, start_new_session=True) for command in commands]
    try:
        return [
            subprocess.CompletedProcess(command, stdout=output, stderr=errors, returncode=process.returncode)
            for command, process in zip(commands, processes, strict=True)
            for output, errors in [process.communicate()]
        ]
    finally:
        for process in processes:
            process.terminate()


class Job:
    """A command under way, which whoever reads `ended` hears of when it is over.

    All that it prints goes to `file`, and with `show` to standard output too; `last_line` is the last of it that is not
    blank. `failure` is set if writing that failed.
    """

    def __init__(
        self, number: int, command: list[str], file: BinaryIO, ended: queue.SimpleQueue[Job], show: bool
    ) -> None:
        self.number, self.log, self.last_line = number, Path(file.name), ""
        self.failure: OSError | None = None
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            start_new_session=True,
        )
        assert self.process.stdin is not None
        self._input = self.process.stdin
        self._reader = threading.Thread(target=self._follow, args=(command, file, ended, show), daemon=True)
        self._reader.start()

    def _follow(self, command: list[str], file: BinaryIO, ended: queue.SimpleQueue[Job], show: bool) -> None:
        assert isinstance(self.process.stdout, io.RawIOBase)  # unbuffered, which would be slow to read by lines
        try:
            with file, io.BufferedReader(self.process.stdout) as output:
                file.write(f"+ {shlex.join(command)}\n".encode())
                for line in output:
                    file.write(line)
                    file.flush()
                    self.last_line = line.decode(errors="replace").strip() or self.last_line
                    if show:
                        sys.stdout.buffer.write(line)
                        sys.stdout.buffer.flush()
            self.process.wait()
        except OSError as error:
            self.failure = error
        ended.put(self)

    def wait(self, seconds: float) -> bool:
        """Whether within `seconds` it has ended, and all that it printed is written."""
        self._reader.join(seconds)
        return not self._reader.is_alive() and self.process.poll() is not None

    def ask_to_end(self) -> None:
        """A line on its standard input."""
        with contextlib.suppress(OSError):
            self._input.write(b"end\n")

    def hang_up(self) -> None:
        """The end of its standard input."""
        with contextlib.suppress(OSError):
            self._input.close()


def wait(jobs: Iterable[Job], seconds: float) -> bool:
    """Whether all have ended within `seconds`, and before somebody lost patience and interrupted."""
    until = time.monotonic() + seconds
    try:
        return all(job.wait(max(0, until - time.monotonic())) for job in jobs)
    except KeyboardInterrupt:
        return False
