"""The whole study at pocket scale: pretrain several sizes for the same time, finetune, prune, quantize, and say which
to ship.

`make demo` runs it. A second run does only what is not done yet.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from chain import Chains, Stage
from fetch import fetch_movie_reviews, fetch_wikitext2
from recipe import ROOT, USER_DIR, Recipe, finetune, pretrain, prune, validation_interval
from rich.console import Console
from screen import Screen

from train_large import runlog, sizes
from train_large.budget import parse_duration
from train_large.compression.levels import level_name
from train_large.data.folder import RECORD
from train_large.data.glue import TaskSummary, prepare_task
from train_large.data.text import TextSummary, prepare_text
from train_large.errors import UserError
from train_large.files import alone
from train_large.machine import processor, usable_cores
from train_large.processes import ended_by_signals
from train_large.report import results as report
from train_large.report.claims import judge_claims
from train_large.report.page import write_page
from train_large.report.tables import print_report
from train_large.report.units import parse_bytes
from train_large.sizes import split_names

STAGES = ("pretrain", "finetune", "prune", "measure")


def main() -> int:
    options = _parser().parse_args()
    console = Console(highlight=False)
    try:
        with ended_by_signals():
            run(options, console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on from here", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--budget", default="150s", help="pretraining time of each size")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything that is made")
    parser.add_argument("--sizes", default=",".join(Recipe.sizes), help="sizes, such as %(default)s")
    parser.add_argument(
        "--text", type=Path, nargs="+", help="your own text for pretraining, in the place of WikiText-2"
    )
    parser.add_argument("--task", type=Path, help="your own task, a TSV with the columns sentence and label")
    parser.add_argument(
        "--memory-limit", help="memory for the model at inference, such as 500kB: the page says what to ship"
    )
    parser.add_argument("--jobs", type=int, default=usable_cores(), help="sizes at a time, one core each")
    return parser


def run(options: argparse.Namespace, console: Console) -> None:
    """The study, from the text to the page."""
    began = time.monotonic()
    seconds = parse_duration(options.budget)
    if options.jobs < 1:
        raise UserError(f"--jobs {options.jobs} is too few: give 1 or more.")
    limit = parse_bytes(options.memory_limit) if options.memory_limit else None
    recipe = replace(Recipe(), sizes=split_names(options.sizes))
    for name in recipe.sizes:
        recipe.size(name)
    out = options.out.resolve()
    with alone(out, "demo", "--out") as lock:
        text, task = prepare(options, recipe, out, console)
        folders = {(name, stage): out / name / stage for name in recipe.sizes for stage in STAGES}
        stages = {
            name: chain(name, folders, recipe, options.budget, seconds, out, task) for name in _largest_first(recipe)
        }
        chains = Chains(stages, options.jobs, out / "logs", lock)
        console.print(
            f"{len(recipe.sizes)} sizes, {seconds:.0f} s of pretraining each, {options.jobs} at a time; "
            f"logs in {out / 'logs'}"
        )
        with Screen(folders, chains.at, console) as screen:
            chains.run(screen)
        results = gather(recipe, folders, text, task, seconds, options)
        report.save(results, out / "results.json")
        print_report(results, limit, console)
        write_page(results, out / "report.html", limit)
        console.print(
            f"\nwrote {out / 'results.json'} and {out / 'report.html'} "
            f"after {(time.monotonic() - began) / 60:.1f} minutes"
        )


def prepare(
    options: argparse.Namespace, recipe: Recipe, out: Path, console: Console
) -> tuple[TextSummary, TaskSummary]:
    """Download what is not there, and make fairseq's data of it."""
    console.print("preparing the data ...")
    downloads = ROOT / "runs" / "downloads"
    common: dict[str, Any] = {"seed": 1, "workers": 1}
    if options.text:
        text = prepare_text(options.text, out / "text", vocabulary_size=recipe.vocabulary, subsets=(), **common)
    else:
        files = fetch_wikitext2(downloads)
        text = prepare_text(
            *([files["train"]], out / "text"),
            **{
                "valid": files["valid"],
                "documents": "wikitext",
                "vocabulary_size": recipe.vocabulary,
                "subsets": (),
                **common,
            },
        )
    task_file = options.task or fetch_movie_reviews(downloads)
    task = prepare_task("tsv", task_file, out / "task", text=out / "text", valid_fraction=0.1, **common)
    return text, task


def chain(
    name: str,
    folders: dict[tuple[str, str], Path],
    recipe: Recipe,
    budget: str,
    seconds: float,
    out: Path,
    task: TaskSummary,
) -> list[Stage]:
    """One size, from its pretraining to its figures."""
    size, classes = recipe.size(name), len(task.labels)
    examples = sum(task.splits["train"].values())
    interval = validation_interval(size, recipe, seconds)
    pretrained, finetuned, pruned, measured = (folders[name, stage] for stage in STAGES)
    text_data, task_data = out / "text" / "data-bin", out / "task"
    of_text, of_task = out / "text" / RECORD, task_data / RECORD
    return [
        Stage(
            "pretrain", pretrained, lambda: pretrain(text_data, pretrained, size, recipe, budget, interval), [of_text]
        ),
        Stage(
            "finetune",
            finetuned,
            lambda: finetune(task_data, finetuned, size, recipe, classes, examples, pretrained / "checkpoint_last.pt"),
            [of_task],
        ),
        Stage(
            "prune",
            pruned,
            lambda: prune(task_data, pruned, size, recipe, classes, examples, finetuned / "checkpoint_best.pt"),
            [of_task],
        ),
        Stage(
            "measure",
            measured,
            lambda: measure(measured, pretrained, finetuned, pruned, recipe, text_data, task_data),
            [of_text, of_task],
        ),
    ]


