"""SIGTERM, wherever a run is: Python takes signals in the main thread only, and some tools train in another one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

_listener: Callable[[], None] | None = None
_has_told = False
_is_worker = False
_has_ended_a_run = False


def listen(listener: Callable[[], None]) -> None:
    """Call `listener` at the first SIGTERM; the second one ends the process, as any does while nobody listens.

    In another thread than the main one it has to be taken there before, by `take_as_a_worker`; else this does nothing.
    """
    global _listener, _has_told
    _listener, _has_told = listener, False
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _tell)


def take_as_a_worker() -> None:
    """Take SIGTERM in this process, for whoever will listen. In the main thread.

    It comes more than once where one is sent to a group of processes and their parent passes its own on. So a second
    one does nothing here: the parent, which gets a second one too, is to end its workers.
    """
    global _is_worker
    _is_worker = True
    signal.signal(signal.SIGTERM, _tell)


def end_run() -> None:
    """The run in this process ends because of a SIGTERM, to it or to another one of its workers."""
    global _has_ended_a_run
    _has_ended_a_run = True


def has_ended_a_run() -> bool:
    return _has_ended_a_run


def die() -> NoReturn:
    """End this process as SIGTERM does. In the main thread."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError("SIGTERM is blocked")


def _tell(signum: int, frame: FrameType | None) -> None:
    global _has_told
    if _has_told and _is_worker:
        return
    if _has_told or _listener is None:
        die()
    _has_told = True
    _listener()
