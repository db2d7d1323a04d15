"""One process for each device (`--mode spawn`), and the moment before fairseq starts any."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch_xla.distributed.xla_multiprocessing as xmp
from fairseq.distributed import utils as distributed_utils

from train_large import sigterm
from xla.patches import Options, apply


def listen(options: Options, before_training: Callable[[Any], None]) -> None:
    """Call `before_training(cfg)` when fairseq has parsed its flags, and let it start its processes.

    Listens at `call_main`, and mends it (fairseq/distributed/utils.py:368 and 394, 0.12.3.1): it asks for up to 8
    processes, and torch-xla 2 refuses any number but one and all; and the processes know nothing of the patches.
    """
    call_main, spawn = distributed_utils.call_main, xmp.spawn

    def checked_call_main(cfg: Any, main: Callable[..., Any], **kwargs: Any) -> None:
        before_training(cfg)
        call_main(cfg, main, **kwargs)

    def spawn_all(fn: Callable[..., Any], args: tuple[Any, ...], nprocs: int | None = None) -> None:
        workers = Workers()
        with workers.as_one():
            try:
                spawn(Worker(options), args, nprocs=None)
            except Terminated:
                workers.terminated = True
            except BrokenProcessPool:
                if workers.were_killed():
                    raise SystemExit(
                        "error: a process of --mode spawn was killed, so all were ended; run the same command again to "
                        "go on from the last checkpoint."
                    ) from None
                if not workers.terminated:
                    raise SystemExit(1) from None  # the worker has said why
        if workers.terminated:
            sigterm.die()

    distributed_utils.call_main = checked_call_main
    xmp.spawn = spawn_all


class Terminated(Exception):
    """What a process that has ended at a SIGTERM says to its parent."""


class Worker:
    """What a process does: the patches, then fairseq's own `distributed_main`.

    torch-xla calls it in a thread for the device (torch_xla/_internal/pjrt.py:72, 2.9.0), where Python lets nobody take
    a signal. It is unpickled in the main thread.
    """

    def __init__(self, options: Options) -> None:
        self.options = options

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        sigterm.take_as_a_worker()

    def __call__(self, index: int, main: Callable[..., Any], cfg: Any, kwargs: dict[str, Any]) -> None:
        try:
            apply(self.options)
            distributed_utils.distributed_main(index, main, cfg, kwargs)
        except BaseException as error:
            # Not by way of the parent: it would wait for the other workers, and they for this one.
            _say(error)
            os._exit(1)
        if sigterm.has_ended_a_run():
            raise Terminated


def _say(error: BaseException) -> None:
    if isinstance(error, SystemExit) and isinstance(error.code, str):
        print(error.code, file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()


class Workers:
    """What happens to this process or to one of its workers happens to all of them."""

    def __init__(self) -> None:
        self.terminated = False
        self._known: set[Any] = set()
        self._first_to_end: list[int] = []  # the statuses of those that ended before the others were ended
        self._ended = threading.Event()

    @contextlib.contextmanager
    def as_one(self) -> Iterator[None]:
        """A SIGTERM is passed on, and a second one ends all at once. When a worker fails or is killed, so are the
        others, which would wait for it in their next update for ever."""
        previous = signal.signal(signal.SIGTERM, self._pass_on)
        watch = threading.Thread(target=self._watch, daemon=True)
        watch.start()
        try:
            yield
        finally:
            self._ended.set()
            watch.join()
            signal.signal(signal.SIGTERM, previous)

    def _pass_on(self, signum: int, frame: Any) -> None:
        again, self.terminated = self.terminated, True
        for worker in multiprocessing.active_children():
            (worker.kill if again else worker.terminate)()
        if again:
            sigterm.die()

    def were_killed(self) -> bool:
        """Whether one has been ended by another signal than SIGTERM, which it could say nothing of itself."""
        self._look()
        return any(status < 0 for status in self._first_to_end)

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            self._known |= set(multiprocessing.active_children())
            self._look()
            if self._first_to_end:
                for worker in self._known:
                    worker.kill()

    def _look(self) -> None:
        statuses = [worker.exitcode for worker in self._known]
        self._first_to_end = self._first_to_end or [
            status for status in statuses if status not in (None, 0, -signal.SIGTERM)
        ]
