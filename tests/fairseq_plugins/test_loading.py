"""Checkpoints that must not be loaded: one sentence each, and nothing written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from fairseq.data import Dictionary
from test_budgeted_run import MLM, run

from fairseq_plugins.models.prenorm_roberta import dictionary_digest


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run(text, *MLM, "--budget", "2", "--budget-clock", "calibrated", "--seconds-per-update", "1", save_dir=folder)
    return folder / "checkpoint_last.pt"


def refusal(text: Path, start: Path, save_dir: Path) -> str:
    with pytest.raises(SystemExit) as ending:
        run(text, *MLM, "--budget", "5s", "--finetune-from-model", start, save_dir=save_dir)
    assert not list(save_dir.glob("*.pt"))
    sentence = str(ending.value)
    assert str(start) in sentence
    assert "\n" not in sentence
    return sentence


def test_a_data_bin_of_another_dictionary_is_refused(text, trained, tmp_path):
    other = tmp_path / "data"
    other.mkdir()
    for path in text.iterdir():
        os.link(path, other / path.name)
    lines = (text / "dict.txt").read_text().splitlines()
    (other / "dict.txt").unlink()
    (other / "dict.txt").write_text("\n".join(lines[::-1]) + "\n")  # as many entries, in another order
    assert "dictionary" in refusal(other, trained, tmp_path / "out")
    (other / "dict.txt").write_text("\n".join(lines[:-1]) + "\n")
    assert "dictionary" in refusal(other, trained, tmp_path / "out")


def test_a_truncated_checkpoint_and_one_with_code_are_refused(text, trained, tmp_path):
    broken = tmp_path / "broken.pt"
    broken.write_bytes(trained.read_bytes()[:-1000])
    refusal(text, broken, tmp_path / "out")
    witness = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return Path.write_text, (witness, "code ran")

    torch.save({"model": {}, "cfg": Payload()}, broken)
    refusal(text, broken, tmp_path / "out")
    assert not witness.exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--encoder-layers", "2"], "it was trained with --encoder-layers 1, and this model has --encoder-layers 2: "),
        (
            ["--encoder-ffn-embed-dim", "20", "--max-positions", "20"],
            "--encoder-ffn-embed-dim 64, --max-positions 16, ",
        ),
        (["--layer-ffn", "20"], "and this model has --encoder-ffn-embed-dim 20"),
        (["--no-embedding-norm"], "with an embedding norm, and this model has --no-embedding-norm: "),
        (["--arch", "roberta"], "with --arch prenorm_roberta, and this model has --arch roberta: "),
        # Its weights would load, and compute something else.
        (["--encoder-attention-heads", "4"], "it was trained with --encoder-attention-heads 2, not 4: give that."),
    ],
)
def test_a_model_of_another_shape_is_told_which_flags_differ(text, trained, tmp_path, flags, told):
    with pytest.raises(SystemExit) as ending:
        run(text, *MLM, "--budget", "5s", "--finetune-from-model", trained, *flags, save_dir=tmp_path)
    assert str(ending.value).startswith(f"error: {trained}: ")
    assert told in str(ending.value)


def test_a_stock_checkpoint_does_not_differ_in_flags_that_it_cannot_have(text, trained, tmp_path):
    checkpoint = torch.load(trained, weights_only=True)
    for name in ("share_layers", "layer_heads", "layer_ffn"):
        delattr(checkpoint["cfg"]["model"], name)
    torch.save(checkpoint, tmp_path / "stock.pt")
    told = "stock.pt: it was trained with --encoder-layers 1, and this model has --encoder-layers 2: "
    with pytest.raises(SystemExit, match=told):
        run(
            *(text, *MLM, "--encoder-layers", "2", "--budget", "5s"),
            *("--finetune-from-model", tmp_path / "stock.pt"),
            save_dir=tmp_path,
        )


def test_weights_that_do_not_fit_for_no_flag_are_told_why(text, trained, tmp_path):
    checkpoint = torch.load(trained, weights_only=True)
    del checkpoint["model"]["encoder.lm_head.bias"]
    torch.save(checkpoint, tmp_path / "less.pt")
    with pytest.raises(SystemExit, match=r"not those of this model \(Missing key.* \"encoder.lm_head.bias\""):
        run(text, *MLM, "--budget", "5s", "--finetune-from-model", tmp_path / "less.pt", save_dir=tmp_path)


def test_the_digest_tells_order_from_order():
    a, b, c = Dictionary(), Dictionary(), Dictionary()
    for dictionary, words in ((a, "x y"), (b, "y x"), (c, "x y")):
        for word in words.split():
            dictionary.add_symbol(word)
    assert dictionary_digest(a) != dictionary_digest(b)
    assert dictionary_digest(a) == dictionary_digest(c)
