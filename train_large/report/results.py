"""results.json: what one experiment measured, as frozen records, read and written with every field checked.

The dataclasses are the format. A field's type and bounds stand beside it, and `load` says which field of which file is
wrong. Lists in the file are tuples here. There are two kinds of experiment: `Results`, of models pretrained, finetuned
and compressed, and `TranslationResults`, of models trained to translate. A file with the field `translation` is of the
second kind. `Runs` is what run logs alone tell."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Sequence, TypeVar, Union

from train_large import runlog
from train_large.budget import seconds_used
from train_large.errors import UserError
from train_large.files import write_text

# Numbers and the bounds they lie in.
Number = Annotated[float, (-math.inf, math.inf)]
Count = Annotated[int, (1, math.inf)]
Natural = Annotated[int, (0, math.inf)]
Amount = Annotated[float, (0, math.inf)]
Share = Annotated[float, (0, 1)]
Perplexity = Annotated[float, (1, math.inf)]
Bleu = Annotated[float, (0, 100)]

Clock = Literal["train", "wall", "calibrated"]


@dataclass(frozen=True)
class Computer:
    processor: str
    cores: Count
    memory_gib: Amount
    python: str


@dataclass(frozen=True)
class Machine(Computer):
    """With the versions of what fairseq runs need."""

    torch: str
    fairseq: str


@dataclass(frozen=True)
class TensorFlowMachine(Computer):
    """With the versions of what Tensor2Tensor runs need."""

    tensorflow: str
    tensor2tensor: str


@dataclass(frozen=True)
class Budget:
    """What each size was given for pretraining."""

    seconds: Amount
    clock: Clock


@dataclass(frozen=True)
class Pretraining:
    corpus: str
    tokens: Count
    vocabulary: Count
    batch_tokens: Count


@dataclass(frozen=True)
class Task:
    """The downstream task: numbers of examples, and `majority`, the accuracy of always guessing the commoner class."""

    name: str
    train: Count
    valid: Count
    metric: Literal["accuracy"]
    majority: Share


@dataclass(frozen=True)
class Decoding:
    """How many sentences were translated to be scored, by beam search with this length penalty alpha."""

    sentences: Count
    beam_size: Count
    alpha: Amount


@dataclass(frozen=True)
class Translation:
    """What was translated and how: numbers of sentence pairs, entries of the vocabulary, tokens a batch.

    `decoding` made the translations of the test set, from the average of `averaged` checkpoints (1: the last one).
    `signature` is sacreBLEU's. `curve_decoding` made the translations of dev sentences for the BLEU of the curves; None
    where there is none."""

    corpus: str
    source: str
    target: str
    train: Count
    dev: Count
    test: Count
    vocabulary: Count
    batch_tokens: Count
    decoding: Decoding
    averaged: Count
    signature: str
    curve_decoding: Decoding | None = None


@dataclass(frozen=True)
class BleuScores:
    """BLEU on the test set, 0 to 100, by three measures that are not to be compared with each other.

    `paper`: tokenised, case-sensitive, compounds split. `t2t`: Tensor2Tensor's own, case-sensitive. `sacrebleu`: of
    detokenised text, by the signature. `paper_error` is the standard error of `paper` over the sentences of the test
    set, by bootstrap; None where it was not measured."""

    paper: Bleu
    t2t: Bleu
    sacrebleu: Bleu
    paper_error: Amount | None = None


@dataclass(frozen=True)
class CurvePoint:
    """One validation in training. `train_seconds` is the training clock, `flops` the training cost so far.

    `used_seconds` is what was used of the budget on its own clock, where that is another; None on the training clock,
    and where it is not known.

    `bleu` is of real translations, by the paper's measure; `approx_bleu` is T2T's, of words each chosen after the right
    ones (teacher forcing)."""

    updates: Natural
    train_seconds: Amount
    flops: Amount
    perplexity: Perplexity
    bleu: Bleu | None = None
    approx_bleu: Bleu | None = None
    used_seconds: Amount | None = None

    def seconds_on(self, clock: Clock) -> float:
        """Seconds so far on a clock that a study's `clock` names."""
        return _seconds_on(clock, self)


@dataclass(frozen=True)
class Finetuned:
    accuracy: Share
    seconds: Amount
    updates: Natural


