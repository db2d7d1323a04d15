"""What malloc keeps, it does not take anew."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The page faults of making and dropping 16 MB ten times, after twenty in which the heap grows: a block with its
# alignment does not fit into the hole that the one before has left, until there are several side by side.
PROGRAM = """
import resource, sys
import torch
from train_large.allocation import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "keep" else None)
for _ in range(20):
    torch.ones(1 << 22)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(1 << 22)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **env: str) -> tuple[str, int]:
    command = [sys.executable, "-c", PROGRAM, how]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=120, check=True)
    said, number = run.stdout.split()
    return said, int(number)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_freed_memory_is_used_again():
    """Four thousand pages each time else, of 4 kB."""
    _, plain = faults("plain", MALLOC_MMAP_THRESHOLD_="131072")
    said, kept = faults("keep")
    assert said == "True"
    assert kept * 5 < plain


def test_what_the_user_has_set_stays():
    said, _ = faults("keep", MALLOC_MMAP_THRESHOLD_="131072")
    assert said == "False"
