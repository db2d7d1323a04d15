"""Tensors that lie in a file: used once, they need not stay in memory."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import numpy as np
from torch import Tensor


def forget(tensor: Tensor) -> None:
    """Let go of the memory of a tensor that is mapped from a file; it is read again if it is used again.

    Does nothing for any other tensor, for one that was changed in place, and where the system does not tell.
    """
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu":
        return
    storage = tensor.untyped_storage()
    first, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    # Whole pages of this tensor alone.
    first, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if first < end and _lies_in_a_file(first, end) and not _has_changed(first, end):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED)


def _has_changed(first: int, end: int) -> bool:
    """Whether a page from `first` to `end` is no longer the file's: written to, it is a copy, which would be lost.

    Bits of /proc/PID/pagemap (Linux, Documentation/admin-guide/mm/pagemap.rst): 63 in memory, 62 swapped out, 61 of a
    file or shared.
    """
    try:
        with open("/proc/self/pagemap", "rb") as file:
            file.seek(first // mmap.PAGESIZE * 8)
            pages = np.frombuffer(file.read((end - first) // mmap.PAGESIZE * 8), dtype=np.uint64)
    except OSError:
        return True
    here, of_file = pages >> np.uint64(62) != 0, pages >> np.uint64(61) & np.uint64(1) != 0
    return len(pages) < (end - first) // mmap.PAGESIZE or bool((here & ~of_file).any())


def _lies_in_a_file(first: int, end: int) -> bool:
    """Whether these addresses are a mapping of a file. Of any other memory the call would make zeros."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
        start, stop = (int(address, 16) for address in addresses.split("-"))
        if start <= first < stop:
            return end <= stop and inode != "0"
    return False
