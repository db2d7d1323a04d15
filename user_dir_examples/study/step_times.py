"""Seconds per update of everything that a study trains, measured on this machine, one at a time, on one core
(`make study-times`; section 2.2). The calibrated clock goes by the table, so it is to be made where nothing else runs.

It writes settings.step_times: one row for each size, batch, sharing and what else an update takes its time for; a row
that is there is not measured again.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import experiments
import job
import jobs
import translation
from experiments import Pretraining, Translation
from omegaconf import DictConfig

from train_large import machine, runlog
from train_large.errors import UserError
from train_large.files import whole

SETTLE = 0.5  # the share of a short run that is left out: its first updates are slower
SECONDS = {"pretrain": 12, "translate": 40}


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the seconds per update of all that a study trains.")
    parser.add_argument("--config", type=Path, help="settings that differ from pocket.yaml, as YAML")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings, such as budget=60s")
    parser.add_argument("--experiment", default="", help="one or several, separated by commas; all unless given")
    options = parser.parse_args()
    try:
        settings = experiments.load(options.config, options.set)
        measure(settings, experiments.names(settings, options.experiment))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def measure(settings: DictConfig, names: Sequence[str]) -> None:
    """Add to the table what these experiments need and is not in it. Raises UserError where a run fails, settings give
    a number for all, or the table is another processor's: budgets by both would not be the same."""
    if isinstance(settings.step_times, (int, float)):
        raise UserError("step_times: it is a number, and goes for every run; name a file to measure into.")
    jobs.save_settings(settings)
    path = experiments.ROOT / settings.step_times
    rows = experiments.read_step_times(path)
    known = {tuple(row[column] for column in experiments.KEY) for row in rows}
    here, others = machine.processor(), {row["processor"] for row in rows}
    runs = [run for name in names for run in experiments.runs_of(settings, name)]
    for run in runs:
        if not isinstance(run, (Pretraining, Translation)):
            continue
        key = experiments.key_of(settings, run)
        if key in known:
            continue
        if others - {here}:
            raise UserError(
                f"{settings.step_times}: it was measured on {', '.join(sorted(others))}, and {run.name}, which is not "
                f"in it, would be on {here}; name another file under step_times to measure everything here."
            )
        known.add(key)
        job.run(settings, jobs.job_of(jobs.Data("text" if isinstance(run, Pretraining) else "pairs")))
        with tempfile.TemporaryDirectory() as folder:
            if isinstance(run, Pretraining):
                command = pretraining(settings, replace(run, data=100, target=None), Path(folder))
            else:
                command = translating(settings, run, Path(folder))
            seconds = _seconds_per_update(command, Path(folder))
        rows.append(dict(zip(experiments.COLUMNS, (*key, f"{seconds:.5g}", here), strict=True)))
        print(f"{run.name}: {1000 * seconds:.1f} ms an update", flush=True)
        _write(path, rows)


def pretraining(settings: DictConfig, run: Pretraining, save_dir: Path) -> list[str]:
    """The command of a run, shortened, on the training clock, which counts an update as it took."""
    recipe = jobs.recipe_of(settings, run)
    budget = f"{SECONDS['pretrain']}s"
    words = jobs.pocket.pretrain(jobs.text_data(settings), save_dir, recipe.size(run.size), recipe, budget, 1 << 30)
    return [*words, "--share-layers", run.share, "--seed", "1", "--disable-validation", "--log-interval", "1"]


def translating(settings: DictConfig, run: Translation, model_dir: Path) -> list[str]:
    recipe = replace(translation.recipe_of(settings), evaluations=1, dev_sentences=1)
    data = jobs.folder(settings, jobs.Data("pairs")) / "prepared" / "data"
    words = translation.recipes.train(
        translation.python_of(settings), data, model_dir, recipe.size(run.size), recipe, SECONDS["translate"]
    )
    return [*words, "--log_step_count_steps=1", "--schedule=train"]


def _seconds_per_update(command: list[str], folder: Path) -> float:
    done = subprocess.run(command, env=job.one_thread(), capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise UserError(f"a run to be timed ended with status {done.returncode}: {' '.join(last)}")
    lines = [line for line in runlog.read(str(folder / runlog.NAME)) if line["kind"] == "train"]
    settled = lines[int(SETTLE * len(lines)) :]
    if len(settled) < 3:
        raise UserError("a run to be timed made too few updates; give it more seconds in step_times.py.")
    steps = [
        (after["train_seconds"] - before["train_seconds"]) / (after["updates"] - before["updates"])
        for before, after in itertools.pairwise(settled)
    ]
    return statistics.mean(steps)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, experiments.COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: [row[column] for column in experiments.COLUMNS]))


if __name__ == "__main__":
    os.chdir(experiments.ROOT)
    sys.exit(main())
