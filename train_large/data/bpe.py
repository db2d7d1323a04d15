"""A byte-level BPE in GPT-2's two files: brought by the user, or trained here; encoded with the `tokenizers` library.

fairseq reads the same files by `--bpe gpt2 --gpt2-encoder-json FILE --gpt2-vocab-bpe FILE`
(fairseq/data/encoders/gpt2_bpe.py) and gives the same ids: encoder.json maps a piece of text (its bytes as printable
characters) to its id; vocab.bpe has a `#version` line, then one merge a line, the first to be done first.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from train_large.errors import UserError

# Lines are encoded together up to this many characters: enough to keep the library's threads busy, some tens of MB of
# memory.
_BATCH_CHARACTERS = 1 << 20
_VERSION = "#version: 0.2"


def train_bpe(lines: Iterable[str], vocabulary_size: int) -> dict[str, str]:
    """Train a BPE of at most `vocabulary_size` entries (256 bytes and the merges) on the lines.

    Returns the contents of its two files by name. Pairs seen only once are not merged, so a small text gives fewer
    entries.
    """
    tokenizer = _tokenizer(BPE())
    trainer = BpeTrainer(
        vocab_size=vocabulary_size, min_frequency=2, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    encoder = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    merges = [" ".join(merge) for merge in model["merges"]]
    # ASCII only, as in GPT-2's own file: fairseq opens encoder.json in the locale's encoding.
    return {"encoder.json": json.dumps(encoder), "vocab.bpe": "\n".join([_VERSION, *merges]) + "\n"}


def load_bpe(encoder_json: Path, vocab_bpe: Path) -> Tokenizer:
    """Read GPT-2's two files.

    Raises UserError where they are missing, are not in GPT-2's format, or do not belong together.
    """
    return parse_bpe(_read(encoder_json), _read(vocab_bpe), str(encoder_json), str(vocab_bpe))


def parse_bpe(encoder_text: str, bpe_text: str, encoder_json: str, vocab_bpe: str) -> Tokenizer:
    """`load_bpe` from the contents of the two files; errors name them `encoder_json` and `vocab_bpe`."""
    try:
        encoder = json.loads(encoder_text)
    except json.JSONDecodeError:
        encoder = None
    if not isinstance(encoder, dict) or not all(type(index) is int for index in encoder.values()):
        raise UserError(
            f"{encoder_json} is not an encoder.json: give GPT-2's file, a JSON object of pieces of text and their ids"
        )
    if sorted(encoder.values()) != list(range(len(encoder))):
        raise UserError(f"{encoder_json} does not number its {len(encoder)} entries from 0 on: give GPT-2's own file")
    if not encoder.keys() >= set(ByteLevel.alphabet()):
        raise UserError(f"{encoder_json} lacks some of the 256 bytes: give the file of a byte-level BPE, as GPT-2's is")
    version, *lines = bpe_text.split("\n")
    if not version.startswith("#version"):
        raise UserError(f"{vocab_bpe} does not begin with a '#version' line: give GPT-2's vocab.bpe")
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines if line)]
    for number, (left, right) in enumerate(merges, start=2):
        if not {left, right, left + right} <= encoder.keys():
            raise UserError(
                f"{vocab_bpe}, line {number}, is not a merge of entries of {encoder_json}: give two files of one BPE"
            )
    return _tokenizer(BPE(vocab=encoder, merges=merges))


def encode(tokenizer: Tokenizer, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str, list[int]]]:
    """Yield (key, line, ids) for each (key, line), in order; a batch of lines is all that is held in memory."""
    for batch in _batches(lines):
        encodings = tokenizer.encode_batch_fast([line for _, line in batch], add_special_tokens=False)
        for (key, line), encoding in zip(batch, encodings):
            yield key, line, encoding.ids


def write_dictionary(path: Path, counts: Iterable[int]) -> int:
    """Write fairseq's dict.txt for BPE ids 0, 1, ...: every id and its count, the frequent first, the unseen too.

    Every entry is listed because a validation token that the dictionary lacks would become <unk>, which is easier to
    predict than what it stands for, and so would flatter the perplexity. As in fairseq (Dictionary.finalize,
    data/dictionary.py), `madeupword` entries fill up to a multiple of 8 with the 4 special symbols; the tasks add
    <mask> after them. GPT-2's 50,257 entries so give RoBERTa's 50,265.

    Returns the number of entries with the special symbols and without <mask>.
    """
    ranked = sorted(enumerate(counts), key=lambda item: -item[1])
    entries = [f"{index} {count}" for index, count in ranked]
    entries += [f"madeupword{index:04d} 0" for index in range(-(len(entries) + 4) % 8)]
    path.write_text("\n".join(entries) + "\n", encoding="utf-8")
    return len(entries) + 4


def _tokenizer(model: BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = ByteLevelDecoder()
    return tokenizer


def _batches(lines: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    batch: list[tuple[int, str]] = []
    size = 0
    for item in lines:
        batch.append(item)
        size += len(item[1]) + 1
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read as UTF-8 text ({error}): give GPT-2's encoder.json and vocab.bpe"
        ) from None
