"""What the report is made from: a results.json, or the run logs in the folders of runs by fairseq or Tensor2Tensor."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

from train_large import runlog
from train_large.errors import UserError
from train_large.report.results import (
    Amount,
    Budget,
    Clock,
    Count,
    Decoding,
    Natural,
    Run,
    Runs,
    Study,
    curve_from_lines,
    load,
    read_record,
    used_beside_training,
    with_whole_numbers,
)

_MOST_NAMES = 6  # in a title


@dataclass(frozen=True)
class _Facts:
    """What the first line of a run log says of the run, as far as the report asks. Logs differ in what they know."""

    layers: Count | None = None
    hidden: Count | None = None
    heads: Count | None = None
    parameters: Count | None = None
    parameters_without_embeddings: Natural | None = None
    learning_rate: Amount | None = None
    problem: str | None = None
    budget_seconds: Amount | None = None
    budget_clock: Clock | None = None
    seconds_per_update: Amount | None = None


def load_study(paths: Sequence[Path]) -> Study:
    """One results.json, or one or more folders of runs. Raises UserError for anything else."""
    if len(paths) == 1 and paths[0].name != runlog.NAME and not paths[0].is_dir():
        return load(paths[0])
    for path in paths:
        if path.is_file() and path.name != runlog.NAME:
            raise UserError(
                f"{path} is not the folder of a run: give a results.json alone, or folders that hold a {runlog.NAME}."
            )
    return read_runs([path.parent if path.name == runlog.NAME else path for path in paths])


def read_runs(folders: Sequence[Path]) -> Runs:
    """The runs in these folders (fairseq's SAVE_DIR, Tensor2Tensor's model_dir), named by what tells the folders apart.

    Raises UserError where there is no run log or a damaged one, where a folder is given twice, and where the runs are
    not of one tool and one problem, so that their perplexities are not to be compared."""
    whole = [folder.resolve() for folder in folders]
    for folder, resolved in zip(folders, whole):
        if whole.count(resolved) > 1:
            raise UserError(f"{folder} is given twice: give each run once.")
    parent, names = names_of(whole)
    logs = [_lines(folder) for folder in folders]
    facts = [_facts(folder, lines) for folder, lines in zip(folders, logs)]
    for folder, fact in zip(folders, facts):
        if fact.problem != facts[0].problem:
            raise UserError(
                f"{folders[0]} is a run of {_what(facts[0])} and {folder} of {_what(fact)}, whose perplexities are not "
                "to be compared: report them separately."
            )
    budgets = {(fact.budget_seconds, fact.budget_clock) for fact in facts}
    seconds, clock = budgets.pop() if len(budgets) == 1 else (None, None)
    listed = ", ".join(names) if len(names) <= _MOST_NAMES else f"{len(names)} runs"
    return Runs(
        title=f"{parent}: {listed}" if parent else listed,
        budget=Budget(seconds, clock) if seconds is not None and clock is not None else None,
        problem=facts[0].problem,
        decodings=tuple(dict.fromkeys(d for folder, lines in zip(folders, logs) for d in _decodings(folder, lines))),
        models=tuple(_run(*each) for each in zip(folders, names, facts, logs)),
    )


def names_of(folders: Sequence[Path]) -> tuple[str, list[str]]:
    """(the folder that all lie in, a short name for each): study/2l_64h/train and study/2l_128h/train to
    (study, [2l_64h, 2l_128h]). A folder alone has its own name, and no other folder is named."""
    if len(folders) == 1:
        return "", [folders[0].name]
    parts = [list(folder.parts) for folder in folders]
    parent = ""
    for end in (0, -1):
        while all(len(part) > 1 for part in parts) and len({part[end] for part in parts}) == 1:
            dropped = [part.pop(end) for part in parts][0]
            parent = dropped if end == 0 else parent
    return parent.strip("/"), ["/".join(part) for part in parts]


def _lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / runlog.NAME
    if not path.is_file():
        raise UserError(
            f"{folder} holds no {runlog.NAME}: give the folder of a budgeted run (fairseq's --save-dir, "
            "Tensor2Tensor's --output_dir), or a results.json."
        )
    try:
        lines = [with_whole_numbers(line) for line in runlog.read(str(path))]
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a run log: it is not UTF-8.") from None
    if not lines:
        raise UserError(f"{path} is empty: the run has not begun.")
    return lines


def _facts(folder: Path, lines: Sequence[dict[str, Any]]) -> _Facts:
    names = {field.name for field in dataclasses.fields(_Facts)}
    return _read(_Facts, {name: said for name, said in runlog.facts(lines).items() if name in names}, folder)


def _decodings(folder: Path, lines: Sequence[dict[str, Any]]) -> list[Decoding]:
    """How the translations behind each BLEU were made, where the log says it."""
    keys = {"sentences": "bleu_sentences", "beam_size": "beam_size", "alpha": "alpha"}
    said = [line for line in lines if line.get("bleu") is not None and all(key in line for key in keys.values())]
    return [_read(Decoding, {name: line[key] for name, key in keys.items()}, folder) for line in said]


def _run(folder: Path, name: str, facts: _Facts, lines: Sequence[dict[str, Any]]) -> Run:
    path = folder / runlog.NAME
    # fairseq's `valid`, the Tensor2Tensor plugin's `dev`, or else the subset that was validated first.
    subsets = [line["subset"] for line in lines if line["kind"] == "valid" and "subset" in line]
    subset = next((name for name in ("valid", "dev", *subsets) if name in subsets), "valid")
    curve = curve_from_lines(lines, path, subset)
    known = {field.name: getattr(facts, field.name) for field in dataclasses.fields(Run) if hasattr(facts, field.name)}
    # Not the last line: a checkpoint may be evaluated when the training has gone on.
    last = max(lines, key=lambda line: (line["updates"], line["train_seconds"]))
    counters = {counter: last[counter] for counter in ("updates", "train_seconds", "tokens", "flops")}
    # The wall clock goes on while the last update is validated and saved, which is not what the budget was used for.
    trained = next(line for line in lines if line["updates"] == last["updates"])
    rest: dict[str, Any] = {
        "used_seconds": used_beside_training(dataclasses.asdict(facts), trained),
        "name": name,
        "run_log": str(path),
        "perplexity": curve[-1].perplexity if curve else None,
        "curve": [],
    }
    return dataclasses.replace(_read(Run, {**known, **counters, **rest}, folder), curve=curve)


def _read(kind: Any, value: dict[str, Any], folder: Path) -> Any:
    try:
        return read_record(kind, value)
    except ValueError as error:
        raise UserError(f"{folder / runlog.NAME}: {error}: the log is damaged or of another program.") from None


def _what(facts: _Facts) -> str:
    return f"Tensor2Tensor's problem {facts.problem}" if facts.problem else "fairseq"
