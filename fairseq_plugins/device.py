"""How to mark a moment on the device that a run trains on, for `train_large.budget.TrainClock`."""

from __future__ import annotations

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


class XlaTimer(HostTimer):
    """Marks from the host; before two are compared the device is waited for, and what it still had to do counts.

    Untested on a TPU.
    """

    def between(self, start: float, end: float) -> float:
        import torch_xla.core.xla_model as xm

        before = self.mark()
        xm.wait_device_ops()
        return super().between(start, end) + (self.mark() - before)


def timer_for(root: DictConfig) -> Any:
    """The timer for the device that `fairseq.trainer.Trainer` chooses (fairseq/trainer.py:59, 0.12.3.1)."""
    if root.common.tpu:
        return XlaTimer()
    if torch.cuda.is_available() and not root.common.cpu:
        return CudaTimer()
    return HostTimer()
