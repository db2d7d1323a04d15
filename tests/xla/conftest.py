"""Small data for real runs. These tests are for the environment of torch-xla: `make test-xla`."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from pathlib import Path

import forked
import pytest

collect_ignore_glob = [] if importlib.util.find_spec("torch_xla") else ["test_*.py"]

# As in `launching.environment`: it is read once, when the first tensor of this process goes to a device.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked LM's corpus of 600 lines of 4 to 14 words out of 40, and 27 lines to validate on. Words count: whoever
    sees the neighbours knows the word."""
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(1)
    for split, lines in (("train", 600), ("valid", 27)):
        counts = [(rng.randrange(40), rng.randint(4, 14)) for _ in range(lines)]
        (folder / split).write_text(
            "".join(" ".join(str((start + i) % 40) for i in range(words)) + "\n" for start, words in counts)
        )
    command = [sys.executable, "-m", "fairseq_cli.preprocess", "--only-source"]
    command += ["--trainpref", str(folder / "train"), "--validpref", str(folder / "valid")]
    forked.run([*command, "--destdir", str(folder / "bin")]).check_returncode()
    return folder / "bin"
