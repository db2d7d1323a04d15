"""Documents in plain text files: one per line, blank-line separated, or WikiText's articles; read a line at a time."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from train_large.errors import UserError

STYLES = ("auto", "line", "blank", "wikitext")
# WikiText's own headings: ` = Title = ` opens an article, ` = = Section = = ` does not.
_TITLE = re.compile(r"= [^=](?:.*[^=])? =")


@dataclass(frozen=True)
class TextFile:
    """A text file that was read once from end to end: it is UTF-8 and holds at least one document."""

    path: Path
    style: str
    """line, blank or wikitext; never auto."""
    documents: int


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex.

    Raises UserError where the file is missing, a folder, empty or not readable.
    """
    sha = hashlib.sha256()
    try:
        with path.open("rb") as file:
            for chunk in iter(lambda: file.read(1 << 20), b""):
                sha.update(chunk)
            empty = file.tell() == 0
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give the path of a text file") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: give the text files in it one by one") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a text file that can") from None
    if empty:
        raise UserError(f"{path} is empty: give a file that holds text")
    return sha.hexdigest()


def read_lines(path: Path) -> Iterator[str]:
    r"""Yield the lines of a UTF-8 file without their ends (\n or \r\n) and without a byte order mark.

    Raises UserError at the first byte that is not UTF-8, with its offset in the file.
    """
    offset = 0
    with path.open("rb") as file:
        for raw in file:
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path} is not UTF-8 (byte 0x{raw[error.start]:02x} at offset {offset + error.start}): "
                    "convert the file to UTF-8, for example with iconv"
                ) from None
            if offset == 0:
                line = line.lstrip("\ufeff")
            offset += len(raw)
            yield line.rstrip("\r\n")


def inspect(path: Path, documents: str = "auto") -> TextFile:
    """Read the file once or twice: settle its style and count its documents.

    `auto` takes a blank line between two lines of text as the mark of the blank-line separated style.
    Raises UserError where there is no document, or no article title in the wikitext style.
    """
    style = documents
    if documents == "auto":
        style = "blank" if _blank_between(line.strip() for line in read_lines(path)) else "line"
    if style == "wikitext":
        lines = _pairs(line.strip() for line in read_lines(path))
        first, following = next(((line, following) for line, following in lines if line), ("", ""))
        if first and (following or not _TITLE.fullmatch(first)):
            raise UserError(
                f"{path} does not begin with a ' = Title = ' line of its own, as WikiText does: choose --documents "
                "blank or line"
            )
    count = 0
    for index, _ in _number(path, style):
        count = index + 1
    if count == 0:
        raise UserError(f"{path} holds nothing but blank lines: give a file that holds text")
    return TextFile(path, style, count)


def number_lines(files: Iterable[TextFile]) -> Iterator[tuple[int, str]]:
    """Yield (document, line) for every line that holds text, documents numbered from 0 through all the files.

    Lines are stripped, as fairseq's examples/roberta/multiprocessing_bpe_encoder.py does (`encode_lines`).
    """
    first = 0
    for file in files:
        for index, line in _number(file.path, file.style):
            yield first + index, line
        first += file.documents


def _number(path: Path, style: str) -> Iterator[tuple[int, str]]:
    """Number the documents of one file from 0; lines without text are dropped."""
    document, previous = -1, ""
    lines = (line.strip() for line in read_lines(path))
    for line, following in _pairs(lines):
        if line:
            if style == "line":
                begins = True
            elif style == "blank":
                begins = not previous
            else:  # a formula cut at its equals signs looks like a title too, but does not stand alone
                begins = not previous and not following and _TITLE.fullmatch(line) is not None
            if begins or document < 0:
                document += 1
            yield document, line
        previous = line


def _pairs(lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    """Yield each line with the next one ("" after the last)."""
    here, ahead = itertools.tee(lines)
    next(ahead, None)
    return zip(here, itertools.chain(ahead, [""]))


def _blank_between(lines: Iterable[str]) -> bool:
    """Whether a blank line stands between two that are not (so a stray one at either end does not count)."""
    text = gap = False
    for line in lines:
        if line and gap:
            return True
        text = text or bool(line)
        gap = text and not line
    return False
