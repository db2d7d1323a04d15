"""The Hydra configs: what fairseq-hydra-train makes of them is what fairseq-train makes of the same flags."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from train_large import runlog, sizes
from train_large.compression.checkpoint import read_checkpoint
from train_large.data.glue import prepare_task
from train_large.data.text import prepare_text

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "user_dir_examples" / "hydra"
PLUGIN = ROOT / "fairseq_plugins"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A text in text/data-bin and a task in task/."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(1)
    words = [f"word{number}" for number in range(40)]
    (folder / "text.txt").write_text("\n".join(" ".join(rng.choices(words, k=12)) for _ in range(600)) + "\n")
    rows = [f"{rng.choice(words)} {label} {rng.choice(words)}\t{label}" for label in ("good", "bad") * 60]
    (folder / "task.tsv").write_text("sentence\tlabel\n" + "\n".join(rows) + "\n")
    prepare_text([folder / "text.txt"], folder / "text", vocabulary_size=300, subsets=(), valid_fraction=0.1)
    prepare_task("tsv", folder / "task.tsv", folder / "task", text=folder / "text")
    return folder


def train(*words: str, module: str = "fairseq_cli.hydra_train", status: int = 0) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", module, *words], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300
    )
    assert (done.returncode == 0) == (status == 0), done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def by_hydra(name: str, *changes: str, status: int = 0) -> str:
    return train("--config-dir", str(CONFIGS), "--config-name", name, *changes, status=status)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(folder / "checkpoint_last.pt")["model"]


CALIBRATED = ("criterion.budget=6s", "+criterion.budget_clock=calibrated", "+criterion.seconds_per_update=0.5")
FLAGS = f"""
    --user-dir {PLUGIN} --cpu --task masked_lm --tokens-per-sample 16 --mask-prob 0.4 --arch prenorm_roberta
    --encoder-layers 2 --encoder-embed-dim 64 --encoder-attention-heads 4 --max-positions 64 --embedding-std 0.1
    --position-init sinusoidal --dropout 0 --attention-dropout 0 --criterion budgeted_masked_lm --budget 6s
    --budget-clock calibrated --seconds-per-update 0.5 --optimizer fused_adam --adam-eps 1e-6 --weight-decay 0.01
    --lr-scheduler budget_linear --warmup-fraction 0.06 --batch-size 32 --num-workers 0 --lr 0.003 --clip-norm 1.0
    --max-valid-steps 14 --batch-size-valid 128 --required-batch-size-multiple 1 --no-epoch-checkpoints
""".split()


@pytest.mark.slow
def test_pretrain_finetune_and_prune_by_hydra(data, tmp_path):
    text, hydra, flags = str(data / "text" / "data-bin"), tmp_path / "hydra", tmp_path / "flags"
    by_hydra("pretrain", f"task.data={text}", f"checkpoint.save_dir={hydra}", *CALIBRATED)
    train(text, *FLAGS, "--adam-betas", "(0.9, 0.98)", "--save-dir", str(flags), module="fairseq_cli.train")
    ours, theirs = weights(hydra), weights(flags)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    lines = runlog.read(str(hydra / runlog.NAME))
    assert (lines[0]["size"], lines[-1]["updates"], lines[-1]["reason"]) == ("2l_64h", 12, "budget")

    start = f"checkpoint.finetune_from_model={hydra}/checkpoint_last.pt"
    task = f"task.data={data / 'task'}"
    by_hydra("finetune", task, start, f"checkpoint.save_dir={tmp_path}/finetune", "optimization.max_epoch=1")
    start = f"checkpoint.finetune_from_model={tmp_path}/finetune/checkpoint_best.pt"
    levels = 'task.sparsity_levels="0.3,0.6"'
    by_hydra("prune", task, start, f"checkpoint.save_dir={tmp_path}/prune", levels)
    pruned = read_checkpoint(tmp_path / "prune" / "checkpoint_sparsity_60.pt")["model"]
    matrix = pruned["encoder.sentence_encoder.layers.0.fc1.weight"]
    assert 0.3 < (matrix == 0).float().mean() < 0.9


def test_the_papers_setting():
    config = OmegaConf.load(CONFIGS / "paper.yaml")
    size = sizes.Size(config.model.encoder_layers, config.model.encoder_embed_dim)
    assert size in sizes.ROBERTA
    batch = config.dataset.batch_size * config.optimization.update_freq[0]
    assert batch == 8192
    assert config.optimization.lr == [sizes.LEARNING_RATES[batch]]
    assert config.task.tokens_per_sample == sizes.PAPER_LENGTH
    assert config.criterion.budget == 1_000_000
    assert config.dataset.required_batch_size_multiple == 1  # no sequence is left out at the end of an epoch


def test_wrong_keys_and_missing_data_are_said(data):
    assert "Missing mandatory value" in by_hydra("pretrain", "criterion.budget=1s", status=1)
    assert "batchsize" in by_hydra("pretrain", f"task.data={data}", "dataset.batchsize=3", status=1)
    told = by_hydra("pretrain", f"task.data={data}/text/data-bin", "+optimization.max_updates=3", status=1)
    assert "error: optimization.max_updates: nothing reads this key; did you mean optimization.max_update?" in told
