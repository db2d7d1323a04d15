"""Classification tasks to fairseq's sentence_prediction layout: GLUE's own files of SST-2 and MNLI, or a user's TSV.

The layout (fairseq/tasks/sentence_prediction.py, load_dataset): input0/, input1/ for pairs, label/, each with
dict.txt and a dataset for each split; class k is entry k of label/dict.txt. Train with `--init-token 0
--separator-token 2`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train_large.data import bpe, folder
from train_large.data.binary import binarize
from train_large.data.documents import digest, read_lines
from train_large.data.splits import share, split_indices
from train_large.errors import UserError

TASKS = ("sst-2", "mnli", "tsv")
# fairseq's Dictionary knows these already and refuses them in a file.
_RESERVED = {"<s>", "<pad>", "</s>", "<unk>", "<mask>"}


@dataclass(frozen=True)
class _Layout:
    """A GLUE task: its files by fairseq's name of the split, the columns that are read, and its classes in order."""

    files: dict[str, str]
    sentences: tuple[str, ...]
    label: str
    labels: tuple[str, ...]


_GLUE = {
    "sst-2": _Layout({"train": "train.tsv", "valid": "dev.tsv"}, ("sentence",), "label", ("0", "1")),
    # The columns stand at 8, 9 and last: 12 columns in train.tsv, 16 in the dev files, which show all five
    # annotators' labels. The order of the classes is the published roberta.large.mnli's.
    "mnli": _Layout(
        {"train": "train.tsv", "valid": "dev_matched.tsv", "valid1": "dev_mismatched.tsv"},
        ("sentence1", "sentence2"),
        "gold_label",
        ("contradiction", "neutral", "entailment"),
    ),
}
_OWN_HEADERS = (("sentence", "label"), ("sentence1", "sentence2", "label"))
# MultiNLI's mark of a pair on which its annotators did not agree: it has no class, so it is left out, as is usual.
_NO_GOLD = "-"


@dataclass(frozen=True)
class Example:
    """One row: its sentences (one or two), its label, and where it stands (for error messages)."""

    sentences: tuple[str, ...]
    label: str
    line: int


@dataclass(frozen=True)
class TaskSummary:
    """What a prepared task folder holds."""

    labels: tuple[str, ...]
    """names in the order of label/dict.txt: class 0, 1, ..."""
    inputs: int
    """sentences per example: 1 or 2"""
    splits: dict[str, dict[str, int]]
    """train, valid (valid1 for MNLI's mismatched part): examples per label"""
    left_out: int
    """MNLI's rows without a gold label ("-")"""


def prepare_task(
    task: str,
    source: Path,
    out: Path,
    *,
    text: Path,
    valid: Path | None = None,
    valid_fraction: float = 0.1,
    seed: int = 1,
    workers: int = 1,
) -> TaskSummary:
    """Prepare a classification task for fairseq's sentence_prediction, with the BPE and dictionary of a prepared text.

    task: sst-2 or mnli, source then being the folder of GLUE's own files (train.tsv and dev.tsv; train.tsv,
    dev_matched.tsv and dev_mismatched.tsv, which become valid and valid1); or tsv, source then being a file with the
    header sentence, label or sentence1, sentence2, label. valid: the validation file of a tsv task; without it the
    fraction `valid_fraction` of the rows is held out at random. text: what prepare_text wrote. All files are UTF-8,
    tab-separated, without quoting.

    Writes out/input0/, out/input1/ (pairs), out/label/ and out/prepared.json, whole or not at all.
    Raises UserError on bad input, with file and line.
    """
    files = _files(task, source, valid)
    if not 0 < valid_fraction < 1:
        raise UserError(
            f"--valid-fraction {valid_fraction} is out of range: give a fraction between 0 and 1, such as 0.1"
        )
    if workers < 1:
        raise UserError(f"--workers {workers} is too few: give 1 or more")
    pieces = [text / "bpe" / "encoder.json", text / "bpe" / "vocab.bpe", text / "data-bin" / "dict.txt"]
    for piece in pieces:
        if not piece.is_file():
            raise UserError(f"{piece} does not exist: give the folder of a prepared text")
    parameters: dict[str, Any] = {"task": task, "text": [digest(piece) for piece in pieces]}
    parameters["source"] = digests = {split: digest(path) for split, path in files.items()}
    if valid is not None and digests["train"] == digests["valid"]:
        raise UserError(
            f"{source} and --valid {valid} have the same contents: give the held-out examples by themselves"
        )
    if "valid" not in files:
        parameters |= {"valid_fraction": valid_fraction, "seed": seed}
    summary = folder.finished(out, parameters)
    if summary is None:
        examples = {split: list(_read(task, path)) for split, path in files.items()}
        if "valid" not in files:
            examples = _hold_out(examples["train"], source, valid_fraction, seed)
        labels = _labels(task, examples, files)
        kept = {split: [row for row in rows if row.label in labels] for split, rows in examples.items()}
        for split, rows in kept.items():
            if not rows:
                raise UserError(f"{files[split]} has no row with a label: give a file with labelled rows")
        done = TaskSummary(
            labels=labels,
            inputs=len(kept["train"][0].sentences),
            splits={split: _count(rows, labels) for split, rows in kept.items()},
            left_out=sum(len(examples[split]) - len(kept[split]) for split in kept),
        )
        with folder.whole(out) as part:
            _write(part, kept, done, pieces, workers)
            folder.finish(part, parameters, asdict(done))
        return done
    return TaskSummary(**{**summary, "labels": tuple(summary["labels"])})


