"""fairseq's dict.txt: which symbol stands at which row of the embeddings."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from train_large.errors import UserError

FILE = "dict.txt"
BOS, PAD, EOS, UNK = range(4)
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # at 0 to 3 (`Dictionary`, fairseq/data/dictionary.py, 0.12.3.1)
MASK = "<mask>"  # last: the tasks masked_lm and sentence_prediction add it to the dictionary
OVERWRITE = "#fairseq:overwrite"  # on a line whose symbol stands on an earlier one too: the later place counts


def find_dictionary(place: Path) -> Path:
    """The dict.txt that `place` is or holds: itself, in a folder of binary data (data-bin) or of a task (input0).

    Raises UserError when there is none.
    """
    for file in (place, place / FILE, place / "data-bin" / FILE, place / "input0" / FILE):
        if file.is_file():
            return file
    raise UserError(f"{place} is no {FILE} and holds none: give the {FILE} of the data that the model was trained on")


def read_dictionary(path: Path) -> list[str]:
    """The symbols of the dict.txt at `path`, as `parse_dictionary` gives them. Raises UserError as it does."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error}): give a {FILE} of fairseq") from None
    return parse_dictionary(text, str(path))


def parse_dictionary(text: str, name: str) -> list[str]:
    """The symbols of a dict.txt in the order of the embeddings, the four special ones and <mask> included.

    Raises UserError, with `name` and the line, for what fairseq would refuse.
    """
    symbols = list(SPECIAL)
    seen = set(symbols)
    # Only "\n" ends a line: a symbol may be a separator of another kind.
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        symbol, _, count = line.rstrip().rpartition(" ")
        overwrite = count == OVERWRITE
        if overwrite:
            symbol, _, count = symbol.rpartition(" ")
        if not re.fullmatch("-?[0-9]+", count):
            raise UserError(f"{name}, line {number}, is not a symbol and its count: give a {FILE} of fairseq")
        if symbol in seen and not overwrite:
            raise UserError(f"{name}, line {number}: {symbol!r} comes twice: give the {FILE} that fairseq wrote")
        seen.add(symbol)
        symbols.append(symbol)
    return symbols if MASK in seen else [*symbols, MASK]


def read_labels(path: Path, classes: int) -> list[str]:
    """The names of `classes` classes: class k is entry k of label/dict.txt, behind which fairseq may have filled up.

    Raises UserError when it lists another number of classes.
    """
    names = label_names(read_dictionary(path))
    if len(names) != classes:
        raise UserError(
            f"{path} names {len(names)} classes ({', '.join(names[:5])}) and the checkpoint's head has {classes}: "
            "give its own by --labels, in the order of the classes"
        )
    return names


def label_names(symbols: Sequence[str]) -> list[str]:
    """The entries of a dictionary of labels, without its special symbols and what fills it up to a multiple of 8."""
    return [symbol for symbol in symbols[len(SPECIAL) : -1] if not re.fullmatch("madeupword[0-9]{4}", symbol)]


def digest(symbols: Sequence[str]) -> str:
    """What a prenorm_roberta's checkpoint keeps of its dictionary (`dictionary_digest` in the model's arguments)."""
    return hashlib.sha256("\n".join(symbols).encode()).hexdigest()[:16]


def check_trained_with(symbols: Sequence[str], name: str, rows: int | None, expected: str | None) -> None:
    """Raise UserError unless `symbols`, read from `name`, can be those that a model was trained with.

    rows: of the model's token embeddings. expected: the digest that its arguments hold. None where it is not known.
    """
    if rows is not None and len(symbols) != rows:
        raise UserError(
            f"{name} makes a dictionary of {len(symbols)} symbols, special ones included, and the checkpoint's "
            f"embeddings have {rows} rows: give the dict.txt of the data that the model was trained on"
        )
    if expected is not None and digest(symbols) != expected:
        raise UserError(
            f"{name} is not the dictionary that the model was trained with, though of its length: give the dict.txt "
            "of its training data"
        )
