from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from train_large.compression.checkpoint import read_checkpoint
from train_large.compression.mapped import forget

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")


def resident_of(path: Path) -> int:
    """Bytes of a file's mappings that are in this process's memory, by the kernel's own count."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line[:1] in "0123456789abcdef" and "-" in line.split()[0]:
            ours = line.endswith(path.name)
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_a_mapped_tensor_is_let_go_and_read_again(tmp_path):
    w = torch.randn(1 << 20)
    torch.save({"model": {"w": w}}, tmp_path / "checkpoint.pt")
    read = read_checkpoint(tmp_path / "checkpoint.pt")["model"]["w"]
    assert read.sum() == w.sum()
    assert resident_of(tmp_path / "checkpoint.pt") > 3 << 20
    forget(read)
    assert resident_of(tmp_path / "checkpoint.pt") < 1 << 20
    assert torch.equal(read, w)


def test_other_memory_is_left_alone():
    w = torch.randn(1 << 20)
    copy = w.clone()
    forget(w)
    forget(w[5:])
    forget(torch.zeros(0))
    assert torch.equal(w, copy)
