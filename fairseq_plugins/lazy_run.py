"""A run under a budget on an XLA device, which the host must not wait for in every update.

fairseq hands the statistics of such a run over only every --log-interval updates, those of one update. So each
micro-batch's are remembered here, on the device, and fetched when there is a log to write.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fairseq import utils
from fairseq.distributed import utils as distributed_utils

from fairseq_plugins.budgeted_run import BudgetedRun
from fairseq_plugins.device import XlaDevice
from fairseq_plugins.execution_clock import ExecutionClock

HEED = 60.0  # seconds until several processes heed SIGTERM, at most and about; `xla.pod` waits five times as long

Log = Mapping[str, Any]


class LazyRun(BudgetedRun):
    """As its base, with the clock read only now and then: at every log, after as many updates again as there have been,
    and after half of the updates that are left in the budget. So the last updates of a budget are looked at one by one,
    and a budget of any length costs a few dozen looks.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._in_update = False
        self._remembered: list[tuple[float, Log]] = []  # update and log of each micro-batch that fairseq has not logged
        self._counted = 0  # how many of them are in the counters
        self._reading = (0.0, 0.0, 0.0)  # updates, seconds used and seconds per update when the clock was read last
        self._next_reading = 0.0
        self._first_reading = (0.0, 0.0)  # updates and seconds used when this process began

    # -- the criterion's side --

    def begin_update(self) -> None:
        super().begin_update()
        self._in_update = True

    def stamp(self, flops: float) -> dict[str, float]:
        self.clock.look()
        return {"budget_used": 0.0, "budget_flops": flops, "budget_terminated": 0.0}

    def remember(self, logging_output: Log) -> None:
        """What one micro-batch of the update in hand has logged."""
        self._remembered.append((self.counters["updates"], logging_output))

    def end_update(self, logging_outputs: Sequence[Log]) -> None:
        """fairseq reduces what it logs; the counters have it from `remember`."""

    def interrupt(self) -> None:
        super().interrupt()
        if self.has_begun:
            self._count()

    # -- what the patches tell --

    def updates_to_log(self) -> list[list[Log]]:
        """What was remembered of every update since the last log, on the host and summed over workers."""
        self._count()
        remembered, self._remembered, self._counted = self._remembered, [], 0
        return [[log for _, log in group] for _, group in itertools.groupby(remembered, key=lambda pair: pair[0])]

    def issued(self) -> None:
        """The update has been issued to the device."""
        if not self._in_update:
            return
        self._in_update = False
        self.clock.end_update()
        self.counters["updates"] += 1
        updates = self.counters["updates"]
        is_logged = updates % self._log_interval == 0
        if is_logged or updates >= self._next_reading or (self._terminated and self._is_alone()):
            self._read_budget()
        for listener in self._after_update:
            listener()
        if self._max_update and self._fairseqs_updates() >= self._max_update:
            self._stop_reason = self._stop_reason or "max_update"
        if is_logged or self._stop_reason:
            self._count()
            self._log_training()
        if self._stop_reason:
            self._keep()

    # -- inner workings --

    def _begin(self) -> None:
        super()._begin()
        self.clock = ExecutionClock(self.counters["train_seconds"], XlaDevice())
        self._first_reading = (self.counters["updates"], self._agreed)
        self._reading = (*self._first_reading, 0.0)

    def _read_budget(self) -> None:
        """Wait for the device and read the clock, all workers at the same update, and decide when to do so again."""
        self.clock.catch_up()
        self._read_clocks()
        used, terminated = self._over_workers(self._used(), self._terminated)
        before, used_before, _ = self._reading
        updates = self.counters["updates"]
        rate = (used - used_before) / (updates - before) if updates > before else 0.0
        self._reading = (updates, used, rate)
        self._agreed = used
        done, seconds = updates - self._first_reading[0], used - self._first_reading[1]
        # A single quick update is no reason to look away for long.
        slow = max(rate, seconds / done)
        left = (self.budget.seconds - used) / slow if self.budget.seconds is not None and slow > 0 else math.inf
        # Several processes heed SIGTERM at the next reading, all at the same update.
        soon = HEED / slow if slow > 0 and not self._is_alone() else math.inf
        self._next_reading = updates + max(1.0, min(done, left // 2, soon // 1))
        if terminated:
            self._terminate()
        elif self.budget.is_over(used):
            self.stop("budget")

    def fraction(self) -> float:
        """As its base; between two readings the clock is taken to go on as it went before, on every worker alike."""
        if self.has_begun:
            read_at, used, rate = self._reading
            self._agreed = used + rate * (self.counters["updates"] - read_at)
        return super().fraction()

    def _count(self) -> None:
        """Fetch what was remembered and has not been counted, and count it."""
        if self._counted == len(self._remembered):
            return
        updates, logs = zip(*self._remembered[self._counted :], strict=True)
        logs = self._summed(utils.xla_device_to_cpu(list(logs)))
        self._remembered[self._counted :] = zip(updates, logs, strict=True)
        self._counted = len(self._remembered)
        for log in logs:
            self.counters["tokens"] += float(log.get("ntokens", 0))
            self.counters["flops"] += float(log.get("budget_flops", 0))
            self._loss_sum += float(log.get(self.loss_name, 0))
            self._loss_count += float(log.get("ntokens" if self.loss_name == "nll_loss" else "sample_size", 0))

    def _summed(self, logs: list[Log]) -> list[Log]:
        """The numbers of each micro-batch, summed over fairseq's workers."""
        if self._world_size == 1:
            return logs
        names = sorted(logs[0])
        numbers = torch.tensor([[float(log[name]) for name in names] for log in logs], dtype=torch.float64)
        numbers = distributed_utils.all_reduce(
            numbers.to(self._device()), group=distributed_utils.get_data_parallel_group()
        )
        return [dict(zip(names, row, strict=True)) for row in numbers.tolist()]

    def _over_workers(self, used: float, terminated: bool) -> tuple[float, bool]:
        """The first worker's seconds, and whether any worker is to end: the same on all of them."""
        if self._is_alone():
            return used, terminated
        own = torch.tensor([used if self._is_master else 0.0, float(terminated)], dtype=torch.float64)
        if self._world_size > 1:
            own = distributed_utils.all_reduce(
                own.to(self._device()), group=distributed_utils.get_data_parallel_group()
            )
        else:
            own = _sum_over_hosts(own)
        used, ended = own.tolist()
        return used, ended > 0

    def _of_first_worker(self, seconds: float) -> float:
        return self._over_workers(seconds, False)[0]

    def _is_alone(self) -> bool:
        """Whether no other process takes part: neither a worker of fairseq's nor, under SPMD, another host."""
        import torch_xla.runtime as xr

        return self._world_size == 1 and not (xr.is_spmd() and xr.process_count() > 1)

    def _device(self) -> torch.device:
        return utils.get_tpu_device()


def _sum_over_hosts(numbers: torch.Tensor) -> torch.Tensor:
    """(n,) summed over the hosts of a pod under SPMD, which share no collectives but those within a program.

    Each host brings as many rows of one matrix as it has devices, of which the first holds its numbers. Single
    precision would lose seconds of a long run, so whole seconds and the rest go apart.
    """
    import numpy as np
    import torch_xla
    import torch_xla.core.xla_model as xm
    import torch_xla.distributed.spmd as xs
    import torch_xla.runtime as xr

    devices = xr.global_runtime_device_count()
    rows = torch.zeros(xr.addressable_runtime_device_count(), 2 * len(numbers))
    rows[0] = torch.cat([numbers.floor(), numbers - numbers.floor()])
    mesh = xs.Mesh(np.arange(devices), (devices,), ("data",))
    sharding = xs.ShardingSpec(mesh, ("data", None), minibatch=xr.process_count() > 1)
    [matrix] = xm.send_cpu_data_to_device([rows], torch_xla.device(), sharding)
    whole, rest = matrix.sum(dim=0).cpu().double().split(len(numbers))
    return whole + rest
