"""The device that a run trains on: how to mark a moment on it, for `train_large.budget.TrainClock`, and what a lazy one
(XLA) must be told."""

from __future__ import annotations

import time
from typing import Any

import torch
from omegaconf import DictConfig

from train_large.budget import HostTimer


class CudaTimer:
    """Marks as CUDA events: recorded behind the work issued so far, waited for only when two are compared."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1000  # milliseconds


def timer_for(root: DictConfig) -> Any:
    """The timer for the device that `fairseq.trainer.Trainer` chooses (fairseq/trainer.py:59, 0.12.3.1)."""
    if torch.cuda.is_available() and not root.common.cpu:
        return CudaTimer()
    return HostTimer()


def is_lazy(device: torch.device) -> bool:
    """Whether `device` only notes what is to be computed, and computes it when it is told to, or asked for a result."""
    return device.type == "xla"


def compute(device: torch.device) -> None:
    """Let a lazy device begin with what has been noted so far, and do not wait for it."""
    if is_lazy(device):
        import torch_xla

        torch_xla.sync()


class XlaDevice:
    """What `ExecutionClock` asks of torch-xla's device."""

    # torch-xla's own record of every execution, kept when the device says that it is done, and its count of what was
    # issued; the second of each is SPMD's.
    METRICS = ("ExecuteTime", "ExecuteReplicatedTime")
    COUNTERS = ("ExecuteComputation", "ExecuteReplicated")
    LATEST = 1.0  # seconds for the record of what is done to arrive

    def __init__(self) -> None:
        self._seen = dict.fromkeys(self.METRICS, 0)

    def wait(self) -> None:
        """Let the device finish all that it has been told, and its record be complete."""
        import torch_xla
        import torch_xla.core.xla_model as xm
        import torch_xla.debug.metrics as met

        torch_xla.sync()
        xm.wait_device_ops()
        # The record is made by a callback of its own, which may come after those who wait have been told.
        issued = sum(met.counter_value(name) or 0 for name in self.COUNTERS)
        until = time.monotonic() + self.LATEST
        while sum((met.metric_data(name) or (0,))[0] for name in self.METRICS) < issued and time.monotonic() < until:
            time.sleep(0.0005)

    def executions(self) -> list[tuple[float, float]]:
        """Start and end, in seconds since the epoch, of the executions that have ended since this was last asked.

        Does not wait for anything. The record goes back 1,024 executions.
        """
        import torch_xla.debug.metrics as met

        spans = []
        for name in self.METRICS:
            data = met.metric_data(name)
            if data is None:
                continue
            count, _, samples = data
            new, self._seen[name] = min(count - self._seen[name], len(samples)), count
            spans += [(end - nanoseconds / 1e9, end) for end, nanoseconds in samples[len(samples) - new :]]
        return spans
