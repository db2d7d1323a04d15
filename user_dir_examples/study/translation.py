"""Train, translate and score one translation model in Tensor2Tensor: python translation.py SETTINGS.yaml RUN

The three steps are those of the pocket study of translation; a step that is done is not done again. Writes
train/run.jsonl and scores.json.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import experiments
import jobs
from omegaconf import DictConfig

from train_large import runlog
from train_large.budget import parse_duration
from train_large.errors import UserError
from train_large.processes import started

POCKET = experiments.ROOT / "user_dir_examples" / "pocket_mt"


def load(name: str) -> ModuleType:
    """A module of the pocket study of translation; the other pocket study has some of the same names."""
    spec = importlib.util.spec_from_file_location(f"pocket_mt_{name}", POCKET / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


recipes, fetches = load("recipe"), load("fetch")


def main() -> int:
    settings_file, name = sys.argv[1:]
    settings = experiments.load(Path(settings_file))
    try:
        run = jobs.find(settings, f"translate/{name}").work
        assert isinstance(run, experiments.Translation)
        translate(settings, run)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def recipe_of(settings: DictConfig):
    """The settings as the pocket study has them."""
    ours = settings.translate
    return replace(
        recipes.Recipe(),
        head_width=ours.head_width,
        most_words=ours.most_words,
        batch_tokens=ours.batch_tokens,
        learning_rate=ours.rate,
        warmup_updates=ours.warmup_updates,
        evaluations=ours.evaluations,
        dev_sentences=ours.dev_sentences,
        test_sentences=ours.test_sentences,
        beam_size=ours.beam_size,
        alpha=ours.alpha,
    )


def python_of(settings: DictConfig) -> str:
    """Tensor2Tensor's Python. Raises UserError where there is none."""
    path = experiments.ROOT / settings.translate.python
    if shutil.which(str(path)) is None:
        raise UserError(f"translate.python: there is no {path}; make Tensor2Tensor's environment with `make env-t2t`.")
    return str(path)


def prepare(settings: DictConfig, out: Path) -> None:
    """The pairs as Tensor2Tensor's shards in out/data, and what of the test set is translated in out/test.{en,fr}."""
    pairs = (
        Path(settings.translate.pairs)
        if settings.translate.pairs
        else fetches.fetch_pairs(experiments.ROOT / "runs" / "downloads")
    )
    recipe = recipe_of(settings)
    (out / "pairs").mkdir(parents=True, exist_ok=True)
    fetches.short_pairs(pairs, recipe.most_words, out / "pairs" / "pairs.tsv")
    call(recipes.datagen(python_of(settings), out / "pairs", out / "data"))
    for language in ("en", "fr"):
        lines = (out / "data" / f"{recipes.PROBLEM}.test.{language}").read_text(encoding="utf-8").split("\n")
        test = "".join(f"{line}\n" for line in lines[:-1][: recipe.test_sentences])
        (out / f"test.{language}").write_text(test, encoding="utf-8")


def translate(settings: DictConfig, run: experiments.Translation) -> None:
    """All three steps."""
    python, recipe, folder = python_of(settings), recipe_of(settings), jobs.folder(settings, run)
    data = jobs.folder(settings, jobs.Data("pairs")) / "prepared"
    seconds = parse_duration(str(settings.translate.budget), "translate.budget")
    size = recipe.size(run.size)
    arguments = (python, data / "data", folder / "train", size, recipe, seconds)
    if not _is_trained(folder / "train"):
        each = experiments.seconds_per_update(settings, run)
        clock = f",budget_clock=calibrated,budget_seconds_per_update={each!r}"
        words = [word + clock * word.startswith("--hparams=") for word in recipes.train(*arguments)]
        call([*words, f"--random_seed={run.seed}"])
    (folder / "translated").mkdir(exist_ok=True)
    found = list((folder / "translated").glob("translations.fr*"))
    if not found:
        call(recipes.decode(*arguments, data / "test.en", folder / "translated" / "translations.fr"))
        found = list((folder / "translated").glob("translations.fr*"))
    score = str(POCKET / "score.py")
    call([python, score, str(found[0]), str(data / "test.fr"), str(folder / "scores.json")])


def _is_trained(folder: Path) -> bool:
    log = folder / runlog.NAME
    return log.exists() and runlog.is_used_up(runlog.read(str(log)))


def call(command: list[str]) -> None:
    """Run it. Raises UserError if it fails or is stopped; what it said went where this process's own words go.

    It takes over the files that this process was given, the lock of job.py among them."""
    with started(command, close_fds=False) as (process, asked):
        status = process.wait()
    name = Path(command[-1]).name if len(command) < 4 else command[4]
    if asked:
        raise UserError(f"{name} was stopped.")
    if status:
        raise UserError(f"{name} failed with {status}.")


def scores(folder: Path) -> dict:
    return json.loads((folder / "scores.json").read_text())


if __name__ == "__main__":
    sys.exit(main())
