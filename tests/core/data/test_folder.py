from __future__ import annotations

import os
from pathlib import Path

import pytest

from train_large.data import folder
from train_large.errors import UserError


def make(out: Path, **parameters: object) -> None:
    with folder.whole(out) as part:
        (part / "sub").mkdir()
        (part / "sub" / "data").write_text("data")
        folder.finish(part, parameters, {"count": 3})


def test_it_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with folder.whole(out) as part:
        (part / "a").write_text("a")
        assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "a").read_text() == "a"


@pytest.mark.parametrize("out", [".", "../here", "../elsewhere/../here", "../there", "../link"])
def test_it_may_be_given_by_any_path(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here is where the shell that started us stands, and looks for what has appeared."""
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    monkeypatch.chdir(here)
    make(Path(out), seed=1)
    assert folder.finished(Path(out), {"seed": 1}) == {"count": 3}
    assert Path(out, "sub", "data").read_text() == "data"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "there") == ["elsewhere", "here", "link"]


def test_what_lies_here_by_now_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_text("old")
    with pytest.raises(UserError, match="not empty"):
        make(Path())
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"
    assert not list(tmp_path.parent.glob(f".{tmp_path.name}*"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError, OSError])
def test_or_not_at_all(error: type[BaseException], tmp_path: Path) -> None:
    def fail() -> None:
        with folder.whole(tmp_path / "out") as part:
            (part / "a").write_text("a")
            raise error("in the middle")

    with pytest.raises(UserError if error is OSError else error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / ".out.part" / "deep"
    left.mkdir(parents=True)
    (left / "half").write_text("half")
    make(tmp_path / "out")
    assert not (tmp_path / "out" / "deep").exists()


def test_two_runs_do_not_mix(tmp_path: Path) -> None:
    with folder.whole(tmp_path / "out") as part:
        (part / "mine").write_text("mine")
        with pytest.raises(UserError, match="being written by another run"), folder.whole(tmp_path / "out"):
            pass
    assert (tmp_path / "out" / "mine").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/out cannot be written"), folder.whole(tmp_path / "file" / "out"):
        pass


def test_the_same_parameters_give_the_summary_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert folder.finished(out, {"seed": 1}) is None
    out.mkdir()
    assert folder.finished(out, {"seed": 1}) is None
    make(out, seed=1, subsets=(0.05,))
    assert folder.finished(out, {"seed": 1, "subsets": (0.05,)}) == {"count": 3}


def test_anything_else_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, seed=1)
    with pytest.raises(UserError, match=r"with another seed \(1, now 2\): choose another folder"):
        folder.finished(out, {"seed": 2})
    with pytest.raises(UserError, match=r"with another valid_fraction \(None, now 0.1\)"):
        folder.finished(out, {"seed": 1, "valid_fraction": 0.1})
    (out / "sub" / "data").write_text("longer data")
    with pytest.raises(UserError, match="sub/data is missing or has changed"):
        folder.finished(out, {"seed": 1})
    (out / "sub" / "data").unlink()
    with pytest.raises(UserError, match="sub/data is missing or has changed"):
        folder.finished(out, {"seed": 1})
    (out / "prepared.json").write_text("{")
    for something in (out, out / "prepared.json"):
        with pytest.raises(UserError, match="is not a folder prepared here"):
            folder.finished(something, {"seed": 1})


def test_what_another_run_begins_when_this_one_ends_is_left_alone(tmp_path, monkeypatch):
    put = folder._put

    def and_another_begins(part, place):
        put(part, place)
        part.mkdir()

    monkeypatch.setattr(folder, "_put", and_another_begins)
    make(tmp_path / "out")
    assert (tmp_path / ".out.part").exists()


def test_a_folder_that_another_run_has_just_taken_away_is_not_ours(tmp_path, monkeypatch):
    import fcntl

    flock = fcntl.flock

    def renamed_meanwhile(lock, how):
        (tmp_path / ".out.part").rename(tmp_path / "out")
        (tmp_path / ".out.part").mkdir()
        flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", renamed_meanwhile)
    with pytest.raises(UserError, match="being written by another run"), folder.whole(tmp_path / "out"):
        raise AssertionError("it is another's")
    assert (tmp_path / ".out.part").exists()


def test_a_parameter_that_is_no_longer_given_counts(tmp_path):
    make(tmp_path / "out", seed=1, valid_fraction=0.1)
    with pytest.raises(UserError, match=r"with another valid_fraction \(0.1, now None\)"):
        folder.finished(tmp_path / "out", {"seed": 1})


def test_here_the_record_comes_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: moved.append(Path(new).name) or replace(old, new))
    with folder.whole(Path()) as part:
        (part / "zebra").write_text("")
        folder.finish(part, {}, {})
    assert moved == ["zebra", folder.RECORD]
