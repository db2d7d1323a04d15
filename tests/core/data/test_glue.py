"""Small files in the columns of GLUE's own, read back by fairseq's sentence_prediction task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from fairseq.tasks.sentence_prediction import SentencePredictionConfig, SentencePredictionTask

from train_large.data import bpe, glue, prepare_task
from train_large.errors import UserError

from .conftest import Prepared

_MNLI_START = (
    "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
)
MNLI_TRAIN = f"{_MNLI_START} sentence1 sentence2 label1 gold_label".replace(" ", "\t")
MNLI_DEV = f"{_MNLI_START} sentence1 sentence2 label1 label2 label3 label4 label5 gold_label".replace(" ", "\t")
LABELS = ["contradiction", "neutral", "entailment"]


def mnli_row(number: int, first: str, second: str, label: str, annotators: int) -> str:
    start = [str(number), f"{number}p", f"{number}pe", "fiction", "( ( a ) b )", "( c )", "(ROOT a)", "(ROOT b)"]
    return "\t".join([*start, first, second, *["neutral"] * annotators, label])


@pytest.fixture
def mnli(tmp_path: Path) -> Path:
    """12 training pairs, 3 matched and 3 mismatched ones; quotes are text, one dev pair has no gold label."""
    folder = tmp_path / "MNLI"
    folder.mkdir()
    rows = [mnli_row(i, f'He said "{i} of it.', f"It's {i}", LABELS[i % 3], 1) for i in range(12)]
    (folder / "train.tsv").write_text("\n".join([MNLI_TRAIN, *rows]) + "\n")
    for name, word in (("matched", "near"), ("mismatched", "far")):
        rows = [mnli_row(i, f"{word} {i}", "so ", LABELS[2 - i], 5) for i in range(3)]
        rows.insert(1, mnli_row(9, "no", "one agrees", "-", 5))
        (folder / f"dev_{name}.tsv").write_text("\n".join([MNLI_DEV, *rows]) + "\n")
    return folder


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Instead of fairseq's binary files, the lines that it would have been given, by dataset (input0/train)."""
    lines: dict[str, list[str]] = {}

    def binarize(texts: Mapping[Path, Path], dictionary: Path, workers: int = 1) -> None:
        for prefix, file in texts.items():
            lines[f"{prefix.parent.name}/{prefix.name}"] = file.read_text().splitlines()
            lines[f"{prefix.parent.name}/dict.txt"] = dictionary.read_text().splitlines()
            file.unlink()

    monkeypatch.setattr(glue, "binarize", binarize)
    return lines


def decode(prepared: Prepared, lines: list[str]) -> list[str]:
    tokenizer = bpe.load_bpe(prepared.folder / "bpe" / "encoder.json", prepared.folder / "bpe" / "vocab.bpe")
    return [tokenizer.decode([int(index) for index in line.split()]) for line in lines]


