"""Work on pieces of a tensor by all cores, each with torch on one thread.

Torch's own threads meet after every operation, and operations on pieces that fit a cache are short: on a busy machine
the meeting takes many times as long as the work.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from train_large.machine import usable_cores

Item = TypeVar("Item")
Result = TypeVar("Result")


@functools.cache
def pool() -> ThreadPoolExecutor:
    """One thread for each core that this process may use."""
    cores = usable_cores()
    here = torch.get_num_threads()
    # OpenMP counts threads for each thread that starts them. But what any thread says last holds for those that have
    # not said anything yet (set_num_threads, aten/src/ATen/ParallelOpenMP.cpp, torch 2.13.0): so all start now, and the
    # last word is that nothing has changed.
    started = ThreadPoolExecutor(cores, "compression", initializer=_one_thread)
    barrier = threading.Barrier(cores)
    list(started.map(lambda _: barrier.wait(), range(cores)))
    torch.set_num_threads(here)
    return started


# A forked process has the pool without its threads, and would wait for them for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.cache_clear)


def _one_thread() -> None:
    torch.get_num_threads()  # the first call in a thread sets what was said last; only then can it be changed
    torch.set_num_threads(1)


def on_all_cores(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """What `function` gives for each item, in order. Not to be called by what runs in the pool itself."""
    items = list(items)
    if len(items) < 2:
        return [function(item) for item in items]
    inferring = torch.is_inference_mode_enabled()  # is of each thread, and its tensors cannot be changed outside

    def in_the_same_mode(item: Item) -> Result:
        with torch.inference_mode(inferring):
            return function(item)

    return list(pool().map(in_the_same_mode, items))
