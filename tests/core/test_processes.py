"""Whatever ends a process that has started others, those do not go on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from waiting import wait_for

from train_large.processes import end, environment

ROOT = Path(__file__).parents[2]

WAITS = """
    import subprocess, sys
    from train_large.processes import end, ended_by_signals
    with ended_by_signals():
        process = subprocess.Popen([sys.executable, "-c", CHILD], start_new_session=True)
        try:
            process.wait()
        finally:
            end([process], 30)
"""
TIMES_STEPS = """
    from test_step_times import watched
    watched(CHILD)
"""
CHILD = "import os, time; open({!r}, 'a').write(str(os.getpid()) + ' '); time.sleep(600)"


def ended(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux's")
@pytest.mark.parametrize("program", [WAITS, TIMES_STEPS], ids=["waits", "times steps"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_what_was_started(tmp_path, program, number):
    told = tmp_path / "pids"
    program = textwrap.dedent(program).replace("CHILD", repr(CHILD.format(str(told))))
    code = f"import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n{program}"
    places = environment(ROOT, ROOT / "tests", ROOT / "tests" / "core")
    process = subprocess.Popen([sys.executable, "-c", code], env=places, stderr=subprocess.DEVNULL)
    wait_for(lambda: told.exists() and told.read_text().endswith(" "))
    process.send_signal(number)
    assert process.wait(60) != 0
    wait_for(lambda: ended(int(told.read_text())))


def test_what_does_not_heed_is_killed_with_its_children(tmp_path):
    told = tmp_path / "pids"
    deaf = "import signal, subprocess, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    deaf += f"subprocess.run([sys.executable, '-c', {CHILD.format(str(told))!r}])"
    process = subprocess.Popen([sys.executable, "-c", deaf], start_new_session=True)
    wait_for(lambda: told.exists() and told.read_text().endswith(" "))
    end([process], 0.2)
    assert process.returncode == -signal.SIGKILL
    wait_for(lambda: ended(int(told.read_text())))


def test_modules_are_found_where_they_are_said_to_be(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "before")
    assert environment(tmp_path, ROOT)["PYTHONPATH"] == os.pathsep.join([str(tmp_path), str(ROOT), "before"])
    monkeypatch.delenv("PYTHONPATH")
    assert environment(tmp_path)["PYTHONPATH"] == str(tmp_path)
