"""The documentation: the tutorial's commands are run, those of the other pages are parsed, and links lead somewhere."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from train_large import runlog

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
SHELL = re.compile(r"^```sh(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\((?!https?://)(?P<to>[^)\s]+)\)")
WORDS = (  # noqa: SIM905
    "the a one red green old new house tree river goes comes stands good bad fine poor"
).split()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the plugin and the tutorial's text and task: its label is whether a sentence says good or bad."""
    rng = random.Random(1)
    (tmp_path / "fairseq_plugins").symlink_to(ROOT / "fairseq_plugins")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    lines = [" ".join(rng.choice(WORDS) for _ in range(12)) for _ in range(2000)]
    (tmp_path / "text.txt").write_text("\n".join(lines) + "\n")
    rows = [f"{' '.join(rng.choice(WORDS[:13]) for _ in range(4))} {word}\t{word}" for word in ("good", "bad") * 150]
    (tmp_path / "task.tsv").write_text("sentence\tlabel\n" + "\n".join(rows) + "\n")
    return tmp_path


def environment() -> dict[str, str]:
    here = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **here, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}


def run(script: str, folder: Path) -> str:
    words = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, script + done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def blocks_of(page: Path, info: str = "") -> list[str]:
    """The shell blocks of a page with this info string; "" for none."""
    return [block["body"] for block in SHELL.finditer(page.read_text()) if block["info"].strip() == info]


@pytest.mark.slow
def test_the_tutorial_from_raw_text_to_a_compressed_model(checkout):
    assert len(blocks_of(DOCS / "tutorial.md", 'title="once"')) == 1  # what this environment has done already
    ran = [run(block, checkout) for block in blocks_of(DOCS / "tutorial.md")]
    labels = [line.split("\t")[0] for line in ran[5].splitlines()[-5:]]
    assert set(labels) <= {"good", "bad"}
    assert len(labels) == 5
    assert (checkout / "small.safetensors").stat().st_size <= 200_000
    assert (checkout / "exported" / "tokenizer.json").exists()
    assert "<svg" in (checkout / "training.html").read_text()
    # On the same data, two processes of one run.
    (two,) = blocks_of(DOCS / "howto" / "cluster.md", 'title="two processes"')
    run(two, checkout)
    start, *_, end = runlog.read(str(checkout / "runs" / "two" / runlog.NAME))
    assert (start["workers"], end["kind"], end["reason"]) == (2, "stop", "budget")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_is_shell(page):
    for block in SHELL.finditer(page.read_text()):
        done = subprocess.run(["bash", "-n", "-c", block["body"]], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in LINK.finditer(page.read_text()):
        to, _, anchor = link["to"].partition("#")
        target = (page.parent / to).resolve() if to else page
        assert target.exists(), link[0]
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}, link[
                0
            ]


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    for page in sorted(DOCS.rglob("*.md")):
        name = str(page.relative_to(DOCS))
        assert name in navigation or name.startswith("results/report"), name


def test_the_command_line_page_has_every_subcommand():
    program = str(Path(sys.executable).with_name("train-large"))
    help_text = subprocess.run([program, "--help"], capture_output=True, text=True, check=True).stdout
    listed = re.findall(r"^    ([a-z][a-z-]+)", help_text, re.M)
    assert "pack" in listed
    page = (DOCS / "reference" / "cli.md").read_text()
    for command in listed:
        assert f"`train-large {command}`" in page or f"`{command}`" in page, command
