"""The stages of the pocket study: in order, once, and stopped together."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import chain
import pytest
from chain import Chains, Stage
from rich.console import Console
from screen import Screen
from waiting import wait_for

from train_large.errors import UserError
from train_large.files import alone


def stage(name: str, folder: Path, code: str, *data: Path) -> Stage:
    return Stage(name, folder, lambda: [sys.executable, "-c", code], data)


def note(path: Path, word: str) -> str:
    return f"open({str(path)!r}, 'a').write({word!r} + chr(10))"


def run(stages: dict[str, list[Stage]], folder: Path, slots: int = 2) -> Chains:
    with alone(folder, "demo", "--out") as lock:
        chains = Chains(stages, slots, folder / "logs", lock)
        chains.run(lambda: None, every=0.01)
    return chains


def test_stages_run_in_order_and_once(tmp_path):
    told = tmp_path / "told"
    stages = {"a": [stage(name, tmp_path / name, note(told, name)) for name in ("one", "two", "three")]}
    assert run(stages, tmp_path).at == {"a": "done"}
    assert told.read_text().split() == ["one", "two", "three"]
    run(stages, tmp_path)
    assert told.read_text().split() == ["one", "two", "three"]


def test_other_settings_begin_anew(tmp_path):
    told = tmp_path / "told"
    run({"a": [stage("one", tmp_path / "one", note(told, "old"))]}, tmp_path)
    (tmp_path / "one" / "left").touch()
    run({"a": [stage("one", tmp_path / "one", note(told, "new"))]}, tmp_path)
    assert told.read_text().split() == ["old", "new"]
    assert not (tmp_path / "one" / "left").exists()


def three_stages(tmp_path: Path, second: str = "") -> list[Stage]:
    """Each notes its name, leaves a file, and reads its own data."""
    stages = []
    for name in ("one", "two", "three"):
        data = tmp_path / f"{name}.data"
        if not data.exists():
            data.write_text("some")
        code = f"{note(tmp_path / 'told', name)}; open({str(tmp_path / name / 'left')!r}, 'x')"
        code += f" # {second}" if name == "two" else ""
        stages.append(stage(name, tmp_path / name, code, data))
    return stages


def test_what_follows_a_stage_that_begins_anew_begins_anew_too(tmp_path):
    run({"a": three_stages(tmp_path)}, tmp_path)
    run({"a": three_stages(tmp_path, second="another budget")}, tmp_path)
    assert (tmp_path / "told").read_text().split() == ["one", "two", "three", "two", "three"]


def test_what_follows_is_gone_before_a_stage_begins_anew(tmp_path):
    """So that a study stopped just then does not keep it."""
    run({"a": three_stages(tmp_path)}, tmp_path)
    failing = stage("two", tmp_path / "two", "raise SystemExit(1)")
    with pytest.raises(UserError, match="two failed"):
        run({"a": [three_stages(tmp_path)[0], failing, three_stages(tmp_path)[2]]}, tmp_path)
    assert (tmp_path / "one" / "done.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["logs", "one", "two"]


def test_other_data_begin_anew(tmp_path):
    run({"a": three_stages(tmp_path)}, tmp_path)
    (tmp_path / "two.data").write_text("something else")
    run({"a": three_stages(tmp_path)}, tmp_path)
    assert (tmp_path / "told").read_text().split() == ["one", "two", "three", "two", "three"]


def test_what_does_not_say_from_what_it_was_made_is_made_anew(tmp_path):
    """Neither by a study of before the data were noted, nor where the note is torn."""
    for noted in (json.dumps(three_stages(tmp_path)[0].command()), '{"command": ["py', "null", "\0\xff"):
        run({"a": three_stages(tmp_path)}, tmp_path)
        (tmp_path / "told").unlink()
        (tmp_path / "one" / "command.json").write_bytes(noted.encode("latin-1"))
        run({"a": three_stages(tmp_path)}, tmp_path)
        assert (tmp_path / "told").read_text().split() == ["one", "two", "three"]


def test_what_was_not_done_is_run_again_with_what_it_left(tmp_path):
    told = tmp_path / "told"
    one = stage("one", tmp_path / "one", note(told, "again"))
    run({"a": [one]}, tmp_path)
    (tmp_path / "one" / "done.json").unlink()
    (tmp_path / "one" / "checkpoint").touch()
    run({"a": [one]}, tmp_path)
    assert told.read_text().split() == ["again", "again"]
    assert (tmp_path / "one" / "checkpoint").exists()


def test_a_note_that_could_not_be_written_is_not_there(tmp_path, monkeypatch):
    """A disk that fills up: no half a command.json, and no stage that counts as done."""
    write_text = Path.write_text

    def half(path: Path, text: str, **how):
        write_text(path, text[: len(text) // 2], **how)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(UserError, match="No space left on device"):
        run({"a": [stage("one", tmp_path / "one", "")]}, tmp_path)
    assert list((tmp_path / "one").iterdir()) == []


def test_a_stage_that_fails_says_so_and_ends_the_others(tmp_path):
    stages = {
        "a": [stage("one", tmp_path / "a", "raise SystemExit('no such thing')")],
        "b": [stage("one", tmp_path / "b", "import time; time.sleep(600)"), stage("two", tmp_path / "c", "")],
    }
    with pytest.raises(UserError, match=r"a: one failed with status 1(.|\n)*no such thing"):
        run(stages, tmp_path)
    assert not (tmp_path / "b" / "done.json").exists()
    assert not (tmp_path / "c").exists()


def test_every_process_has_one_thread(tmp_path):
    told = tmp_path / "told"
    code = f"import os; open({str(told)!r}, 'w').write(os.environ['OMP_NUM_THREADS'])"
    run({"a": [stage("one", tmp_path / "one", code)]}, tmp_path)
    assert told.read_text() == "1"


# ------------------------------------------------------------------------------------------------ stopped

TRAINER = """
import os, signal, sys, time