def write_tsv(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def test_fairseq_reads_mnli(mnli: Path, prepared: Prepared, tmp_path: Path) -> None:
    summary = prepare_task("mnli", mnli, tmp_path / "out", text=prepared.folder)
    assert summary.labels == tuple(LABELS)
    assert (summary.inputs, summary.left_out) == (2, 2)
    assert summary.splits == {
        "train": dict.fromkeys(LABELS, 4),
        "valid": dict.fromkeys(LABELS, 1),
        "valid1": dict.fromkeys(LABELS, 1),
    }
    config = SentencePredictionConfig(data=str(tmp_path / "out"), num_classes=3, init_token=0, separator_token=2)
    config.regression_target, config.no_shuffle, config.seed = False, True, 1
    task = SentencePredictionTask.setup_task(config)
    assert len(task.dictionary) == prepared.summary.dictionary_entries + 1  # <mask>, as in pretraining
    expected = {
        "train": [(f'He said "{i} of it.', f"It's {i}", i % 3) for i in range(12)],
        "valid": [(f"near {i}", "so", 2 - i) for i in range(3)],
        "valid1": [(f"far {i}", "so", 2 - i) for i in range(3)],
    }
    for split, pairs in expected.items():
        dataset = task.load_dataset(split)
        found = []
        for index in range(len(dataset)):
            item = dataset[index]
            tokens = item["net_input.src_tokens"].tolist()
            assert (tokens[0], tokens[-1]) == (0, 2)  # <s> first </s></s> second </s>
            middle = tokens.index(2)
            assert tokens[middle + 1] == 2
            halves = [tokens[1:middle], tokens[middle + 2 : -1]]
            words = [" ".join(task.dictionary[token] for token in half) for half in halves]
            found.append((*decode(prepared, words), int(item["target"])))
        assert found == pairs
    again = prepare_task("mnli", mnli, tmp_path / "out", text=prepared.folder)
    assert again == summary


def test_sst2(recorded: dict[str, list[str]], prepared: Prepared, tmp_path: Path) -> None:
    write_tsv(tmp_path / "train.tsv", "sentence\tlabel", 'a " fine film \t1', "dull \t0", "fine \t1")
    write_tsv(tmp_path / "dev.tsv", "sentence\tlabel", "it 's dull . \t0")
    summary = prepare_task("sst-2", tmp_path, tmp_path / "out", text=prepared.folder)
    assert summary == glue.TaskSummary(("0", "1"), 1, {"train": {"0": 1, "1": 2}, "valid": {"0": 1, "1": 0}}, 0)
    assert decode(prepared, recorded["input0/train"]) == ['a " fine film', "dull", "fine"]
    assert decode(prepared, recorded["input0/valid"]) == ["it 's dull ."]
    assert (recorded["label/train"], recorded["label/valid"]) == (["1", "0", "1"], ["0"])
    assert recorded["label/dict.txt"] == ["0 1", "1 2"]
    assert recorded["input0/dict.txt"] == (prepared.folder / "data-bin" / "dict.txt").read_text().splitlines()
    assert not any(name.startswith("input1") for name in recorded)


def test_an_own_tsv_holds_rows_out_at_random(
    recorded: dict[str, list[str]], prepared: Prepared, tmp_path: Path
) -> None:
    rows = [f"first {i}\tsecond {i}\t{'yes' if i % 2 else 'no'}" for i in range(50)]
    source = write_tsv(tmp_path / "own.tsv", "sentence1\tsentence2\tlabel", *rows)
    summary = prepare_task("tsv", source, tmp_path / "out", text=prepared.folder)
    assert summary.labels == ("no", "yes")
    assert {split: sum(counts.values()) for split, counts in summary.splits.items()} == {"train": 45, "valid": 5}
    found = {}
    for split in ("train", "valid"):
        columns = [decode(prepared, recorded[f"input{i}/{split}"]) for i in (0, 1)]
        found[split] = ["\t".join(row) for row in zip(*columns, recorded[f"label/{split}"])]
    assert sorted(found["train"] + found["valid"]) == sorted(rows)
    prepare_task("tsv", source, tmp_path / "same", text=prepared.folder)
    assert decode(prepared, recorded["input0/valid"]) == [row.split("\t")[0] for row in found["valid"]]
    prepare_task("tsv", source, tmp_path / "other", text=prepared.folder, seed=2)
    assert decode(prepared, recorded["input0/valid"]) != [row.split("\t")[0] for row in found["valid"]]


def test_an_own_validation_file(recorded: dict[str, list[str]], prepared: Prepared, tmp_path: Path) -> None:
    source = write_tsv(tmp_path / "own.tsv", "sentence\tlabel", "a\tx", "b\ty")
    valid = write_tsv(tmp_path / "valid.tsv", "sentence\tlabel", "c\ty")
    summary = prepare_task("tsv", source, tmp_path / "out", text=prepared.folder, valid=valid)
    assert summary.splits == {"train": {"x": 1, "y": 1}, "valid": {"x": 0, "y": 1}}
    assert decode(prepared, recorded["input0/valid"]) == ["c"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "own.tsv is empty"),
        (["sentence\tlabel"], "own.tsv has a header and no rows"),
        (["text\tlabel", "a\tx"], "own.tsv, line 1: the header must be"),
        (["sentence\tlabel", "a\tx", "b"], "own.tsv, line 3, has 1 columns and the header 2"),
        (["sentence\tlabel", "a\tx", "b\tc\ty"], "own.tsv, line 3, has 3 columns and the header 2"),
        (["sentence\tlabel", " \tx"], "own.tsv, line 2, has no sentence"),
        (["sentence\tlabel", "a\tx", "b\t"], "own.tsv, line 3: label '' is not a single plain word"),
        (["sentence\tlabel", "a\tx", "b\tnot good"], "own.tsv, line 3: label 'not good' is not a single plain word"),
        (["sentence\tlabel", "a\tx", "b\t<s>"], "own.tsv, line 3: label '<s>' is not a single plain word"),
        (["sentence\tlabel", "a\tx", "b\tx"], "own.tsv has the label 'x' only"),
        (["sentence\tlabel", "a\tx"], "own.tsv has one row only"),
        (
            ["sentence\tlabel", "a\tx", "b\ty", "c\tz"],
            "own.tsv, line [234]: all rows of the label '[xyz]' were held out",
        ),
    ],
)
def test_bad_rows_are_named_and_nothing_is_written(
    rows: list[str], message: str, prepared: Prepared, tmp_path: Path
) -> None:
    source = tmp_path / "own.tsv"
    source.write_text("".join(row + "\n" for row in rows))
    with pytest.raises(UserError, match=message):
        prepare_task("tsv", source, tmp_path / "out", text=prepared.folder)
    assert list(tmp_path.iterdir()) == [source]


