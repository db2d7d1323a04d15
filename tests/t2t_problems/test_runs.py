"""Tensor2Tensor's own programs with the plugin, from pairs to a score: what a user does, as processes."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from programs import ROOT, environment, launch, make_data, pairs, read, trainer

from t2t_problems import bleu, counters
from train_large import runlog
from train_large.sizes import Size, tensor2tensor_parameters

BUDGET = 15

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("enfr"))


@pytest.fixture(scope="module")
def trained(data: Path) -> Path:
    """A run that was killed half-way, and taken up again until its budget was used."""
    out = data.parent / "run"
    schedule = ["--schedule=continuous_train_and_eval", "--eval_throttle_seconds=0", "--log_step_count_steps=10"]
    arguments = trainer(data, out, f"budget_seconds={BUDGET},budget_evaluations=3,bleu_sentences=20", *schedule)
    command = [sys.executable, "-m", *map(str, arguments)]
    with open(str(data.parent / "killed.log"), "wb") as log:
        process = subprocess.Popen(command, env=environment(), cwd=str(ROOT), stdout=log, stderr=log)
        for _ in range(6000):
            time.sleep(0.1)
            if process.poll() is not None or any(line["kind"] == "valid" for line in read(out)):
                break
        process.send_signal(signal.SIGKILL)
        process.wait()
    shutil.copy(str(out / runlog.NAME), str(data.parent / "killed.jsonl"))
    launch(*arguments)
    return out


def test_the_budget_survives_a_kill(trained: Path) -> None:
    (start,), (resume,), stop = read(trained, "start"), read(trained, "resume"), read(trained, "stop")[-1]
    assert start["parameters"] == tensor2tensor_parameters(Size(2, 128), start["vocabulary"])
    before = [line for line in runlog.read(str(trained.parent / "killed.jsonl")) if line["kind"] == "checkpoint"]
    kept = next(line for line in before if line["updates"] == resume["updates"])
    assert kept["updates"] > 0
    # What was saved, no more and no less.
    assert {name: resume[name] for name in ("train_seconds", "tokens", "flops")} == {
        name: kept[name] for name in ("train_seconds", "tokens", "flops")
    }
    assert stop["reason"] == "budget"
    assert counters.in_checkpoint(counters.latest(str(trained)))["updates"] == stop["updates"]


def test_the_run_stops_at_the_first_update_over_its_budget(trained: Path) -> None:
    *_, before, stop = [line for line in read(trained) if line["kind"] in ("train", "stop")]
    assert stop["updates"] == before["updates"]  # logged at the stop
    assert stop["train_seconds"] >= BUDGET
    earlier = [line for line in read(trained, "train") if line["updates"] < stop["updates"]][-1]
    updates = stop["updates"] - earlier["updates"]
    one = (stop["train_seconds"] - earlier["train_seconds"]) / updates
    assert stop["train_seconds"] - BUDGET < 5 * one  # batches differ in length


def test_every_evaluation_has_loss_perplexity_and_bleu(trained: Path) -> None:
    valid = read(trained, "valid")
    assert len(valid) == 3
    assert valid[-1]["updates"] == read(trained, "stop")[-1]["updates"]
    for line in valid:
        assert line["subset"] == "dev"
        assert line["bleu_sentences"] == 20
        assert 0 <= line["bleu"] <= 100
        assert line["beam_size"] == 1
        assert line["perplexity"] == pytest.approx(math.exp(line["loss"]))
    # A model that has learned nothing gives every word piece the same chance. By the first evaluation a quick machine
    # has learned all there is, and what comes after goes up and down.
    (start,) = read(trained, "start")
    assert valid[-1]["perplexity"] < start["vocabulary"] / 10


def test_the_same_run_again_trains_nothing(trained: Path, data: Path) -> None:
    before = read(trained, "stop")[-1]
    launch(*trainer(data, trained, f"budget_seconds={BUDGET},bleu_sentences=0", "--schedule=train"))
    after = read(trained, "stop")[-1]
    assert (after["updates"], after["train_seconds"]) == (before["updates"], before["train_seconds"])


def test_decode_score_and_average(trained: Path, data: Path, tmp_path: Path) -> None:
    model = [f"--data_dir={data}", "--problem=translate_enfr_pairs", "--hparams_set=transformer_enfr_2l_128h"]
    out = tmp_path / "translations.fr"
    source, reference = (data / f"translate_enfr_pairs.test.{language}" for language in ("en", "fr"))
    launch(
        "t2t_problems.launch",
        "decoder",
        *model,
        "--model=transformer",  # the stock model reads what the budgeted one has left
        f"--output_dir={trained}",
        f"--decode_from_file={source}",
        f"--decode_to_file={out}",
        "--decode_hparams=beam_size=2,alpha=0.6",
    )
    translations = next(tmp_path.glob("translations.fr*"))
    said = launch("t2t_problems.bleu", f"--translation={translations}", f"--reference={reference}", "--json")
    scores = json.loads(said[said.index("{") :])
    sides = [path.read_text(encoding="utf-8").split("\n")[:-1] for path in (translations, reference)]
    assert scores["scores"]["paper"] == pytest.approx(bleu.paper_bleu(*sides), abs=1e-9)
    assert scores["sentences"] == len(sides[1])
    lines = translations.read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(reference.read_text(encoding="utf-8").splitlines())
    words = {word for _, french in pairs(3000) for word in french.split()}
    assert {word for line in lines for word in line.split()} & words

    launch("t2t_problems.launch", "avg_all", f"--model_dir={trained}", f"--output_dir={tmp_path / 'average'}", "--n=2")
    averaged, last = counters.latest(str(tmp_path / "average")), counters.latest(str(trained))
    assert averaged is not None
    assert counters.in_checkpoint(averaged)["updates"] == counters.in_checkpoint(last)["updates"]


def test_an_evaluation_by_a_process_of_its_own(trained: Path, data: Path) -> None:
    """And of the training data, which is no score of the run."""
    model = [f"--data_dir={data}", "--problem=translate_enfr_pairs", "--hparams_set=transformer_enfr_2l_128h"]
    model += [f"--output_dir={trained}", "--model=transformer_budgeted", "--eval_steps=1", "--eval_timeout_mins=0"]
    before = read(trained)
    said = launch("t2t_problems.launch", "eval", *model)
    assert "neg_log_perplexity" in said
    launch("t2t_problems.launch", "trainer", *model, "--schedule=continuous_eval_on_train_data")
    assert read(trained) == before
    launch("t2t_problems.launch", "trainer", *model, "--schedule=continuous_eval", "--hparams=bleu_sentences=0")
    (scored,) = read(trained)[len(before) :]
    assert (scored["kind"], scored["subset"], scored["updates"]) == ("valid", "dev", before[-1]["updates"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("budget_seconds=0", "budget_seconds=0 leaves no time to train"),
        ("budget_seconds=2h", "--hparams=budget_seconds=2h: give a number of seconds"),
        ("budget_seconds=5,budget_clock=sundial", "budget_clock='sundial' is none of train, wall, calibrated"),
        ("budget_seconds=5,hidden_size=256", "holds a model with 128 hidden dimensions"),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(trained: Path, data: Path, change: str, sentence: str) -> None:
    before = read(trained)
    said = launch(*trainer(data, trained, change, "--schedule=train"), status=2)
    assert sentence in said
    assert "Traceback" not in said
    assert read(trained) == before
