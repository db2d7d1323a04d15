"""results.json: what one experiment measured, as frozen records, read and written with every field checked.

The dataclasses are the format. A field's type and bounds stand beside it, and `load` says which field of which file is
wrong. Lists in the file are tuples here."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from train_large import runlog
from train_large.errors import UserError
from train_large.files import whole

# Numbers and the bounds they lie in.
Number = Annotated[float, (-math.inf, math.inf)]
Count = Annotated[int, (1, math.inf)]
Natural = Annotated[int, (0, math.inf)]
Amount = Annotated[float, (0, math.inf)]
Share = Annotated[float, (0, 1)]
Perplexity = Annotated[float, (1, math.inf)]


@dataclass(frozen=True)
class Machine:
    processor: str
    cores: Count
    memory_gib: Amount
    python: str
    torch: str
    fairseq: str


@dataclass(frozen=True)
class Budget:
    """What each size was given for pretraining."""

    seconds: Amount
    clock: Literal["train", "wall", "calibrated"]


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
class CurvePoint:
    """One validation during pretraining. `train_seconds` is the budget's clock, `flops` the training cost so far."""

    updates: Natural
    train_seconds: Amount
    flops: Amount
    perplexity: Perplexity


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
class Model:
    """One size, pretrained within the budget, finetuned and compressed. `run_log` is relative to results.json."""

    name: str
    layers: Count
    hidden: Count
    heads: Count
    parameters: Count
    parameters_without_embeddings: Natural
    learning_rate: Amount
    run_log: str
    updates: Natural
    train_seconds: Amount
    tokens: Natural
    flops: Amount
    perplexity: Perplexity
    curve: tuple[CurvePoint, ...]
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


@dataclass(frozen=True)
class Results:
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
    def by_size(self) -> tuple[Model, ...]:
        """The models, smallest first."""
        return tuple(sorted(self.models, key=lambda model: (model.parameters, model.name)))

    @property
    def has_files(self) -> bool:
        """Whether there is a real file for any of the measurements."""
        return any(entry.file_bytes is not None for model in self.models for entry in model.compressed)


def load(path: Path) -> Results:
    """Reads results.json. Raises UserError, with the file and the field, for whatever is missing, unknown or wrong."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror}): give the results.json of a finished run.") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): give the results.json of a finished run.") from None
    try:
        return parse(value)
    except ValueError as error:
        raise UserError(f"{path}: {error}: mend the field or let the run write the file again.") from None


def save(results: Results, path: Path) -> None:
    """Writes results.json, whole or not at all.

    Raises ValueError, with the field, for what `load` would not take (a perplexity of infinity, say); UserError where
    the file cannot be written."""
    value = dataclasses.asdict(results, dict_factory=_without_absent)
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    parse(json.loads(text))
    write_whole(path, text)


def _without_absent(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """A record's fields without those that may be left out and are. A claim's verdict may be null, but not absent."""
    return {name: value for name, value in fields if value is not None or name not in _MAY_BE_ABSENT}


_MAY_BE_ABSENT = {
    field.name
    for record in (Compressed, Model, Results)
    for field in dataclasses.fields(record)
    if field.default is None
}


def write_whole(path: Path, text: str) -> None:
    """Writes a text file aside, then renames it. Raises UserError if that fails, and leaves what was there before."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror}): choose another place.") from None
    with whole(path) as aside:
        aside.write_text(text, encoding="utf-8")


def parse(value: Any) -> Results:
    """Records from plain JSON values. Raises ValueError that begins with the field: `models[2].compressed[0].bits`."""
    results = _read(Results, value, "")
    names = [model.name for model in results.models]
    if not names:
        raise ValueError("models is empty")
    for m, model in enumerate(results.models):
        where = f"models[{m}]"
        if names.index(model.name) != m:
            raise ValueError(f"{where}.name {model.name!r} is there twice")
        for i, (before, after) in enumerate(zip(model.curve, model.curve[1:]), start=1):
            if after.updates <= before.updates:
                raise ValueError(f"{where}.curve[{i}].updates does not rise")
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
    if len({entry.file_bytes is None for model in results.models for entry in model.compressed}) > 1:
        raise ValueError("models give file_bytes for some entries of compressed and not for others")
    try:
        datetime.fromisoformat(results.created.replace("Z", "+00:00"))
    except ValueError:
        raise ValueError(f"created is {results.created!r}, not an ISO 8601 time") from None
    return results


def _read(kind: Any, value: Any, where: str) -> Any:
    """The JSON value as `kind` (a dataclass, tuple, union, literal or plain type), or ValueError naming `where`."""
    here = where or "the file"
    if dataclasses.is_dataclass(kind):
        return _read_record(kind, value, where)
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


def _read_record(kind: Any, value: Any, where: str) -> Any:
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
    """The validation points of one subset in a run log (SAVE_DIR/run.jsonl), in order of updates.

    A point measured twice, as after a resume or by a last validation at the stop, counts as it was measured last.
    Raises UserError if a validation line lacks a number."""
    points = {}
    for line in runlog.read(path):
        if line["kind"] != "valid" or line.get("subset", subset) != subset:
            continue
        try:
            point = _read_record(CurvePoint, {f.name: line[f.name] for f in dataclasses.fields(CurvePoint)}, "")
        except KeyError as error:
            raise UserError(f"{path}: a validation line has no {error}: the log is of another program.") from None
        except ValueError as error:
            raise UserError(f"{path}: in a validation line, {error}: the run diverged or the log is damaged.") from None
        points[point.updates] = point
    return tuple(points[updates] for updates in sorted(points))
