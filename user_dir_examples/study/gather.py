"""The measurements of a study's finished jobs, as rows of its CSV files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import about
import experiments
import job
import jobs
import measurements
import translation
from experiments import Finetuning, Measuring, MemoryRun, Pretraining, Translation
from omegaconf import DictConfig

from train_large import runlog, sizes


def gather(settings: DictConfig, names: Sequence[str], results: Path) -> dict[str, list[str]]:
    """Write the CSV files of each experiment into its folder of `results`; gives the jobs that are not done, by
    experiment."""
    missing = {}
    for name in names:
        plan = jobs.all_jobs(settings, [name])
        done = finished(settings, plan)
        rows = [row for path in plan if path in done for row in rows_of(settings, name, plan[path].work)]
        measurements.write(rows, results / name)
        if rows:
            folders = [jobs.study_folder(settings) / path for path in done]
            last = max((folder / job.DONE).stat().st_mtime for folder in folders)
            about.write(about.facts(settings, [job.noted(folder) for folder in folders], last), results / name)
        else:
            (results / name / about.NAME).unlink(missing_ok=True)
        if len(done) < len(plan):
            missing[name] = sorted(set(plan) - done)
    return missing


def finished(settings: DictConfig, plan: Mapping[str, jobs.Job]) -> set[str]:
    """The jobs that are done with the settings and the inputs that they would have now, and whose inputs are too."""
    counts: dict[str, bool] = {}

    def of(path: str) -> bool:
        if path not in counts:
            folder = jobs.study_folder(settings) / path
            counts[path] = (
                (folder / job.DONE).exists()
                and all(of(need) for need in plan[path].needs)
                and job.made_from(folder) == job.identity(settings, plan[path])
            )
        return counts[path]

    return {path for path in plan if of(path)}


def rows_of(settings: DictConfig, experiment: str, work: jobs.Work) -> Iterator[Any]:
    """What one finished job has measured for an experiment."""
    match work:
        case Pretraining():
            yield from _curve(settings, work)
        case Measuring():
            yield from _compressed(settings, work)
        case Translation():
            yield from _translated(settings, work)
        case MemoryRun():
            peaks = json.loads((jobs.folder(settings, work) / "memory.json").read_text())
            memory = settings.memory
            yield measurements.Memory(
                size=memory.size,
                share=work.share,
                batch=memory.batch,
                length=memory.length,
                seed=work.seed,
                peak_bytes=peaks["trained"] - peaks["loaded"],
            )


def trained(settings: DictConfig, run: Pretraining) -> dict[str, Any]:
    """The fields that every row of a masked language model has."""
    recipe = jobs.recipe_of(settings, run)
    size = recipe.size(run.size)
    prepared = json.loads((jobs.text_data(settings).parent / "prepared.json").read_text())
    entries = prepared["summary"]["dictionary_entries"] + 1  # <mask>
    return {
        **{"run": run.name, "size": run.size, "layers": size.layers, "hidden": size.hidden},
        "parameters": sizes.parameters(size, entries, max_positions=recipe.positions, share=run.share),
        "layer_parameters": sizes.parameters_without_embeddings(size, entries, share=run.share),
        **{"batch": run.batch, "rate": recipe.learning_rate, "share": run.share, "data": float(run.data)},
        **{"target": run.target, "seed": run.seed},
    }


def _curve(settings: DictConfig, run: Pretraining) -> Iterator[measurements.Point]:
    lines = runlog.read(str(jobs.folder(settings, run) / runlog.NAME))
    for line in lines:
        if line["kind"] == "valid" and line["subset"] == "valid":
            perplexity = math.inf if line["perplexity"] is None else line["perplexity"]  # of a run that diverged
            yield measurements.Point(
                **trained(settings, run), **_counters(settings, run, line), perplexity=perplexity, bleu=None
            )


def calibrated(settings: DictConfig, run: Pretraining | Translation, line: dict[str, Any]) -> float:
    """The time of a line of the run log by the clock that the budget goes by (section 2.2); how long this run took on
    this machine, beside others, is in its run.jsonl."""
    return round(line["updates"] * experiments.seconds_per_update(settings, run), 6)


def _counters(settings: DictConfig, run: Pretraining | Translation, line: dict[str, Any]) -> dict[str, Any]:
    return {
        "updates": int(line["updates"]),
        "seconds": calibrated(settings, run, line),
        "flops": float(line["flops"]),
        "tokens": int(line["tokens"]),
    }


def _compressed(settings: DictConfig, run: Measuring) -> Iterator[Any]:
    _, start = jobs.finetuned(settings, run.start)
    measured = json.loads((jobs.folder(settings, run) / "measured.json").read_text())
    ladder = {}
    if run.pruning:
        text = (jobs.folder(settings, run.pruning) / "ladder.jsonl").read_text()
        ladder = {line["sparsity"]: line for line in map(json.loads, text.splitlines())}
    yield from _accuracies(settings, start, measured, ladder)
    of_run = trained(settings, start.pretraining)
    for error in measured["weight_errors"]:
        fields = {name: error[name] for name in ("sparsity", "bits", "kind", "mean", "mean_absolute", "variance")}
        weights = {"weights": error["parameters"], "deviation": error["deviation"]}
        yield measurements.Error(**of_run, **fields, **weights)


def _accuracies(
    settings: DictConfig, start: Finetuning, measured: dict[str, Any], ladder: dict[float, dict[str, Any]]
) -> Iterator[measurements.Accuracy]:
    end = _checkpoint_line(settings, start)
    task = json.loads((jobs.task_data(settings) / "prepared.json").read_text())
    for entry in measured["compressed"]:
        level = ladder.get(entry["sparsity"], {"updates": 0, "recovered": True})
        yield measurements.Accuracy(
            **trained(settings, start.pretraining),
            checkpoint=float(start.checkpoint),
            updates=int(end["updates"]),
            seconds=calibrated(settings, start.pretraining, end),
            perplexity=measured["perplexity"],
            finetune_batch=start.batch,
            finetune_rate=start.rate,
            finetune_dropout=start.dropout,
            finetune_seed=start.seed,
            sparsity=entry["sparsity"],
            bits=entry["bits"],
            accuracy=entry["accuracy"],
            examples=sum(task["summary"]["splits"]["valid"].values()),
            nonzero=entry["nonzero"],
            bytes=entry["bytes"],
            bytes_paper=entry["bytes_paper"],
            recovery_updates=int(level["updates"]),
            recovered=bool(level["recovered"]),
        )


def _checkpoint_line(settings: DictConfig, start: Finetuning) -> dict[str, Any]:
    """The counters of the pretraining at the checkpoint that was finetuned."""
    lines = runlog.read(str(jobs.folder(settings, start.pretraining) / runlog.NAME))
    if start.checkpoint == 1:
        return [line for line in lines if line["kind"] == "stop"][-1]
    updates = jobs.checkpoint_updates(settings, start.pretraining, start.checkpoint)
    return [line for line in lines if line["updates"] == updates][-1]


def _translated(settings: DictConfig, run: Translation) -> Iterator[Any]:
    folder = jobs.folder(settings, run)
    lines = runlog.read(str(folder / "train" / runlog.NAME))
    start, end = lines[0], lines[-1]
    size = translation.recipe_of(settings).size(run.size)
    fields: dict[str, Any] = {
        **{"run": run.name, "size": run.size, "layers": size.layers, "hidden": size.hidden},
        "parameters": int(start["parameters"]),
        "layer_parameters": int(start["parameters"]) - start["vocabulary"] * size.hidden,
        **{"batch": int(settings.translate.batch_tokens), "share": "none", "data": 100.0, "target": None},
        **{"rate": translation.recipe_of(settings).peak_rate(size), "seed": run.seed},
    }
    validations = [line for line in lines if line["kind"] == "valid" and line["subset"] == "dev"]
    for line in validations:
        yield measurements.Point(
            **fields, **_counters(settings, run, line), perplexity=line["perplexity"], bleu=line.get("bleu")
        )
    scores = translation.scores(folder)
    yield measurements.Translated(
        **fields,
        updates=int(end["updates"]),
        seconds=calibrated(settings, run, end),
        perplexity=validations[-1]["perplexity"],
        bleu=scores["paper"],
        bleu_error=scores["paper_error"],
    )
