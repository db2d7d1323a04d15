"""SIGTERM reaches whoever listens, in processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

LISTEN = """
import os, signal, threading, time
from train_large import sigterm

def told():
    print("told", flush=True)

def send():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
"""


def run(script: str) -> tuple[int, str]:
    child = subprocess.run([sys.executable, "-c", LISTEN + script], capture_output=True, text=True, timeout=60)
    assert not child.stderr
    return child.returncode, child.stdout


def test_the_first_one_is_told_and_the_second_ends_the_process():
    assert run("sigterm.listen(told); send(); print('goes on')") == (0, "told\ngoes on\n")
    assert run("sigterm.listen(told); send(); send(); print('goes on')") == (-signal.SIGTERM, "told\n")


IN_A_THREAD = "thread = threading.Thread(target=sigterm.listen, args=(told,)); thread.start(); thread.join();"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        # Python takes signals in the main thread only.
        (f"{IN_A_THREAD} send()", (-signal.SIGTERM, "")),
        (f"sigterm.take_as_a_worker(); {IN_A_THREAD} send(); print('goes on')", (0, "told\ngoes on\n")),
        # A worker is told by its group and by its parent, which ends it when that gets a second one.
        (f"sigterm.take_as_a_worker(); {IN_A_THREAD} send(); send(); print('goes on')", (0, "told\ngoes on\n")),
        ("sigterm.take_as_a_worker(); send()", (-signal.SIGTERM, "")),
        ("sigterm.listen(told); sigterm.die()", (-signal.SIGTERM, "")),
    ],
)
def test_a_run_in_another_thread_listens_where_the_main_thread_takes_them(script, expected):
    assert run(script) == expected


def test_a_run_that_was_ended_by_one_says_so():
    said = "print(sigterm.has_ended_a_run()); sigterm.end_run(); print(sigterm.has_ended_a_run())"
    assert run(said) == (0, "False\nTrue\n")
