"""Real English prose that every Python brings along, and one text folder prepared from it with fairseq itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from train_large.data import TextSummary, prepare_text


@dataclass(frozen=True)
class Prepared:
    """A prepared folder, what went into it, and what prepare_text said of it."""

    folder: Path
    source: Path
    documents: list[list[str]]
    summary: TextSummary


@pytest.fixture(scope="session")
def prose() -> list[list[str]]:
    """400 different paragraphs of Python's own documentation: a document each, four lines long at least."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    paragraphs = [[line.strip() for line in part.splitlines() if line.strip()] for part in text.split("\n\n")]
    return list({tuple(lines): lines for lines in paragraphs if len(lines) >= 4}.values())[:400]


@pytest.fixture(scope="session")
def prepared(prose: list[list[str]], tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """prepare_text's whole way, once for all tests (fairseq-preprocess takes seconds to start)."""
    folder = tmp_path_factory.mktemp("a,comma and a space")  # fairseq-preprocess cuts lists of files at commas
    source = folder / "prose.txt"
    source.write_text("\n\n".join("\n".join(lines) for lines in prose) + "\n", encoding="utf-8")
    summary = prepare_text([source], folder / "text", vocabulary_size=1000, valid_fraction=0.1)
    return Prepared(folder / "text", source, prose, summary)
