"""The pocket study on a user's own text and task, from the text to the page, with very little time."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import demo
import pytest
from chain import Chains
from recipe import Recipe

from train_large.data.glue import TaskSummary
from train_large.files import alone
from train_large.report.results import load

DEMO = Path(__file__).parents[2] / "user_dir_examples" / "pocket" / "demo.py"
WORDS = (  # noqa: SIM905
    "the a one red green old new house tree river goes comes stands good bad fine poor"
).split()


def study(*flags: str, status: int = 0) -> str:
    command = [sys.executable, str(DEMO), *flags]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "COLUMNS": "120"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture
def own(tmp_path: Path) -> tuple[str, ...]:
    """A text and a task whose label is whether it says `good` or `bad`."""
    rng = random.Random(1)
    lines = [" ".join(rng.choice(WORDS) for _ in range(12)) for _ in range(1200)]
    (tmp_path / "text.txt").write_text("\n".join(lines) + "\n")
    rows = [f"{' '.join(rng.choice(WORDS[:13]) for _ in range(4))} {word}\t{word}" for word in ("good", "bad") * 120]
    (tmp_path / "task.tsv").write_text("sentence\tlabel\n" + "\n".join(rows) + "\n")
    return ("--text", str(tmp_path / "text.txt"), "--task", str(tmp_path / "task.tsv"), "--out", str(tmp_path / "out"))


@pytest.mark.slow
def test_from_the_text_to_the_page(own, tmp_path):
    flags = (*own, "--sizes", "1l_16h,2l_16h", "--budget", "3s", "--memory-limit", "20kB")
    output = study(*flags)
    results = load(tmp_path / "out" / "results.json")
    assert [model.name for model in results.models] == ["1l_16h", "2l_16h"]
    recipe = Recipe()
    for model in results.models:
        assert 3 <= model.train_seconds < 4
        assert model.curve[-1].updates == model.updates
        assert len(model.compressed) == (1 + len(recipe.sparsity)) * len(recipe.bits)
        for entry in model.compressed:
            assert entry.parameters > entry.nonzero * (1 - 1e-9) or entry.sparsity == 0
            assert entry.bytes_paper <= entry.bytes
        whole, pruned = model.at(0.0, 32), model.at(0.9, 32)
        assert pruned.nonzero < 0.3 * whole.nonzero
        assert model.finetuned.accuracy == whole.accuracy
        measured = tmp_path / "out" / model.name / "measure"
        assert sorted(path.name for path in measured.glob("*.safetensors")) == [
            f"packed_{b}.safetensors" for b in (32, 4, 6, 8)
        ]
        for bits in recipe.bits:
            assert model.at(0.0, bits).file_bytes == (measured / f"packed_{bits}.safetensors").stat().st_size
        assert pruned.file_bytes < whole.file_bytes
        assert {(error.sparsity, error.bits) for error in model.weight_errors} == {(0, 8), (0, 6), (0, 4), (0.6, 32)}
        at_bits = [model.weight_errors_at(0.0, bits)["fc1"].mean_absolute for bits in (8, 6, 4)]
        assert 0 < at_bits[0] < at_bits[1] < at_bits[2]
        assert model.weight_errors_at(0.0, 4)["all"].parameters == whole.parameters
    page = (tmp_path / "out" / "report.html").read_text()
    assert "1l_16h" in page
    assert page.count("<svg") >= 4
    assert "20 kB" in page
    assert "section 4.3" in output
    assert "bytes of the file" in page
    assert "Weight error, quantized to 4 bits" in output
    # Again: everything is there, and the figures stay.
    study(*flags)
    assert load(tmp_path / "out" / "results.json").models == results.models


def test_what_another_text_task_or_budget_does_anew(tmp_path, monkeypatch):
    told = tmp_path / "told"

    def noting(name: str):
        return lambda *given: [sys.executable, "-c", f"open({str(told)!r}, 'a').write({name + ' '!r})", repr(given)]

    for name in demo.STAGES:
        monkeypatch.setattr(demo, name, noting(name))
    recipe, task = Recipe(), TaskSummary(("bad", "good"), 1, {"train": {"bad": 9, "good": 9}}, 0)
    folders = {("1l_16h", name): tmp_path / "1l_16h" / name for name in demo.STAGES}

    def done(budget: str = "3s", **records: str) -> list[str]:
        told.write_text("")
        for name, record in records.items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "prepared.json").write_text(record)
        stages = demo.chain("1l_16h", folders, recipe, budget, 3.0, tmp_path, task)
        with alone(tmp_path, "demo", "--out") as lock:
            Chains({"1l_16h": stages}, 1, tmp_path / "logs", lock).run(lambda: None, every=0.01)
        return told.read_text().split()

    assert done(text="a text", task="a task") == list(demo.STAGES)
    assert done() == []
    assert done(task="another") == ["finetune", "prune", "measure"]
    assert done(text="another") == list(demo.STAGES)
    assert done(budget="4s") == list(demo.STAGES)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--budget", "2 fortnights"), "2 fortnights"),
        (("--sizes", "huge"), "huge"),
        (("--sizes", " , "), "--sizes"),
        (("--text", "nowhere.txt"), "nowhere.txt"),
        (("--jobs", "0"), "--jobs 0"),
    ],
)
def test_bad_flags_are_one_sentence(flags, named, tmp_path):
    output = study("--out", str(tmp_path / "out"), *flags, status=2)
    assert named in output.splitlines()[-1]
    assert "Traceback" not in output
