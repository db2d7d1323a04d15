"""The settings of a study, and the runs that its experiments ask for.

An experiment is a grid: every pretraining of its `pretrain`, every finetuning of its `finetune` from each of those,
and so on. A run is known by its settings, so experiments that ask for the same one share it.
"""

from __future__ import annotations

import csv
import difflib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train_large.budget import parse_duration
from train_large.compression.levels import check_bits, parse_levels
from train_large.errors import UserError
from train_large.sizes import SHARING, Size

CHECKPOINTS = (0.25, 0.5, 0.75, 1)
"""The shares of a pretraining at which a checkpoint is kept."""

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "user_dir_examples"
COMMON = Path(__file__).with_name("pocket.yaml")
COMMITTED = frozenset(path.parent.name for path in EXAMPLES.glob("*/pocket.yaml") if path != COMMON)


@dataclass(frozen=True)
class Pretraining:
    """A masked language model, trained for the budget or until it comes to the perplexity `target`.

    `data` is the percentage of the text. The name tells it from every other run of the study."""

    size: str
    batch: int
    share: str
    data: float
    target: float | None
    seed: int

    @property
    def name(self) -> str:
        parts = [self.size, f"batch{self.batch}"]
        if self.share != "none":
            parts.append(f"share_{self.share}")
        if self.data != 100:
            parts.append(f"data{self.data:g}")
        if self.target is not None:
            parts.append(f"to{self.target:g}")
        return f"{'-'.join(parts)}-seed{self.seed}"


@dataclass(frozen=True)
class Finetuning:
    """A pretrained model finetuned from its end, or from the checkpoint at this share of the pretraining."""

    pretraining: Pretraining
    checkpoint: float
    batch: int
    rate: float
    dropout: float
    seed: int

    @property
    def name(self) -> str:
        return (
            f"{self.pretraining.name}/from{100 * self.checkpoint:g}-batch{self.batch}-rate{self.rate:g}"
            f"-dropout{self.dropout:g}-seed{self.seed}"
        )


@dataclass(frozen=True)
class Grid:
    """Finetunings of one pretrained model, of which the best by validation is compressed (Appendix D)."""

    experiment: str
    pretraining: Pretraining
    finetunings: tuple[Finetuning, ...]

    @property
    def name(self) -> str:
        return f"{self.experiment}/{self.pretraining.name}"


@dataclass(frozen=True)
class Pruning:
    """The ladder of sparsity levels, from one finetuned model or the best of a grid."""

    start: Finetuning | Grid

    @property
    def name(self) -> str:
        return self.start.name


@dataclass(frozen=True)
class Measuring:
    """Accuracy and bytes at every bit width, at every level of the ladder if there is one, and the weight errors."""

    start: Finetuning | Grid
    pruning: Pruning | None

    @property
    def name(self) -> str:
        return f"{self.start.name}/{'ladder' if self.pruning else 'whole'}"


@dataclass(frozen=True)
class MemoryRun:
    """A few updates, watched for how much memory they take."""

    share: str
    seed: int

    @property
    def name(self) -> str:
        return f"share_{self.share}-seed{self.seed}"


@dataclass(frozen=True)
class Translation:
    """A translation model of this size, trained for its budget; translated and scored."""

    size: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.size}-seed{self.seed}"


Run = Pretraining | Finetuning | Grid | Pruning | Measuring | MemoryRun | Translation


