"""Text to the ids that a model was trained on, and back, with the files that a packed model carries.

The same steps as when the data was prepared (train_large/data): a line is stripped, cut by the BPE of encoder.json and
vocab.bpe, and each piece's number looked up in dict.txt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from train_large.data import bpe
from train_large.data.dictionary import EOS, MASK, UNK, label_names, parse_dictionary
from train_large.errors import UserError

DICTIONARY, LABELS, ENCODER, MERGES = "dict.txt", "labels.txt", "encoder.json", "vocab.bpe"


@dataclass(frozen=True)
class Vocabulary:
    """symbols in the order of the embeddings; ids is the other way round."""

    tokenizer: Tokenizer
    symbols: tuple[str, ...]
    ids: Mapping[str, int]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without special symbols."""
        numbers = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[self.ids.get(str(number), UNK) for number in encoding.ids] for encoding in numbers]

    def word(self, index: int) -> str:
        """The text of one id, a space before it included; special symbols as they are."""
        symbol = self.symbols[index]
        return self.tokenizer.decode([int(symbol)]) if symbol.isdecimal() else symbol

    @property
    def mask(self) -> int:
        return self.ids[MASK]


def read_vocabulary(files: Mapping[str, str]) -> Vocabulary:
    """The vocabulary from the files by name. Raises UserError when one is missing, or is not what it should be."""
    texts = {name: _text(files, name) for name in (DICTIONARY, ENCODER, MERGES)}
    symbols = parse_dictionary(texts[DICTIONARY], DICTIONARY)
    ids = {symbol: index for index, symbol in enumerate(symbols)}  # of two the later, as in fairseq
    return Vocabulary(bpe.parse_bpe(texts[ENCODER], texts[MERGES], ENCODER, MERGES), tuple(symbols), ids)


def read_labels(files: Mapping[str, str], classes: int) -> tuple[str, ...]:
    """The names of a classifier's classes, in order; their numbers where the file has no labels.txt."""
    if LABELS not in files:
        return tuple(map(str, range(classes)))
    names = label_names(parse_dictionary(_text(files, LABELS), LABELS))
    if len(names) != classes:
        raise UserError(
            f"{LABELS} names {len(names)} classes ({', '.join(names[:5])}) and the model has {classes}: pack it again "
            "with its own labels."
        )
    return tuple(names)


def sentence(parts: Iterable[Sequence[int]], task: Mapping[str, Any]) -> list[int]:
    """One sentence, or a pair, as fairseq's sentence_prediction joins them: <s> a </s>, <s> a </s> </s> b </s>.

    The first and the separating symbol are those of the task's options (--init-token, --separator-token).
    """
    ids: list[int] = []
    for number, part in enumerate(parts):
        before = task.get("separator_token" if number else "init_token")
        ids += [*([] if before is None else [int(before)]), *part, EOS]
    return ids


def _text(files: Mapping[str, str], name: str) -> str:
    if name not in files:
        raise UserError(f"the file has no {name}, so it cannot read text: pack the model with its text's folder.")
    return files[name]
