"""Finetuning: the number of classes is that of the labels."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_budgeted_run import COMMON, SIZE, run

CLASSIFY = ["--task", "sentence_prediction", "--criterion", "budgeted_sentence_prediction", "--batch-size", "4"]
CLASSIFY += ["--arch", "prenorm_roberta", *SIZE, *COMMON, "--lr-scheduler", "fixed", "--budget", "1s"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Dictionaries alone, which a run reads first. That of labels is filled up, as fairseq does it."""
    for part, words in (("input0", ["a", "b"]), ("label", ["neg", "pos", "madeupword0000", "madeupword0001"])):
        (tmp_path / part).mkdir()
        (tmp_path / part / "dict.txt").write_text("".join(f"{word} 1\n" for word in words))
    return tmp_path


@pytest.mark.parametrize("classes", [1, 3, 4])
def test_another_number_of_classes_than_of_labels_is_refused(data, classes):
    told = f"--num-classes {classes}: {data}/label/dict.txt names 2: give 2."
    with pytest.raises(SystemExit, match=told):
        run(data, *CLASSIFY, "--num-classes", classes, save_dir=data / "run")


def test_no_number_of_classes_is_refused(data):
    with pytest.raises(SystemExit, match="--num-classes: give the number of classes"):
        run(data, *CLASSIFY, save_dir=data / "run")


@pytest.mark.parametrize("flags", [["--num-classes", "2"], ["--num-classes", "1", "--regression-target"]])
def test_the_right_number_is_taken(data, flags):
    with pytest.raises(AssertionError, match="could not find dataset: .*input0/valid"):  # which comes next
        run(data, *CLASSIFY, *flags, save_dir=data / "run")