@dataclass(frozen=True)
class Compressed:
    """One model, pruned to `sparsity` and stored at `bits` a weight.

    `bytes` is what it costs to store: `bits` for each parameter kept, and the masks. `bytes_paper` is the paper's
    accounting (section 4.1): nonzero * bits / 8. `file_bytes` is the size of the file that holds the model at these
    bits, with its dictionary, BPE, labels and configuration inside; None where none was written."""

    sparsity: Share
    bits: Literal[32, 8, 6, 4]
    accuracy: Share
    parameters: Count
    nonzero: Natural
    bytes: Count
    bytes_paper: Natural
    recovery_updates: Natural
    recovered: bool
    file_bytes: Count | None = None

    @property
    def is_compressed(self) -> bool:
        return self.bits < 32 or self.sparsity > 0

    @property
    def stored_bytes(self) -> int:
        """What storing it takes: the size of the real file, or what is computed for the weights where there is none."""
        return self.bytes if self.file_bytes is None else self.file_bytes


@dataclass(frozen=True)
class WeightError:
    """How far the finetuned weights move when quantized to `bits`, or when this share of them is set to zero.

    `kind` is a kind of module, or `all`. The rest is defined in train_large/compression/weight_error.py; `deviation` is
    that of the finetuned weights themselves. Pruned without training after it, unlike the entries of `compressed`."""

    sparsity: Share
    bits: Literal[32, 8, 6, 4]
    kind: str
    parameters: Count
    mean: Number
    mean_absolute: Amount
    variance: Amount
    deviation: Amount
    relative: Amount

    @property
    def normalized(self) -> float | None:
        """The mean of |w - w'| in standard deviations of the weights; None where those are all the same."""
        return self.mean_absolute / self.deviation if self.deviation else None


@dataclass(frozen=True)
class Run:
    """One model in training. None stands for what its run log does not know.

    `train_seconds` is the training clock; `used_seconds` is what was used of the budget when the training ended, as in
    `CurvePoint`."""

    name: str
    layers: Count | None
    hidden: Count | None
    heads: Count | None
    parameters: Count | None
    parameters_without_embeddings: Natural | None
    learning_rate: Amount | None
    run_log: str
    updates: Natural
    train_seconds: Amount
    tokens: Natural
    flops: Amount
    perplexity: Perplexity | None
    curve: tuple[CurvePoint, ...]
    used_seconds: Amount | None = dataclasses.field(default=None, kw_only=True)

    def seconds_on(self, clock: Clock) -> float:
        """Seconds in the end on a clock that a study's `clock` names."""
        return _seconds_on(clock, self)


def _seconds_on(clock: Clock, moment: CurvePoint | Run) -> float:
    if clock == "train":
        return moment.train_seconds
    assert moment.used_seconds is not None, "a study whose clock this is knows it of all"
    return moment.used_seconds


@dataclass(frozen=True)
class SizeInStudy(Run):
    """One size of a study, of which everything is known. `run_log` is relative to results.json."""

    layers: Count
    hidden: Count
    heads: Count
    parameters: Count
    parameters_without_embeddings: Natural
    learning_rate: Amount
    perplexity: Perplexity


@dataclass(frozen=True)
class TranslationModel(SizeInStudy):
    """One size, trained to translate within the budget; `perplexity` is that of the dev set at its end, per token."""

    scores: BleuScores


@dataclass(frozen=True)
class Model(SizeInStudy):
    """One size, pretrained within the budget, finetuned and compressed."""

    finetuned: Finetuned
    compressed: tuple[Compressed, ...]
    weight_errors: tuple[WeightError, ...] | None = None

    def at(self, sparsity: float, bits: int) -> Compressed | None:
        """The measurement at this sparsity and bit width, if there is one."""
        return next((c for c in self.compressed if c.bits == bits and abs(c.sparsity - sparsity) < 0.005), None)

    def weight_errors_at(self, sparsity: float, bits: int) -> dict[str, WeightError]:
        """The weight errors by kind of module at this sparsity and bit width; empty where they were not measured."""
        errors = self.weight_errors or ()
        return {e.kind: e for e in errors if e.bits == bits and abs(e.sparsity - sparsity) < 0.005}


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and what was measured here. `shows` is None where it cannot be told."""

    claim: str
    section: str
    shows: bool | None
    measured: str


AnyRun = TypeVar("AnyRun", bound=Run)


class _OfSizes(Generic[AnyRun]):
    budget: Budget | None
    models: tuple[AnyRun, ...]

    @property
    def clock(self) -> Clock:
        """The clock to tell the time of all models by: the budget's; the training clock where they have no budget in
        common, or where what was used of it is not known of all."""
        used = [used for model in self.models for used in (model.used_seconds, *(p.used_seconds for p in model.curve))]
        known = None not in used
        return self.budget.clock if self.budget is not None and known else "train"

    @property
    def by_size(self) -> tuple[AnyRun, ...]:
        """The models, smallest first: by parameters if those are known of all, else by FLOPs per token."""
        known = all(model.parameters for model in self.models)

        def size(model: Run) -> float:
            return (model.parameters or 0) if known else model.flops / max(1, model.tokens)

        return tuple(sorted(self.models, key=lambda model: (size(model), model.name)))


@dataclass(frozen=True)
class Runs(_OfSizes[Run]):
    """Runs of one tool, as their logs tell. `problem` is Tensor2Tensor's name of it; None for fairseq's runs.

    `budget` is None where the runs were given different ones, or none. `decodings` are those of BLEU at validations:
    more than one if the runs differ in it."""

    title: str
    budget: Budget | None
    problem: str | None
    decodings: tuple[Decoding, ...]
    models: tuple[Run, ...]


@dataclass(frozen=True)
class TranslationResults(_OfSizes[TranslationModel]):
    format: Literal[1]
    title: str
    created: str
    command: str
    machine: TensorFlowMachine
    budget: Budget
    translation: Translation
    models: tuple[TranslationModel, ...]
    claims: tuple[Claim, ...] | None = None


@dataclass(frozen=True)
class Results(_OfSizes[Model]):
    format: Literal[1]
    title: str
    created: str
    command: str
    machine: Machine
    budget: Budget
    pretraining: Pretraining
    task: Task
    models: tuple[Model, ...]
    claims: tuple[Claim, ...] | None = None

    @property
    def has_files(self) -> bool:
        """Whether there is a real file for any of the measurements."""
        return any(entry.file_bytes is not None for model in self.models for entry in model.compressed)


Study = Union[Results, TranslationResults, Runs]


def load(path: Path) -> Results | TranslationResults:
    """Reads results.json. Raises UserError, with the file and the field, for whatever is missing, unknown or wrong."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror}): give the results.json of a finished run.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): give the results.json of a finished run.") from None
    try:
        return parse(value)
    except ValueError as error:
        raise UserError(f"{path}: {error}: mend the field or let the run write the file again.") from None


