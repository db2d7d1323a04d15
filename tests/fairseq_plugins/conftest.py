"""Small data for real runs of fairseq."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import forked
import pytest


def preprocess(folder: Path, *flags: str) -> Path:
    command = [
        sys.executable,
        "-m",
        "fairseq_cli.preprocess",
        "--trainpref",
        str(folder / "train"),
        "--validpref",
        str(folder / "valid"),
    ]
    forked.run([*command, "--destdir", str(folder / "bin"), *flags]).check_returncode()
    return folder / "bin"


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Counting: whoever sees the neighbours knows the word."""
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(1)
    for split, lines in (("train", 400), ("valid", 24)):
        starts = [rng.randrange(20) for _ in range(lines)]
        (folder / split).write_text(
            "".join(" ".join(str((start + i) % 30) for i in range(14)) + "\n" for start in starts)
        )
    return preprocess(folder, "--only-source")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A translation that reverses."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = random.Random(2)
    for split, lines in (("train", 80), ("valid", 8)):
        sources = [[str(rng.randrange(12)) for _ in range(6)] for _ in range(lines)]
        (folder / f"{split}.en").write_text("".join(" ".join(words) + "\n" for words in sources))
        (folder / f"{split}.fr").write_text("".join(" ".join(words[::-1]) + "\n" for words in sources))
    return preprocess(folder, "--source-lang", "en", "--target-lang", "fr", "--joined-dictionary")
