"""Memory of large tensors on a CPU, kept for the next ones instead of given back to the kernel."""

from __future__ import annotations

import ctypes
import functools
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST = 32 << 20  # bytes: the most that glibc takes for M_MMAP_THRESHOLD on 64 bits
KEPT = (1 << 31) - 1  # bytes: the most that mallopt takes


@functools.cache
def keep_freed_memory() -> bool:
    """Have glibc's malloc keep up to 2 GB of what is freed; False where there is no glibc, or the user has set it.

    It gives large blocks back to the kernel when they are freed, and takes them anew zeroed page by page, which costs
    3 to 10 % of an update in training here, and 2 % of a prediction. PyTorch asks malloc for every tensor.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    malloc = ctypes.CDLL(None)
    return bool(malloc.mallopt(M_MMAP_THRESHOLD, LARGEST) and malloc.mallopt(M_TRIM_THRESHOLD, KEPT))
