"""Tensors that lie in a file: used once, they need not stay in memory."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

from torch import Tensor


def forget(tensor: Tensor) -> None:
    """Let go of the memory of a tensor that is mapped from a file; it is read again if it is used again.

    Does nothing for any other tensor, and where the system has no such call. A tensor that was changed in place would
    lose the change; those of `read_checkpoint` are not to be changed.
    """
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu":
        return
    storage = tensor.untyped_storage()
    first, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    # Whole pages of this tensor alone.
    first, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if first < end and _lies_in_a_file(first, end):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED)


def _lies_in_a_file(first: int, end: int) -> bool:
    """Whether these addresses are a mapping of a file. Of any other memory the call would make zeros."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
        start, stop = (int(address, 16) for address in addresses.split("-"))
        if start <= first < stop:
            return end <= stop and inode != "0"
    return False
