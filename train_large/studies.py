"""What a finished study tells the planner: how good its sizes are after finetuning, and what compressing them costs.

From the results.json of a demo, or the accuracies.csv that `make study` has measured: there the means over seeds.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import get_type_hints

from train_large.errors import UserError
from train_large.report import results
from train_large.report.results import Results

CSV = "accuracies.csv"
PLACES = ("results.json", CSV, f"compression/{CSV}", f"results/compression/{CSV}")
"""Where the file is in a folder of either."""
WHOLE = (0.0, 32)  # not pruned and not quantized


@dataclass(frozen=True)
class Compressed:
    """A size pruned to `sparsity` (0 to 1) and stored at `bits` a weight; `file_bytes` is None where no file was
    written."""

    sparsity: float
    bits: int
    accuracy: float
    file_bytes: int | None


@dataclass(frozen=True)
class StudiedSize:
    """`parameters` leave the embeddings out; `perplexity` is that of pretraining, `accuracy` that after finetuning."""

    name: str
    layers: int
    hidden: int
    parameters: int
    perplexity: float
    accuracy: float
    compressed: tuple[Compressed, ...]

    def at(self, sparsity: float, bits: int) -> Compressed | None:
        """The measurement at this sparsity and bit width, if there is one."""
        return next((c for c in self.compressed if c.bits == bits and abs(c.sparsity - sparsity) < 0.005), None)


@dataclass(frozen=True)
class Study:
    """`examples` are those that accuracy was measured on."""

    examples: int
    sizes: tuple[StudiedSize, ...]


def read(path: Path) -> Study:
    """A study's file, or the folder that it is in. Raises UserError for anything else."""
    path = Path(path)
    if path.is_dir():
        found = next((path / place for place in PLACES if (path / place).is_file()), None)
        if found is None:
            raise UserError(
                f"--study {path}: there is no {' and no '.join(PLACES)} in it; give the folder of a finished demo or "
                "study."
            )
        path = found
    elif not path.exists():
        raise UserError(f"--study {path} does not exist: give the folder of a finished demo or study.")
    if path.suffix == ".csv":
        return of_rows(_rows(path), path)
    study = results.load(path)
    if not isinstance(study, Results):
        raise UserError(f"{path} is a study of translation, which has compressed nothing: give one that has.")
    return of_results(study)


def of_results(study: Results) -> Study:
    return Study(
        study.task.valid,
        tuple(
            StudiedSize(
                model.name,
                model.layers,
                model.hidden,
                model.parameters_without_embeddings,
                model.perplexity,
                model.finetuned.accuracy,
                tuple(Compressed(c.sparsity, c.bits, c.accuracy, c.file_bytes) for c in model.compressed),
            )
            for model in study.models
        ),
    )


@dataclass(frozen=True)
class Row:
    """What is read of a row of accuracies.csv (user_dir_examples/study/measurements.py), by the columns' names."""

    run: str
    size: str
    layers: int
    hidden: int
    layer_parameters: int
    batch: int
    rate: float
    share: str
    data: float
    target: str
    seed: int
    checkpoint: float
    perplexity: float
    finetune_batch: int
    finetune_rate: float
    finetune_dropout: float
    finetune_seed: int
    sparsity: float
    bits: int
    accuracy: float
    examples: int

    @property
    def recipe(self) -> tuple[object, ...]:
        """What the models of a size must have in common to be repetitions of one another."""
        shape = (self.layers, self.hidden, self.layer_parameters)
        pretraining = (self.batch, self.rate, self.share, self.data, self.target)
        return (*shape, *pretraining, self.finetune_batch, self.finetune_rate, self.finetune_dropout)

    @property
    def model(self) -> tuple[str, int]:
        return self.run, self.finetune_seed

    @property
    def way(self) -> tuple[float, int]:
        return self.sparsity, self.bits


_KINDS = get_type_hints(Row)
_BOUNDS = {
    **dict.fromkeys(("layers", "hidden", "layer_parameters", "bits", "examples"), (1, math.inf)),
    **dict.fromkeys(("checkpoint", "sparsity", "accuracy"), (0, 1)),
    "perplexity": (1, sys.float_info.max),
}


def _rows(path: Path) -> Iterator[Row]:
    way_out = f"give the {CSV} that `make study` has written."
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in _KINDS if name not in (reader.fieldnames or ())]
            if missing:
                raise UserError(f"{path} has no column {missing[0]}: {way_out}")
            for line in reader:
                where = f"{path}, line {reader.line_num}"
                cells = {}
                for name, kind in _KINDS.items():
                    cell = line[name]
                    try:
                        cells[name] = kind(cell)
                        low, high = _BOUNDS.get(name, (-math.inf, math.inf))
                        good = cell is not None and (kind is str or low <= cells[name] <= high)
                    except (TypeError, ValueError):
                        good = False
                    if not good:
                        raise UserError(f"{where}: {name} is {cell or 'empty'}, which it cannot be; {way_out}")
                yield Row(**cells)
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror}): {way_out}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not CSV ({error}): {way_out}") from None


def of_rows(rows: Iterable[Row], path: Path) -> Study:
    """The means over the seeds of each size, of models that were finetuned from the end of their pretraining.

    Raises UserError where a size was trained in several ways or a row is there twice, and where nothing is there of
    models as they were finetuned.
    """
    ended = [row for row in rows if row.checkpoint == 1]
    sizes = [
        _size(name, [row for row in ended if row.size == name], path)
        for name in dict.fromkeys(row.size for row in ended)
    ]
    if not any(sizes):
        raise UserError(f"{path} has no model as it was finetuned (32 bits, not pruned): give a finished study.")
    known = sorted((size for size in sizes if size), key=lambda size: (size.parameters, size.name))
    return Study(min(row.examples for row in ended), tuple(known))


def _size(name: str, own: Sequence[Row], path: Path) -> StudiedSize | None:
    """Of the models that were measured as they were finetuned, and the ways of compression that all of them have: a
    loss is of the same models as what it is lost from."""
    if len({row.recipe for row in own}) > 1:
        raise UserError(f"{path} has {name} of several shapes or recipes, which are no repetitions: give rows of one.")
    models: dict[tuple[str, int], dict[tuple[float, int], Row]] = {}
    for row in own:
        if models.setdefault(row.model, {}).setdefault(row.way, row) is not row:
            raise UserError(
                f"{path} has {row.run}, finetuned with seed {row.finetune_seed}, twice at {row.bits} bits and sparsity "
                f"{row.sparsity:g}: remove one of the rows."
            )
    measured = [rows for rows in models.values() if WHOLE in rows]
    if not measured:
        return None
    ways = sorted(way for way in measured[0] if all(way in rows for rows in measured))
    first = own[0]
    return StudiedSize(
        name,
        first.layers,
        first.hidden,
        first.layer_parameters,
        math.exp(fmean(math.log(rows[WHOLE].perplexity) for rows in measured)),
        fmean(rows[WHOLE].accuracy for rows in measured),
        tuple(Compressed(*way, fmean(rows[way].accuracy for rows in measured), None) for way in ways),
    )
