"""Plain text to what pretraining reads: a BPE, a held-out validation set, nested subsets, fairseq's binary data."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from train_large.data import bpe, folder
from train_large.data.binary import binarize
from train_large.data.documents import STYLES, TextFile, digest, inspect, number_lines
from train_large.data.splits import share, split_indices, subset_name
from train_large.errors import UserError

logger = logging.getLogger(__name__)

# Learning merges keeps a count for every word seen; a sample of this many bytes knows the frequent ones.
_BPE_SAMPLE_BYTES = 1 << 29
_LINES_PER_REPORT = 1_000_000


@dataclass(frozen=True)
class SplitSummary:
    """What one split holds. Tokens: BPE entries, without the </s> that fairseq adds to each line. Bytes: UTF-8's."""

    documents: int
    lines: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class TextSummary:
    """What a prepared text folder holds."""

    bpe: str
    """given (GPT-2's files, brought by the user) or trained"""
    bpe_entries: int
    dictionary_entries: int
    """with fairseq's four special symbols and the filling up to a multiple of 8, without <mask>"""
    splits: dict[str, SplitSummary]
    """train, valid, and each subset of train by its name (train-5pct)"""


def prepare_text(
    inputs: list[Path],
    out: Path,
    *,
    valid: Path | None = None,
    documents: str = "auto",
    encoder_json: Path | None = None,
    vocab_bpe: Path | None = None,
    vocabulary_size: int = 8192,
    valid_fraction: float = 0.005,
    subsets: tuple[float, ...] = (0.05, 0.01),
    seed: int = 1,
    workers: int = 1,
) -> TextSummary:
    """Prepare plain text for masked language modelling (the paper's section 2.1; subsets: its section 5.1).

    Writes out/bpe/{encoder.json,vocab.bpe}, out/data-bin/ (train, valid, dict.txt) and, for each subset,
    out/data-bin-5pct/ and so on (train: that share of the training documents, each subset a part of the larger ones;
    valid and dict.txt: the same), and out/prepared.json. All of it appears at once, or nothing does. Where it is all
    there already, nothing is done.

    inputs: UTF-8 files. documents: line (one per line), blank (blank-line separated), wikitext (an article begins at
    ' = Title = '), or auto (blank if a blank line stands between two lines of text, else line). valid: a file of its
    own for validation; without it the fraction `valid_fraction` of the documents (at least one) is held out at
    random. encoder_json and vocab_bpe: GPT-2's; without them a BPE of at most `vocabulary_size` entries is trained on
    the training documents. workers: processes of fairseq-preprocess; the BPE uses a thread for each processor unless
    RAYON_NUM_THREADS says otherwise.

    Raises UserError on bad input.
    """
    subsets = tuple(sorted(subsets, reverse=True))
    _check(inputs, documents, encoder_json, vocab_bpe, vocabulary_size, valid_fraction, subsets, workers)
    parameters: dict[str, Any] = {"documents": documents, "subsets": subsets, "seed": seed}
    parameters["inputs"] = _digests(inputs, valid)
    if valid is None:
        parameters["valid_fraction"] = valid_fraction
    if encoder_json and vocab_bpe:
        parameters["bpe"] = [digest(encoder_json), digest(vocab_bpe)]
    else:
        parameters["vocabulary_size"] = vocabulary_size
    summary = folder.finished(out, parameters)
    if summary is None:
        files = [inspect(path, documents) for path in inputs]
        valid_files = [inspect(valid, documents)] if valid else []
        depth = _split(files, valid, valid_fraction, subsets, seed)
        given = {"encoder.json": encoder_json, "vocab.bpe": vocab_bpe} if encoder_json and vocab_bpe else None
        with folder.whole(out) as part:
            tokenizer = _settle_bpe(part / "bpe", given, files, depth, vocabulary_size)
            splits, counts = _encode(tokenizer, files, valid_files, depth, subsets, part)
            summary = asdict(
                TextSummary(
                    bpe="given" if given else "trained",
                    bpe_entries=len(counts),
                    dictionary_entries=bpe.write_dictionary(part / "dict.txt", counts.tolist()),
                    splits=splits,
                )
            )
            _binarize(part, subsets, workers)
            folder.finish(part, parameters, summary)
    return TextSummary(
        **{**summary, "splits": {name: SplitSummary(**split) for name, split in summary["splits"].items()}}
    )


def _check(
    inputs: Sequence[Path],
    documents: str,
    encoder_json: Path | None,
    vocab_bpe: Path | None,
    vocabulary_size: int,
    valid_fraction: float,
    subsets: Sequence[float],
    workers: int,
) -> None:
    if not inputs:
        raise UserError("no text was given: name at least one file")
    if documents not in STYLES:
        raise UserError(f"--documents {documents} is not known: choose one of {', '.join(STYLES)}")
    if (encoder_json is None) != (vocab_bpe is None):
        raise UserError("--encoder-json and --vocab-bpe belong together: give both of GPT-2's files, or neither")
    if vocabulary_size < 256:
        raise UserError(f"--vocabulary-size {vocabulary_size} is too small: a byte-level BPE has at least 256 entries")
    if not 0 < valid_fraction < 1:
        raise UserError(
            f"--valid-fraction {valid_fraction} is out of range: give a fraction between 0 and 1, such as 0.005"
        )
    if not all(0 < fraction < 1 for fraction in subsets):
        raise UserError(
            f"--subsets {','.join(map(str, subsets))} is out of range: give fractions between 0 and 1, such as 0.05"
        )
    if len({subset_name(fraction) for fraction in subsets}) < len(subsets):
        raise UserError(f"--subsets {','.join(map(str, subsets))} names one twice: give each fraction once")
    if workers < 1:
        raise UserError(f"--workers {workers} is too few: give 1 or more")


