"""English to French at pocket scale: train several sizes in Tensor2Tensor for the same time, and say which translates
best.

`make demo-mt` runs it. A second run does only what is not done yet.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import psutil
from fetch import fetch_pairs, short_pairs
from recipe import PROBLEM, Recipe, datagen, decode, train
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "user_dir_examples" / "pocket"))  # what runs the stages of both pocket studies

from chain import Chains, Stage  # noqa: E402
from screen import Screen  # noqa: E402

from train_large import runlog  # noqa: E402
from train_large.budget import parse_duration  # noqa: E402
from train_large.errors import UserError  # noqa: E402
from train_large.files import alone, write_text  # noqa: E402
from train_large.machine import processor, usable_cores  # noqa: E402
from train_large.processes import ended_by_signals, environment  # noqa: E402
from train_large.report import results as report  # noqa: E402
from train_large.report import runs  # noqa: E402
from train_large.report.claims import judge_claims  # noqa: E402
from train_large.report.page import write_page  # noqa: E402
from train_large.report.tables import print_report  # noqa: E402
from train_large.sizes import split_names  # noqa: E402

STAGES = ("train", "translate", "score")


def main() -> int:
    options = _parser().parse_args()
    console = Console(highlight=False)
    # Tensor2Tensor's programs are run by the name of their package.
    os.environ["PYTHONPATH"] = environment(ROOT)["PYTHONPATH"]
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
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
    parser.add_argument("--budget", default="240s", help="training time of each size")
    parser.add_argument("--out", type=Path, default=Path("runs/demo-mt"), help="folder for everything that is made")
    parser.add_argument("--sizes", default=",".join(Recipe.sizes), help="sizes, such as %(default)s")
    parser.add_argument("--pairs", type=Path, help="your own pairs, a TSV of English and French")
    parser.add_argument("--words", type=int, default=Recipe.most_words, help="longest sentence that is taken")
    parser.add_argument("--t2t", default=".venv-t2t/bin/python", help="Python of Tensor2Tensor's environment")
    parser.add_argument("--jobs", type=int, default=usable_cores(), help="sizes at a time, one core each")
    return parser


def run(options: argparse.Namespace, console: Console) -> None:
    """The study, from the pairs to the page."""
    began = time.monotonic()
    seconds = parse_duration(options.budget)
    if options.jobs < 1:
        raise UserError(f"--jobs {options.jobs} is too few: give 1 or more.")
    recipe = replace(Recipe(), sizes=split_names(options.sizes), most_words=options.words)
    for name in recipe.sizes:
        recipe.size(name)
    python = shutil.which(options.t2t)
    if python is None:
        raise UserError(f"--t2t {options.t2t}: there is no such Python; make Tensor2Tensor's with `make env-t2t`.")
    python = os.path.abspath(python)  # not resolved: the link is what makes it the environment's
    out = options.out.resolve()
    with alone(out, "demo", "--out") as lock:
        data = prepare(options, recipe, python, out, console, lock)
        folders = {(name, stage): out / name / stage for name in recipe.sizes for stage in STAGES}
        largest_first = sorted(recipe.sizes, key=lambda name: -recipe.size(name).hidden * recipe.size(name).layers)
        stages = {name: chain(name, folders, recipe, seconds, python, data) for name in largest_first}
        chains = Chains(stages, options.jobs, out / "logs", lock)
        console.print(
            f"{len(recipe.sizes)} sizes, {seconds:.0f} s of training each, {options.jobs} at a time; "
            f"logs in {out / 'logs'}"
        )
        with Screen(folders, chains.at, console) as screen:
            chains.run(screen)
        results = gather(recipe, folders, data, seconds, options)
        report.save(results, out / "results.json")
        print_report(results, console=console)
        write_page(results, out / "report.html")
        console.print(
            f"\nwrote {out / 'results.json'} and {out / 'report.html'} "
            f"after {(time.monotonic() - began) / 60:.1f} minutes"
        )


def prepare(options: argparse.Namespace, recipe: Recipe, python: str, out: Path, console: Console, lock: int) -> Path:
    """The pairs as Tensor2Tensor's shards; nothing is made twice. Gives the folder of the shards."""
    console.print("preparing the data ...")
    pairs = options.pairs or fetch_pairs(ROOT / "runs" / "downloads")
    (out / "pairs").mkdir(parents=True, exist_ok=True)
    chosen = out / "pairs" / "pairs.tsv"
    made = out / "pairs" / f".{os.getpid()}.tsv"
    short_pairs(pairs, recipe.most_words, made)
    if chosen.exists() and chosen.read_bytes() == made.read_bytes():
        made.unlink()  # datagen goes by the file's date
    else:
        made.replace(chosen)
    log = out / "logs" / "datagen.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as output:
        command = datagen(python, out / "pairs", out / "data")
        done = subprocess.run(command, stdout=output, stderr=output, pass_fds=(lock,), check=False)
    if done.returncode:
        *_, last = log.read_text(errors="replace").splitlines() or [f"status {done.returncode}"]
        raise UserError(f"datagen failed ({last.replace('error: ', '')}); all that it said is in {log}.")
    for language in ("en", "fr"):
        lines = (out / "data" / f"{PROBLEM}.test.{language}").read_text(encoding="utf-8").split("\n")
        test = "".join(f"{line}\n" for line in lines[:-1][: recipe.test_sentences])
        write_text(test_file(out / "data", language), test)
    return out / "data"


