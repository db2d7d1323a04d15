"""fairseq-train over what is prepared here: the loss falls, for masked words and for a task."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import forked
import pytest

from train_large.data import prepare_task

from .conftest import Prepared

SIZE = ["--arch", "roberta_prenorm", "--encoder-layers", "1", "--encoder-embed-dim", "32"]
SIZE += ["--encoder-ffn-embed-dim", "64", "--encoder-attention-heads", "2", "--dropout", "0", "--max-positions", "64"]
COMMON = ["--cpu", "--no-save", "--no-progress-bar", "--log-format", "simple", "--log-interval", "20"]
COMMON += ["--optimizer", "adam", "--lr", "3e-3", "--batch-size", "16", "--required-batch-size-multiple", "1"]


def train(data: Path, *options: str) -> list[float]:
    """The training losses that fairseq logs, in bits."""
    command = [sys.executable, "-m", "fairseq_cli.train", str(data), *SIZE, *COMMON, "--max-update", "60", *options]
    run = forked.run(command)
    assert run.returncode == 0, run.stderr + run.stdout
    assert re.search(r"valid on 'valid' subset", run.stdout + run.stderr)
    return [float(loss) for loss in re.findall(r"train_inner.*? loss=([0-9.]+)", run.stdout + run.stderr)]


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["data-bin", "data-bin-1pct"])
def test_masked_words(folder: str, prepared: Prepared) -> None:
    losses = train(
        *(prepared.folder / folder, "--task", "masked_lm", "--criterion", "masked_lm", "--tokens-per-sample", "64")
    )
    assert losses[0] > losses[-1]


@pytest.mark.slow
def test_a_task(prepared: Prepared, tmp_path: Path) -> None:
    """Whether a line of Python's documentation speaks of classes is plain from its words."""
    lines = sorted({line.replace("\t", " ") for document in prepared.documents for line in document})
    rows = [f"{line}\t{'class' if 'class' in line else 'other'}" for line in lines]
    source = tmp_path / "lines.tsv"
    source.write_text("\n".join(["sentence\tlabel", *rows]) + "\n", encoding="utf-8")
    prepare_task("tsv", source, tmp_path / "task", text=prepared.folder)
    options = ["--task", "sentence_prediction", "--criterion", "sentence_prediction", "--num-classes", "2"]
    losses = train(tmp_path / "task", *options, "--init-token", "0", "--shorten-method", "truncate")
    assert losses[0] > losses[-1]
