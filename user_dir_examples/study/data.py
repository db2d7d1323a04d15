"""Make the data of a study ready: python data.py SETTINGS.yaml text|task|pairs"""

from __future__ import annotations

import sys
from pathlib import Path

import experiments
import jobs
import translation
from fetch import fetch_movie_reviews, fetch_wikitext2
from omegaconf import DictConfig

from train_large.data.glue import prepare_task
from train_large.data.text import prepare_text
from train_large.errors import UserError

DOWNLOADS = experiments.ROOT / "runs" / "downloads"


def main() -> int:
    settings_file, name = sys.argv[1:]
    settings = experiments.load(Path(settings_file))
    try:
        prepare(settings, name)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def prepare(settings: DictConfig, name: str) -> None:
    """fairseq's data in data/NAME/prepared. Raises UserError on bad input."""
    out = jobs.folder(settings, jobs.Data(name)) / "prepared"
    if name == "text":
        _text(settings, out)
    elif name == "task":
        _task(settings, out)
    else:
        translation.prepare(settings, out)


def _text(settings: DictConfig, out: Path) -> None:
    files = [Path(path) for path in settings.text.files]
    of_pocket = {}
    if not files:
        fetched = fetch_wikitext2(DOWNLOADS)
        files, of_pocket = [fetched["train"]], {"valid": fetched["valid"], "documents": "wikitext"}
    subsets = tuple(percent / 100 for percent in settings.text.subsets)
    prepare_text(files, out, vocabulary_size=settings.text.vocabulary, subsets=subsets, seed=1, **of_pocket)


def _task(settings: DictConfig, out: Path) -> None:
    source = Path(settings.task.source) if settings.task.source else fetch_movie_reviews(DOWNLOADS)
    text = jobs.folder(settings, jobs.Data("text")) / "prepared"
    fraction = settings.task.valid_fraction
    prepare_task(settings.task.format, source, out, text=text, valid_fraction=fraction, seed=1)


if __name__ == "__main__":
    sys.exit(main())
