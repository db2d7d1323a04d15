"""The process behind each run of a study: its folder, the jobs that it needs first, and its command."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import experiments
from experiments import (
    ROOT,
    Finetuning,
    Grid,
    Measuring,
    MemoryRun,
    Pretraining,
    Pruning,
    Run,
    Translation,
)
from omegaconf import DictConfig, OmegaConf

sys.path += [str(ROOT / "user_dir_examples" / folder) for folder in ("pocket", "pocket_mt")]

import recipe as pocket  # noqa: E402

from train_large.compression.levels import level_name  # noqa: E402
from train_large.errors import UserError  # noqa: E402
from train_large.files import whole  # noqa: E402

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Data:
    """The text, the task or the sentence pairs, made ready: `name` is one of these."""

    name: str


Work = Run | Data

_KINDS: dict[type, str] = {
    Data: "data",
    Pretraining: "pretrain",
    Finetuning: "finetune",
    Grid: "select",
    Pruning: "prune",
    Measuring: "measure",
    MemoryRun: "memory",
    Translation: "translate",
}


@dataclass(frozen=True)
class Job:
    """`kind/name` is the folder below the study's, and what the job is called."""

    kind: str
    name: str
    work: Work
    needs: tuple[str, ...]

    @property
    def path(self) -> str:
        return f"{self.kind}/{self.name}"


def job_of(work: Work) -> Job:
    """The job that does this work."""
    return Job(_KINDS[type(work)], work.name, work, tuple(job_of(need).path for need in _needs(work)))


def _needs(work: Work) -> list[Work]:
    match work:
        case Pretraining():
            return [Data("text")]
        case Finetuning():
            return [Data("task"), work.pretraining]
        case Grid():
            return list(work.finetunings)
        case Pruning():
            return [work.start]
        case Measuring():
            return [work.pruning or work.start]
        case Translation():
            return [Data("pairs")]
        case Data(name="task"):
            return [Data("text")]
    return []


def all_jobs(settings: DictConfig, names: Iterable[str]) -> dict[str, Job]:
    """Every job of these experiments by its path, those that others need included."""
    jobs: dict[str, Job] = {}
    waiting: list[Work] = [run for name in names for run in experiments.runs_of(settings, name)]
    while waiting:
        work = waiting.pop()
        job = job_of(work)
        if job.path not in jobs:
            jobs[job.path] = job
            waiting += _needs(work)
    return jobs


def folder(settings: DictConfig, work: Work) -> Path:
    """Where the job leaves what it makes."""
    return study_folder(settings) / job_of(work).path


def study_folder(settings: DictConfig) -> Path:
    return ROOT / str(settings.out)


def settings_file(settings: DictConfig) -> Path:
    """Where a study's settings lie for its jobs."""
    return study_folder(settings) / "settings.yaml"


def save_settings(settings: DictConfig) -> None:
    study_folder(settings).mkdir(parents=True, exist_ok=True)
    with whole(settings_file(settings)) as aside:
        OmegaConf.save(settings, aside)


# ------------------------------------------------------------------------------------------------ commands


def command(settings: DictConfig, work: Work) -> list[str]:
    """The command of a job, once those that it needs are done. Raises UserError where something of theirs is gone."""
    match work:
        case Pretraining():
            return _pretrain(settings, work)
        case Finetuning():
            return _finetune(settings, work)
        case Pruning():
            return _prune(settings, work)
        case Measuring():
            return _measure(settings, work)
        case Translation():
            return _helper("translation.py", settings, work.name)
        case MemoryRun():
            return _helper("memory.py", settings, work.name)
        case Grid():
            return _helper("select_best.py", settings, work.name)
    return _helper("data.py", settings, work.name)


def _helper(script: str, settings: DictConfig, name: str) -> list[str]:
    return [sys.executable, str(HERE / script), str(settings_file(settings)), name]


