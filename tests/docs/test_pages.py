"""The documentation: the commands of the tutorial and of the pages that go on from it are run, those that want other
machines, data or hours are read by their programs' own parsers, and links lead somewhere.

A block of shell with a title is not run.
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
from fairseq import options
from fairseq.utils import import_user_module

from train_large import cli, runlog
from xla import launch, pod

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
SHELL = re.compile(r"^```sh(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.M | re.S)
OTHER = re.compile(r"^```(?P<language>python|console)\n(?P<body>.*?)^```$", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\((?!https?://)(?P<to>[^)\s]+)\)")
WORDS = (  # noqa: SIM905
    "the a one red green old new house tree river goes comes stands good bad fine poor"
).split()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plugin and the tutorial's text and task: its label is whether a sentence says good or bad."""
    folder = tmp_path_factory.mktemp("checkout")
    rng = random.Random(1)
    (folder / "fairseq_plugins").symlink_to(ROOT / "fairseq_plugins")
    (folder / ".venv").symlink_to(sys.prefix)
    lines = [" ".join(rng.choice(WORDS) for _ in range(12)) for _ in range(2000)]
    (folder / "text.txt").write_text("\n".join(lines) + "\n")
    rows = [f"{' '.join(rng.choice(WORDS[:13]) for _ in range(4))} {word}\t{word}" for word in ("good", "bad") * 150]
    (folder / "task.tsv").write_text("sentence\tlabel\n" + "\n".join(rows) + "\n")
    return folder


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


@pytest.fixture(scope="module")
def tutorial(checkout: Path) -> list[str]:
    """What the tutorial's blocks print; the folder then has what they make."""
    assert len(blocks_of(DOCS / "tutorial.md", 'title="once"')) == 1  # what this environment has done already
    return [run(block, checkout) for block in blocks_of(DOCS / "tutorial.md")]


@pytest.mark.slow
def test_the_tutorial_from_raw_text_to_a_compressed_model(checkout, tutorial):
    labels = [line.split("\t")[0] for line in tutorial[5].splitlines()[-5:]]
    assert set(labels) <= {"good", "bad"}
    assert len(labels) == 5
    assert (checkout / "small.safetensors").stat().st_size <= 200_000
    assert (checkout / "exported" / "tokenizer.json").exists()
    assert "<svg" in (checkout / "training.html").read_text()


@pytest.mark.slow
def test_two_processes(checkout, tutorial):
    (two,) = blocks_of(DOCS / "howto" / "cluster.md", 'title="two processes"')
    run(two, checkout)
    start, *_, end = runlog.read(str(checkout / "runs" / "two" / runlog.NAME))
    assert (start["workers"], end["kind"], end["reason"]) == (2, "stop", "budget")


@pytest.mark.slow
def test_pilots_and_the_plan_for_a_night(checkout, tutorial):
    """With seconds for its minutes and hours, and small sizes."""
    (block,) = blocks_of(DOCS / "planner.md", 'title="at full scale"')
    short = {"--pilot 5m": "--pilot 6s", "--budget 8h": "--budget 30s", "2l_64h,3l_128h,4l_192h": "1l_32h,2l_64h"}
    for long, instead in short.items():
        assert long in block
        block = block.replace(long, instead)
    assert re.match(r"Train (1l_32h|2l_64h) .* for the whole 30 s", run(block, checkout))
    assert (checkout / "plan.png").stat().st_size > 10_000


GOING_ON = [page for page in PAGES if page.parent == DOCS and page.stem != "tutorial" and blocks_of(page)]


def test_which_pages_go_on_from_the_tutorial():
    names = {page.stem for page in GOING_ON}
    assert names == {"budgets", "compression", "data", "export", "packed", "planner", "runtime", "structures"}


@pytest.mark.slow
@pytest.mark.parametrize("page", GOING_ON, ids=lambda page: page.stem)
def test_the_commands_of_a_page(checkout, tutorial, page):
    for block in blocks_of(page):
        run(block, checkout)
    for block in OTHER.finditer(page.read_text()):
        if block["language"] == "python":
            run(f"python - <<'END'\n{block['body']}\nEND", checkout)


def test_what_a_page_says_a_command_prints(tmp_path):
    (block,) = (b for b in OTHER.finditer((DOCS / "sizes.md").read_text()) if b["language"] == "console")
    command, _, printed = block["body"].removeprefix("$ ").partition("\n")
    assert run(command, tmp_path) == printed


# ------------------------------------------------------------------------------------------- commands that are not run


def commands_of(page: Path) -> list[list[str]]:
    """The words of each command of the blocks that are not run."""
    blocks = [b["body"] for b in SHELL.finditer(page.read_text()) if b["info"] or page == ROOT / "README.md"]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_that_are_not_run_are_understood(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands_of(page):
        understand([word for word in words if word not in ("srun", "...")])


def understand(words: list[str]) -> None:
    """Raise SystemExit where the program would not take these flags, AssertionError for a program unknown here."""
    match words:
        case ["fairseq-train", *flags]:
            fairseq_takes(flags)
        case ["torchrun", "--nproc_per_node", "2", ".venv/bin/fairseq-train", *flags]:
            fairseq_takes(flags)
        case ["train-large", *flags]:
            given, passed_on = cli._split_at_dashes(flags)
            cli._parser().parse_args(given)
            if passed_on:
                fairseq_takes(["data", "--task", "masked_lm", "--arch", "prenorm_roberta", *passed_on])
        case ["python", "-m", "xla.pretrain" | "xla.finetune" as module, *flags]:
            fairseq_takes(launch._parse(module.removeprefix("xla."), flags)[1])
        case ["python", "-m", "xla.pod", *flags]:
            pod._parse(flags)
        case [".venv/bin/python", script, *flags]:
            done = subprocess.run([sys.executable, ROOT / script, *flags, "--help"], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert {word for word in flags if word.startswith("--")} <= set(re.findall(r"--[a-z-]+", done.stdout))
        case ["status=$?"] | ["[", "$status", "-ne", "143", "]", "||", "scontrol", "requeue", _] | ["exit", "$status"]:
            pass  # docs/howto/cluster.md: tried on SLURM by hand, as the page says
        case ["make", target, *_]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
        case ["python", "-m", "t2t_problems.launch" | "t2t_problems.bleu", *_]:
            pass  # tests/t2t_problems, where there is TensorFlow
        case _:
            assert words[0] in (".", "pip", ".venv/bin/pip"), words


def fairseq_takes(flags: list[str]) -> None:
    import_user_module(Namespace(user_dir="fairseq_plugins"))
    options.parse_args_and_arch(options.get_training_parser(), flags)


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


def test_the_command_line_page_has_every_flag():
    spec = importlib.util.spec_from_file_location("flags", DOCS / "hooks" / "flags.py")
    assert spec is not None
    assert spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)

    def page(name: str) -> str:
        return hook.on_page_markdown("# Page\n", page=SimpleNamespace(file=SimpleNamespace(src_uri=name)))

    shown = page("reference/cli.md")
    for command, flag in (("plan", "--pilot"), ("quantize", "--target-error"), ("export-hf", "--onnx")):
        assert flag in shown.partition(f"\n## {command}\n")[2].partition("\n## ")[0]
    assert page("index.md") == "# Page\n"


def test_the_reference_has_every_module_that_it_names():
    named = re.findall(r"^::: (\S+)$", "".join(p.read_text() for p in (DOCS / "reference").glob("*.md")), re.M)
    assert len(named) == len(set(named)) > 50
    for module in named:
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module
