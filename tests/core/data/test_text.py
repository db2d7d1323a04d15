"""A prepared text folder, read back by fairseq's own classes."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fairseq.data import Dictionary, TokenBlockDataset, data_utils
from fairseq.data.encoders.gpt2_bpe import GPT2BPE, GPT2BPEConfig

from train_large.data import SplitSummary, prepare_text, text
from train_large.errors import UserError

from .conftest import Prepared

FOLDERS = {"train": "data-bin", "train-5pct": "data-bin-5pct", "train-1pct": "data-bin-1pct"}


def decode(folder: Path, split: str, bpe: GPT2BPE) -> list[list[str]]:
    """Documents of a binary dataset as lines of text: its items are lines, an item of </s> alone parts documents."""
    dictionary = Dictionary.load(str(folder / "dict.txt"))
    documents: list[list[str]] = [[]]
    for item in data_utils.load_indexed_dataset(str(folder / split), dictionary):
        assert item[-1] == dictionary.eos()
        assert dictionary.unk() not in item
        if len(item) == 1:
            documents.append([])
        else:
            documents[-1].append(bpe.decode(dictionary.string(item)))
    return documents


@pytest.fixture(scope="module")
def gpt2(prepared: Prepared) -> GPT2BPE:
    files = (str(prepared.folder / "bpe" / name) for name in ("encoder.json", "vocab.bpe"))
    return GPT2BPE(GPT2BPEConfig(**dict(zip(("gpt2_encoder_json", "gpt2_vocab_bpe"), files))))


@pytest.fixture(scope="module")
def splits(prepared: Prepared, gpt2: GPT2BPE) -> dict[str, list[list[str]]]:
    splits = {name: decode(prepared.folder / where, "train", gpt2) for name, where in FOLDERS.items()}
    return {**splits, "valid": decode(prepared.folder / "data-bin", "valid", gpt2)}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Instead of fairseq's binary files, the lines that it would have been given, by dataset (data-bin/train)."""
    lines: dict[str, list[str]] = {}

    def binarize(texts: Mapping[Path, Path], dictionary: Path, workers: int = 1) -> None:
        for prefix, file in texts.items():
            lines[f"{prefix.parent.name}/{prefix.name}"] = file.read_text().splitlines()
            prefix.parent.mkdir(exist_ok=True)
            for suffix in (".bin", ".idx"):
                prefix.with_name(prefix.name + suffix).write_bytes(file.read_bytes())
            shutil.copy(dictionary, prefix.parent / "dict.txt")
            file.unlink()

    monkeypatch.setattr(text, "binarize", binarize)
    return lines


def test_the_splits_hold_the_documents(prepared: Prepared, splits: dict[str, list[list[str]]]) -> None:
    def keys(name: str) -> Counter[tuple[str, ...]]:
        return Counter(map(tuple, splits[name]))

    assert keys("train") + keys("valid") == Counter(map(tuple, prepared.documents))
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 360,
        "valid": 40,
        "train-5pct": 18,
        "train-1pct": 4,
    }
    assert keys("train-1pct") < keys("train-5pct") < keys("train")
    positions = [prepared.documents.index(document) for document in splits["train"]]
    assert positions == sorted(positions)  # the order of the text is kept


def test_the_summary_is_what_fairseq_finds(
    prepared: Prepared, splits: dict[str, list[list[str]]], gpt2: GPT2BPE
) -> None:
    for name, documents in splits.items():
        lines = [line for document in documents for line in document]
        tokens = sum(len(gpt2.encode(line).split()) for line in lines)
        size = sum(len(line.encode()) for line in lines)
        assert prepared.summary.splits[name] == SplitSummary(len(documents), len(lines), tokens, size)
    assert prepared.summary.bpe == "trained"
    assert (prepared.summary.bpe_entries, prepared.summary.dictionary_entries) == (1000, 1008)


