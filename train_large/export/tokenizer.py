"""The byte-level BPE of a run as a Hugging Face tokenizer, id for id what fairseq reads.

fairseq comes to its ids in two steps, the BPE's own id of a piece of text and the place of that id in dict.txt:

    text        " the"        encoder.json   "Ġthe": 262        dict.txt   line 5 is "262 1061396"        id 4 + 4 = 8

Here it is one vocabulary, {"Ġthe": 8}. What dict.txt lacks is <unk>, as in fairseq.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Replace
from tokenizers.processors import TemplateProcessing

from train_large.data.bpe import load_bpe
from train_large.data.dictionary import EOS, MASK, SPECIAL, UNK
from train_large.errors import UserError

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
# What Python's str.strip removes, by which prepare-task trims sentences. Onigurama's \s lacks the four separators.
_ENDS = r"\A[\s\x1c-\x1f]+|[\s\x1c-\x1f]+\z"


def find_bpe(place: Path) -> tuple[Path, Path]:
    """GPT-2's two files in the folder `place`, or in its folder bpe/. Raises UserError when they are in neither."""
    for folder in (place, place / "bpe"):
        files = folder / "encoder.json", folder / "vocab.bpe"
        if all(file.is_file() for file in files):
            return files
    raise UserError(f"{place} does not hold encoder.json and vocab.bpe: give the folder of a prepared text")


def write_tokenizer(
    folder: Path,
    symbols: Sequence[str],
    bpe: tuple[Path, Path],
    *,
    max_length: int,
    init_token: int | None,
    separator_token: int | None,
    sentences: bool,
) -> int:
    """Write tokenizer.json and tokenizer_config.json. Returns how many entries of the BPE are <unk>.

    symbols: the dictionary (`read_dictionary`). max_length: tokens that the model has positions for. init_token and
    separator_token: fairseq's --init-token and --separator-token: what stands first, and before a second sentence;
    `</s>` ends each sentence. sentences: for a classifier, whose inputs are trimmed and hold no special tokens; a
    masked language model finds <mask> (with the space before it) in its text, and the other special tokens too.
    Raises UserError where the BPE does not fit the dictionary.
    """
    tokenizer = load_bpe(*bpe)
    encoder, merges = tokenizer.get_vocab(), json.loads(tokenizer.to_str())["model"]["merges"]
    rows, missing = _rows(symbols, encoder)
    _check_unknown(missing, encoder, merges, bpe[0])
    names = {row: name for name, row in rows.items()}  # of the symbols, before what is <unk> comes to share its row
    result = Tokenizer(BPE(vocab=rows, merges=[], unk_token=names[UNK]))
    result.pre_tokenizer, result.decoder = tokenizer.pre_tokenizer, tokenizer.decoder
    if sentences:
        result.normalizer = Replace(Regex(_ENDS), "")
    special = {symbol: names[symbols.index(symbol)] for symbol in (*SPECIAL, MASK)}
    result.add_special_tokens(
        [AddedToken(name, lstrip=symbol == MASK, normalized=False) for symbol, name in special.items()]
    )
    result.post_processor = _template(symbols, names, init_token, separator_token)

    form = json.loads(result.to_str())
    # By hand, because the library writes one entry a row, and the pieces that are <unk> share theirs.
    merged = {left + right for left, right in merges}
    form["model"]["vocab"] = rows | {piece: UNK for piece in missing if piece in merged}
    form["model"]["merges"] = merges
    _write(folder / TOKENIZER, form)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": sentences,
        "bos_token": special["<s>"],
        "cls_token": special["<s>"],
        "eos_token": special["</s>"],
        "sep_token": special["</s>"],
        "pad_token": special["<pad>"],
        "unk_token": special["<unk>"],
        "mask_token": special[MASK],
    }
    _write(folder / SETTINGS, settings)
    return len(missing)


def _rows(symbols: Sequence[str], encoder: dict[str, int]) -> tuple[dict[str, int], list[str]]:
    """The row of the embeddings by the piece of text or the symbol's own name, and the pieces that have none."""
    pieces = {str(index): piece for piece, index in encoder.items()}
    place = {symbol: row for row, symbol in enumerate(symbols)}  # of a symbol that comes twice, the last
    rows: dict[str, int] = {}
    for row, symbol in enumerate(symbols):
        name = pieces.get(symbol, symbol)
        if symbol not in pieces or place[symbol] != row:
            while name in encoder or name in rows:  # a special token, or one that fills up, must not be a piece of text
                name = f"<{name}>"
        rows[name] = row
    return rows, [piece for piece in encoder if piece not in rows]


def _check_unknown(
    missing: Collection[str], encoder: dict[str, int], merges: Sequence[Sequence[str]], file: Path
) -> None:
    if len(missing) == len(encoder):
        raise UserError(f"none of the ids in {file} is in the dictionary: give the BPE that its data was encoded with")
    parts = {part for merge in merges for part in merge}
    needed = sorted(parts.intersection(missing), key=lambda piece: encoder[piece])
    if needed:
        # They would have to be entries until they are merged, and <unk> when they are not: the model knows no such.
        raise UserError(
            f"the dictionary lacks {len(needed)} entries of {file} that longer ones are merged from, such as id "
            f"{encoder[needed[0]]}: Hugging Face's BPE cannot make <unk> of them; leave out --bpe and encode with "
            "fairseq, or train on a text that prepare-text prepared, whose dictionary has every entry"
        )


def _template(
    symbols: Sequence[str], names: dict[int, str], init_token: int | None, separator_token: int | None
) -> TemplateProcessing:
    for flag, token in (("--init-token", init_token), ("--separator-token", separator_token)):
        if token is not None and not 0 <= token < len(symbols):
            raise UserError(f"{flag} {token} is in the way: the dictionary has {len(symbols)} symbols")

    def piece(token: int | None) -> list[str]:
        return [] if token is None else [names[token]]

    one = [*piece(init_token), "$A", names[EOS]]
    two = [*one, *piece(separator_token), "$B", names[EOS]]
    used = {token for token in (init_token, separator_token, EOS) if token is not None}
    return TemplateProcessing(single=one, pair=two, special_tokens=[(names[token], token) for token in sorted(used)])


def _write(path: Path, form: dict[str, Any]) -> None:
    path.write_text(json.dumps(form, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
