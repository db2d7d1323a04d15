"""Finetuning and pruning by `python -m xla.finetune`, beside plain fairseq-train on the CPU."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import forked
import pytest
import torch
from launching import COMMON, SIZE, launch, lines, losses, observe, plain

BATCH = ["--batch-size", "16", "--lr-scheduler", "fixed", "--max-epoch", "2"]
SENTENCES = 90  # so that the last batch of an epoch has 10
UPDATES_PER_EPOCH = 6

CLASSIFY = ["--arch", "prenorm_roberta", *SIZE, "--num-classes", "3", *COMMON, *BATCH]
REGRESS = ["--num-classes", "1", "--regression-target"]
PAIRS = ["--arch", "transformer", "--encoder-layers", "1", "--decoder-layers", "1", "--share-all-embeddings"]
PAIRS += ["--encoder-embed-dim", "32", "--decoder-embed-dim", "32", "--encoder-ffn-embed-dim", "64"]
PAIRS += ["--decoder-ffn-embed-dim", "64", "--encoder-attention-heads", "2", "--decoder-attention-heads", "2"]
PAIRS += ["--criterion", "budgeted_label_smoothed_cross_entropy", "--label-smoothing", "0.1", *COMMON, *BATCH]
LEVELS = ["--sparsity-levels", "0.3,0.6,0.9", "--recovery", "2", "--recovery-interval", "3", "--max-epoch", "9"]


def preprocess(*flags: str) -> None:
    command = [sys.executable, "-m", "fairseq_cli.preprocess", *flags]
    forked.run(command).check_returncode()


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences of one of three ranges of words, and which it is: as classes, and as numbers for a regression."""
    folder = tmp_path_factory.mktemp("sentences")
    rng = random.Random(3)
    for part in ("input0", "label"):
        (folder / part).mkdir()
    (folder / "bin" / "label").mkdir(parents=True)
    for split, count in (("train", SENTENCES), ("valid", 25)):
        labels = [rng.randrange(3) for _ in range(count)]
        inputs = [" ".join(f"w{rng.randrange(12) + 6 * label}" for _ in range(rng.randint(4, 12))) for label in labels]
        (folder / "input0" / split).write_text("".join(f"{line}\n" for line in inputs))
        (folder / "label" / split).write_text("".join(f"{label}\n" for label in labels))
        (folder / "bin" / "label" / f"{split}.label").write_text("".join(f"{label / 2}\n" for label in labels))
    for part in ("input0", "label"):
        splits = [word for split in ("train", "valid") for word in (f"--{split}pref", str(folder / part / split))]
        preprocess(*splits, "--only-source", "--destdir", str(folder / "bin" / part))
    return folder / "bin"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A translation that reverses; both sides have many lengths."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = random.Random(2)
    for split, count in (("train", SENTENCES), ("valid", 25)):
        sources = [[str(rng.randrange(12)) for _ in range(rng.randint(3, 9))] for _ in range(count)]
        (folder / f"{split}.en").write_text("".join(" ".join(words) + "\n" for words in sources))
        (folder / f"{split}.fr").write_text("".join(" ".join(words[::-1]) + " end\n" for words in sources))
    splits = [word for split in ("train", "valid") for word in (f"--{split}pref", str(folder / split))]
    destination = ["--destdir", str(folder / "bin"), "--joined-dictionary"]
    preprocess(*splits, "--source-lang", "en", "--target-lang", "fr", *destination)
    return folder / "bin"


def both(data: Path, *flags: str, save_dir: Path, devices: int = 1) -> tuple[Path, Path]:
    """The run without torch-xla, and with it."""
    plain(data, *flags, save_dir=save_dir / "plain")
    launch("finetune", data, *flags, save_dir=save_dir / "xla", devices=devices)
    return save_dir / "plain", save_dir / "xla"


def assert_same_losses(ours: Path, theirs: Path) -> None:
    for kind in ("train", "valid"):
        assert losses(ours, kind) == pytest.approx(losses(theirs, kind), rel=1e-5)
        assert [line.get("accuracy") for line in lines(ours, kind)] == [
            line.get("accuracy") for line in lines(theirs, kind)
        ]
    assert len(losses(ours)) == 2 * UPDATES_PER_EPOCH
    assert len(set(losses(ours))) > UPDATES_PER_EPOCH  # it has learned something
    assert [line["tokens"] for line in lines(ours, "train")] == [line["tokens"] for line in lines(theirs, "train")]