def test_one_dictionary_of_the_training_text(
    prepared: Prepared, splits: dict[str, list[list[str]]], gpt2: GPT2BPE
) -> None:
    counts = Counter(token for d in splits["train"] for line in d for token in gpt2.encode(line).split())
    dictionary = Dictionary.load(str(prepared.folder / "data-bin" / "dict.txt"))
    assert {dictionary[i]: dictionary.count[i] for i in range(4, 1004)} == {str(i): counts[str(i)] for i in range(1000)}
    assert len(dictionary) == prepared.summary.dictionary_entries
    for where in FOLDERS.values():
        for name in ("dict.txt", "valid.bin", "valid.idx"):
            ours = (prepared.folder / where / name).read_bytes()
            assert ours == (prepared.folder / "data-bin" / name).read_bytes()
    assert sorted(path.name for path in prepared.folder.iterdir()) == [
        "bpe",
        "data-bin",
        "data-bin-1pct",
        "data-bin-5pct",
        "prepared.json",
    ]


def test_fairseq_sees_the_documents_borders(prepared: Prepared, splits: dict[str, list[list[str]]]) -> None:
    folder = prepared.folder / "data-bin"
    dictionary = Dictionary.load(str(folder / "dict.txt"))
    items = data_utils.load_indexed_dataset(str(folder / "train"), dictionary)
    blocks = TokenBlockDataset(
        items, items.sizes, 10**6, pad=dictionary.pad(), eos=dictionary.eos(), break_mode="complete_doc"
    )
    ends = np.array([[int((block == dictionary.eos()).sum()), len(block)] for block in blocks])
    assert ends[:, 0].tolist() == [len(document) for document in splits["train"]]