def save(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as a budgeted run does: the second one ends it at once
    time.sleep(0.5)
    open(TOLD, 'a').write('saved ')
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
open(TOLD, 'a').write(f'{os.getpid()} ')
time.sleep(600)
"""

DEMO = """
import sys
from pathlib import Path
from chain import Chains, Stage
from train_large.files import alone
from train_large.processes import ended_by_signals

folder = Path(FOLDER)
with ended_by_signals(), alone(folder, "demo", "--out") as lock:
    stages = {"a": [Stage("one", folder / "one", lambda: [sys.executable, "-c", TRAINER])]}
    Chains(stages, 1, folder / "logs", lock).run(lambda: None, every=0.1)
"""


@pytest.fixture
def going_on(tmp_path) -> Iterator[tuple[subprocess.Popen, Path]]:
    """A demo whose one stage has begun, and the file that tells of it: its process, and whether it saved."""
    told = tmp_path / "told"
    trainer = TRAINER.replace("TOLD", repr(str(told)))
    demo = DEMO.replace("FOLDER", repr(str(tmp_path))).replace("TRAINER", repr(trainer))
    places = os.pathsep.join([str(Path(chain.__file__).parent), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", demo], env={**os.environ, "PYTHONPATH": places}, stderr=subprocess.PIPE
    )
    wait_for(lambda: told.exists() and told.read_text())
    yield process, told
    for pid in (process.pid, int(told.read_text().split()[0])):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_stops_all_in_order(going_on, number):
    process, told = going_on
    process.send_signal(number)
    if number != signal.SIGINT:
        time.sleep(0.2)
        process.send_signal(number)  # shells send it again; what is saving is not cut short
    _, said = process.communicate(timeout=60)
    assert told.read_text().split()[1:] == ["saved"]
    assert process.returncode != 0
    assert b"KeyboardInterrupt" in said  # which the demos tell in a sentence


def test_what_does_not_end_is_killed_with_what_it_started(tmp_path, monkeypatch):
    told = tmp_path / "told"
    code = (
        "import os, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        f"open({str(told)!r}, 'a').write(str(child.pid) + ' '); time.sleep(600)"
    )

    def interrupted_when_it_is_there() -> None:
        if told.exists() and told.read_text():
            raise KeyboardInterrupt

    monkeypatch.setattr(chain, "PATIENCE", 0.2)
    with alone(tmp_path, "demo", "--out") as lock:
        chains = Chains({"a": [stage("one", tmp_path / "one", code)]}, 1, tmp_path / "logs", lock)
        with pytest.raises(KeyboardInterrupt):
            chains.run(interrupted_when_it_is_there, every=0.1)
    child = int(told.read_text())
    wait_for(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text())


def test_a_fault_of_the_screen_stops_all(tmp_path):
    begun = tmp_path / "begun"
    code = f"import time; open({str(begun)!r}, 'w').close(); time.sleep(600)"

    def fails() -> None:
        if begun.exists():
            raise OSError("the terminal is gone")

    with alone(tmp_path, "demo", "--out") as lock:
        chains = Chains({"a": [stage("one", tmp_path / "one", code)]}, 1, tmp_path / "logs", lock)
        with pytest.raises(OSError, match="the terminal is gone"):
            chains.run(fails, every=0.1)
    assert [process.returncode for process in chains._processes.values()] == [-signal.SIGTERM]
    assert not (tmp_path / "one" / "done.json").exists()


def test_below_nohup_a_demo_outlives_its_terminal(tmp_path):
    code = "import os, signal; from train_large.processes import ended_by_signals\nwith ended_by_signals():\n"
    code += "    os.kill(os.getpid(), signal.SIGHUP); print('alive')"
    command = ["nohup", sys.executable, "-c", code]
    told = subprocess.run(command, capture_output=True, text=True, cwd=Path(chain.__file__).parent, check=False)
    assert told.stdout == "alive\n", told.stderr


def test_the_processes_of_a_killed_demo_keep_the_next_one_out(going_on, tmp_path):
    process, told = going_on
    taken = rf"^a demo, .* in {tmp_path}: wait .*"
    with pytest.raises(UserError, match=taken), alone(tmp_path, "demo", "--out"):
        pass
    process.kill()
    process.communicate()
    with pytest.raises(UserError, match=taken), alone(tmp_path, "demo", "--out"):
        pass
    os.kill(int(told.read_text()), signal.SIGTERM)
    wait_for(lambda: "saved" in told.read_text())
    wait_for(lambda: is_free(tmp_path))


def is_free(folder: Path) -> bool:
    with contextlib.suppress(UserError), alone(folder, "demo", "--out"):
        return True
    return False


def test_the_screen_bears_torn_lines(tmp_path):
    whole = {"updates": 20, "train_seconds": 1.5}
    lines = [{"kind": "start", "budget_seconds": 3.0}, {"kind": "train", **whole}]
    text = "\n".join(["{", json.dumps(lines[0]), '{"kind": "tr', "7", json.dumps(lines[1]), '{"kind"'])
    (tmp_path / "run.jsonl").write_bytes(text.encode() + b"\xff\0\n")
    (tmp_path / "ladder.jsonl").write_text('{"sparsity": 0.15, "score": 0.5}\n{"spar\n')
    shown = io.StringIO()
    at = {"a": "pretrain", "b": "prune"}
    with Screen(dict.fromkeys(at.items(), tmp_path), at, Console(file=shown, width=120)) as screen:
        screen()
    assert "a pretrain 20 updates, 2 s of 3 s; b prune 15% pruned, accuracy 50.0%" in shown.getvalue()