def _digests(inputs: Sequence[Path], valid: Path | None) -> list[str]:
    """The digests of all files; the same text twice would put the held-out documents among the training ones."""
    seen: dict[str, Path] = {}
    for path in [*inputs, *([valid] if valid else [])]:
        sha = digest(path)
        if sha in seen:
            raise UserError(f"{path} holds the same text as {seen[sha]}: give each text once, validation text apart")
        seen[sha] = path
    return list(seen)


def _split(
    files: Sequence[TextFile], valid: Path | None, valid_fraction: float, subsets: Sequence[float], seed: int
) -> NDArray[np.int8]:
    count = sum(file.documents for file in files)
    if valid is None and count < 2:
        raise UserError(
            f"{files[0].path} holds one document only (read as --documents {files[0].style}), so none can be held out: "
            "give more text, another --documents, or a validation file by --valid"
        )
    held_out = 0 if valid else min(share(count, valid_fraction), count - 1)
    return split_indices(count, held_out, subsets, seed)


def _settle_bpe(
    destination: Path,
    given: dict[str, Path] | None,
    files: Sequence[TextFile],
    depth: NDArray[np.int8],
    vocabulary_size: int,
) -> Tokenizer:
    """Write the two files of the BPE, brought or trained, and read it from them."""
    destination.mkdir()
    if given:
        for name, path in given.items():
            (destination / name).write_bytes(path.read_bytes())
        bpe.load_bpe(given["encoder.json"], given["vocab.bpe"])  # so that an error names the user's files
    else:
        every = 1 + sum(file.path.stat().st_size for file in files) // _BPE_SAMPLE_BYTES
        training = (line for document, line in number_lines(files) if depth[document] >= 0)
        sample = "all lines" if every == 1 else f"one line in {every:,}"
        logger.info("training a byte-level BPE of at most %d entries on %s", vocabulary_size, sample)
        for name, content in bpe.train_bpe(itertools.islice(training, 0, None, every), vocabulary_size).items():
            (destination / name).write_text(content, encoding="utf-8")
    return bpe.load_bpe(destination / "encoder.json", destination / "vocab.bpe")


@dataclass
class _Split:
    """A split on its way to a file of BPE ids: a line a line, a blank line between documents.

    That is fairseq's form (examples/roberta/README.pretraining.md): its blocks of --sample-break-mode none and
    complete go through the blank line, a lone </s>, and those of complete_doc end there (data/token_block_dataset.py,
    document_sep_len).
    """

    file: TextIO
    documents: int = 0
    lines: int = 0
    tokens: int = 0
    bytes: int = 0
    last: int = field(default=-1)

    def write(self, document: int, line: str, ids: str, tokens: int) -> None:
        if document != self.last:
            if self.documents:
                self.file.write("\n")
            self.documents += 1
            self.last = document
        self.file.write(ids)
        self.lines += 1
        self.tokens += tokens
        self.bytes += len(line.encode())

    def summary(self) -> SplitSummary:
        return SplitSummary(self.documents, self.lines, self.tokens, self.bytes)


def _encode(
    tokenizer: Tokenizer,
    files: Sequence[TextFile],
    valid_files: Sequence[TextFile],
    depth: NDArray[np.int8],
    subsets: Sequence[float],
    work: Path,
) -> tuple[dict[str, SplitSummary], NDArray[np.int64]]:
    """Write work/{train,valid,train-5pct,...}.ids in one pass over the text; count each BPE id in train."""
    counts = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    names = [str(index) for index in range(len(counts))]
    with contextlib.ExitStack() as stack:
        splits = {
            name: _Split(stack.enter_context((work / f"{name}.ids").open("w", encoding="ascii")))
            for name in ["train", "valid", *(f"train-{subset_name(fraction)}" for fraction in subsets)]
        }
        valid, training = splits["valid"], [split for name, split in splits.items() if name != "valid"]

        def write(lines: Iterable[tuple[int, str]], depth_of: NDArray[np.int8] | None) -> None:
            seen: list[int] = []
            for number, (document, line, ids) in enumerate(bpe.encode(tokenizer, lines), start=1):
                text = " ".join([names[index] for index in ids]) + "\n"
                level = -1 if depth_of is None else depth_of[document]
                for split in training[: level + 1] or [valid]:
                    split.write(document, line, text, len(ids))
                if level >= 0:
                    seen += ids
                if len(seen) > 1 << 20:
                    counts[:] += np.bincount(seen, minlength=len(counts))
                    seen.clear()
                if number % _LINES_PER_REPORT == 0:
                    logger.info("encoded %d lines", number)
            counts[:] += np.bincount(np.array(seen, dtype=np.int64), minlength=len(counts))

        write(number_lines(files), depth)
        write(number_lines(valid_files), None)
        return {name: split.summary() for name, split in splits.items()}, counts


def _binarize(part: Path, subsets: Sequence[float], workers: int) -> None:
    """Turn part/*.ids and part/dict.txt into the data-bin folders."""
    logger.info("binarizing with %d processes", workers)
    texts = {part / "data-bin" / split: part / f"{split}.ids" for split in ("train", "valid")}
    subset_folders = {subset_name(fraction): part / f"data-bin-{subset_name(fraction)}" for fraction in subsets}
    texts.update({where / "train": part / f"train-{name}.ids" for name, where in subset_folders.items()})
    binarize(texts, part / "dict.txt", workers)
    (part / "dict.txt").unlink()
    for where in subset_folders.values():
        for name in ("valid.bin", "valid.idx"):
            (where / name).write_bytes((part / "data-bin" / name).read_bytes())
