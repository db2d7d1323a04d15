"""The stages of the pocket study: in order, once, and stopped together."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from chain import Chains, Stage

from train_large.errors import UserError


def stage(name: str, folder: Path, code: str) -> Stage:
    return Stage(name, folder, lambda: [sys.executable, "-c", code])


def note(path: Path, word: str) -> str:
    return f"open({str(path)!r}, 'a').write({word!r} + chr(10))"


def run(stages: dict[str, list[Stage]], folder: Path, slots: int = 2) -> Chains:
    chains = Chains(stages, slots, folder / "logs")
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


def test_what_was_not_done_is_run_again_with_what_it_left(tmp_path):
    told = tmp_path / "told"
    one = stage("one", tmp_path / "one", note(told, "again"))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "command.json").write_text(json.dumps(one.command()))
    (tmp_path / "one" / "checkpoint").touch()
    run({"a": [one]}, tmp_path)
    assert told.read_text().split() == ["again"]
    assert (tmp_path / "one" / "checkpoint").exists()


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
