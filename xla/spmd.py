"""Batches on the device, split over all devices of all hosts under SPMD (one program, which XLA partitions).

Parameters are replicated. Batches are split by rows; on a pod each host brings its own rows.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor


def start() -> None:
    """Make all devices one. Before anything is on a device."""
    import torch_xla.runtime as xr

    xr.use_spmd()


def take_rank(cfg: Any) -> None:
    """Tell fairseq which host of a pod this is, so that one writes the logs. To fairseq it is the only worker."""
    import torch_xla.runtime as xr

    cfg.distributed_training.distributed_rank = xr.process_index()


def to_device(sample: Any) -> Any:
    """The tensors of `sample`, in dictionaries and lists, on the device, without waiting for it."""
    import torch_xla
    import torch_xla.core.xla_model as xm

    tensors: list[Tensor] = []
    _walk(sample, tensors.append)
    moved: dict[int, Tensor] = {}
    for tensor in tensors:
        if tensor.device.type == "cpu":
            [moved[id(tensor)]] = xm.send_cpu_data_to_device([tensor], torch_xla.device(), _by_rows(tensor.dim()))
    return _walk(sample, lambda tensor: moved.get(id(tensor), tensor))


@functools.lru_cache(maxsize=None)
def _by_rows(dimensions: int) -> Any:
    """How a tensor of a batch is split: its first dimension over all devices. None without SPMD."""
    import torch_xla.distributed.spmd as xs
    import torch_xla.runtime as xr

    if not xr.is_spmd() or dimensions == 0:
        return None
    count = xr.global_runtime_device_count()
    mesh = xs.Mesh(np.arange(count), (count,), ("data",))
    several_hosts = xr.process_count() > 1
    return xs.ShardingSpec(mesh, ("data", *[None] * (dimensions - 1)), minibatch=several_hosts)


def _walk(value: Any, do: Any) -> Any:
    """`value` with `do` applied to every tensor in it."""
    if torch.is_tensor(value):
        return do(value)
    if isinstance(value, dict):
        return {name: _walk(item, do) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_walk(item, do) for item in value]
    return value
