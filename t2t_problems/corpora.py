"""Parallel text: pairs of sentences read straight from files or archives, checked line by line, and sampled by hash.

Nothing is unpacked: Tensor2Tensor's own reader (data_generators/translate.py:171, 1.15.7) leaves unpacked and compiled
files in tmp_dir and takes them for whole the next time, also when it was killed half-way, and it cuts the longer of two
files without a word.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import heapq
import itertools
import logging
import os
import re
import tarfile
import zlib
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple, Tuple

from train_large.errors import UserError

Pair = Tuple[str, str]  # English, French

log = logging.getLogger(__name__)


class Corpus(NamedTuple):
    """A source of sentence pairs: one pair for each line, as often as it is read."""

    name: str
    """For messages: the file or files."""
    read: Callable[[], Iterator[Pair]]
    """Yields (English, French) without white space at the ends; a side may be empty (see `full`). Raises UserError."""


class Census(NamedTuple):
    pairs: int
    """Pairs of which both sides have text."""
    characters: int
    """Characters of those pairs, both sides together."""


def two_files(english: Path, french: Path) -> Corpus:
    """The lines of two UTF-8 files, side by side."""

    def read() -> Iterator[Pair]:
        with _opened(english) as first, _opened(french) as second:
            yield from _side_by_side(str(english), lines(str(english), first), str(french), lines(str(french), second))

    return Corpus(f"{english} and {french}", read)


def tsv_file(path: Path) -> Corpus:
    """A UTF-8 file of lines "English TAB French"; an empty line is an empty pair."""

    def read() -> Iterator[Pair]:
        with _opened(path) as stream:
            for number, line in enumerate(lines(str(path), stream), 1):
                sides = line.split("\t") if line.strip() else ["", ""]
                if len(sides) != 2:
                    raise UserError(
                        f"{path} line {number} has {len(sides) - 1} tabs instead of one: each line is the English "
                        "sentence, a tab, the French sentence."
                    )
                yield sides[0].strip(), sides[1].strip()

    return Corpus(str(path), read)


def archived(archive: Path, english: str, french: str) -> Corpus:
    """Two members of a .tgz or .tar, read side by side; those in .gz are decompressed, those in .sgm are segments."""

    def read() -> Iterator[Pair]:
        names = f"{english} in {archive}", f"{french} in {archive}"
        with _member(archive, english) as first, _member(archive, french) as second:
            sides = lines(names[0], first), lines(names[1], second)
            if english.endswith(".sgm"):
                sides = segments(sides[0]), segments(sides[1])
            yield from _side_by_side(names[0], sides[0], names[1], sides[1])

    return Corpus(f"{english} and {french} in {archive}", read)


def lines(name: str, stream: Iterable[bytes]) -> Iterator[str]:
    r"""The lines of `stream`, which end in \n or \r\n and nowhere else; UserError names the line that is not UTF-8."""
    for number, line in enumerate(stream, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name}: line {number} is not UTF-8 (byte {error.start + 1} of the line is "
                f"0x{line[error.start]:02x}): convert the file to UTF-8, for example with iconv."
            ) from None


def segments(sgm: Iterable[str]) -> Iterator[str]:
    """The text of each <seg> of WMT's .sgm files, spaces made single and entities kept, as sacreBLEU gives it."""
    for line in sgm:
        match = re.search(r"<seg\b[^>]*>(.*)</seg>", line)
        if match:
            yield " ".join(match.group(1).split())


def full(pairs: Iterable[Pair]) -> Iterator[Pair]:
    """The pairs of which both sides have text."""
    return (pair for pair in pairs if pair[0] and pair[1])


def census(corpus: Corpus) -> Census:
    """Read `corpus` once from end to end, and say how many pairs are left out because a side is empty.

    Raises UserError for whatever is wrong in it, and if no pair has text on both sides.
    """
    pairs = characters = total = first_empty = 0
    for total, (english, french) in enumerate(corpus.read(), 1):  # noqa: B007
        if english and french:
            pairs += 1
            characters += len(english) + len(french)
        else:
            first_empty = first_empty or total
    if not pairs:
        raise UserError(f"{corpus.name}: no line has both an English and a French sentence.")
    if first_empty:
        log.warning(
            "%s: %d of %d lines have an empty side and are left out; the first is line %d.",
            corpus.name,
            total - pairs,
            total,
            first_empty,
        )
    return Census(pairs, characters)


def fraction(text: str, purpose: str) -> float:
    """A number in [0, 1) that `text` has for this purpose on every machine, as if drawn at random (BLAKE2b)."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, person=purpose.encode("utf-8")).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def subsample(pairs: Iterable[Pair], share: float) -> Iterator[Pair]:
    """About `share` of the distinct pairs. A smaller share is part of a larger one; 1 is all of them."""
    return (pair for pair in pairs if share >= 1 or _rank(pair) < share)


def sample(pairs: Iterable[Pair], characters: int) -> list[Pair]:
    """Pairs drawn evenly from all of `pairs`, together of at least so many characters if there are as many.

    They are those that the smallest subsample has first, whatever their order. `characters` is positive. Holds no more
    than the sample in memory.
    """
    heap: list[tuple[float, Pair]] = []  # the pair to give up next on top
    held = 0
    for pair in pairs:
        rank = -_rank(pair)
        if held >= characters and rank < heap[0][0]:
            continue
        heapq.heappush(heap, (rank, pair))
        held += _characters(pair)
        while held - _characters(heap[0][1]) >= characters:
            held -= _characters(heapq.heappop(heap)[1])
    return [pair for _, pair in sorted(heap, reverse=True)]


def _rank(pair: Pair) -> float:
    return fraction("\t".join(pair), "subsample")


def _characters(pair: Pair) -> int:
    return len(pair[0]) + len(pair[1])


def _side_by_side(first: str, english: Iterator[str], second: str, french: Iterator[str]) -> Iterator[Pair]:
    for number, (source, target) in enumerate(itertools.zip_longest(english, french)):
        if source is None or target is None:
            rest = 1 + sum(1 for _ in (french if source is None else english))
            counts = (number, number + rest) if source is None else (number + rest, number)
            raise UserError(
                f"{first} has {counts[0]} lines and {second} has {counts[1]}: line n of the one must be the "
                "translation of line n of the other."
            )
        yield source.strip(), target.strip()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Iterable[bytes]]:
    try:
        with path.open("rb") as stream:
            yield stream
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error


@contextlib.contextmanager
def _member(archive: Path, name: str) -> Iterator[Iterable[bytes]]:
    try:
        with contextlib.ExitStack() as stack:
            tar = stack.enter_context(tarfile.open(str(archive), "r:*"))
            found = next((member for member in tar if os.path.normpath(member.name) == name), None)
            stream = tar.extractfile(found) if found else None
            if stream is None:
                raise UserError(f"{archive} holds no {name}: it is not the archive meant here, or it is damaged.")
            yield stack.enter_context(gzip.open(stream)) if name.endswith(".gz") else stream
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise UserError(
            f"{archive} cannot be read to the end of {name} ({error}): it is damaged or was not downloaded whole; "
            "download it again."
        ) from error