@pytest.mark.slow
@pytest.mark.parametrize(("more", "devices"), [((), 1), (REGRESS, 4)], ids=["classes on one", "regression on four"])
def test_sentence_prediction(sentences, tmp_path, more, devices):
    flags = ["--task", "sentence_prediction", "--criterion", "budgeted_sentence_prediction", *CLASSIFY, *more]
    theirs, ours = both(sentences, *flags, save_dir=tmp_path, devices=devices)
    assert_same_losses(ours, theirs)
    assert ("accuracy" in lines(ours, "valid")[0]) == (not more)


@pytest.mark.slow
def test_translation(pairs, tmp_path):
    theirs, ours = both(pairs, "--task", "translation", *PAIRS, save_dir=tmp_path)
    assert_same_losses(ours, theirs)


def assert_same_ladder(ours: Path, theirs: Path) -> None:
    ours_lines, theirs_lines = (
        [json.loads(line) for line in (save_dir / "ladder.jsonl").read_text().splitlines()]
        for save_dir in (ours, theirs)
    )
    assert [line["sparsity"] for line in ours_lines] == [0, 0.3, 0.6, 0.9]
    for line, other in zip(ours_lines, theirs_lines, strict=True):
        for name in ("score", "baseline"):
            assert line.pop(name) == pytest.approx(other.pop(name), rel=1e-5)
        assert line.pop("seconds") > 0
        assert other.pop("seconds") > 0
        assert line == other


def assert_zeros_stay(save_dir: Path) -> None:
    """What a level has pruned is zero in the checkpoints of all levels after it, and as much of it as was asked."""
    gone: dict[str, torch.Tensor] = {}
    for record in [json.loads(line) for line in (save_dir / "ladder.jsonl").read_text().splitlines()][1:]:
        path = save_dir / f"checkpoint_sparsity_{round(100 * record['sparsity'])}.pt"
        model = torch.load(path, weights_only=True)["model"]
        for name, before in gone.items():
            assert not (before & (model[name] != 0)).any(), f"{name} in {path}"
        matrices = {name: tensor for name, tensor in model.items() if tensor.dim() == 2 and "heads" not in name}
        tied = {tensor.data_ptr(): name for name, tensor in matrices.items()}
        gone = {name: model[name] == 0 for name in tied.values()}
        zeros = sum(int(mask.sum()) for mask in gone.values())
        assert zeros == record["zeros"] == round(record["sparsity"] * record["prunable"])


@pytest.mark.slow
def test_pruning_sentence_prediction(sentences, tmp_path):
    flags = ["--task", "pruning_sentence_prediction", "--criterion", "budgeted_sentence_prediction", *CLASSIFY, *LEVELS]
    plain(sentences, *flags, save_dir=tmp_path / "plain")
    found = observe("finetune", sentences, *flags, save_dir=tmp_path / "xla")
    assert_same_ladder(tmp_path / "xla", tmp_path / "plain")
    assert losses(tmp_path / "xla") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert_zeros_stay(tmp_path / "xla")

    # Each level's last update prunes for the next.
    compiled = [line["compilations"] for line in found]
    assert len(found) == 3 * UPDATES_PER_EPOCH + 1
    assert compiled[UPDATES_PER_EPOCH - 2] == compiled[-1], f"programs after each update: {compiled}"


@pytest.mark.slow
def test_pruning_translation(pairs, tmp_path):
    flags = ["--task", "pruning_translation", *PAIRS, *LEVELS, "--lr", "0.0001"]
    theirs, ours = both(pairs, *flags, save_dir=tmp_path)
    assert_same_ladder(ours, theirs)
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)
    assert_zeros_stay(ours)


@pytest.mark.slow
def test_pruning_masked_lm_under_spmd(text, tmp_path):
    flags = ["--arch", "prenorm_roberta", *SIZE, "--tokens-per-sample", "16", "--sample-break-mode", "complete"]
    flags += ["--task", "pruning_masked_lm", "--criterion", "budgeted_masked_lm", *COMMON, *BATCH, *LEVELS]
    theirs, ours = both(text, *flags, "--recovery-epochs", "0.2", save_dir=tmp_path, devices=4)
    assert_same_ladder(ours, theirs)
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)
    assert_zeros_stay(ours)
