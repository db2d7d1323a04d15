"""Which processor it is and what is free, by the files of /proc and /sys."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from train_large import machine

PROC = {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   8000000 kB", "proc/self/cgroup": "0::/a/b"}
OLD = {**PROC, "proc/self/cgroup": "5:cpu:/x\n4:memory:/x"}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        (PROC, 8_192_000_000),
        ({**PROC, "a/b/memory.max": "max", "a/b/memory.current": "5"}, 8_192_000_000),
        ({**PROC, "a/b/memory.max": "900", "a/b/memory.current": "400"}, 500),
        ({**PROC, "a/memory.max": "900", "a/memory.current": "400"}, 500),  # of the cgroup above
        ({**PROC, "a/b/memory.max": "900", "a/b/memory.current": "1000"}, 0),
        (
            {
                **PROC,
                **{"a/b/memory.max": "900", "a/b/memory.current": "800"},
                "a/b/memory.stat": "anon 100\nfile 700\nactive_file 200\ninactive_file 500\n",
            },
            600,
        ),
        (
            {
                **OLD,
                **{"memory/x/memory.limit_in_bytes": "900", "memory/x/memory.usage_in_bytes": "800"},
                "memory/x/memory.stat": "cache 9\ninactive_file 1\ntotal_cache 9\ntotal_inactive_file 300\n",
            },
            400,
        ),
        (
            {**OLD, "memory/x/memory.limit_in_bytes": str(2**63 - 4096), "memory/x/memory.usage_in_bytes": "800"},
            8_192_000_000,
        ),
    ],
)
def test_memory_that_is_available(tmp_path: Path, files: dict[str, str], free: int | None) -> None:
    for name, text in files.items():
        path = tmp_path / (name if name.startswith("proc/") else f"sys/fs/cgroup/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert machine.available_memory(tmp_path) == free


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n", "AMD EPYC (family 25 model 17)"),
        ("processor\t: 0\nmodel name\t: ARMv8\nprocessor\t: 1\nmodel name\t: other\n", "ARMv8"),
        ("processor\t: 0\n", platform.processor() or platform.machine()),
    ],
)
def test_generations_of_one_name_are_told_apart(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(text)
    assert machine.processor(tmp_path) == name


def test_a_system_that_does_not_tell_has_an_architecture(tmp_path: Path) -> None:
    assert machine.processor(tmp_path) == (platform.processor() or platform.machine())


def test_its_maker(tmp_path: Path) -> None:
    assert machine.maker(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\n\nvendor_id\t: Other\n")
    assert machine.maker(tmp_path) == "AuthenticAMD"