def recipe_of(settings: DictConfig, run: Pretraining) -> pocket.Recipe:
    """What the pocket study's commands are made from."""
    pretrain, finetune = settings.pretrain, settings.finetune
    return replace(
        pocket.Recipe(),
        head_width=settings.model.head_width,
        vocabulary=settings.text.vocabulary,
        length=pretrain.length,
        positions=settings.model.positions,
        embedding_std=settings.model.embedding_std,
        masked=pretrain.masked,
        batch=run.batch,
        learning_rate=pretrain.rates[run.batch],
        warmup=pretrain.warmup,
        validations=pretrain.validations,
        curve_batches=pretrain.curve_batches,
        finetune_epochs=finetune.epochs,
        finetune_batch=finetune.batch,
        finetune_learning_rate=finetune.rate,
        finetune_dropout=finetune.dropout,
        prune_learning_rate=settings.prune.rate,
        sparsity=tuple(settings.prune.levels),
    )


def recipe_to_finetune(settings: DictConfig, run: Finetuning) -> pocket.Recipe:
    return replace(
        recipe_of(settings, run.pretraining),
        finetune_batch=run.batch,
        finetune_learning_rate=run.rate,
        finetune_dropout=run.dropout,
    )


def text_data(settings: DictConfig, percent: float = 100) -> Path:
    whole = study_folder(settings) / "data" / "text" / "prepared" / "data-bin"
    return whole if percent == 100 else whole.with_name(f"data-bin-{percent:g}pct")


def task_data(settings: DictConfig) -> Path:
    return study_folder(settings) / "data" / "task" / "prepared"


