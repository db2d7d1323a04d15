"""What a measurement is made on: the processor, its cores, and the memory that is free."""

from __future__ import annotations

import contextlib
import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path


def processor(root: Path = Path("/")) -> str:
    """The processor's name as its maker gives it, with the numbers of its family and model where it has such: in a
    virtual machine generations of twice the speed have one name. Its architecture where the system does not tell."""
    found = _cpuinfo(root)
    name = found.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{key} {found[full]}" for key, full in (("family", "cpu family"), ("model", "model")) if full in found]
    return f"{name} ({' '.join(numbers)})" if numbers else name


def maker(root: Path = Path("/")) -> str | None:
    """Of the processor, in its own words ("GenuineIntel"); None where the system does not tell."""
    return _cpuinfo(root).get("vendor_id")


def _cpuinfo(root: Path) -> dict[str, str]:
    """What Linux tells of the first processor."""
    try:
        lines = (root / "proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return {}
    found: dict[str, str] = {}
    for key, _, value in (line.partition(":") for line in lines):
        found.setdefault(key.strip(), value.strip())
    return found


def describe(threads: int) -> str:
    """One cell of a table: processor, cores, threads in use."""
    return f"{processor()}, {os.cpu_count()} cores, {threads} threads"


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that a new process could take now, within the limits of this process's cgroups; None where the system does
    not tell. root: where /proc and /sys are."""
    free = free_memory(root)
    return None if free is None else min([free, *left_by_cgroups(root)])


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that are free on the whole machine, or would be if they were asked for."""
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def usable_cores(root: Path = Path("/")) -> int:
    """How many threads of this process can compute at a time: by its affinity, and by the limits of its cgroups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([cores, *(max(1, math.ceil(limit)) for limit in _cgroup_cores(root))])


def _cgroup_cores(root: Path) -> Iterator[float]:
    """Limits of this process's cgroups, in cores. Each may be set at any level above it too."""
    for group, version in cgroups(root, "cpu"):
        with contextlib.suppress(OSError, ValueError):
            if version == 2:
                quota, period = (group / "cpu.max").read_text().split()
            else:
                quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if quota != "max" and int(quota) > 0:
                yield int(quota) / int(period)


def left_by_cgroups(root: Path = Path("/")) -> Iterator[int]:
    """Bytes that each limit of this process's cgroups leaves.

    What counts as used has files in it that were read or written. Those that nobody has looked at lately
    (`inactive_file`) are dropped before a process runs out of memory, so they count as free.
    """
    for group, version in cgroups(root, "memory"):
        names = ("max", "current") if version == 2 else ("limit_in_bytes", "usage_in_bytes")
        with contextlib.suppress(OSError, ValueError):  # "max", which is none, is no number
            most, used = (int((group / f"memory.{name}").read_text()) for name in names)
            if most < 2**60:  # version 1 writes the largest number for none
                dropped = _statistic(group, "inactive_file" if version == 2 else "total_inactive_file")
                yield max(0, most - max(0, used - dropped))


def _statistic(group: Path, name: str) -> int:
    """A line of the cgroup's memory.stat; 0 where there is none."""
    with contextlib.suppress(OSError, ValueError):
        for line in (group / "memory.stat").read_text().splitlines():
            if line.split()[:1] == [name]:
                return int(line.split()[1])
    return 0


def cgroups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """Folders of the cgroups that this process is in and of those above them, and the version of their interface."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                mount, version = root / "sys/fs/cgroup", 2
            elif controller in controllers.split(","):
                mount, version = root / "sys/fs/cgroup" / controller, 1
            else:
                continue
            # In a container the path may be the host's: what is not there is passed over, and the mount itself counts.
            here = mount / path.lstrip("/")
            yield from ((folder, version) for folder in (here, *here.parents) if mount in (folder, *folder.parents))
