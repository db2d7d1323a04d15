"""The settings of the pocket study, and the fairseq commands they make."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from train_large.flops import train_flops
from train_large.sizes import Size

ROOT = Path(__file__).resolve().parents[2]
USER_DIR = ROOT / "fairseq_plugins"


@dataclass(frozen=True)
class Recipe:
    """What all sizes have in common; README.md says how the figures were found."""

    sizes: tuple[str, ...] = ("1l_16h", "2l_32h", "2l_64h", "3l_128h")
    head_width: int = 16
    """narrower than the paper's 64: at these sizes that would be one or two heads, and the plateau lasts longer"""
    vocabulary: int = 1000
    """entries of the BPE: small, so that the embeddings do not outweigh the layers"""
    length: int = 16
    """tokens per sequence in pretraining: the shorter, the sooner attention finds the neighbours"""
    positions: int = 64
    """tokens per sequence in the task; longer sentences are cut"""
    embedding_std: float = 0.1
    """of the embeddings at the start: BERT's 0.02 is for models many times as wide"""
    masked: float = 0.4
    """share of the tokens masked; the paper's 0.15 gives too few words to learn from in so short a time"""
    batch: int = 32
    """sequences per update"""
    learning_rate: float = 3e-3
    warmup: float = 0.06
    validations: int = 15
    """points on each curve, about"""
    curve_batches: int = 15
    """validation batches of 128 sequences for a point on the curve; the last figure is over the whole split"""
    finetune_epochs: int = 3
    finetune_batch: int = 32
    finetune_learning_rate: float = 1e-3
    finetune_dropout: float = 0.1
    prune_learning_rate: float = 5e-4
    sparsity: tuple[float, ...] = (0.15, 0.30, 0.45, 0.60, 0.75, 0.90)
    bits: tuple[int, ...] = (32, 8, 6, 4)
    error_sparsity: float = 0.60
    """share pruned for the study of weight errors (the paper's figure 9)"""

    def size(self, name: str) -> Size:
        return Size.parse(name, self.head_width)


# Only to space the validations: about what one core does, in FLOPs as Clark et al. count them, and what making a batch
# and a step takes besides.
_FLOPS_PER_SECOND = 4e10
_SECONDS_BESIDES = 0.02


def fairseq_train(data: Path, save_dir: Path, size: Size, recipe: Recipe) -> list[str]:
    """What every stage's command begins with."""
    return [
        *[
            sys.executable,
            "-m",
            "fairseq_cli.train",
            str(data),
            "--user-dir",
            str(USER_DIR),
            "--save-dir",
            str(save_dir),
        ],
        *["--cpu", "--arch", "prenorm_roberta", "--max-positions", str(recipe.positions)],
        *["--encoder-layers", str(size.layers), "--encoder-embed-dim", str(size.hidden)],
        *["--encoder-attention-heads", str(size.heads), "--attention-dropout", "0"],
        *["--embedding-std", str(recipe.embedding_std), "--position-init", "sinusoidal"],
        *["--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--adam-eps", "1e-6", "--clip-norm", "1.0"],
        *["--log-format", "simple", "--no-epoch-checkpoints", "--num-workers", "0"],
        *["--required-batch-size-multiple", "1", "--no-progress-bar"],
    ]


def validation_interval(size: Size, recipe: Recipe, seconds: float) -> int:
    """Updates from one point of the curve to the next, about."""
    flops = train_flops(size, recipe.vocabulary, recipe.length, recipe.batch)
    return max(10, math.ceil(seconds / recipe.validations / (flops / _FLOPS_PER_SECOND + _SECONDS_BESIDES)))


def pretrain(data: Path, save_dir: Path, size: Size, recipe: Recipe, budget: str, interval: int) -> list[str]:
    """Masked language modeling for the budget, validated and saved every `interval` updates."""
    return [
        *fairseq_train(data, save_dir, size, recipe),
        *["--task", "masked_lm", "--criterion", "budgeted_masked_lm", "--budget", budget],
        *["--mask-prob", str(recipe.masked), "--dropout", "0"],
        *["--tokens-per-sample", str(recipe.length), "--batch-size", str(recipe.batch)],
        *[
            "--lr-scheduler",
            "budget_linear",
            "--warmup-fraction",
            str(recipe.warmup),
            "--lr",
            str(recipe.learning_rate),
        ],
        *["--weight-decay", "0.01", "--log-interval", "20"],
        *["--validate-interval-updates", str(interval), "--save-interval-updates", str(interval)],
        *["--keep-interval-updates", "1", "--batch-size-valid", "128"],
        *["--max-valid-steps", str(recipe.curve_batches - 1)],  # fairseq stops after the one behind it
    ]


def _classification(data: Path, save_dir: Path, size: Size, recipe: Recipe, classes: int, start: Path) -> list[str]:
    return [
        *fairseq_train(data, save_dir, size, recipe),
        *["--criterion", "budgeted_sentence_prediction", "--num-classes", str(classes)],
        *["--init-token", "0", "--separator-token", "2", "--shorten-method", "truncate"],
        *["--batch-size", str(recipe.finetune_batch), "--batch-size-valid", "64", "--weight-decay", "0.1"],
        *[
            "--finetune-from-model",
            str(start),
            "--best-checkpoint-metric",
            "accuracy",
            "--maximize-best-checkpoint-metric",
        ],
        *["--dropout", str(recipe.finetune_dropout), "--log-interval", "20"],
    ]


def finetune(
    data: Path, save_dir: Path, size: Size, recipe: Recipe, classes: int, examples: int, start: Path
) -> list[str]:
    """The task, from the pretrained model."""
    updates = recipe.finetune_epochs * math.ceil(examples / recipe.finetune_batch)
    return [
        *_classification(data, save_dir, size, recipe, classes, start),
        *[
            "--task",
            "sentence_prediction",
            "--lr-scheduler",
            "polynomial_decay",
            "--lr",
            str(recipe.finetune_learning_rate),
        ],
        *[
            "--warmup-updates",
            str(math.ceil(0.06 * updates)),
            "--total-num-update",
            str(updates),
            "--max-update",
            str(updates),
        ],
    ]


def prune(
    data: Path, save_dir: Path, size: Size, recipe: Recipe, classes: int, examples: int, start: Path
) -> list[str]:
    """The pruning ladder, from the finetuned model, measured four times an epoch."""
    quarter = math.ceil(examples / recipe.finetune_batch / 4)
    levels = ",".join(map(str, recipe.sparsity))
    return [
        *_classification(data, save_dir, size, recipe, classes, start),
        *["--task", "pruning_sentence_prediction", "--sparsity-levels", levels],
        *["--recovery-interval", str(quarter)],
        *["--lr-scheduler", "fixed", "--lr", str(recipe.prune_learning_rate)],
        *["--save-interval-updates", "500", "--keep-interval-updates", "1"],
    ]