def _pretrain(settings: DictConfig, run: Pretraining) -> list[str]:
    interval = validation_interval(settings, run)
    each = experiments.seconds_per_update(settings, run)
    recipe = recipe_of(settings, run)
    data, size = text_data(settings, run.data), recipe.size(run.size)
    return [
        *pocket.pretrain(data, folder(settings, run), size, recipe, settings.budget, interval),
        *["--budget-clock", "calibrated", "--seconds-per-update", repr(each)],
        *["--share-layers", run.share, "--seed", str(run.seed)],
        # Kept for the study of convergence: a quarter, a half and three quarters of the way.
        *["--keep-interval-updates-pattern", str(interval * settings.pretrain.validations // 4)],
        *(["--target-ppl", str(run.target)] if run.target is not None else []),
    ]


def validation_interval(settings: DictConfig, run: Pretraining) -> int:
    """Updates from one point of the curve to the next."""
    return max(1, math.ceil(experiments.updates_of(settings, run) / settings.pretrain.validations))


def checkpoint(settings: DictConfig, run: Pretraining, share: float) -> Path:
    """The checkpoint at this share of the pretraining."""
    if share == 1:
        return folder(settings, run) / "checkpoint_last.pt"
    updates = checkpoint_updates(settings, run, share)
    found = list(folder(settings, run).glob(f"checkpoint_*_{updates}.pt"))  # fairseq has the epoch in the name
    if len(found) != 1:
        raise UserError(
            f"{folder(settings, run)}: there is no checkpoint of {updates} updates; remove the folder to run it again."
        )
    return found[0]


def checkpoint_updates(settings: DictConfig, run: Pretraining, share: float) -> int:
    """The updates after which this share of the pretraining, less than all of it, is kept."""
    return round(share * settings.pretrain.validations) * validation_interval(settings, run)


def _examples(settings: DictConfig) -> int:
    prepared = json.loads((task_data(settings) / "prepared.json").read_text())
    return sum(prepared["summary"]["splits"]["train"].values())


def _finetune(settings: DictConfig, run: Finetuning) -> list[str]:
    recipe = recipe_to_finetune(settings, run)
    start = checkpoint(settings, run.pretraining, run.checkpoint)
    arguments = (recipe.size(run.pretraining.size), recipe, settings.task.classes, _examples(settings))
    return [
        *pocket.finetune(task_data(settings), folder(settings, run), *arguments, start),
        *["--share-layers", run.pretraining.share, "--seed", str(run.seed)],
    ]


def finetuned(settings: DictConfig, start: Finetuning | Grid) -> tuple[Path, Finetuning]:
    """The checkpoint to compress, and the finetuning that it is of; of a grid, once it has been chosen."""
    if isinstance(start, Finetuning):
        return folder(settings, start) / "checkpoint_best.pt", start
    best = json.loads((folder(settings, start) / "best.json").read_text())["name"]
    (run,) = [run for run in start.finetunings if run.name == best]
    return folder(settings, run) / "checkpoint_best.pt", run


def _prune(settings: DictConfig, run: Pruning) -> list[str]:
    path, start = finetuned(settings, run.start)
    recipe = recipe_to_finetune(settings, start)
    arguments = (recipe.size(start.pretraining.size), recipe, settings.task.classes, _examples(settings))
    return [
        *pocket.prune(task_data(settings), folder(settings, run), *arguments, path),
        *["--share-layers", start.pretraining.share, "--seed", str(start.seed)],
    ]


def _measure(settings: DictConfig, run: Measuring) -> list[str]:
    path, start = finetuned(settings, run.start)
    levels = [{"sparsity": 0.0, "checkpoint": str(path)}]
    if run.pruning:
        pruned = folder(settings, run.pruning)
        for level in settings.prune.levels:
            levels.append(
                {"sparsity": level, "checkpoint": str(pruned / f"checkpoint_sparsity_{level_name(level)}.pt")}
            )
    request = {
        "user_dir": str(pocket.USER_DIR),
        "pretrained": str(checkpoint(settings, start.pretraining, start.checkpoint)),
        "text_data": str(text_data(settings)),
        "task_data": str(task_data(settings)),
        "bits": list(settings.measure.bits),
        "levels": levels,
        "finetuned": str(path),
        "pruned": settings.measure.error_sparsity,
    }
    script = ROOT / "user_dir_examples" / "pocket" / "evaluate.py"
    return [sys.executable, str(script), json.dumps(request), str(folder(settings, run) / "measured.json")]


def settings_of(settings: DictConfig, work: Work) -> str:
    """What a job's outcome depends on besides its name and the code, as text; the jobs that it needs are not in it."""
    every = OmegaConf.to_container(settings)
    assert isinstance(every, dict)
    pretrain, finetune = every["pretrain"], every["finetune"]
    rates = pretrain.pop("rates")
    pretrain.pop("batch")
    match work:
        case Data():
            parts = every[{"text": "text", "task": "task", "pairs": "translate"}[work.name]]
            files = _own_files(settings, work.name)
            if files:
                parts = [parts, [_digest(path) for path in files]]
        case Pretraining():
            parts = [every["budget"], every["model"], pretrain, rates[work.batch]]
            parts.append(experiments.seconds_per_update(settings, work))
        case Finetuning():
            parts = [every["model"], every["task"]["classes"], finetune["epochs"]]
        case Translation():
            parts = [every["translate"], experiments.seconds_per_update(settings, work)]
        case _:
            parts = [every["prune"], every["measure"], every["memory"]]
    return json.dumps(parts, sort_keys=True)


def _own_files(settings: DictConfig, name: str) -> list[Path]:
    """The files or folders of the user that this data is made from; none: the pocket study's own."""
    given = {"text": settings.text.files, "task": [settings.task.source], "pairs": [settings.translate.pairs]}[name]
    return [Path(path) for path in given if path is not None]


def _digest(path: Path) -> str:
    """Of a file, or of all files of a folder with their names. Raises UserError where it cannot be read."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    whole = hashlib.sha256()
    for each in files:
        try:
            with each.open("rb") as file:
                of_file = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(
                f"{each}: it cannot be read ({error.strerror}); text.files, task.source and translate.pairs name what "
                "a study is made from."
            ) from None
        whole.update(f"{each.relative_to(path)} {of_file}\n".encode())
    return whole.hexdigest()


def find(settings: DictConfig, path: str) -> Job:
    """The job of this path. Raises UserError where the study has none."""
    for name in experiments.names(settings):
        with contextlib.suppress(UserError):  # settings of another experiment, which nobody may have asked for
            jobs = all_jobs(settings, [name])
            if path in jobs:
                return jobs[path]
    raise UserError(f"{path}: the study has no such job.")
