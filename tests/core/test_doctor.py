"""`train-large doctor`: its own rows, the table, the exit status, and what is left when the probe cannot answer."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from train_large import cli, doctor, machine
from train_large.doctor import Row

ROOT = Path(__file__).parents[2]
KNOWN = Row("layers", True, "they were tried", "--no-fast-layers")


def plugin(folder: Path, script: str) -> Path:
    """A user dir whose probe is `script`."""
    user_dir = folder / "fairseq_plugins"
    user_dir.mkdir()
    (user_dir / "doctor.py").write_text(script)
    return user_dir


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def test_rows_of_the_probe_come_first_and_its_chatter_is_passed_over(tmp_path):
    answer = '[{"what": "x", "active": false, "why": "because", "off_by": null}]'
    rows = doctor.examine(plugin(tmp_path, f"print('hello')\nprint('{answer}')"))
    assert rows[0] == Row("x", False, "because")
    assert {"memory", "disk", "extra fairseq"} <= {row.what for row in rows}


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "SIGILL"),
        ("raise RuntimeError('the disk is on fire')", "the disk is on fire"),
        ("print('no rows')", "status 0"),
        ("print('[1]')", "status 0"),
        ("print(5)", "status 0"),
    ],
)
def test_a_probe_without_an_answer_is_a_row_and_status_1(tmp_path, script, reason):
    rows = doctor.examine(plugin(tmp_path, script))
    assert rows[0].active is None
    assert reason in rows[0].why
    assert "nothing can be told of layers" in rows[0].why
    assert len(rows) > 2
    assert doctor.status(rows) == 1


def test_a_probe_that_hangs_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "PATIENCE", 1)
    [row] = doctor.probe(plugin(tmp_path, "import time; time.sleep(60)"))
    assert row.active is None
    assert "no answer in 1 seconds" in row.why


def test_without_the_plugin_the_row_says_which_flag_helps(tmp_path):
    [row] = doctor.probe(tmp_path)
    assert row.active is None
    assert "--user-dir" in row.why
    assert str(tmp_path) in row.why


def test_the_plugin_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert doctor._plugin(None) == ROOT / "fairseq_plugins"


def test_inactive_is_no_failure():
    assert doctor.status([KNOWN, Row("GPUs", False, "none found")]) == 0
    assert doctor.status([KNOWN, Row("GPUs", None, "who knows")]) == 1


def test_the_table_keeps_to_the_width_and_says_how_to_turn_off():
    rows = [KNOWN, Row("GPUs", False, "none " * 40, "--never"), Row("much longer", None, "who knows")]
    lines = doctor.as_table(rows, 70).splitlines()
    assert lines[0] == "layers       yes  they were tried (off by --no-fast-layers)"
    assert lines[1].startswith("GPUs         no   none none")
    assert lines[2].startswith(" " * 18 + "none")
    assert lines[-1] == "much longer  ?    who knows"
    assert all(len(line) <= 70 for line in lines)
    assert "--never" not in "".join(lines)


def test_the_command_prints_and_returns(monkeypatch, capsys):
    rows = [KNOWN]
    monkeypatch.setattr(doctor, "examine", lambda user_dir: rows)
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out == doctor.as_table(rows) + "\n"
    rows.append(Row("torch", None, "cannot be imported"))
    assert cli.main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == [
        {"what": "layers", "active": True, "why": "they were tried", "off_by": "--no-fast-layers"},
        {"what": "torch", "active": None, "why": "cannot be imported", "off_by": None},
    ]


def test_missing_libraries_are_named_with_their_extra(monkeypatch):
    wanted = ["numpy", "pytest>=1; extra == 'one'", 'no-such-thing[x]==3; (python_version < "3") and extra == "two"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: [*wanted, "numpy; extra == 'two'"])
    one, two = doctor.libraries()
    assert (one.what, one.active) == ("extra one", True)
    assert (two.what, two.active) == ("extra two", False)
    assert two.why.startswith("no-such-thing not installed")


def test_a_package_is_installed_whatever_its_modules_are_called(monkeypatch):
    """pytest-xdist is imported as `xdist`; and of fairseq's two packages either will do."""
    wanted = [
        "pytest-xdist; extra == 'dev'",
        "fairseq-fixed==0.12.3.1; extra == 'fairseq'",
        "fairseq; extra == 'fairseq'",
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    here: set[str] = set()

    def version(name):
        if name not in here:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert [row.active for row in doctor.libraries()] == [False, False]
    for installed in ({"pytest-xdist", "fairseq"}, {"pytest-xdist", "fairseq-fixed"}):
        here |= installed
        assert [row.active for row in doctor.libraries()] == [True, True]
        here.clear()


def test_every_extra_says_what_it_is_for():
    declared = {row.what.removeprefix("extra ") for row in doctor.libraries()}
    assert declared <= set(doctor.NEEDED_FOR)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 8),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "150000 100000"}, 2),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "300000 100000"}, 3),
        ({"proc/self/cgroup": "0::/../host", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        (
            {
                "proc/self/cgroup": "3:cpuacct,cpu:/x\n0::/",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            4,
        ),
    ],
)
def test_cores_are_those_of_affinity_and_cgroups(tmp_path, monkeypatch, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert machine.usable_cores(system(tmp_path, files)) == cores


@pytest.mark.parametrize(
    ("limit", "active", "said"),
    [
        ({}, True, "no limit by a cgroup"),
        ({"sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/memory.current": "5"}, True, "no limit by a cgroup"),
        ({"sys/fs/cgroup/memory.max": "900000000", "sys/fs/cgroup/memory.current": "400000000"}, False, "500 MB"),
        # Files that were read count as used, until somebody needs the room.
        (
            {
                "sys/fs/cgroup/memory.max": "9000000000",
                "sys/fs/cgroup/memory.current": "8800000000",
                "sys/fs/cgroup/memory.stat": "anon 500000000\ninactive_file 6000000000\nactive_file 7\n",
            },
            True,
            "6.20 GB",
        ),
    ],
)
def test_memory_is_what_is_free_within_the_cgroup(tmp_path, limit, active, said):
    files = {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   8000000 kB", "proc/self/cgroup": "0::/"}
    row = doctor.memory(system(tmp_path, {**files, **limit}))
    assert row.active is active
    assert "8.19 GB free" in row.why
    assert said in row.why


def test_the_core_imports_neither_torch_nor_an_adapter():
    program = "import sys, train_large.doctor as d; d.examine.__module__; d.libraries(); d.memory(); d.disk()\n"
    program += "print({'torch', 'fairseq', 'fairseq_plugins'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert said.stdout == "set()\n"
