from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from train_large.compression.checkpoint import read_checkpoint
from train_large.compression.mapped import forget
from train_large.compression.storage import storage

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


def test_what_was_changed_in_place_is_kept(tmp_path):
    """As by someone who prunes the tensors that safetensors' load_file maps, and counts bytes then."""
    w = torch.randn(1 << 20)
    save_file({"w": w}, tmp_path / "w.safetensors")
    mapped = load_file(tmp_path / "w.safetensors")["w"]
    mapped[5000] = 7.0
    counted = int(torch.count_nonzero(mapped.masked_fill_(mapped.abs() < 1, 0)))
    assert storage({"w": mapped}, 4).nonzero == counted
    forget(mapped)
    assert mapped[5000] == 7
    assert int(torch.count_nonzero(mapped)) == counted
