"""What a finished study tells the planner: how good its sizes are after finetuning, and what compressing them costs.

From the results.json of a demo, or the accuracies.csv that `make study` has measured: there the means over seeds.
"""

from __future__ import annotations

import csv
import math
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


@dataclass(frozen=True)
class Compressed:
    """A size pruned to `sparsity` (0 to 1) and stored at `bits` a weight: in a real file of so many bytes, or, where
    none was written, in what its bits and masks take."""

    sparsity: float
    bits: int
    accuracy: float
    bytes: int


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
                tuple(Compressed(c.sparsity, c.bits, c.accuracy, c.stored_bytes) for c in model.compressed),
            )
            for model in study.models
        ),
    )


@dataclass(frozen=True)
class Row:
    """What is read of a row of accuracies.csv (user_dir_examples/study/measurements.py), by the columns' names."""

    size: str
    layers: int
    hidden: int
    layer_parameters: int
    batch: str
    rate: str
    share: str
    data: str
    target: str
    checkpoint: float
    perplexity: float
    finetune_batch: str
    finetune_rate: str
    finetune_dropout: str
    sparsity: float
    bits: int
    accuracy: float
    bytes: int
    examples: int

    @property
    def recipe(self) -> tuple[str, ...]:
        """What models of a size must have in common to be repetitions of one another."""
        pretraining = (self.batch, self.rate, self.share, self.data, self.target)
        return (*pretraining, self.finetune_batch, self.finetune_rate, self.finetune_dropout)


_KINDS = get_type_hints(Row)


def _rows(path: Path) -> Iterator[Row]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            for line in reader:
                where = f"{path}, line {reader.line_num}"
                try:
                    row = Row(**{name: kind(line[name]) for name, kind in _KINDS.items()})
                except (KeyError, TypeError, ValueError) as error:
                    what = f"there is no column {error}" if isinstance(error, KeyError) else str(error)
                    raise UserError(f"{where}: {what}; give the {CSV} that `make study` has written.") from None
                shares = 0 <= row.accuracy <= 1 and 0 <= row.sparsity < 1
                if not (shares and 1 <= row.perplexity < math.inf and row.examples > 0):
                    raise UserError(
                        f"{where}: a perplexity below 1, an accuracy or a sparsity that is no share, or no examples; "
                        f"give the {CSV} that `make study` has written."
                    )
                yield row
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror}): give the {CSV} of a finished study.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not CSV ({error}): give the {CSV} of a finished study.") from None


def of_rows(rows: Iterable[Row], path: Path) -> Study:
    """The means over the seeds of each size, of models that were finetuned from the end of their pretraining.

    Raises UserError where a size was trained in several ways, or nothing is there of models as they were finetuned.
    """
    ended = [row for row in rows if row.checkpoint == 1]
    sizes = []
    for name in dict.fromkeys(row.size for row in ended):
        own = [row for row in ended if row.size == name]
        if len({row.recipe for row in own}) > 1:
            raise UserError(
                f"{path} has {name} trained in several ways, and which is meant is not said: give a study of one, as "
                f"compression/{CSV} is."
            )
        whole = [row for row in own if row.bits == 32 and row.sparsity == 0]
        if whole:
            sizes.append(_size(own, whole))
    if not sizes:
        raise UserError(f"{path} has no model as it was finetuned (32 bits, not pruned): give a finished study.")
    sizes.sort(key=lambda size: (size.parameters, size.name))
    return Study(max(row.examples for row in ended), tuple(sizes))


def _size(own: Sequence[Row], whole: Sequence[Row]) -> StudiedSize:
    first = own[0]
    ways = sorted({(row.sparsity, row.bits) for row in own})
    measured = {way: [row for row in own if (row.sparsity, row.bits) == way] for way in ways}
    return StudiedSize(
        first.size,
        first.layers,
        first.hidden,
        first.layer_parameters,
        math.exp(fmean(math.log(row.perplexity) for row in whole)),
        fmean(row.accuracy for row in whole),
        tuple(
            Compressed(*way, fmean(row.accuracy for row in of_way), round(fmean(row.bytes for row in of_way)))
            for way, of_way in measured.items()
        ),
    )
