"""What a measurement was made on."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def processor() -> str:
    """The processor's name as its maker gives it, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe(threads: int) -> str:
    """One cell of a table: processor, cores, threads in use."""
    return f"{processor()}, {os.cpu_count()} cores, {threads} threads"
