"""The card's figures against counts made here, on the tensors of fairseq."""

from __future__ import annotations

import pytest
import torch

from train_large.compression.checkpoint import stock_form
from train_large.export.huggingface import export_hf

HEADS = {"sentence_classification_head": 2}


@pytest.fixture
def card(save, prepared, tmp_path):
    """Export a checkpoint and give the rows of its card's tables."""

    def card(checkpoint, **options):
        export_hf(save(checkpoint), tmp_path / "out", dictionary=prepared.dictionary, **options)
        lines = (tmp_path / "out" / "README.md").read_text().splitlines()
        rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ") and " | " in line.strip("| ")]
        return dict(rows)

    return card


def zeros_and_weights(state):
    """Of matrices and embeddings that are in the folder: the language model's head is not."""
    body = [w for name, w in state.items() if name.startswith("encoder.sentence_encoder.") and w.dim() == 2]
    return sum(int((w == 0).sum()) for w in body), sum(w.numel() for w in body)


def test_sizes_are_counted(build, card, tmp_path):
    model, checkpoint = build("prenorm_roberta", "--share-layers", "all", heads=HEADS)
    rows = card(checkpoint)
    counted = {id(p): p.numel() for name, p in model.named_parameters() if not name.startswith("encoder.lm_head.")}
    assert rows["parameters"] == f"{sum(counted.values()):,}"  # shared layers once
    assert (rows["layers"], rows["hidden size"], rows["feed-forward size"]) == ("3", "32", "128")
    assert (rows["attention heads"], rows["tokens, at most"]) == ("4", "20")
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert rows["model.safetensors"] == f"{size:,} bytes, float32"
    assert size > 4 * sum(counted.values())  # and written out for every layer


def test_training_is_what_the_checkpoint_says(build, card):
    checkpoint = build("prenorm_roberta")[1]
    checkpoint["cfg"]["criterion"] = {"_name": "budgeted_masked_lm", "budget": "90s", "budget_clock": "wall"}
    checkpoint["cfg"]["checkpoint"]["best_checkpoint_metric"] = "loss"
    rows = card(checkpoint)
    assert rows["criterion"] == "budgeted_masked_lm"
    assert (rows["budget"], rows["budget's clock"]) == ("90s", "wall")
    assert rows["updates, one run after the other"] == "1,234 (MaskedLmLoss)"
    assert rows["time by fairseq's clock, all runs"] == "61 s"
    assert rows["loss (base 2) on the validation set"] == "3.25"  # this checkpoint's, not the run's best


def test_the_budget_outlives_conversions(build, card):
    checkpoint = build("prenorm_roberta")[1]
    checkpoint["cfg"]["criterion"] = {"_name": "budgeted_masked_lm", "budget": "90s", "budget_clock": "wall"}
    rows = card(stock_form(stock_form(checkpoint)))
    assert rows["criterion"] == "masked_lm"
    assert (rows["budget"], rows["budget's clock"]) == ("90s", "wall")


def test_what_is_not_known_is_left_out(build, card):
    checkpoint = build("prenorm_roberta")[1]
    checkpoint["extra_state"] = {}
    checkpoint["optimizer_history"] = []
    checkpoint["cfg"]["criterion"] = {"_name": "masked_lm"}
    rows = card(checkpoint)
    assert not [row for row in rows if "update" in row or "budget" in row or "time" in row or "validation" in row]
    assert not [value for value in rows.values() if "None" in value]


def test_compression_is_recorded_and_counted(build, card):
    checkpoint = build("prenorm_roberta", heads=HEADS)[1]
    state = checkpoint["model"]
    for name in ("embed_tokens.weight", "layers.1.fc1.weight"):
        state[f"encoder.sentence_encoder.{name}"].view(-1)[::3] = 0
    zeros, count = zeros_and_weights(state)
    checkpoint["extra_state"]["pruning"] = {
        **{"level": 2, "sparsity": 0.3, "zeros": 31, "prunable": 100, "metric": "accuracy", "score": 0.68},
        **{"baseline": 0.7, "recovered": False, "updates": 4, "seconds": 1.5},
    }
    checkpoint["compression"] = [
        {"version": 1, "method": "uniform", "bits": 4, "granularity": "tensor", "bytes": 12345, "bytes_paper": 11000}
    ]
    checkpoint["cfg"]["checkpoint"]["best_checkpoint_metric"] = "accuracy"
    rows = card(checkpoint, scores={"accuracy of this folder": 0.655})
    assert rows["zeros here, in matrices and embeddings"] == f"{zeros:,} of {count:,} ({zeros / count:.2%})"
    assert rows["pruned to a sparsity of 0.3"] == "31 of 100"
    assert rows["uniform"] == "bits 4, granularity tensor, bytes 12,345, bytes_paper 11,000"
    later = "on the validation set, before the last conversion of the weights"
    assert rows[f"accuracy (%) {later}"] == "3.25"
    assert rows[f"accuracy {later}"] == "0.68"
    assert rows["accuracy before pruning"] == "0.7"
    assert rows["accuracy of this folder"] == "0.655"


def test_the_classes_are_named_and_a_bar_does_not_end_a_cell(build, card, tmp_path):
    card(build("prenorm_roberta", heads=HEADS)[1], labels=["good|fine", "bad"])
    assert "| classes | good\\|fine, bad |" in (tmp_path / "out" / "README.md").read_text()


def test_its_code_runs(build, save, prepared, tmp_path, monkeypatch):
    """What a reader copies gives the logits of fairseq, on sentences longer than the model has positions too."""
    model, checkpoint = build("prenorm_roberta", heads=HEADS)
    export_hf(save(checkpoint), tmp_path / "out", dictionary=prepared.dictionary, bpe=prepared.folder)
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    sentences = ["the film", " ".join(["a delight"] * 20)]
    assert '["a sentence", "another one"]' in code
    monkeypatch.chdir(tmp_path / "out")
    names: dict = {}
    exec(code.replace('["a sentence", "another one"]', repr(sentences)), names)
    for sentence, found in zip(sentences, names["logits"]):
        ids = torch.tensor([[0, *prepared.encode(sentence)][:20]])  # TruncateDataset of fairseq
        expected = model(ids, features_only=True, classification_head_name="sentence_classification_head")[0][0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_language_models_code_runs(build, save, prepared, tmp_path, monkeypatch):
    checkpoint = build("roberta_prenorm")[1]
    export_hf(save(checkpoint), tmp_path / "out", dictionary=prepared.dictionary, bpe=prepared.folder)
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "out")
    names: dict = {}
    exec(code, names)
    assert names["logits"].shape[-1] == len(prepared.symbols())