def load(config: Path | None = None, changes: Sequence[str] = ()) -> DictConfig:
    """The settings: the common ones, each experiment's pocket.yaml, the file `config` and `changes` (key=value).

    Paths are from the checkout's root. Raises UserError for a file that cannot be read, a key that does not exist, and
    values that cannot be."""
    common = OmegaConf.load(COMMON)
    assert isinstance(common, DictConfig)
    for path in sorted(EXAMPLES.glob("*/pocket.yaml")):
        if path != COMMON:
            common.experiments[path.parent.name] = OmegaConf.load(path)
    defaults = OmegaConf.to_container(common)
    OmegaConf.set_struct(common, True)
    for part in ("pretrain.rates", "experiments"):
        OmegaConf.set_struct(OmegaConf.select(common, part), False)  # a rate for another batch, an experiment of yours
    try:
        theirs = [OmegaConf.load(config)] if config else []
    except (OSError, OmegaConfBaseException, ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{config}: it cannot be read as YAML ({_first_line(error)}).") from None
    except Exception as error:  # PyYAML's errors have no base that is a ValueError
        if type(error).__module__.startswith("yaml"):
            raise UserError(f"{config}: it cannot be read as YAML ({_first_line(error)}).") from None
        raise
    for layer in [*theirs, *([OmegaConf.from_dotlist(list(changes))] if changes else [])]:
        try:
            _clear_for(layer, common)
            common = OmegaConf.merge(common, layer)
        except (OmegaConfBaseException, ValueError) as error:
            where = str(config) if layer in theirs else "SET"
            raise UserError(
                f"{where}: {_first_line(error)}; {COMMON.relative_to(ROOT)} lists the keys that exist."
            ) from None
    assert isinstance(common, DictConfig)
    for key in ("budget", "translate.budget"):
        if isinstance(OmegaConf.select(common, key), (int, float)):  # of seconds
            OmegaConf.update(common, key, str(OmegaConf.select(common, key)))
    _check_kinds(defaults, OmegaConf.to_container(common))
    common.pretrain.rates = _rates(common.pretrain.rates)
    # The jobs run in other folders.
    common.text.files = [str(ROOT / path) for path in common.text.files]
    for part, key in (("task", "source"), ("translate", "pairs")):
        if common[part][key] is not None:
            common[part][key] = str(ROOT / common[part][key])
    _check(common)
    return common


def _clear_for(layer: DictConfig | ListConfig, common: DictConfig) -> None:
    """A part of a grid is keys or a list of such; one takes the other's place whole, which merging them refuses."""
    theirs = OmegaConf.select(layer, "experiments")
    for name, grid in theirs.items() if isinstance(theirs, DictConfig) else ():
        ours = common.experiments.get(name)
        if isinstance(grid, DictConfig) and isinstance(ours, DictConfig):
            for part in set(grid) & set(ours):
                if isinstance(grid[part], ListConfig) != isinstance(ours[part], ListConfig):
                    ours.pop(part)


def _rates(rates: DictConfig) -> dict[int, float]:
    """By batch size as a number: a key of SET is text. Raises UserError for one that is no number."""
    try:
        found = {int(batch): rate for batch, rate in rates.items()}
    except ValueError:
        found = {}
    if not found or not all(isinstance(rate, (int, float)) and rate > 0 for rate in found.values()) or min(found) < 1:
        raise UserError(f"pretrain.rates: {rates} should be a rate for each batch size, such as {{32: 0.003}}.")
    return found


def _check_kinds(defaults: dict[str, Any], settings: dict[str, Any], where: str = "") -> None:
    """Raises UserError where a value is of another kind than pocket.yaml's."""
    for key, default in defaults.items():
        value, name = settings[key], f"{where}{key}"
        if isinstance(default, dict):
            if not isinstance(value, dict):
                raise UserError(f"{name}: {value} should be keys with values; {COMMON.relative_to(ROOT)} has its keys.")
            if name not in ("experiments", "pretrain.rates"):
                _check_kinds(default, value, f"{name}.")
        elif isinstance(default, list):
            kind = type(default[0]) if default else str
            if not isinstance(value, list) or not all(_is_like(each, kind) for each in value):
                example = default or ["my.txt"]
                raise UserError(f"{name}: {value} should be a list in square brackets, such as {example}.")
        elif default is None:
            if not (value is None or isinstance(value, str)):
                raise UserError(f"{name}: {value} should be the path of a file, or null.")
        elif not _is_like(value, type(default)) and not (name == "step_times" and _is_like(value, float)):
            raise UserError(f"{name}: {value} is not of the kind of {default}, as {COMMON.relative_to(ROOT)} has it.")


def _is_like(value: Any, kind: type) -> bool:
    return isinstance(value, str if kind is str else (int, float))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


_COUNTS = (
    *("text.vocabulary", "task.classes", "model.head_width", "model.positions", "pretrain.length", "pretrain.batch"),
    *("pretrain.validations", "pretrain.curve_batches", "finetune.epochs", "finetune.batch", "memory.batch"),
    *("memory.length", "memory.vocabulary", "memory.updates", "translate.head_width", "translate.most_words"),
    *("translate.batch_tokens", "translate.warmup_updates", "translate.evaluations", "translate.dev_sentences"),
    *("translate.test_sentences", "translate.beam_size"),
)
_SHARES = ("task.valid_fraction", "pretrain.masked", "pretrain.warmup", "finetune.dropout", "measure.error_sparsity")


def _check(settings: DictConfig) -> None:
    parse_duration(str(settings.budget), "budget")
    parse_duration(str(settings.translate.budget), "translate.budget")
    seeds = list(settings.seeds)
    if not seeds or len(set(seeds)) < len(seeds) or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
        raise UserError(f"seeds: {seeds} should be at least one whole number from 0 on, each once.")
    for key in _COUNTS:
        value = OmegaConf.select(settings, key)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{key}: {value} should be a whole number from 1 on.")
    for key in _SHARES:
        value = OmegaConf.select(settings, key)
        if not 0 <= value < 1:
            raise UserError(f"{key}: {value} should be a share, from 0 to less than 1.")
    for key in ("finetune.rate", "prune.rate", "translate.rate", "model.embedding_std", "step_times"):
        value = OmegaConf.select(settings, key)
        if isinstance(value, (int, float)) and not 0 < value < math.inf:
            raise UserError(f"{key}: {value} should be above 0.")
    if settings.pretrain.validations < 4 or settings.pretrain.validations % 4:
        raise UserError(
            f"pretrain.validations: {settings.pretrain.validations} is no multiple of 4, at whose quarters checkpoints "
            "are kept."
        )
    try:
        parse_levels(",".join(map(str, settings.prune.levels)))
        for bits in settings.measure.bits:
            check_bits(bits)
    except UserError as error:
        told = str(error).replace("--sparsity-levels", "prune.levels:").replace("--bits", "measure.bits:")
        raise UserError(told) from None
    if settings.pretrain.batch not in settings.pretrain.rates:
        raise UserError(f"pretrain.batch: there is no rate for {settings.pretrain.batch} in pretrain.rates; add one.")


def names(settings: DictConfig, wanted: str = "") -> list[str]:
    """The experiments to run: all, or those in the comma-separated `wanted`. Raises UserError for an unknown one."""
    known = sorted(settings.experiments)
    chosen = [name for name in wanted.replace(",", " ").split() if name] or known
    for name in chosen:
        if name not in known:
            raise UserError(f"there is no experiment '{name}': choose among {', '.join(known)}.")
    for name in sorted(set(known) - set(chosen) - COMMITTED):
        near = difflib.get_close_matches(name, COMMITTED, 1, cutoff=0.8)
        if near:  # a change that would be ignored for hours
            raise UserError(
                f"experiments.{name}: there is no such experiment, but {near[0]}; write that, or add {name} to "
                "--experiment if it is one of yours."
            )
    return chosen


_KEYS = {
    "pretrain": {"size", "batch", "share", "data", "target", "seed"},
    "finetune": {"checkpoint", "batch", "rate", "dropout", "seed"},
    "translate": {"size", "seed"},
    "memory": {"share", "seed"},
}
_TEXTS = {"size", "share"}


def runs_of(settings: DictConfig, experiment: str) -> list[Run]:
    """Every run of an experiment, after those that it needs. Raises UserError for keys and values that cannot be."""
    grid = settings.experiments[experiment]
    where = f"experiments.{experiment}"
    if not isinstance(grid, DictConfig):
        raise UserError(f"{where}: {grid} should be keys with values, such as pretrain: {{size: [2l_64h]}}.")
    unknown = set(grid) - {*_KEYS, "prune", "measure", "select"}
    if unknown:
        raise UserError(f"{where}.{min(unknown)}: there is no such key.")
    for key, of in (("finetune", "pretrain"), ("prune", "finetune"), ("measure", "finetune"), ("select", "finetune")):
        if grid.get(key) and of not in grid:
            raise UserError(f"{where}.{key}: there is nothing that it could go on from; add {of}: {{...}}.")
    runs: list[Run] = []
    seeds = list(settings.seeds)
    for values in _product(grid, "memory", where, {"share": "none", "seed": seeds}):
        _check_share(values["share"], f"{where}.memory.share")
        runs.append(MemoryRun(values["share"], values["seed"]))
    for values in _product(grid, "translate", where, {"seed": seeds}):
        Size.parse(values["size"], settings.translate.head_width)
        runs.append(Translation(values["size"], values["seed"]))
    defaults = {"batch": settings.pretrain.batch, "share": "none", "data": 100, "target": None, "seed": seeds}
    for values in _product(grid, "pretrain", where, defaults):
        pretraining = _pretraining(settings, values, where)
        runs.append(pretraining)
        if "finetune" in grid:
            runs += _from(settings, grid, experiment, pretraining)
    return runs


def _pretraining(settings: DictConfig, values: dict[str, Any], where: str) -> Pretraining:
    Size.parse(values["size"], settings.model.head_width)
    if values["batch"] not in settings.pretrain.rates:
        raise UserError(f"{where}.pretrain.batch: there is no rate for {values['batch']} in pretrain.rates; add one.")
    _check_share(values["share"], f"{where}.pretrain.share")
    if values["data"] not in (100, *settings.text.subsets):
        raise UserError(f"{where}.pretrain.data: {values['data']} per cent is not in text.subsets; add it.")
    return Pretraining(**values)


def _check_share(share: str, where: str) -> None:
    if share not in SHARING:
        raise UserError(f"{where}: '{share}' is none of {', '.join(SHARING)}.")


def _from(settings: DictConfig, grid: DictConfig, experiment: str, pretraining: Pretraining) -> Iterator[Run]:
    """What is finetuned from one pretrained model, pruned, and measured."""
    where = f"experiments.{experiment}"
    defaults = {
        **{"checkpoint": 1.0, "batch": settings.finetune.batch, "rate": settings.finetune.rate},
        **{"dropout": settings.finetune.dropout, "seed": pretraining.seed},
    }
    finetunings = [Finetuning(pretraining, **values) for values in _product(grid, "finetune", where, defaults)]
    for finetuning in finetunings:
        if finetuning.checkpoint not in CHECKPOINTS:
            raise UserError(
                f"{where}.finetune.checkpoint: {finetuning.checkpoint} is none of {', '.join(map(str, CHECKPOINTS))}."
            )
    yield from finetunings
    starts: list[Finetuning | Grid] = list(finetunings)
    if grid.get("select"):
        starts = [Grid(experiment, pretraining, tuple(finetunings))]
        yield starts[0]
    for start in starts:
        pruning = Pruning(start) if grid.get("prune") else None
        if pruning:
            yield pruning
        yield Measuring(start, pruning)


def _product(grid: DictConfig, part: str, where: str, defaults: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of the values of a part of a grid; a list of parts is one after the other."""
    if part not in grid:
        return
    parts = grid[part] if isinstance(grid[part], ListConfig) else [grid[part]]
    for each in parts:
        given = OmegaConf.to_container(each, resolve=True) if isinstance(each, (DictConfig, ListConfig)) else each or {}
        if not isinstance(given, dict):
            raise UserError(f"{where}.{part}: it should be keys with values, such as size: [2l_64h].")
        unknown = set(given) - _KEYS[part]
        if unknown:
            raise UserError(f"{where}.{part}.{min(unknown)}: there is no such key.")
        values = {**defaults, **given}
        if part in ("pretrain", "translate") and "size" not in values:
            raise UserError(f"{where}.{part}.size: the sizes are missing, such as size: [2l_64h].")
        lists = [value if isinstance(value, list) else [value] for value in values.values()]
        for key, value in ((key, value) for key, each in zip(values, lists, strict=True) for value in each):
            if isinstance(value, str) != (key in _TEXTS) and not (key == "target" and value is None):
                kind = "text" if key in _TEXTS else "a number"
                raise UserError(f"{where}.{part}.{key}: {value} should be {kind}.")
        for combination in itertools.product(*lists):
            yield dict(zip(values, combination, strict=True))


# ------------------------------------------------------------------------------------------------ the clock


KEY = ("work", "size", "batch", "share", "length", "vocabulary", "head_width", "masked")
COLUMNS = (*KEY, "seconds_per_update", "processor")
"""Of the table of step times: what the time of an update depends on, the time, and where it was measured."""


def key_of(settings: DictConfig, run: Pretraining | Translation) -> tuple[str, ...]:
    """The values of KEY, as text. Of translation, sentences are of up to `length` words, in the vocabulary of
    Tensor2Tensor's problem."""
    if isinstance(run, Translation):
        ours = settings.translate
        values = ("translate", run.size, int(ours.batch_tokens), "none", ours.most_words, "", ours.head_width, "")
    else:
        of_text = (settings.pretrain.length, settings.text.vocabulary)
        values = ("pretrain", run.size, run.batch, run.share, *of_text, settings.model.head_width)
        values += (settings.pretrain.masked,)
    return tuple(map(str, values))


def seconds_per_update(settings: DictConfig, run: Pretraining | Translation) -> float:
    """What the calibrated clock charges for an update. Raises UserError where it was not measured."""
    if isinstance(settings.step_times, (int, float)):
        return float(settings.step_times)
    key = key_of(settings, run)
    for row in read_step_times(ROOT / str(settings.step_times)):
        if tuple(row[column] for column in KEY) == key:
            return float(row["seconds_per_update"])
    told = ", ".join(f"{column} {value}" for column, value in zip(KEY, key, strict=True) if value)
    raise UserError(
        f"{settings.step_times}: the seconds per update of {run.name} are not there ({told}); measure them with "
        "`make study-times`, with the same CONFIG and SET."
    )


def read_step_times(path: Path) -> list[dict[str, str]]:
    """The rows of the table; none where there is no such file. Raises UserError for a table of other columns."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise UserError(
                f"{path}: its columns are not {', '.join(COLUMNS)}; remove it and measure anew with `make study-times`."
            )
        return list(reader)


def updates_of(settings: DictConfig, run: Pretraining) -> int:
    """The updates that the budget is worth."""
    seconds = parse_duration(str(settings.budget), "budget")
    return max(1, math.ceil(seconds / seconds_per_update(settings, run)))
