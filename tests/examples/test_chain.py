"""The stages of the pocket study: in order, once, and stopped together."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from chain import Chains, Stage

from train_large.errors import UserError


def stage(name: str, folder: Path, code: str, *data: Path) -> Stage:
    return Stage(name, folder, lambda: [sys.executable, "-c", code], data)


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
