"""Files that appear whole or not at all, and what is no file."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sys
from types import SimpleNamespace

import pytest

from train_large.errors import UserError
from train_large.files import alone, keep_apart, remove, whole, write_text


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    with whole(tmp_path / "link") as aside:
        aside.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "file").read_text() == "new"
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["file"]


def test_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is a device or a pipe"), whole(tmp_path / "pipe") as aside:
        aside.write_text("new")
    assert (tmp_path / "pipe").is_fifo()


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=f"there is no folder {tmp_path}/none; make it"), whole(
        tmp_path / "none" / "file"
    ):
        raise AssertionError("nothing can be written")


def test_torchs_word_for_a_full_disk_is_translated(tmp_path, monkeypatch):
    def full():
        with whole(tmp_path / "file"):
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\nmore")

    with pytest.raises(UserError, match="unexpected pos"):
        full()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=4096, total=8192))
    with pytest.raises(UserError, match="No space left on device"):
        full()


def test_a_file_system_without_room_for_anything_is_not_full(tmp_path, monkeypatch):
    """As /proc, which has no blocks at all."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=0, used=0, free=0))
    with pytest.raises(UserError, match="its own reason"), whole(tmp_path / "file"):
        raise RuntimeError("its own reason")


def test_a_pipe_that_a_link_leads_to_is_one():
    _, end = os.pipe()
    with pytest.raises(UserError, match="is a device or a pipe"), whole(f"/proc/self/fd/{end}"):
        raise AssertionError("nothing can be written")
    os.close(end)


def test_a_failure_leaves_what_was_there(tmp_path):
    (tmp_path / "file").write_text("old")

    def fill_the_disk():
        with whole(tmp_path / "file") as aside:
            aside.write_text("new")
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="is as it was"):
        fill_the_disk()
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_text_makes_its_folder(tmp_path):
    write_text(tmp_path / "a" / "b" / "text", "é\n")
    assert (tmp_path / "a" / "b" / "text").read_bytes() == "é\n".encode()
    with pytest.raises(UserError, match=f"{tmp_path}/a/b/text/c could not be written"):
        write_text(tmp_path / "a" / "b" / "text" / "c", "")


def test_a_folder_goes_whole(tmp_path, monkeypatch):
    """What a killed removal leaves is not under the folder's name, and goes with the next."""
    place = tmp_path / "run"
    for name in ("one", "other"):
        (place / name).mkdir(parents=True)
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda path, ignore_errors=False: ignore_errors or sys.exit("killed"))
        with pytest.raises(SystemExit):
            remove(place)
    assert not place.exists()
    place.mkdir()
    remove(place)
    remove(place)  # is not there
    assert list(tmp_path.iterdir()) == []


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.fstat(file).st_size) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *names: done.append("renamed") or replace(*names))
    with whole(tmp_path / "file") as aside:
        aside.write_text("12345")
    assert done == [5, "renamed"]


def test_a_folder_is_no_place_for_a_file(tmp_path):
    with pytest.raises(UserError, match="is a directory: give the name of the file"), whole(tmp_path):
        raise AssertionError("nothing can be written")


def test_only_torchs_word_is_translated(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=4096, total=8192))
    with pytest.raises(UserError, match="Permission denied"), whole(tmp_path / "file"):
        raise PermissionError(13, "Permission denied")


def test_a_folder_is_one_works_at_a_time(tmp_path):
    folder = tmp_path / "new" / "out"
    with alone(folder, "study", "SET=out=FOLDER"):
        told = rf"^a study, .* in {folder}: wait .* with SET=out=FOLDER\.$"
        with pytest.raises(UserError, match=told), alone(folder, "study", "SET=out=FOLDER"):
            pass
    with alone(folder, "study", "SET=out=FOLDER"), alone(tmp_path, "study", "SET=out=FOLDER"):
        pass


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    told = r"file/out cannot be written \(Not a directory\): give another folder with --out"
    with pytest.raises(UserError, match=told), alone(tmp_path / "file" / "out", "demo", "--out"):
        pass


def test_a_folder_without_locks_is_one_sentence(tmp_path, monkeypatch):
    def refuse(*_) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match="has no locks"), alone(tmp_path, "demo", "--out"):
        pass


def test_an_output_is_no_input_and_no_other_output(tmp_path):
    model, log = tmp_path / "model", tmp_path / "log"
    (tmp_path / "link").symlink_to(model)
    keep_apart([model, log], out=tmp_path / "new", csv=None, page=tmp_path / "page")
    with pytest.raises(UserError, match=f"^OUT {tmp_path}/link: {model} is read by the same command"):
        keep_apart([model], out=tmp_path / "link")
    with pytest.raises(UserError, match=f"^--weight-error-csv {tmp_path}/a: .* is written by the same command"):
        keep_apart([model], csv=tmp_path / "a", weight_error_csv=tmp_path / "a")