def _files(task: str, source: Path, valid: Path | None) -> dict[str, Path]:
    """The files to read, by split."""
    if task not in TASKS:
        raise UserError(f"task {task} is not known: choose one of {', '.join(TASKS)}")
    if task == "tsv":
        return {"train": source, "valid": valid} if valid else {"train": source}
    if valid is not None:
        raise UserError(f"--valid {valid} is for --task tsv only: {task} brings its own validation files")
    if not source.is_dir():
        raise UserError(f"{source} is not a folder: give the folder that holds {', '.join(_GLUE[task].files.values())}")
    return {split: source / name for split, name in _GLUE[task].files.items()}


def _read(task: str, path: Path) -> Iterator[Example]:
    """Read one file: the header, then a row a line; tabs separate, quotes are text."""
    lines = read_lines(path)
    header = next(lines).split("\t")
    if task == "tsv":
        if tuple(header) not in _OWN_HEADERS:
            raise UserError(
                f"{path}, line 1: the header must be 'sentence' and 'label', or 'sentence1', 'sentence2' and 'label', "
                "separated by tabs"
            )
        sentences, label = tuple(header[:-1]), "label"
    else:
        sentences, label = _GLUE[task].sentences, _GLUE[task].label
        missing = [name for name in (*sentences, label) if name not in header]
        if missing:
            raise UserError(f"{path}, line 1: the header has no column {missing[0]}: give GLUE's own file of {task}")
    columns = [header.index(name) for name in sentences]
    label_column = header.index(label)
    empty = True
    for number, line in enumerate(lines, start=2):
        fields = line.split("\t")
        if len(fields) != len(header):
            raise UserError(
                f"{path}, line {number}, has {len(fields)} columns and the header {len(header)}: mend that line"
            )
        example = Example(tuple(fields[column].strip() for column in columns), fields[label_column].strip(), number)
        if not any(example.sentences):
            raise UserError(f"{path}, line {number}, has no sentence: mend or remove that line")
        empty = False
        yield example
    if empty:
        raise UserError(f"{path} has a header and no rows: give a file with rows")


def _hold_out(rows: Sequence[Example], source: Path, fraction: float, seed: int) -> dict[str, list[Example]]:
    if len(rows) < 2:
        raise UserError(
            f"{source} has one row only, so none can be held out: give more rows, or a validation file by --valid"
        )
    depth = split_indices(len(rows), min(share(len(rows), fraction), len(rows) - 1), (), seed)
    return {
        "train": [row for row, level in zip(rows, depth) if level == 0],
        "valid": [row for row, level in zip(rows, depth) if level < 0],
    }


def _labels(task: str, examples: dict[str, list[Example]], files: dict[str, Path]) -> tuple[str, ...]:
    """The classes in order, GLUE's own or those of the training rows by the alphabet; checks every row."""
    labels = _GLUE[task].labels if task in _GLUE else tuple(sorted({row.label for row in examples["train"]}))
    for split, rows in examples.items():
        path = files.get(split, files["train"])
        for row in rows:
            unmarked = task == "mnli" and row.label == _NO_GOLD
            if not row.label or row.label in _RESERVED or len(row.label.split()) > 1:
                raise UserError(f"{path}, line {row.line}: label {row.label!r} is not a single plain word: rename it")
            if row.label not in labels and not unmarked and split not in files:
                raise UserError(
                    f"{path}, line {row.line}: all rows of the label {row.label!r} were held out for validation: give "
                    "more of them, or a validation file by --valid"
                )
            if row.label not in labels and not unmarked:
                raise UserError(
                    f"{path}, line {row.line}: label {row.label!r} is not one of {', '.join(labels)}: mend that line"
                )
            if len(row.sentences) != len(examples["train"][0].sentences):
                raise UserError(
                    f"{path} has another number of sentences per row than {files['train']}: give two of a kind"
                )
    if len(labels) < 2:
        raise UserError(f"{files['train']} has the label {labels[0]!r} only: give rows of two classes or more")
    return labels


def _count(rows: Sequence[Example], labels: Sequence[str]) -> dict[str, int]:
    counts = Counter(row.label for row in rows)
    return {label: counts[label] for label in labels}


def _write(
    part: Path, examples: dict[str, list[Example]], summary: TaskSummary, pieces: Sequence[Path], workers: int
) -> None:
    """Encode the rows of each split and binarize them; the inputs in one go, since they share a dictionary."""
    encoder_json, vocab_bpe, dictionary = pieces
    tokenizer = bpe.load_bpe(encoder_json, vocab_bpe)
    inputs: dict[Path, Path] = {}
    labels: dict[Path, Path] = {}
    for split, rows in examples.items():
        for index in range(summary.inputs):
            file = inputs[part / f"input{index}" / split] = part / f"input{index}.{split}.ids"
            with file.open("w", encoding="ascii") as ids_file:
                for _, _, ids in bpe.encode(tokenizer, ((row.line, row.sentences[index]) for row in rows)):
                    print(*ids, file=ids_file)
        file = labels[part / "label" / split] = part / f"label.{split}"
        file.write_text("".join(f"{row.label}\n" for row in rows), encoding="utf-8")
    label_dictionary = part / "label.dict.txt"
    counts = summary.splits["train"]
    label_dictionary.write_text("".join(f"{label} {counts[label]}\n" for label in summary.labels), encoding="utf-8")
    binarize(inputs, dictionary, workers)
    binarize(labels, label_dictionary)
    label_dictionary.unlink()