def test_what_does_not_belong_together_is_refused(mnli: Path, prepared: Prepared, tmp_path: Path) -> None:
    source = write_tsv(tmp_path / "own.tsv", "sentence\tlabel", "a\tx", "b\ty")
    unseen = write_tsv(tmp_path / "unseen.tsv", "sentence\tlabel", "a\tx", "b\tz")
    pairs = write_tsv(tmp_path / "pairs.tsv", "sentence1\tsentence2\tlabel", "a\tb\tx")
    out, text = tmp_path / "out", prepared.folder
    with pytest.raises(UserError, match="unseen.tsv, line 3: label 'z' is not one of x, y"):
        prepare_task("tsv", source, out, text=text, valid=unseen)
    with pytest.raises(UserError, match="pairs.tsv has another number of sentences per row than .*own.tsv"):
        prepare_task("tsv", source, out, text=text, valid=pairs)
    same = write_tsv(tmp_path / "same.tsv", *source.read_text().splitlines())
    with pytest.raises(UserError, match="own.tsv and --valid .*same.tsv have the same contents"):
        prepare_task("tsv", source, out, text=text, valid=same)
    with pytest.raises(UserError, match="--valid .* is for --task tsv only"):
        prepare_task("mnli", mnli, out, text=text, valid=source)
    with pytest.raises(UserError, match="own.tsv is not a folder: give the folder that holds train.tsv, dev.tsv"):
        prepare_task("sst-2", source, out, text=text)
    with pytest.raises(UserError, match="dev.tsv does not exist"):
        prepare_task("sst-2", mnli, out, text=text)
    with pytest.raises(UserError, match="task cola is not known"):
        prepare_task("cola", mnli, out, text=text)
    with pytest.raises(UserError, match="encoder.json does not exist: give the folder of a prepared text"):
        prepare_task("mnli", mnli, out, text=tmp_path)
    with pytest.raises(UserError, match="--valid-fraction 1.5 is out of range"):
        prepare_task("tsv", source, out, text=text, valid_fraction=1.5)
    dev = mnli / "dev_matched.tsv"
    dev.write_text(dev.read_text().replace("entailment", "entails"))
    with pytest.raises(
        UserError, match="dev_matched.tsv, line 2: label 'entails' is not one of contradiction, neutral"
    ):
        prepare_task("mnli", mnli, out, text=text)
    dev.write_text(MNLI_DEV.replace("gold_label", "label") + "\n")
    with pytest.raises(UserError, match="dev_matched.tsv, line 1: the header has no column gold_label"):
        prepare_task("mnli", mnli, out, text=text)
    assert not out.exists()
