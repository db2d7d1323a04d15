"""Python programs as processes that begin with torch, fairseq, torch-xla or TensorFlow imported.

To import them takes longer than most of what the programs of tests do then. multiprocessing's fork server imports them
once and does nothing else; each program is a fork of it, and otherwise as if its command had been run.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

_IMPORTED = ["torch_xla.debug.metrics", "fairseq.options", "fairseq.trainer", "tensorflow"]  # those that are there

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(_IMPORTED)


def run(
    command: Sequence[str],
    *,
    env: Mapping[str, str] = os.environ,
    cwd: str | Path | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """[sys.executable, *words], with -m and a module, -c and code, or a script; as subprocess.run, text captured."""
    assert command[0] == sys.executable
    with tempfile.TemporaryDirectory() as folder:
        outputs = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        child = _CONTEXT.Process(target=_begin, args=(list(command), dict(env), str(cwd or os.getcwd()), outputs))
        child.start()
        child.join(timeout)
        if child.exitcode is None:
            child.kill()
            child.join()
            raise subprocess.TimeoutExpired(command, timeout or 0)
        stdout, stderr = (Path(path).read_text(encoding="utf-8", errors="replace") for path in outputs)
    return subprocess.CompletedProcess(command, child.exitcode, stdout, stderr)


def _begin(command: list[str], env: dict[str, str], cwd: str, outputs: list[str]) -> None:
    """In the new process."""
    for number, path in enumerate(outputs, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    multiprocessing.set_start_method(None, force=True)  # the system's own; what a fork server starts would use it too
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    if "torch" in sys.modules and "OMP_NUM_THREADS" in env:  # which it has read already
        sys.modules["torch"].set_num_threads(int(env["OMP_NUM_THREADS"]))
    sys.path[:0] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    _, *program = command
    try:
        if program[0] == "-m":
            sys.path.insert(0, cwd)
            sys.argv = program[1:]
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        elif program[0] == "-c":
            sys.path.insert(0, cwd)
            sys.argv = [program[0], *program[2:]]
            exec(program[1], {"__name__": "__main__"})
        else:
            sys.path.insert(0, os.path.dirname(program[0]))
            sys.argv = program
            runpy.run_path(program[0], run_name="__main__")
    except SystemExit as end:
        if end.code is not None:  # multiprocessing of Python 3.7 takes None for a failure
            raise
    finally:  # as Python ends, which multiprocessing does not see to
        threading._shutdown()
        atexit._run_exitfuncs()