def test_a_second_run_does_nothing_and_another_is_refused(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(text, "binarize", None)
    moved = tmp_path / "renamed.txt"
    shutil.copy(prepared.source, moved)
    options: dict[str, Any] = {"vocabulary_size": 1000, "valid_fraction": 0.1, "workers": 3}
    assert prepare_text([moved], prepared.folder, **options) == prepared.summary
    with pytest.raises(UserError, match="prepared with another seed"):
        prepare_text([moved], prepared.folder, seed=2, **options)
    moved.write_text("changed\n\ntext")
    with pytest.raises(UserError, match="prepared with another inputs"):
        prepare_text([moved], prepared.folder, **options)


def test_a_validation_file_of_its_own(recorded: dict[str, list[str]], prepared: Prepared, tmp_path: Path) -> None:
    valid = tmp_path / "valid.txt"
    valid.write_text("One line.\nAnother document.\n")
    summary = prepare_text([prepared.source], tmp_path / "out", valid=valid, vocabulary_size=300)
    assert (summary.splits["train"].documents, summary.splits["valid"].documents) == (400, 2)
    assert [bool(line) for line in recorded["data-bin/valid"]] == [True, False, True]


def test_gpt2s_own_files_are_taken_as_they_are(
    recorded: dict[str, list[str]], prepared: Prepared, tmp_path: Path, gpt2: GPT2BPE
) -> None:
    encoder_json, vocab_bpe = (prepared.folder / "bpe" / name for name in ("encoder.json", "vocab.bpe"))
    source = tmp_path / "text.txt"
    source.write_text("The first document\nand the second\nand the third\n")
    out = tmp_path / "out"
    summary = prepare_text([source], out, encoder_json=encoder_json, vocab_bpe=vocab_bpe, subsets=(0.5,))
    assert (summary.bpe, summary.bpe_entries) == ("given", 1000)
    assert (out / "bpe" / "encoder.json").read_bytes() == encoder_json.read_bytes()
    assert (out / "bpe" / "vocab.bpe").read_bytes() == vocab_bpe.read_bytes()
    ids = [gpt2.encode(line) for line in source.read_text().splitlines()]
    assert sorted(filter(None, recorded["data-bin/train"] + recorded["data-bin/valid"])) == sorted(ids)
    assert len(recorded["data-bin-50pct/train"]) == 1


def test_nothing_depends_on_chance(recorded: dict[str, list[str]], prepared: Prepared, tmp_path: Path) -> None:
    runs = []
    for name in ("a", "b"):
        prepare_text([prepared.source], tmp_path / name, vocabulary_size=500, seed=3)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        runs.append([(path.relative_to(tmp_path / name), path.read_bytes()) for path in files])
    assert runs[0] == runs[1]
    first = recorded["data-bin/valid"]
    prepare_text([prepared.source], tmp_path / "c", vocabulary_size=500, seed=4)
    assert recorded["data-bin/valid"] != first


def test_the_bpe_learns_from_training_documents_only(recorded: dict[str, list[str]], tmp_path: Path) -> None:
    documents = [f"word{chr(97 + i)} " + f"{chr(97 + i) * 9} " * 20 for i in range(20)]
    source = tmp_path / "text.txt"
    source.write_text("\n".join(documents))
    prepare_text([source], tmp_path / "out", vocabulary_size=600, valid_fraction=0.05)
    encoder = (tmp_path / "out" / "bpe" / "encoder.json").read_text()
    unknown = [chr(97 + i) for i in range(20) if f"\\u0120{chr(97 + i) * 9}" not in encoder]
    assert len(unknown) == 1  # the held-out document's own word was never merged
    assert len(recorded["data-bin/valid"]) == 1


def test_a_sample_of_lines_trains_the_bpe_of_a_large_corpus(
    recorded: dict[str, list[str]], prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_BPE_SAMPLE_BYTES", prepared.source.stat().st_size // 3)
    given: list[str] = []
    train_bpe = text.bpe.train_bpe

    def note(lines: Iterable[str], size: int) -> dict[str, str]:
        given.extend(lines)
        return train_bpe(given, size)

    monkeypatch.setattr(text.bpe, "train_bpe", note)
    summary = prepare_text([prepared.source], tmp_path / "out", vocabulary_size=300)
    assert len(given) == -(-summary.splits["train"].lines // 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"documents": "page"}, "--documents page is not known"),
        ({"vocabulary_size": 255}, "--vocabulary-size 255 is too small"),
        ({"valid_fraction": 0.0}, "--valid-fraction 0.0 is out of range"),
        ({"valid_fraction": 1.0}, "--valid-fraction 1.0 is out of range"),
        ({"subsets": (0.05, 1.5)}, "--subsets 1.5,0.05 is out of range"),
        ({"subsets": (0.05, 0.05)}, "names one twice"),
        ({"workers": 0}, "--workers 0"),
        ({"seed": -1}, "--seed -1 is negative"),
        ({"encoder_json": Path("encoder.json")}, "--encoder-json and --vocab-bpe belong together"),
        ({"valid": Path("missing.txt")}, "missing.txt does not exist"),
        ({"inputs": []}, "no text was given"),
        ({"inputs": [Path("missing.txt")]}, "missing.txt does not exist"),
        ({"inputs": ["text.txt", "copy.txt"]}, "copy.txt holds the same text as .*text.txt"),
        ({"inputs": ["text.txt"], "valid": "copy.txt"}, "copy.txt holds the same text as .*text.txt"),
        ({"inputs": ["one.txt"]}, "one.txt holds one document only"),
        ({"inputs": ["text.txt", "blank.txt"]}, "blank.txt holds nothing but blank lines"),
        ({"inputs": ["text.txt"], "valid": "latin.txt"}, "latin.txt is not UTF-8"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "text.txt").write_text("a b c\nd e f\n")
    (source / "copy.txt").write_text("a b c\nd e f\n")
    (source / "one.txt").write_text("only\n")
    (source / "blank.txt").write_text(" \n")
    (source / "latin.txt").write_bytes("é\n".encode("latin-1"))
    inputs = [source / name for name in options.pop("inputs", ["text.txt"])]
    if "valid" in options:
        options["valid"] = source / options["valid"]
    with pytest.raises(UserError, match=message):
        prepare_text(inputs, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == [source]


def test_a_failure_halfway_leaves_nothing(prepared: Prepared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(text, "binarize", full)
    with pytest.raises(UserError, match=r"out could not be written \(No space left on device\): make room"):
        prepare_text([prepared.source], tmp_path / "out", vocabulary_size=300)
    assert list(tmp_path.iterdir()) == []
