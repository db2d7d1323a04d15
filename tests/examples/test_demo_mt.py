"""The pocket study of translation on a user's own pairs, from the TSV to the page, with very little time."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from train_large.report.results import load

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "user_dir_examples" / "pocket_mt" / "demo.py"
T2T = ROOT / ".venv-t2t" / "bin" / "python"
WORDS = {"the": "le", "cat": "chat", "dog": "chien", "sees": "voit", "big": "grand", "red": "rouge", "a": "un"}


def study(*flags: str, status: int = 0) -> str:
    command = [sys.executable, str(DEMO), *flags]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "COLUMNS": "120", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Sentences translated word by word."""
    draw = random.Random(1)
    lines = [draw.choices(list(WORDS), k=draw.randint(3, 9)) for _ in range(1500)]
    path = tmp_path / "mine.tsv"
    path.write_text(
        "".join(f"{' '.join(words)}\t{' '.join(map(WORDS.get, words))}\n" for words in lines), encoding="utf-8"
    )
    return path


@pytest.mark.slow
@pytest.mark.skipif(not T2T.exists(), reason="Tensor2Tensor's environment is not there: make env-t2t")
def test_from_the_pairs_to_the_page(pairs, tmp_path):
    out = tmp_path / "out"
    flags = ("--pairs", str(pairs), "--out", str(out), "--sizes", "1l_16h,1l_32h", "--budget", "3s", "--t2t", str(T2T))
    output = study(*flags)
    results = load(out / "results.json")
    assert [model.name for model in results.models] == ["1l_16h", "1l_32h"]
    assert results.translation.train + results.translation.dev + results.translation.test <= 1500
    for model in results.models:
        assert 3 <= model.train_seconds < 4
        assert len(model.curve) == 5
        assert model.curve[-1].updates == model.updates
        assert model.curve[-1].bleu is not None
        # The scores are those of the files that lie there.
        folder = out / model.name
        scores = json.loads((folder / "score" / "s.json").read_text())
        assert model.scores.paper == scores["paper"]
        (translations,) = (folder / "translate").glob("translations.fr*")
        assert len(translations.read_text().splitlines()) == results.translation.decoding.sentences
        assert f"{model.scores.paper:.2f}" in output
    assert "BLEU" in (out / "report.html").read_text()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*/*") if "logs" not in str(path)}
    study(*flags)  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in before} == before


# In the place of Tensor2Tensor's Python: notes what it is to do, and leaves the files that something else asks for.
T2T_OF_NOTHING = """#!PYTHON
import sys
from pathlib import Path

flags = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:] if "=" in word)
words = {Path(word).stem for word in sys.argv[1:]}
(program,) = words & {"datagen", "trainer", "decoder", "score"}
with open("TOLD", "a") as told:
    told.write(program + " ")
if program == "datagen":
    data, pairs = Path(flags["data_dir"]), Path(flags["tmp_dir"], "pairs.tsv").read_text().splitlines()
    data.mkdir(exist_ok=True)
    (data / "translate_enfr_pairs.json").write_text(str(hash(tuple(pairs))))
    for number, language in enumerate(("en", "fr")):
        lines = [pair.split(chr(9))[number] + chr(10) for pair in pairs[:5]]
        for split in ("dev", "test"):
            (data / f"translate_enfr_pairs.{split}.{language}").write_text("".join(lines))
if program == "decoder":
    Path(flags["decode_to_file"]).touch()
if program == "score":
    Path(sys.argv[-1]).write_text("{}")
"""


def test_what_other_pairs_words_or_budgets_do_anew(pairs, tmp_path, monkeypatch):
    told, t2t = tmp_path / "told", tmp_path / "python"
    t2t.write_text(T2T_OF_NOTHING.replace("PYTHON", sys.executable).replace("TOLD", str(told)))
    t2t.chmod(0o755)
    monkeypatch.setenv("PYTHONHASHSEED", "0")

    def done(*flags: str) -> list[str]:
        told.write_text("")
        own = ("--pairs", str(pairs), "--t2t", str(t2t), "--out", str(tmp_path / "out"), "--sizes", "1l_16h")
        assert "no run log" in study(*own, *flags, status=2)  # nothing was trained, so there is nothing to gather
        return told.read_text().split()

    everything = ["datagen", "trainer", "decoder", "score"]
    assert done("--words", "12") == everything
    assert done("--words", "12") == ["datagen"]
    assert done("--words", "5") == everything
    assert done("--words", "5", "--budget", "9s") == everything
    pairs.write_text("".join(line for line in pairs.open() if "red" not in line))
    assert done("--words", "5", "--budget", "9s") == everything


def test_what_is_wrong_is_told(pairs, tmp_path):
    out = ("--out", str(tmp_path / "out"))
    assert "make env-t2t" in study("--t2t", str(tmp_path / "nowhere"), *out, status=2)
    assert "'7x' is not a size" in study("--sizes", "7x", *out, status=2)
    assert "--jobs -2 is too few" in study("--jobs", "-2", *out, status=2)
    assert "leaves no time" in study("--budget", "0", *out, status=2)
    torn = tmp_path / "torn.tsv"
    torn.write_text("one side only\n")
    said = study("--pairs", str(torn), "--t2t", sys.executable, *out, status=2)
    assert str(torn) in said
    assert "Traceback" not in said
