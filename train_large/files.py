"""Files that appear whole or not at all, folders that go so, and folders in which one is at work at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from train_large.errors import UserError

_NOTHING = 1 << 20  # bytes free


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give the name of a file to write beside `path`; when the block ends well, it is flushed and takes `path`'s place.

    Raises UserError when it cannot be written (a full disk, no such folder); what was at `path` is then untouched.
    """
    place = Path(path).resolve()  # a link stays one, to the new file
    aside = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        if place.is_dir():
            raise UserError(f"{path} is a directory: give the name of the file to write.")
        if not place.parent.is_dir():
            raise UserError(f"{path} could not be written: there is no folder {place.parent}; make it first.")
        if Path(path).exists() and not Path(path).is_file():  # not `place`: a pipe that a link leads to has no path
            raise UserError(f"{path} is a device or a pipe, whose place a file would take: give the name of a file.")
        aside.touch()  # or a writer of its own says in its own words that it cannot
        yield aside
        with aside.open("rb+") as file:
            os.fsync(file.fileno())  # or a crash soon after may leave the new name on an empty file
        os.replace(aside, place)
    except (OSError, RuntimeError) as error:  # torch's writer has a RuntimeError for a disk that fills up
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        if isinstance(error, RuntimeError) and _is_full(place.parent):
            reason = os.strerror(errno.ENOSPC)
        raise UserError(
            f"{path} could not be written ({reason}) and is as it was: free some space or give another place."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def keep_apart(inputs: Iterable[Path], **outputs: Path | None) -> None:
    """Raise UserError where an output, named by its flag without the dashes (or out), is an input or another output."""
    taken = {Path(path).resolve(): f"{path} is read" for path in inputs}
    for name, path in outputs.items():
        if path is None:
            continue
        flag = "OUT" if name == "out" else f"--{name.replace('_', '-')}"
        if path.resolve() in taken:
            raise UserError(f"{flag} {path}: {taken[path.resolve()]} by the same command; give another place.")
        taken[path.resolve()] = f"{path} is written"


def _is_full(folder: Path) -> bool:
    disk = shutil.disk_usage(folder)
    return disk.free < _NOTHING and disk.total > 0  # /proc has nothing at all


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 as `whole` does, its folder too where that is missing. Raises UserError likewise."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror}): choose another place.") from None
    with whole(path) as aside:
        aside.write_text(text, encoding="utf-8")


def remove(folder: Path) -> None:
    """Remove all of a folder or nothing, if it is there: a removal that is killed leaves no part under its name."""
    aside = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
        shutil.rmtree(aside)


@contextlib.contextmanager
def alone(folder: Path, work: str, elsewhere: str) -> Iterator[int]:
    """One such `work` at a time in `folder`, which is made; `elsewhere` is the flag that names another.

    Gives the lock, for the processes that it starts to inherit: those that a killed one left keep the next one out of
    the folders that they write to. The system lets go of it when all that hold it have ended, however they do.
    Raises UserError where another is at work, or the folder cannot be written or locked.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}): give another folder with {elsewhere}."
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"a {work}, or what is left of a killed one, is at work in {folder}: wait for it, end the processes "
                f"that `fuser {folder / '.lock'}` names, or give another folder with {elsewhere}."
            ) from None
        except OSError as error:
            raise UserError(
                f"{folder} has no locks ({error.strerror}): give another folder with {elsewhere}."
            ) from None
        yield lock.fileno()
