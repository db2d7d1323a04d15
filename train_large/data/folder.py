"""A prepared folder: it appears whole or not at all, and prepared.json in it says what it was made from."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train_large.errors import UserError

RECORD = "prepared.json"


@contextlib.contextmanager
def whole(out: Path) -> Iterator[Path]:
    """Give an empty folder beside `out`; rename it to `out` when the block ends well, remove it when not.

    Where `out` is the working directory, what is in the folder is moved into it instead.
    What a killed run left behind is removed by the next one; a lock on the folder keeps two runs apart.
    Raises UserError where another run is at work on `out`, or where the disk is full or not writable.
    """
    place = out.resolve()  # "." has no name
    part = place.parent / f".{place.name}.part"
    try:
        part.mkdir(parents=True, exist_ok=True)
        lock = os.open(part, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose another folder") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = _is_open_as(lock, part)  # another run may have renamed it in between
        except BlockingIOError:
            ours = False
        if not ours:
            raise UserError(f"{out} is being written by another run: wait for it, or choose another folder")
        try:
            _clear(part)
            yield part
            _put(part, place)
        except OSError as error:
            raise UserError(
                f"{out} could not be written ({error.strerror or error}): make room or choose another folder"
            ) from error
        finally:
            if _is_open_as(lock, part):  # what has this name once ours was renamed is another run's
                shutil.rmtree(part, ignore_errors=True)
    finally:
        os.close(lock)


def _is_open_as(lock: int, part: Path) -> bool:
    """Whether the folder that is open as `lock` still has this name."""
    try:
        return os.path.samestat(os.fstat(lock), part.stat())
    except FileNotFoundError:
        return False


def finished(out: Path, parameters: dict[str, Any]) -> dict[str, Any] | None:
    """The summary of `out` if it was made from the same parameters, None if there is nothing in `out` yet.

    Raises UserError where `out` holds anything else, or is no longer what was written.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
        theirs, sizes, summary = record["parameters"], record["sizes"], record["summary"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{out} exists and is not a folder prepared here: choose another folder or delete it") from None
    ours = _plain(parameters)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"{out} was prepared with another {name} ({theirs.get(name)}, now {ours.get(name)}): "
                "choose another folder or delete it"
            )
    for name, size in sizes.items():
        file = out / name
        if not file.is_file() or file.stat().st_size != size:
            raise UserError(f"{file} is missing or has changed since it was prepared: delete {out} and run again")
    return summary


def recorded(folder: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """What a prepared folder was made from, and the bytes of its files by name; empty where no record says."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return dict(record["parameters"]), dict(record["sizes"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}, {}


def finish(folder: Path, parameters: dict[str, Any], summary: dict[str, Any]) -> None:
    """Write the record of a folder that is otherwise complete."""
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}
    record = {"parameters": _plain(parameters), "sizes": sizes, "summary": summary}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _plain(parameters: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back (tuples as lists), so that it compares."""
    return json.loads(json.dumps(parameters))


def _put(part: Path, place: Path) -> None:
    """Make the folder `part` the one at `place`, which is not there or empty."""
    if place != Path.cwd():
        os.replace(part, place)
        return
    # Whoever stands in a folder that is replaced stands in one that is gone. Its record comes last.
    if any(place.iterdir()):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
    for entry in sorted(part.iterdir(), key=lambda entry: entry.name == RECORD):
        os.replace(entry, place / entry.name)


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