def test_file(data: Path, language: str) -> Path:
    """What of the test set is translated."""
    return data.parent / f"test.{language}"


def chain(
    name: str, folders: dict[tuple[str, str], Path], recipe: Recipe, seconds: float, python: str, data: Path
) -> Sequence[Stage]:
    """One size, from its training to its scores on the test set."""
    size = recipe.size(name)
    model_dir, translated, scored = (folders[name, stage] for stage in STAGES)
    source, reference = (test_file(data, language) for language in ("en", "fr"))

    def translate() -> list[str]:
        return decode(python, data, model_dir, size, recipe, seconds, source, translated / "translations.fr")

    def score() -> list[str]:
        (translations,) = translated.glob("translations.fr*")
        files = (translations, reference, scored / "s.json")
        return [python, str(Path(__file__).with_name("score.py")), *map(str, files)]

    return [
        Stage(
            "train",
            model_dir,
            lambda: train(python, data, model_dir, size, recipe, seconds),
            [data / f"{PROBLEM}.json"],  # datagen's record
        ),
        Stage("translate", translated, translate, [source]),
        Stage("score", scored, score, [reference]),
    ]


def gather(
    recipe: Recipe,
    folders: dict[tuple[str, str], Path],
    data: Path,
    seconds: float,
    options: argparse.Namespace,
) -> report.TranslationResults:
    """Everything that was measured, as results.json holds it."""
    out = options.out.resolve()
    scores = {name: json.loads((folders[name, "score"] / "s.json").read_text()) for name in recipe.sizes}
    counts = {split: len((data / f"{PROBLEM}.{split}.fr").read_text().split("\n")) - 1 for split in ("dev", "test")}
    anyone = scores[recipe.sizes[0]]
    start = _lines(folders[recipe.sizes[0], "train"], "start")[0]
    everything = len((out / "pairs" / "pairs.tsv").read_text().split("\n")) - 1
    results = report.TranslationResults(
        format=1,
        title="Which size to train for translation: the pocket study",
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=shlex.join(["python", os.path.relpath(__file__, ROOT), *sys.argv[1:]]),
        machine=_machine(anyone),
        budget=report.Budget(seconds=seconds, clock="train"),
        translation=report.Translation(
            corpus=options.pairs.name if options.pairs else "LibreOffice's help and messages, manual pages",
            source="English",
            target="French",
            train=everything - counts["dev"] - counts["test"],
            dev=counts["dev"],
            test=counts["test"],
            vocabulary=start["vocabulary"],
            batch_tokens=recipe.batch_tokens,
            decoding=report.Decoding(sentences=anyone["sentences"], beam_size=recipe.beam_size, alpha=recipe.alpha),
            averaged=1,
            signature=anyone["sacrebleu_signature"],
            curve_decoding=report.Decoding(
                sentences=min(recipe.dev_sentences, counts["dev"]), beam_size=recipe.beam_size, alpha=recipe.alpha
            ),
        ),
        models=tuple(_model(name, folders, recipe, scores[name], out) for name in recipe.sizes),
    )
    return replace(results, claims=tuple(judge_claims(results)))


def _model(
    name: str, folders: dict[tuple[str, str], Path], recipe: Recipe, scores: dict, out: Path
) -> report.TranslationModel:
    log = folders[name, "train"] / runlog.NAME
    run = runs.read_runs([folders[name, "train"]]).models[0]
    vocabulary = _lines(folders[name, "train"], "start")[0]["vocabulary"]
    of_run = {
        **vars(run),
        "name": name,
        "learning_rate": recipe.peak_rate(recipe.size(name)),
        "parameters_without_embeddings": run.parameters - vocabulary * recipe.size(name).hidden,
        "run_log": os.path.relpath(log, out),
        "scores": report.BleuScores(
            paper=scores["paper"],
            t2t=scores["t2t_cased"],
            sacrebleu=scores["sacrebleu"],
            paper_error=scores["paper_error"],
        ),
    }
    return report.TranslationModel(**of_run)


def _lines(folder: Path, kind: str) -> list[dict]:
    return [line for line in runlog.read(str(folder / runlog.NAME)) if line["kind"] == kind]


def _machine(scored: dict) -> report.TensorFlowMachine:
    return report.TensorFlowMachine(
        processor=processor(),
        cores=os.cpu_count() or 1,
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        **{name: scored[name] for name in ("python", "tensorflow", "tensor2tensor")},
    )


if __name__ == "__main__":
    sys.exit(main())
