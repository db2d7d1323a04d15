"""The settings of the pocket study of translation, and the Tensor2Tensor commands they make."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from train_large.sizes import Size

PROBLEM = "translate_enfr_pairs"
HPARAMS_SET = "transformer_enfr_2l_128h"  # what the recipe and the size do not say is as there


@dataclass(frozen=True)
class Recipe:
    """What all sizes have in common; README.md says how the figures were found."""

    sizes: tuple[str, ...] = ("1l_32h", "2l_64h", "2l_128h", "3l_256h")
    head_width: int = 32
    """narrower than the paper's 64: at these sizes that would be one or two heads"""
    most_words: int = 12
    """on either side of a pair: what so short a training can learn from"""
    batch_tokens: int = 1024
    learning_rate: float = 0.5
    """the constant of transformer_base's schedule, there 2 for some hundred thousand updates"""
    warmup_updates: int = 300
    """transformer_base has 8,000"""
    dropout: float = 0.0
    """transformer_base's 0.1 is against overfitting, which takes longer than this"""
    evaluations: int = 5
    dev_sentences: int = 100
    """translated at each evaluation"""
    test_sentences: int = 300
    """translated at the end"""
    beam_size: int = 4
    alpha: float = 0.6

    def peak_rate(self, size: Size) -> float:
        """The learning rate at the end of the warm-up, by transformer_base's schedule."""
        return self.learning_rate / math.sqrt(size.hidden * self.warmup_updates)

    def size(self, name: str) -> Size:
        return Size.parse(name, self.head_width)


def launch(python: str, program: str) -> list[str]:
    """What every command begins with: a program of Tensor2Tensor in its own environment."""
    return [python, "-W", "ignore", "-m", "t2t_problems.launch", program, f"--problem={PROBLEM}"]


def datagen(python: str, pairs: Path, data: Path) -> list[str]:
    """Word pieces and shards of the pairs in the folder `pairs`."""
    return [*launch(python, "datagen"), f"--tmp_dir={pairs}", f"--data_dir={data}"]


def hparams(size: Size, recipe: Recipe, seconds: float) -> str:
    """--hparams of every program that builds the model."""
    values = {
        "num_hidden_layers": size.layers,
        "hidden_size": size.hidden,
        "filter_size": size.ffn,
        "num_heads": size.heads,
        "batch_size": recipe.batch_tokens,
        "learning_rate_constant": recipe.learning_rate,
        "learning_rate_warmup_steps": recipe.warmup_updates,
        "layer_prepostprocess_dropout": recipe.dropout,
        "attention_dropout": recipe.dropout,
        "relu_dropout": recipe.dropout,
        "budget_seconds": seconds,
        "budget_evaluations": recipe.evaluations,
        "bleu_sentences": recipe.dev_sentences,
    }
    return ",".join(f"{name}={value}" for name, value in values.items())


def _model(python: str, program: str, data: Path, model_dir: Path, size: Size, recipe: Recipe, seconds: float):
    return [
        *launch(python, program),
        f"--data_dir={data}",
        f"--output_dir={model_dir}",
        "--model=transformer_budgeted",
        f"--hparams_set={HPARAMS_SET}",
        f"--hparams={hparams(size, recipe, seconds)}",
        f"--decode_hparams=beam_size={recipe.beam_size},alpha={recipe.alpha}",
    ]


def train(python: str, data: Path, model_dir: Path, size: Size, recipe: Recipe, seconds: float) -> list[str]:
    """Train within the budget on one core, evaluating and translating a little of the dev set on the way."""
    return [
        *_model(python, "trainer", data, model_dir, size, recipe, seconds),
        "--schedule=continuous_train_and_eval",
        "--train_steps=1000000000",  # the budget ends the run
        "--eval_steps=1000000",  # the whole dev set
        "--eval_throttle_seconds=0",
        "--keep_checkpoint_max=2",
        "--log_step_count_steps=50",
        "--intra_op_parallelism_threads=1",
        "--inter_op_parallelism_threads=1",
    ]


def decode(
    python: str, data: Path, model_dir: Path, size: Size, recipe: Recipe, seconds: float, source: Path, out: Path
) -> list[str]:
    """Translate the sentences of `source` into `out` with the last checkpoint."""
    return [
        *_model(python, "decoder", data, model_dir, size, recipe, seconds),
        f"--decode_from_file={source}",
        f"--decode_to_file={out}",
    ]
