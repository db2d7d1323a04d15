"""The clock of a run on a lazy device, whose host runs ahead of it: seconds in which the device executed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class Union:
    """The length of the union of spans of time, which come nearly in order."""

    KEPT = 64  # of the latest spans; no later one is expected to reach back behind them

    def __init__(self, seconds: float = 0.0) -> None:
        self._closed = seconds
        self._horizon = 0.0  # what lies before this is in `_closed`
        self._spans: list[tuple[float, float]] = []  # disjoint, in order

    def add(self, start: float, end: float) -> None:
        start = max(start, self._horizon)
        if end <= start:
            return
        merged: list[tuple[float, float]] = []
        for span in sorted([*self._spans, (start, end)]):
            if merged and span[0] <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], span[1]))
            else:
                merged.append(span)
        while len(merged) > self.KEPT:
            first = merged.pop(0)
            self._closed += first[1] - first[0]
            self._horizon = first[1]
        self._spans = merged

    @property
    def seconds(self) -> float:
        return self._closed + sum(end - start for start, end in self._spans)


class ExecutionClock:
    """Seconds of training: the device executes, or the host waits for data between two updates.

    Neither the host's tracing nor XLA's compiling is charged, unless the device executes meanwhile. As
    `train_large.budget.TrainClock`, it runs in stretches over updates that `interrupt` ends; it waits for the device
    at both ends of a stretch and when it is told to, never in between.

    `device` has `wait()` and `executions()`, see `fairseq_plugins.device.XlaDevice`; `now` is the time in which these
    are told, in seconds.
    """

    def __init__(self, seconds: float, device: Any, now: Callable[[], float] = time.time) -> None:
        self._device = device
        self._now = now
        self._charged = Union(seconds)
        self._running = False
        self._ended: float | None = None  # when the host had issued the latest update of this stretch

    def begin_update(self) -> None:
        """An update begins: its data are there."""
        if not self._running:
            self._device.wait()
            self._device.executions()  # those of validation
            self._running = True
        elif self._ended is not None:
            self._charged.add(self._ended, self._now())
        self._ended = None

    def end_update(self) -> None:
        """The update has been issued."""
        self._ended = self._now()
        self.look()

    def interrupt(self) -> None:
        """Something that is not training begins."""
        if self._running:
            self.catch_up()
        self._running, self._ended = False, None

    def catch_up(self) -> None:
        """Wait for the device, so that `seconds` has all updates that were issued."""
        self._device.wait()
        self.look()
        if self._ended is not None:  # that wait was not for data
            self._ended = self._now()

    def look(self) -> None:
        """Charge what has been executed meanwhile, without waiting. The device's record of it does not go back far."""
        for span in self._device.executions():
            self._charged.add(*span)

    @property
    def seconds(self) -> float:
        """Seconds of the updates that the device has done."""
        return self._charged.seconds