def save(results: Results | TranslationResults, path: Path) -> None:
    """Writes results.json, whole or not at all.

    Raises ValueError, with the field, for what `load` would not take (a perplexity of infinity, say); UserError where
    the file cannot be written."""
    value = dataclasses.asdict(results, dict_factory=_without_absent)
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    parse(json.loads(text))
    write_text(path, text)


def _without_absent(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """A record's fields without those that may be left out and are. A claim's verdict may be null, but not absent."""
    return {name: value for name, value in fields if value is not None or name not in _MAY_BE_ABSENT}


_MAY_BE_ABSENT = {
    field.name
    for record in (Compressed, Model, Results, CurvePoint, Translation, BleuScores, TranslationResults)
    for field in dataclasses.fields(record)
    if field.default is None
}


def parse(value: Any) -> Results | TranslationResults:
    """Records from plain JSON values. Raises ValueError that begins with the field: `models[2].compressed[0].bits`."""
    translated = isinstance(value, dict) and "translation" in value
    results: Results | TranslationResults = _read(TranslationResults if translated else Results, value, "")
    _check_models(results.models)
    if isinstance(results, Results):
        _check_compressed(results.models)
    else:
        _check_translation(results)
    try:
        datetime.fromisoformat(results.created.replace("Z", "+00:00"))
    except ValueError:
        raise ValueError(f"created is {results.created!r}, not an ISO 8601 time") from None
    return results


def _check_models(models: Sequence[Run]) -> None:
    names = [model.name for model in models]
    if not names:
        raise ValueError("models is empty")
    for m, model in enumerate(models):
        where = f"models[{m}]"
        if names.index(model.name) != m:
            raise ValueError(f"{where}.name {model.name!r} is there twice")
        for i, (before, after) in enumerate(zip(model.curve, model.curve[1:]), start=1):
            if after.updates <= before.updates:
                raise ValueError(f"{where}.curve[{i}].updates does not rise")


def _check_translation(results: TranslationResults) -> None:
    translation = results.translation
    for name, decoding, most in (
        ("decoding", translation.decoding, translation.test),
        ("curve_decoding", translation.curve_decoding, translation.dev),
    ):
        if decoding is not None and decoding.sentences > most:
            raise ValueError(f"translation.{name}.sentences is {decoding.sentences}, more than the {most} there are")
    for m, model in enumerate(results.models):
        for i, point in enumerate(model.curve):
            if point.bleu is not None and translation.curve_decoding is None:
                raise ValueError(f"models[{m}].curve[{i}].bleu is there, but not translation.curve_decoding")
    # Some errors measured and others not would make the verdicts depend on which two sizes are compared.
    if len({model.scores.paper_error is None for model in results.models}) > 1:
        raise ValueError("models give scores.paper_error for some sizes and not for others")


def _check_compressed(models: Sequence[Model]) -> None:
    for m, model in enumerate(models):
        where = f"models[{m}]"
        seen = set()
        for i, entry in enumerate(model.compressed):
            if entry.nonzero > entry.parameters:
                raise ValueError(f"{where}.compressed[{i}].nonzero is more than its parameters")
            if (entry.sparsity, entry.bits) in seen:
                raise ValueError(f"{where}.compressed[{i}] repeats sparsity {entry.sparsity} at {entry.bits} bits")
            seen.add((entry.sparsity, entry.bits))
        kinds = [(error.sparsity, error.bits, error.kind) for error in model.weight_errors or ()]
        for i, kind in enumerate(kinds):
            if kinds.index(kind) != i:
                raise ValueError(
                    f"{where}.weight_errors[{i}] repeats {kind[2]!r} at sparsity {kind[0]}, {kind[1]} bits"
                )
    # Sizes of files and sizes of weights alone are not to be compared with each other.
    if len({entry.file_bytes is None for model in models for entry in model.compressed}) > 1:
        raise ValueError("models give file_bytes for some entries of compressed and not for others")


def _read(kind: Any, value: Any, where: str) -> Any:
    """The JSON value as `kind` (a dataclass, tuple, union, literal or plain type), or ValueError naming `where`."""
    here = where or "the file"
    if dataclasses.is_dataclass(kind):
        return read_record(kind, value, where)
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Annotated:
        number = _read(arguments[0], value, where)
        least, most = arguments[1]
        if not least <= number <= most:
            bounds = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
            raise ValueError(f"{here} is {value!r}, and must be {bounds}")
        return number
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{here} is not a list")
        return tuple(_read(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if typing.get_origin(kind) is Literal:
        if value not in arguments or isinstance(value, (bool, float)):
            raise ValueError(f"{here} is {value!r}, not {' or '.join(map(repr, arguments))}")
        return value
    if type(None) in arguments:
        return None if value is None else _read(arguments[0], value, where)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        word = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[kind]
        raise ValueError(f"{here} is {value!r}, not {word}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{here} is {value}, not a finite number")
    return value


def read_record(kind: Any, value: Any, where: str = "") -> Any:
    """The JSON object as a record of this kind, or ValueError naming the field that is missing, unknown or wrong."""
    dot = f"{where}." if where else ""
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'the file'} is not an object")
    types = typing.get_type_hints(kind, include_extras=True)
    for name in value:
        if name not in types:
            raise ValueError(f"{dot}{name} is not a field of this format")
    read = {}
    for known in dataclasses.fields(kind):
        if known.name in value:
            read[known.name] = _read(types[known.name], value[known.name], dot + known.name)
        elif known.default is dataclasses.MISSING:
            raise ValueError(f"{dot}{known.name} is missing")
    return kind(**read)


def curve_from_run_log(path: Path, subset: str = "valid") -> tuple[CurvePoint, ...]:
    """The validation points of one subset in a run log (run.jsonl), in order of updates.

    fairseq calls it `valid`, the Tensor2Tensor plugin `dev`. A point measured twice, as after a resume or by a last
    validation at the stop, counts as it was measured last; a BLEU from either line is kept. Raises UserError if a
    validation line lacks a number."""
    return curve_from_lines(runlog.read(path), path, subset)


def used_beside_training(facts: dict[str, Any], line: dict[str, Any]) -> float | None:
    """`used_seconds` at a line of a run log with these facts."""
    return None if facts.get("budget_clock") in (None, "train") else seconds_used(facts, line)


def with_whole_numbers(line: dict[str, Any]) -> dict[str, Any]:
    """A line of a run log whose counts are whole numbers: numpy's were written as floating-point numbers."""
    return {name: int(v) if isinstance(v, float) and v.is_integer() else v for name, v in line.items()}


def curve_from_lines(lines: Sequence[dict[str, Any]], path: Path, subset: str) -> tuple[CurvePoint, ...]:
    """As curve_from_run_log, of the lines of the log read from `path`."""
    measured: dict[int, dict[str, Any]] = {}
    facts = runlog.facts(lines)
    for line in map(with_whole_numbers, lines):
        if line["kind"] == "valid" and line.get("subset", subset) == subset:
            known = {
                field.name: line[field.name]
                for field in dataclasses.fields(CurvePoint)
                if field.name in line and (line[field.name] is not None or field.default is dataclasses.MISSING)
            }
            known["used_seconds"] = used_beside_training(facts, line)
            measured.setdefault(line["updates"], {}).update(known)
    try:
        points = [read_record(CurvePoint, point) for _, point in sorted(measured.items())]
    except ValueError as error:
        lacking = str(error).removesuffix(" is missing")
        if lacking != str(error):
            raise UserError(f"{path}: a validation line has no {lacking!r}: the log is of another program.") from None
        raise UserError(f"{path}: in a validation line, {error}: the run diverged or the log is damaged.") from None
    return tuple(points)
