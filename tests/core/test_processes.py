"""Whatever ends a process that has started others, those do not go on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from waiting import wait_for

from train_large.processes import end, ended_by_signals, environment, started

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


def test_signals_mean_afterwards_what_they_meant_before():
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with ended_by_signals():
        assert all(signal.getsignal(number) not in before for number in numbers)
    assert [signal.getsignal(number) for number in numbers] == before


LOADER = "import os, time; open({!r}, 'a').write(str(os.getpid()) + ' '); time.sleep(600)"


def test_loaders_of_a_process_that_has_ended_are_killed(tmp_path):
    told = tmp_path / "pids"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {LOADER.format(str(told))!r}])"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    assert process.wait(60) == 0
    wait_for(lambda: told.exists() and told.read_text().endswith(" "))
    end([process], 0, ask=False)
    wait_for(lambda: ended(int(told.read_text())))


def test_patience_is_for_all_together(monkeypatch):
    class Deaf:
        returncode, pid, waited = None, 0, None

        def terminate(self): ...

        def wait(self, timeout=None):
            if timeout is not None:
                self.waited = timeout
                clock.append(clock[-1] + timeout)
                raise subprocess.TimeoutExpired("deaf", timeout)

    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[-1])
    monkeypatch.setattr(os, "killpg", lambda *_: None)
    processes = [Deaf(), Deaf(), Deaf()]
    end(processes, 30)
    assert [process.waited for process in processes] == [30, 0, 0]


STARTS = """
import os, signal, subprocess, sys
from train_large.processes import started
code = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(7)); print(flush=True); time.sleep(60)"
asked = []
def ask(pid):
    asked.append(pid)
    os.kill(pid, signal.SIGTERM)
before = signal.getsignal(NUMBER)
with started([sys.executable, "-c", code], ask, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as (process, came):
    process.stdout.readline()
    os.kill(os.getpid(), NUMBER)
    status = process.wait(60)
    os.kill(os.getpid(), NUMBER)  # of one that has ended nobody is asked
print(status, asked == [process.pid], came == [NUMBER, NUMBER], signal.getsignal(NUMBER) == before)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_what_is_started_is_asked_to_end_and_waited_for(number):
    code = STARTS.replace("NUMBER", str(int(number)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(ROOT))
    assert done.stdout == "7 True True True\n", done.stderr


def test_a_signal_while_a_process_is_started_is_handed_on(monkeypatch):
    popen, asked = subprocess.Popen, []

    def slow(*words, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return popen(*words, **options)

    monkeypatch.setattr(subprocess, "Popen", slow)
    with started([sys.executable, "-c", ""], asked.append) as (process, came):
        process.wait()
    assert (asked, came) == ([process.pid], [signal.SIGTERM])
