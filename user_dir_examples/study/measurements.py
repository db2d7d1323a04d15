"""What a study measures: the rows of its CSV files, one kind of row a file, one folder of files an experiment.

The figures, the tables and the verdicts are made of these files alone, so a study that is committed as CSV can be
judged and drawn again without its checkpoints.
"""

from __future__ import annotations

import csv
import dataclasses
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from train_large.errors import UserError
from train_large.files import whole


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What every row says of the model that was trained: its run, shape, recipe and seed.

    `parameters` counts everything, `layer_parameters` leaves the embeddings out. `batch` is in sequences (translation:
    in tokens), `data` the percentage of the training text, `target` the perplexity that the run was to stop at.
    """

    run: str
    size: str
    layers: int
    hidden: int
    parameters: int
    layer_parameters: int
    batch: int
    rate: float
    share: str
    data: float
    target: float | None
    seed: int


@dataclass(frozen=True, kw_only=True)
class Point(Trained):
    """curves.csv: one validation in training. `seconds` are those of the budget's clock; `bleu` is None but in
    translation, where `perplexity` is that of the dev set."""

    updates: int
    seconds: float
    flops: float
    tokens: int
    perplexity: float
    bleu: float | None


@dataclass(frozen=True, kw_only=True)
class Accuracy(Trained):
    """accuracies.csv: a finetuned model at one sparsity (0 to 1) and bit width (32: as it was finetuned).

    `updates`, `seconds` and `perplexity` are those of the pretraining at the checkpoint that was finetuned, and
    `checkpoint` is its share of the pretraining (1: the end). `bytes` is what k bits a weight and a mask cost,
    `bytes_paper` the paper's count, nonzero * bits / 8.
    """

    checkpoint: float
    updates: int
    seconds: float
    perplexity: float
    finetune_batch: int
    finetune_rate: float
    finetune_dropout: float
    finetune_seed: int
    sparsity: float
    bits: int
    accuracy: float
    examples: int
    nonzero: int
    bytes: int
    bytes_paper: int
    recovery_updates: int
    recovered: bool


@dataclass(frozen=True, kw_only=True)
class Error(Trained):
    """weight_errors.csv: how far compression moves the finetuned weights, by kind of module (train_large's
    compression/weight_error.py defines the statistics)."""

    sparsity: float
    bits: int
    kind: str
    weights: int
    mean: float
    mean_absolute: float
    variance: float
    deviation: float


@dataclass(frozen=True, kw_only=True)
class Memory:
    """memory.csv: the largest resident memory of a training process, in bytes, above that of one that has only
    loaded its libraries and data."""

    size: str
    share: str
    batch: int
    length: int
    seed: int
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Translated(Trained):
    """translations.csv: BLEU of the test set by the paper's measure, its standard error by resampling, and the dev
    perplexity, at the end of the budget."""

    updates: int
    seconds: float
    perplexity: float
    bleu: float
    bleu_error: float


FILES: dict[type, str] = {
    Point: "curves.csv",
    Accuracy: "accuracies.csv",
    Error: "weight_errors.csv",
    Memory: "memory.csv",
    Translated: "translations.csv",
}

Row = TypeVar("Row")


def write(rows: Sequence[Any], folder: Path) -> None:
    """One file for each kind of row in `folder`, sorted, so that the same measurements make the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, name in FILES.items():
        of_kind = [dataclasses.asdict(row) for row in rows if type(row) is kind]
        if not of_kind:
            (folder / name).unlink(missing_ok=True)
            continue
        of_kind.sort(key=lambda row: [(value is not None, value) for value in row.values()])
        with whole(folder / name) as aside, aside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(of_kind[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(of_kind)


def read(folder: Path, kind: type[Row]) -> list[Row]:
    """The rows of this kind in `folder`; none where there is no such file. Raises UserError for a file that is none
    of ours."""
    path = folder / FILES[kind]
    if not path.exists():
        return []
    types_of = typing.get_type_hints(kind)
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != list(types_of):
            raise UserError(f"{path}: the columns are not {', '.join(types_of)}: make it again with `make study`.")
        try:
            return [kind(**{name: _value(text, types_of[name]) for name, text in row.items()}) for row in reader]
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}; make it again with `make study`.") from None


def _value(text: str, kind: Any) -> Any:
    if isinstance(kind, types.UnionType):
        return None if text == "" else _value(text, typing.get_args(kind)[0])
    if kind is bool:
        return bool(["False", "True"].index(text))
    return kind(text)


def experiments(folder: Path) -> list[str]:
    """The experiments that have measurements in the folder of a study's results."""
    return sorted({path.parent.name for name in FILES.values() for path in folder.glob(f"*/{name}")})


def best_finetunings(rows: Iterable[Accuracy]) -> list[Accuracy]:
    """Of each pretrained model and each of its checkpoints, the rows of the finetuning that is most accurate before it
    is compressed, or as near to that as was measured: the best of a grid (Appendix D)."""
    recipes: dict[tuple[str, float], dict[tuple, list[Accuracy]]] = {}
    for row in rows:
        recipe = (row.finetune_batch, row.finetune_rate, row.finetune_dropout, row.finetune_seed)
        recipes.setdefault((row.run, row.checkpoint), {}).setdefault(recipe, []).append(row)

    def uncompressed(rows: list[Accuracy]) -> float:
        return min(rows, key=lambda row: (row.sparsity, -row.bits)).accuracy

    return [
        row for found in recipes.values() for row in max((found[recipe] for recipe in sorted(found)), key=uncompressed)
    ]


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows whose fields have these values."""
    return [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]