def measure(
    folder: Path, pretrained: Path, finetuned: Path, pruned: Path, recipe: Recipe, text_data: Path, task_data: Path
) -> list[str]:
    """The command that measures every level and bit width. All it is to do is in it, so that a change makes it anew."""
    levels = [{"sparsity": 0.0, "checkpoint": str(finetuned / "checkpoint_best.pt")}]
    for level in recipe.sparsity:
        levels.append({"sparsity": level, "checkpoint": str(pruned / f"checkpoint_sparsity_{level_name(level)}.pt")})
    request = {
        "user_dir": str(USER_DIR),
        "pretrained": str(pretrained / "checkpoint_last.pt"),
        "text_data": str(text_data),
        "task_data": str(task_data),
        "bits": list(recipe.bits),
        "levels": levels,
        "finetuned": str(finetuned / "checkpoint_best.pt"),
        "pruned": recipe.error_sparsity,
    }
    evaluate = Path(__file__).with_name("evaluate.py")
    return [sys.executable, str(evaluate), json.dumps(request), str(folder / "measured.json")]


def gather(
    recipe: Recipe,
    folders: dict[tuple[str, str], Path],
    text: TextSummary,
    task: TaskSummary,
    seconds: float,
    options: argparse.Namespace,
) -> report.Results:
    """Everything that was measured, as results.json holds it."""
    out = options.out.resolve()
    valid = task.splits["valid"]
    results = report.Results(
        format=1,
        title="Train large, then compress: the pocket study"
        if not options.text
        else f"Train large, then compress: {out.name}",
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=shlex.join(["python", os.path.relpath(__file__, ROOT), *sys.argv[1:]]),
        machine=_machine(),
        budget=report.Budget(seconds=seconds, clock="train"),
        pretraining=report.Pretraining(
            corpus="WikiText-2" if not options.text else ", ".join(path.name for path in options.text),
            tokens=text.splits["train"].tokens,
            vocabulary=text.bpe_entries,
            batch_tokens=recipe.batch * recipe.length,
        ),
        task=report.Task(
            name="movie-review sentences" if not options.task else options.task.name,
            train=sum(task.splits["train"].values()),
            valid=sum(valid.values()),
            metric="accuracy",
            majority=max(valid.values()) / sum(valid.values()),
        ),
        models=tuple(_model(name, folders, recipe, text, out) for name in recipe.sizes),
    )
    return replace(results, claims=tuple(judge_claims(results)))


def _model(
    name: str, folders: dict[tuple[str, str], Path], recipe: Recipe, text: TextSummary, out: Path
) -> report.Model:
    size = recipe.size(name)
    log = folders[name, "pretrain"] / runlog.NAME
    end = [line for line in runlog.read(log) if line["kind"] == "stop"][-1]
    finetuning = [line for line in runlog.read(folders[name, "finetune"] / runlog.NAME) if line["kind"] == "stop"][-1]
    measured = json.loads((folders[name, "measure"] / "measured.json").read_text())
    ladder = {
        line["sparsity"]: line
        for line in map(json.loads, (folders[name, "prune"] / "ladder.jsonl").read_text().splitlines())
    }
    entries = len_of_dictionary(text)
    compressed = tuple(
        report.Compressed(
            **entry,
            recovery_updates=int(ladder[entry["sparsity"]]["updates"]) if entry["sparsity"] else 0,
            recovered=bool(ladder[entry["sparsity"]]["recovered"]) if entry["sparsity"] else True,
        )
        for entry in measured["compressed"]
    )
    whole = next(entry for entry in compressed if entry.sparsity == 0 and entry.bits == 32)
    return report.Model(
        name=name,
        layers=size.layers,
        hidden=size.hidden,
        heads=size.heads,
        parameters=sizes.parameters(size, entries, max_positions=recipe.positions),
        parameters_without_embeddings=sizes.parameters_without_embeddings(size, entries),
        learning_rate=recipe.learning_rate,
        run_log=os.path.relpath(log, out),
        updates=int(end["updates"]),
        train_seconds=end["train_seconds"],
        tokens=int(end["tokens"]),
        flops=end["flops"],
        perplexity=measured["perplexity"],
        curve=report.curve_from_run_log(log),
        finetuned=report.Finetuned(
            accuracy=whole.accuracy, seconds=finetuning["train_seconds"], updates=int(finetuning["updates"])
        ),
        compressed=compressed,
        weight_errors=tuple(report.WeightError(**error) for error in measured["weight_errors"]),
    )


def len_of_dictionary(text: TextSummary) -> int:
    """Entries of the model's embedding: fairseq's tasks add <mask>."""
    return text.dictionary_entries + 1


def _largest_first(recipe: Recipe) -> list[str]:
    return sorted(recipe.sizes, key=lambda name: -sizes.parameters(recipe.size(name), recipe.vocabulary))


def _machine() -> report.Machine:
    return report.Machine(
        processor=processor(),
        cores=os.cpu_count() or 1,
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        python=platform.python_version(),
        torch=version("torch"),
        fairseq=version("fairseq-fixed"),
    )


if __name__ == "__main__":
    sys.exit(main())
