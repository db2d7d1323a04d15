"""How an experiment was measured, in words, beside its measurements: settings, machine, software, date."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import experiments
from experiments import ROOT
from omegaconf import DictConfig

from train_large.files import whole
from train_large.machine import processor

NAME = "about.csv"


def here() -> dict[str, str]:
    """What a job notes when it has come to its end: the machine that it ran on, and with which software."""
    return {
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "software": f"torch {version('torch')}, fairseq {version('fairseq-fixed')}",
    }


def facts(settings: DictConfig, noted: Sequence[Mapping[str, str]], finished: float) -> dict[str, str]:
    """What to say of measurements whose jobs have `noted` where they ran, the last of which was done at `finished`, in
    seconds since 1970."""
    text = ", ".join(Path(path).name for path in settings.text.files) or "WikiText-2"
    task = Path(settings.task.source).name if settings.task.source else "movie-review sentences"
    timed_on = sorted({row["processor"] for row in experiments.read_step_times(ROOT / str(settings.step_times))})
    return {
        "text": f"{text}, a BPE of {settings.text.vocabulary} entries, {settings.pretrain.length} tokens a sequence",
        "task": task,
        "budget": f"{settings.budget} for pretraining, {settings.translate.budget} for translation, calibrated",
        "seconds per update": f"measured on {', '.join(timed_on)}"
        if timed_on
        else f"{settings.step_times} for all alike",
        **{key: "; ".join(sorted({note.get(key, "not noted") for note in noted})) for key in ("machine", "software")},
        "seeds": ", ".join(map(str, settings.seeds)),
        "date": datetime.fromtimestamp(finished, UTC).date().isoformat(),
    }


def write(told: Mapping[str, str], folder: Path) -> None:
    with whole(folder / NAME) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(told.items())


def read(results: Path) -> dict[str, str]:
    """What all experiments of a study were measured with; where they differ, which with what."""
    by_experiment = {}
    for path in sorted(results.glob(f"*/{NAME}")):
        with path.open(newline="", encoding="utf-8") as file:
            by_experiment[path.parent.name] = dict(csv.reader(file))
    told = {}
    for key in dict.fromkeys(key for each in by_experiment.values() for key in each):
        of_text: dict[str, list[str]] = {}
        for name, each in by_experiment.items():
            of_text.setdefault(each.get(key, "not noted"), []).append(name)
        told[key] = (
            next(iter(of_text))
            if len(of_text) == 1
            else "; ".join(f"{text} ({', '.join(names)})" for text, names in of_text.items())
        )
    return told
