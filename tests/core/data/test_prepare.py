"""What was prepared is told from what other options, files or texts would give."""

from __future__ import annotations

import re
import shutil
from collections import Counter

import pytest

from train_large.data import bpe, glue, prepare_task, prepare_text, text
from train_large.errors import UserError


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    for name, content in bpe.train_bpe(["some words and others"] * 3, 270).items():
        (folder / name).write_text(content, encoding="utf-8")
    return folder


@pytest.fixture
def recorded(monkeypatch):
    lines: dict[str, list[str]] = {}

    def binarize(texts, dictionary, workers=1):
        for prefix, file in texts.items():
            lines[f"{prefix.parent.name}/{prefix.name}"] = file.read_text().splitlines()
            lines[f"{prefix.parent.name}/dict.txt"] = dictionary.read_text().splitlines()
            prefix.parent.mkdir(exist_ok=True)
            for suffix in (".bin", ".idx"):
                prefix.with_name(prefix.name + suffix).write_bytes(b"")
            shutil.copy(dictionary, prefix.parent / "dict.txt")
            file.unlink()

    monkeypatch.setattr(text, "binarize", binarize)
    monkeypatch.setattr(glue, "binarize", binarize)
    return lines


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"documents": "line"}, "documents"),
        ({"subsets": (0.5,)}, "subsets"),
        ({"valid_fraction": 0.3}, "valid_fraction"),
        ({"vocabulary_size": 299}, "vocabulary_size"),
        ({"seed": 2}, "seed"),
    ],
)
def test_every_option_that_shows_in_the_result_is_compared(recorded, tmp_path, change, name):
    source = tmp_path / "text.txt"
    source.write_text("a b\nc d\ne f\ng h\n")
    prepare_text([source], tmp_path / "out", vocabulary_size=300)
    with pytest.raises(UserError, match=f"out was prepared with another {name} "):
        prepare_text([source], tmp_path / "out", **{"vocabulary_size": 300, **change})


@pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe"])
def test_both_files_of_a_bpe_are_compared(recorded, gpt2, tmp_path, name):
    own = shutil.copytree(gpt2, tmp_path / "own")
    source = tmp_path / "text.txt"
    source.write_text("a b\nc d\n")
    files = {"encoder_json": own / "encoder.json", "vocab_bpe": own / "vocab.bpe"}
    prepare_text([source], tmp_path / "out", **files)
    (own / name).write_text((own / name).read_text() + "\n")
    with pytest.raises(UserError, match="out was prepared with another bpe"):
        prepare_text([source], tmp_path / "out", **files)


def test_a_bad_bpe_is_named_as_it_was_given(gpt2, tmp_path):
    (tmp_path / "encoder.json").write_text('{"a": 0}')
    (tmp_path / "text.txt").write_text("a b\nc d\n")
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path / 'encoder.json'))} lacks some of the 256 bytes"):
        prepare_text(
            [tmp_path / "text.txt"],
            tmp_path / "out",
            encoder_json=tmp_path / "encoder.json",
            vocab_bpe=gpt2 / "vocab.bpe",
        )


def test_one_document_is_left_to_train_on(recorded, tmp_path):
    (tmp_path / "text.txt").write_text("a b\nc d\n")
    summary = prepare_text([tmp_path / "text.txt"], tmp_path / "out", valid_fraction=0.9, vocabulary_size=300)
    assert {name: summary.splits[name].documents for name in ("train", "valid")} == {"train": 1, "valid": 1}


def test_entries_of_a_large_text_are_counted_once(recorded, tmp_path):
    """More of them than are held at a time, 2^20."""
    line = "ab" * 1000
    (tmp_path / "text.txt").write_text(f"{line}\n" * 525 + "c\n" * 2)
    (tmp_path / "valid.txt").write_text("c\n")
    prepare_text([tmp_path / "text.txt"], tmp_path / "out", valid=tmp_path / "valid.txt", vocabulary_size=256)
    counts = Counter(token for line in recorded["data-bin/train"] for token in line.split())
    written = {name: int(count) for name, count in (line.split() for line in recorded["data-bin/dict.txt"])}
    assert sum(counts.values()) > 1 << 20
    assert {name: count for name, count in written.items() if count} == counts


@pytest.fixture
def prepared(recorded, tmp_path):
    (tmp_path / "text.txt").write_text("a b\nc d\n")
    prepare_text([tmp_path / "text.txt"], tmp_path / "text", vocabulary_size=300)
    return tmp_path / "text"


def test_a_task_is_compared_with_all_that_it_was_made_of(prepared, tmp_path):
    source, out = tmp_path / "own.tsv", tmp_path / "out"
    source.write_text("sentence\tlabel\n" + "".join(f"s{i}\t{'xy'[i % 2]}\n" for i in range(20)))
    prepare_task("tsv", source, out, text=prepared)
    with pytest.raises(UserError, match="with another seed"):
        prepare_task("tsv", source, out, text=prepared, seed=2)
    with pytest.raises(UserError, match="with another valid_fraction"):
        prepare_task("tsv", source, out, text=prepared, valid_fraction=0.2)
    dictionary = prepared / "data-bin" / "dict.txt"
    dictionary.write_text(dictionary.read_text() + "other 1\n")
    with pytest.raises(UserError, match="with another text"):
        prepare_task("tsv", source, out, text=prepared)


def test_only_mnli_has_rows_without_a_class(prepared, tmp_path):
    (tmp_path / "train.tsv").write_text("sentence\tlabel\na\t0\nb\t1\n")
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\na\t0\nb\t-\n")
    with pytest.raises(UserError, match="dev.tsv, line 3: label '-' is not one of 0, 1"):
        prepare_task("sst-2", tmp_path, tmp_path / "out", text=prepared)


def test_lines_may_end_as_on_windows(recorded, prepared, tmp_path):
    (tmp_path / "own.tsv").write_bytes(b"sentence\tlabel\r\na b\tx\r\nc\ty\r\n")
    (tmp_path / "valid.tsv").write_bytes(b"sentence\tlabel\r\nd\tx\r\n")
    summary = prepare_task("tsv", tmp_path / "own.tsv", tmp_path / "out", text=prepared, valid=tmp_path / "valid.tsv")
    assert summary.splits == {"train": {"x": 1, "y": 1}, "valid": {"x": 1, "y": 0}}
    assert recorded["label/train"] == ["x", "y"]
