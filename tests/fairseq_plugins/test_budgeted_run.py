"""Budgets in real runs of fairseq-train.

Most runs are made in this process, on a clock of the test's own: a forward in training takes a second, one in
validation ten, saving a hundred. So what is charged is known exactly, whatever the machine does. The runs that are
killed are processes of their own.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
import torch
from fairseq import options
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import progress_bar
from fairseq.trainer import Trainer
from fairseq_cli import train as fairseq_train
from omegaconf import OmegaConf
from tensorboardX.proto import event_pb2

import fairseq_plugins
from fairseq_plugins import budgeted_run, device
from fairseq_plugins.criterions.label_smoothed_cross_entropy import BudgetedLabelSmoothedCrossEntropyCriterion
from fairseq_plugins.criterions.masked_lm import QuickMaskedLmLoss
from fairseq_plugins.criterions.sentence_prediction import BudgetedSentencePredictionCriterion
from fairseq_plugins.run import shape_facts
from train_large import budget, flops, runlog, step_times
from train_large.report.runs import read_runs
from train_large.sizes import Size

USER_DIR = str(Path(fairseq_plugins.__file__).parent)
SIZE = ["--encoder-layers", "1", "--encoder-embed-dim", "16", "--encoder-attention-heads", "2", "--max-positions", "16"]
COMMON = [
    "--cpu",
    "--num-workers",
    "0",
    "--no-progress-bar",
    "--log-format",
    "simple",
    "--required-batch-size-multiple",
    "1",
]
COMMON += [
    "--optimizer",
    "adam",
    "--lr",
    "0.01",
    "--dropout",
    "0",
    "--attention-dropout",
    "0",
    "--seed",
    "1",
    "--log-interval",
    "1",
]
MLM = [
    "--task",
    "masked_lm",
    "--criterion",
    "budgeted_masked_lm",
    "--arch",
    "prenorm_roberta",
    *SIZE,
    "--tokens-per-sample",
    "16",
]
MLM += [
    "--batch-size",
    "4",
    "--lr-scheduler",
    "budget_linear",
    "--warmup-fraction",
    "0.2",
    "--no-epoch-checkpoints",
    *COMMON,
]


class FakeTime:
    """A clock that work moves."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def now(self) -> float:
        return self.seconds

    mark = now

    def between(self, start: float, end: float) -> float:
        return end - start


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()

    def costs(owner: Any, name: str, seconds: Any) -> None:
        upstream = getattr(owner, name)

        def slow(self: Any, *args: Any, **kwargs: Any) -> Any:
            fake.seconds += seconds(self)
            return upstream(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, slow)

    for criterion in (QuickMaskedLmLoss, LabelSmoothedCrossEntropyCriterion):
        costs(criterion, "forward", lambda criterion: 1 if criterion.training else 10)
    costs(Trainer, "save_checkpoint", lambda _: 100)
    monkeypatch.setattr(budgeted_run, "TrainClock", lambda seconds, timer: budget.TrainClock(seconds, fake, fake.now))
    monkeypatch.setattr(
        budgeted_run, "WallClock", lambda seconds: budget.WallClock(seconds, started=1000.0, now=fake.now)
    )
    return fake


def run(*flags: Any, save_dir: Path, finish: bool = True) -> list[dict[str, Any]]:
    """One fairseq-train in this process; the lines of its log. `finish`: as at the end of its process."""
    parser = options.get_training_parser()
    arguments = [*map(str, flags), "--save-dir", str(save_dir), "--user-dir", USER_DIR]
    previous = signal.getsignal(signal.SIGTERM)
    try:
        fairseq_train.main(convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, arguments)))
        if finish:
            budgeted_run.current.finish()
    finally:
        signal.signal(signal.SIGTERM, previous)
    return runlog.read(save_dir / runlog.NAME)


def of_kind(lines: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["kind"] == kind]


def test_a_budget_stops_the_run_at_its_end(text, tmp_path, clock):
    lines = run(text, *MLM, "--budget", "20s", save_dir=tmp_path)
    stop = lines[-1]
    assert stop["kind"] == "stop"
    assert stop["reason"] == "budget"
    assert (stop["updates"], stop["train_seconds"]) == (20, 20)
    assert stop["tokens"] > 0
    assert (tmp_path / "checkpoint_last.pt").exists()


def test_validation_and_saving_are_not_charged_to_the_train_clock_but_to_the_wall_clock(text, tmp_path, clock):
    often = ["--validate-interval-updates", "5", "--save-interval-updates", "5", "--keep-interval-updates", "1"]
    lines = run(text, *MLM, "--budget", "20s", *often, save_dir=tmp_path / "train")
    assert (lines[-1]["updates"], lines[-1]["train_seconds"]) == (20, 20)
    assert [line["updates"] for line in of_kind(lines, "valid")] == [5, 10, 15, 20]
    assert len(of_kind(lines, "checkpoint")) == 4
    assert lines[-1]["wall_seconds"] > 400
    lines = run(text, *MLM, "--budget", "200s", "--budget-clock", "wall", *often, save_dir=tmp_path / "wall")
    assert lines[-1]["reason"] == "budget"
    assert lines[-1]["updates"] < 20
    assert lines[-1]["train_seconds"] == lines[-1]["updates"]


def test_gradient_accumulation_makes_updates_longer(text, tmp_path, clock):
    lines = run(text, *MLM, "--budget", "20s", "--update-freq", "4", save_dir=tmp_path)
    assert (lines[-1]["updates"], lines[-1]["train_seconds"]) == (5, 20)


def test_the_calibrated_clock_counts_updates(text, tmp_path, clock):
    flags = ["--budget", "2h", "--budget-clock", "calibrated", "--seconds-per-update", "600"]
    lines = run(text, *MLM, *flags, save_dir=tmp_path)
    assert lines[-1]["updates"] == 12


def test_the_calibrated_clock_reads_the_table_of_time_steps(text, tmp_path, clock):
    row = dict.fromkeys(step_times.COLUMNS, 0)
    row.update({"size": "1l_16h", "layers": 1, "hidden": 16, "ffn": 64, "heads": 2, "length": 16, "batch": 8})
    row.update({"seconds_per_update": 4.0, "device": "cpu", "machine": "", "torch": "", "flags": ""})
    table = tmp_path / "steps.csv"
    entries = 30 + 4 + 1 + 6  # words, special symbols, the mask, and what fills up to a multiple of 8
    rows = [{**row, "vocabulary": entries}, {**row, "vocabulary": 50265, "seconds_per_update": 9.0}]
    table.write_text("\n".join(",".join(map(str, line)) for line in (row, *(each.values() for each in rows))) + "\n")
    flags = ["--budget", "20s", "--budget-clock", "calibrated", "--seconds-per-update", table]
    lines = run(text, *MLM, *flags, "--update-freq", "2", save_dir=tmp_path / "run")
    assert lines[0]["seconds_per_update"] == 4
    assert lines[-1]["updates"] == 5
    with pytest.raises(SystemExit, match=r"steps\.csv"):  # no row for updates of 4 sequences
        run(text, *MLM, *flags, save_dir=tmp_path / "other")
    for given in (table, "0.5"):  # the train clock would not look at it
        with pytest.raises(SystemExit, match=f"--seconds-per-update {given} is for --budget-clock calibrated"):
            run(text, *MLM, "--budget", "3s", "--seconds-per-update", given, save_dir=tmp_path / "by the train clock")
    with pytest.raises(SystemExit, match=r"steps\.csv: a table is of one --update-freq"):
        run(text, *MLM, *flags, "--update-freq", "2,4", save_dir=tmp_path / "two")
    shrunk = ["--encoder-layers", "2", "--layer-ffn", "7,64"]
    with pytest.raises(SystemExit, match=r"steps\.csv: a table has no models with --layer-heads or --layer-ffn"):
        run(text, *MLM, *flags, *shrunk, save_dir=tmp_path / "shrunk")


def test_the_learning_rate_rises_and_falls_over_the_budget(text, tmp_path, clock):
    lines = run(text, *MLM, "--budget", "20s", save_dir=tmp_path)
    rates = [line["lr"] for line in of_kind(lines, "train")]
    expected = [0.01 * budget.warmup_then_linear(used / 20, 0.2) for used in range(20)]
    assert rates == pytest.approx(expected)


def test_a_run_goes_on_where_its_checkpoint_was_and_is_charged_once(text, tmp_path, clock, monkeypatch):
    flags = [*MLM, "--budget", "20s", "--save-interval-updates", "6"]
    whole = run(text, *flags, save_dir=tmp_path / "whole")

    updates = []

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        updates.append(1)
        if len(updates) == 9:
            raise KeyboardInterrupt
        return upstream(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        upstream = Trainer.train_step
        patch.setattr(Trainer, "train_step", killed)
        with pytest.raises(KeyboardInterrupt):
            run(text, *flags, save_dir=tmp_path / "parts")
    lines = run(text, *flags, save_dir=tmp_path / "parts")
    resume = of_kind(lines, "resume")[0]
    assert (resume["updates"], resume["train_seconds"]) == (6, 6)
    assert (lines[-1]["updates"], lines[-1]["train_seconds"], lines[-1]["reason"]) == (20, 20, "budget")
    assert lines[-1]["flops"] == whole[-1]["flops"]
    # The same data, rates and random numbers: the same losses.
    for name in ("lr", "loss"):
        assert [line[name] for line in of_kind(lines, "train")] == pytest.approx(
            [line[name] for line in of_kind(whole, "train")]
        )
    # Once more: there is nothing left.
    lines = run(text, *flags, save_dir=tmp_path / "parts")
    assert lines[-1]["updates"] == 20


def test_a_run_goes_on_from_the_end_of_an_epoch_with_what_is_left(text, tmp_path, clock):
    flags = [*MLM, "--budget", "200s"]
    before = run(text, *flags, "--max-epoch", "1", save_dir=tmp_path)[-1]
    assert 0 < before["updates"] < 200
    lines = run(text, *flags, save_dir=tmp_path)
    resume = of_kind(lines, "resume")[0]
    for name in ("updates", "train_seconds", "tokens", "flops"):
        assert resume[name] == before[name]
    assert (lines[-1]["updates"], lines[-1]["train_seconds"], lines[-1]["reason"]) == (200, 200, "budget")
    # --reset-meters asks for a new one.
    lines = run(text, *flags, "--max-epoch", "3", "--reset-meters", save_dir=tmp_path)
    assert of_kind(lines, "start")[-1]["updates"] == 0


def test_finetuning_begins_with_a_fresh_budget(text, tmp_path, clock):
    run(text, *MLM, "--budget", "7s", save_dir=tmp_path / "a")
    lines = run(
        text,
        *MLM,
        "--budget",
        "5s",
        "--finetune-from-model",
        tmp_path / "a" / "checkpoint_last.pt",
        save_dir=tmp_path / "b",
    )
    assert lines[0]["kind"] == "start"
    assert lines[-1]["updates"] == 5


def test_the_log_begins_with_what_its_readers_compare_runs_by(text, tmp_path, clock):
    first = run(text, *MLM, "--budget", "1s", save_dir=tmp_path)[0]
    words = len((text / "dict.txt").read_text().splitlines())
    assert first["vocabulary"] == words + 5  # <s>, <pad>, </s>, <unk> and <mask>
    assert first["length"] == int(MLM[MLM.index("--tokens-per-sample") + 1])


def test_a_run_that_was_killed_after_its_last_checkpoint_gets_its_last_line(text, tmp_path, clock):
    flags = [text, *MLM, "--budget", "3s"]
    run(*flags, save_dir=tmp_path, finish=False)
    killed = runlog.read(tmp_path / runlog.NAME)
    assert not runlog.is_finished(killed)
    lines = run(*flags, save_dir=tmp_path)
    assert lines[:-1] == killed
    assert (lines[-1]["kind"], lines[-1]["reason"], lines[-1]["updates"]) == ("stop", "budget", 3)
    assert run(*flags, save_dir=tmp_path) == lines


def test_a_signal_in_the_last_update_does_not_take_the_validation_away(text, tmp_path, clock, monkeypatch):
    upstream = budgeted_run.BudgetedRun.begin_update

    def begin_update(self) -> None:
        upstream(self)
        if self.counters["updates"] == 2:
            self.take_sigterm()

    monkeypatch.setattr(budgeted_run.BudgetedRun, "begin_update", begin_update)
    for flags in (["--budget", "3s"], ["--budget", "1h", "--max-update", "3"]):
        lines = run(text, *MLM, *flags, save_dir=tmp_path / flags[1])
        assert [line["updates"] for line in of_kind(lines, "valid")] == [3]
        assert runlog.is_finished(lines)


def test_an_update_that_overflows_leaves_no_difference_behind(clock):
    """fairseq leaves it without an end, and what the next one tells is not to be counted from there."""
    ours = object.__new__(budgeted_run.BudgetedRun)
    ours.has_begun, ours._validation, ours._told, ours._tail, ours._is_master = True, None, None, 0.0, True
    ours._terminated_at, ours.clock = None, budget.TrainClock(0, clock, clock.now)
    ours.budget = Namespace(clock="train")
    for micro_batches in ((1.0, 2.0), (3.0, 4.0)):
        ours.begin_update()
        told = 0.0
        for seconds in micro_batches:
            clock.seconds += 1
            told += ours.stamp(0)["budget_used"]
            assert told == seconds


def test_a_target_perplexity_stops_the_run(text, tmp_path, clock):
    flags = ["--target-ppl", "1000", "--validate-interval-updates", "3", "--max-update", "50"]
    lines = run(text, *MLM, "--budget", "1d", *flags, save_dir=tmp_path)
    assert lines[-1]["reason"] == "target_ppl"
    assert lines[-1]["updates"] == 4  # the validation after the third says so, and fairseq stops after an update
    assert of_kind(lines, "valid")[0]["perplexity"] <= 1000


def test_the_log_holds_what_fairseq_measured_in_nats(text, tmp_path, clock, monkeypatch):
    told = []
    upstream = fairseq_train.validate

    def listening(*args: Any) -> Any:
        told.append(upstream(*args))
        return told[-1]

    monkeypatch.setattr(fairseq_train, "validate", listening)
    lines = run(text, *MLM, "--budget", "4s", save_dir=tmp_path)
    valid = of_kind(lines, "valid")[-1]
    assert valid["loss"] / math.log(2) == pytest.approx(told[-1][0], abs=5e-4)  # fairseq rounds to three digits
    assert valid["perplexity"] == pytest.approx(math.exp(valid["loss"]))
    assert valid["subset"] == "valid"


def test_tensorboard_has_the_validations_of_the_log(text, tmp_path, clock):
    flags = ("--tensorboard-logdir", tmp_path / "events", "--validate-interval-updates", 2)
    lines = run(text, *MLM, "--budget", "4s", *flags, save_dir=tmp_path)
    progress_bar._close_writers()
    losses = scalars(tmp_path / "events" / "valid", "loss")
    valid = {line["updates"]: line["loss"] / math.log(2) for line in of_kind(lines, "valid")}
    assert losses.keys() == valid.keys() == {2, 4}
    assert losses == pytest.approx(valid, abs=6e-4)  # rounded to three digits


def scalars(folder: Path, tag: str) -> dict[int, float]:
    """A curve of TensorBoard, by steps. Its files are records: length, checksum, event, checksum."""
    found = {}
    for path in folder.iterdir():
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            for value in event.summary.value:
                if value.tag == tag:
                    found[event.step] = value.simple_value
            data = data[16 + size :]
    return found


def test_flops_are_those_of_the_batches(text, tmp_path, clock):
    lines = run(text, *MLM, "--budget", "3s", save_dir=tmp_path)
    entries = len((text / "dict.txt").read_text().splitlines()) + 5  # fairseq's four special symbols and <mask>
    one = flops.train_flops(Size(1, 16, heads=2), entries, 16, 4)
    assert lines[-1]["flops"] == pytest.approx(3 * one)


def test_the_log_tells_the_text_and_the_masks(text, tmp_path, clock):
    lines = run(text, *MLM, "--budget", "1s", "--mask-prob", "0.25", save_dir=tmp_path)
    assert lines[0]["masked"] == 0.25
    whole = run(text, *MLM, "--max-epoch", "1", "--budget", "900s", save_dir=tmp_path / "whole")
    assert lines[0]["train_tokens"] == whole[-1]["tokens"]


def test_the_log_of_a_shrunk_model_is_of_its_own_layers(text, tmp_path, clock):
    shape = "--encoder-layers 2 --layer-heads 2,1 --layer-ffn 64,7"
    lines = run(text, *MLM, *shape.split(), "--budget", "2s", save_dir=tmp_path)
    entries = len((text / "dict.txt").read_text().splitlines()) + 5
    one = flops.train_flops(Size(2, 16, heads=2), entries, 16, 4, layers=[(2, 64), (1, 7)])
    assert lines[-1]["flops"] == pytest.approx(2 * one)
    start = lines[0]
    assert (start["size"], start["heads"], start["ffn"]) == ("2l_16h", None, None)
    assert (start["layer_heads"], start["layer_ffn"]) == ("2,1", "64,7")
    [model] = read_runs([tmp_path]).models
    assert (model.layers, model.hidden, model.heads, model.flops) == (2, 16, None, lines[-1]["flops"])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, {"heads": 4, "ffn": 64, "layer_heads": None, "layer_ffn": None}),
        ({"layer_heads": "2,2"}, {"heads": 2, "ffn": 64, "layer_heads": "2,2", "layer_ffn": None}),
        ({"layer_ffn": "9,64"}, {"heads": 4, "ffn": None, "layer_heads": None, "layer_ffn": "9,64"}),
        ({"share_layers": "all", "no_embedding_norm": True}, {"share_layers": "all", "embedding_norm": False}),
        ({"share_layers": "none", "no_embedding_norm": False}, {"share_layers": None, "embedding_norm": None}),
    ],
)
def test_heads_and_rows_are_told_where_layers_are_alike(flags, expected):
    whole = {"encoder_layers": 2, "encoder_ffn_embed_dim": 64, "encoder_attention_heads": 4}
    assert expected.items() <= shape_facts(Namespace(**whole, **flags)).items()


def test_flops_of_a_classifier_are_of_its_own_layers():
    model = Namespace(encoder_layers=2, encoder_embed_dim=16, encoder_ffn_embed_dim=64, encoder_attention_heads=4)
    model.layer_heads, model.layer_ffn = "3,1", "5,64"
    task = Namespace(source_dictionary=range(50), cfg=Namespace(num_classes=3))
    criterion = Namespace(run=Namespace(root=Namespace(model=model)), task=task)
    sample = {"net_input": {"src_tokens": torch.zeros(4, 10)}}
    layers, head = [(3, 5), (1, 64)], {"head": "classification", "classes": 3}
    assert BudgetedSentencePredictionCriterion.flops(criterion, sample) == flops.train_flops(
        Size(2, 16, 64, 4), 50, 10, 4, layers=layers, **head
    )


def test_translation_runs_under_the_same_budget(pairs, tmp_path, clock):
    flags = [
        "--task",
        "translation",
        "--criterion",
        "budgeted_label_smoothed_cross_entropy",
        "--label-smoothing",
        "0.1",
    ]
    flags += ["--arch", "transformer", "--encoder-layers", "1", "--decoder-layers", "1", "--encoder-embed-dim", "16"]
    flags += ["--decoder-embed-dim", "16", "--encoder-ffn-embed-dim", "32", "--decoder-ffn-embed-dim", "32"]
    flags += ["--encoder-attention-heads", "2", "--decoder-attention-heads", "2", "--share-all-embeddings"]
    lines = run(
        pairs,
        *flags,
        "--batch-size",
        "8",
        "--lr-scheduler",
        "budget_linear",
        *COMMON,
        "--report-accuracy",
        "--budget",
        "12s",
        save_dir=tmp_path,
    )
    assert (lines[-1]["updates"], lines[-1]["train_seconds"]) == (12, 12)
    valid = of_kind(lines, "valid")[-1]
    assert valid["perplexity"] == pytest.approx(math.exp(valid["loss"]))
    assert 0 < valid["accuracy"] < 1  # fairseq tells per cent, of which there are some
    assert lines[-1]["flops"] > 0


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--budget", "0"], "--budget"),
        (["--budget", "2 fortnights"], "2 fortnights"),
        (["--budget", "5s", "--warmup-fraction", "1.5"], "--warmup-fraction"),
        (["--budget", "5s", "--budget-clock", "calibrated"], "--seconds-per-update"),
        (["--budget", "5s", "--target-ppl", "0.5"], "--target-ppl"),
        (["--budget", "5s", "--target-ppl", "9", "--disable-validation"], "--disable-validation turns off"),
        ([], "--budget"),
    ],
)
def test_bad_flags_end_with_one_sentence(text, tmp_path, flags, sentence):
    with pytest.raises(SystemExit) as ending:
        run(text, *MLM, *flags, save_dir=tmp_path)
    assert sentence in str(ending.value)
    assert "\n" not in str(ending.value)
    assert not list(tmp_path.glob("*.pt"))


def test_a_scheduler_without_a_budget_ends_with_one_sentence(text, tmp_path):
    flags = [*MLM]
    flags[flags.index("budgeted_masked_lm")] = "masked_lm"
    budgeted_run.current = None
    with pytest.raises(SystemExit, match="budget_linear"):
        run(text, *flags, save_dir=tmp_path)


# -- processes of their own --


def process(*flags: Any, save_dir: Path, before: str = "") -> subprocess.Popen[bytes]:
    """A fairseq-train of its own, which does `before` first; what it prints goes to SAVE_DIR/output."""
    code = f"{before}\nfrom fairseq_cli.train import cli_main\ncli_main()"
    command = [sys.executable, "-c", code, *map(str, flags), "--save-dir", str(save_dir)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    save_dir.mkdir(exist_ok=True)
    with open(save_dir / "output", "ab") as output:
        return subprocess.Popen(
            [*command, "--user-dir", USER_DIR], stdout=output, stderr=subprocess.STDOUT, env=environment
        )


def ending(child: subprocess.Popen[bytes], save_dir: Path, status: int = 0) -> list[dict[str, Any]]:
    """Wait for its end; the lines of its log."""
    assert child.wait(timeout=300) == status, (save_dir / "output").read_text()[-3000:]
    return runlog.read(save_dir / runlog.NAME)


def wait_for(condition: Callable[[list[dict[str, Any]]], bool], child: subprocess.Popen[bytes], save_dir: Path) -> None:
    """Wait until the log's lines meet `condition`."""
    log = save_dir / runlog.NAME
    while not (log.exists() and condition(runlog.read(log))):
        assert child.poll() is None, (save_dir / "output").read_text()[-3000:]
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_run_trains_for_what_is_left(text, tmp_path):
    flags = [
        text,
        *MLM,
        "--budget",
        "8s",
        "--save-interval-updates",
        "20",
        "--disable-validation",
        "--keep-interval-updates",
        "1",
    ]
    child = process(*flags, save_dir=tmp_path)
    wait_for(lambda lines: any(line["train_seconds"] > 3 for line in of_kind(lines, "checkpoint")), child, tmp_path)
    child.kill()
    child.wait()
    child = process(*flags, save_dir=tmp_path)
    lines = ending(child, tmp_path)
    resume = of_kind(lines, "resume")[0]
    saved = [line for line in of_kind(lines, "checkpoint") if line["updates"] <= resume["updates"]][-1]
    assert resume["updates"] == saved["updates"]
    assert resume["train_seconds"] == pytest.approx(saved["train_seconds"], abs=0.01)
    assert lines[-1]["reason"] == "budget"
    durations = [b["train_seconds"] - a["train_seconds"] for a, b in zip(lines, lines[1:])]
    assert 8 <= lines[-1]["train_seconds"] <= 8 + 2 * max(durations)


@pytest.mark.slow
def test_sigterm_saves_then_stops(text, tmp_path):
    flags = [text, *MLM, "--budget", "1h"]
    child = process(*flags, save_dir=tmp_path)
    wait_for(lambda lines: len(lines) > 10, child, tmp_path)
    child.terminate()
    child.terminate()  # torchrun does so after SLURM, which signals all processes
    lines = ending(child, tmp_path, -signal.SIGTERM)
    assert lines[-1]["reason"] == "SIGTERM"
    state = torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)
    assert state["optimizer_history"][-1]["num_updates"] == lines[-1]["updates"]


FAILING = """
from fairseq.trainer import Trainer
train_step = Trainer.train_step
def fail_after_five(self, *args, **more):
    if self.get_num_updates() == 5:
        raise RuntimeError("no memory left")
    return train_step(self, *args, **more)
Trainer.train_step = fail_after_five
"""


DISK_FULL = """
import errno
from fairseq.trainer import Trainer
def save_checkpoint(self, *args, **more):
    raise OSError(errno.ENOSPC, "no space")
Trainer.save_checkpoint = save_checkpoint
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "budget", "reason"),
    [
        ("", "1h", "interrupted"),
        ("import os; os.environ['LOGLEVEL'] = 'WARNING'" + FAILING, "1h", "failed"),
        (DISK_FULL, "1h", "failed"),
        (DISK_FULL, "0.1s", "failed"),
    ],
    ids=["ctrl-c", "exception", "disk full", "disk full at the end"],
)
def test_a_run_that_did_not_come_to_its_end_says_so(text, tmp_path, before, budget, reason):
    """Whatever reads the log must not take it for one that did."""
    flags = [text, *MLM, "--budget", budget, "--save-interval-updates", "20"]
    child = process(*flags, save_dir=tmp_path, before=before)
    if not before:
        wait_for(lambda lines: len(lines) > 3, child, tmp_path)
        child.send_signal(signal.SIGINT)
    assert child.wait(timeout=300) != 0
    lines = runlog.read(tmp_path / runlog.NAME)
    assert (lines[-1]["kind"], lines[-1].get("reason")) == ("stop", reason)
    assert not runlog.is_finished(lines)


@pytest.mark.slow
def test_sigterm_to_all_processes_that_fairseq_spawned_saves(text, tmp_path):
    """The one that spawned the workers dies of it at once, at which the system sends them a SIGINT."""
    script = Path(__file__).with_name("two_workers.py")
    flags = [*MLM, "--budget", "1h", "--user-dir", USER_DIR, "--save-dir", tmp_path / "run"]
    with open(tmp_path / "output", "wb") as output:
        child = subprocess.Popen(
            [sys.executable, script, *map(str, (tmp_path, text, *flags))],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            start_new_session=True,
        )
    log = tmp_path / "run" / runlog.NAME
    wait_for(lambda lines: len(lines) > 3, child, tmp_path / "run")
    os.killpg(child.pid, signal.SIGTERM)
    assert child.wait(timeout=300) == -signal.SIGTERM
    until = time.monotonic() + 120
    while runlog.read(log)[-1]["kind"] != "stop" and time.monotonic() < until:
        time.sleep(0.05)
    assert runlog.read(log)[-1].get("reason") == "SIGTERM", (tmp_path / "output").read_text()[-3000:]
    state = torch.load(tmp_path / "run" / "checkpoint_last.pt", weights_only=True)
    assert state["optimizer_history"][-1]["num_updates"] == runlog.read(log)[-1]["updates"]


def test_a_table_of_step_times_is_not_for_tasks_without_a_length():
    run_of_a_task = object.__new__(budgeted_run.BudgetedRun)
    run_of_a_task.section = OmegaConf.create({"seconds_per_update": "steps.csv", "budget_clock": "calibrated"})
    run_of_a_task.root = OmegaConf.create(
        {
            "dataset": {"batch_size": 4},
            "optimization": {"update_freq": [1]},
            "distributed_training": {"distributed_world_size": 1},
            "task": {"_name": "sentence_prediction"},
        }
    )
    with pytest.raises(SystemExit, match=r"--seconds-per-update steps\.csv: .* give the seconds as a number"):
        run_of_a_task._seconds_per_update()


def test_runs_of_one_process_do_not_know_each_other(text, tmp_path, clock):
    """As under `fairseq-hydra-train --multirun`."""
    run(text, *MLM, "--budget", "40s", save_dir=tmp_path / "good", finish=False)
    run(text, *MLM, "--budget", "1s", save_dir=tmp_path / "bad", finish=False)
    # The first came to its end when the second began.
    stop = runlog.read(tmp_path / "good" / runlog.NAME)[-1]
    assert (stop["kind"], stop["reason"], stop["wall_seconds"]) == ("stop", "budget", 40 + 6 * 10 + 100)
    assert (tmp_path / "bad" / "checkpoint_best.pt").exists()
    budgeted_run.current.finish()


def test_max_update_is_fairseqs_own_count(text, tmp_path, clock):
    flags = [text, *MLM, "--budget", "30s", "--no-save-optimizer-state", "--disable-validation"]
    run(*flags, "--max-update", "12", save_dir=tmp_path)
    lines = run(*flags, "--max-update", "20", save_dir=tmp_path)
    assert (lines[-1]["updates"], lines[-1]["reason"]) == (30, "budget")


def test_a_budget_goes_on_under_a_checkpoint_suffix(text, tmp_path, clock):
    flags = [text, *MLM, "--budget", "120s", "--checkpoint-suffix=-a", "--disable-validation"]
    run(*flags, "--max-epoch", "1", save_dir=tmp_path)
    lines = run(*flags, save_dir=tmp_path)
    assert [line["updates"] for line in of_kind(lines, "resume")] == [100]
    assert lines[-1]["updates"] == 120


def test_the_wall_clock_is_of_this_run_alone(text, tmp_path, clock):
    flags = [text, *MLM, "--budget", "300s", "--budget-clock", "wall"]
    run(*flags, save_dir=tmp_path)
    for checkpoint in tmp_path.glob("*.pt"):
        checkpoint.unlink()
    clock.seconds = 1000.0
    run(*flags, "--max-update", "3", save_dir=tmp_path)
    clock.seconds = 1000.0
    lines = run(*flags, save_dir=tmp_path)
    assert lines[-1]["updates"] > 3


def test_what_is_no_transformer_is_refused(pairs, tmp_path):
    flags = ["--task", "translation", "--arch", "lstm", "--criterion", "budgeted_label_smoothed_cross_entropy"]
    flags += ["--batch-size", "8", "--budget", "5s", "--cpu", "--optimizer", "adam", "--lr", "0.001"]
    with pytest.raises(SystemExit, match="--arch lstm is no Transformer"):
        run(pairs, *flags, save_dir=tmp_path)


def test_continue_once_goes_on_with_the_budget(text, tmp_path, clock):
    run(text, *MLM, "--budget", "100s", "--max-update", "10", save_dir=tmp_path / "one")
    on = ["--continue-once", tmp_path / "one" / "checkpoint_last.pt", "--max-update", "15"]
    lines = run(text, *MLM, "--budget", "100s", *on, save_dir=tmp_path / "two")
    assert [(line["kind"], line["updates"], line["train_seconds"]) for line in (lines[0], lines[-1])] == [
        ("resume", 10, 10),
        ("stop", 15, 15),
    ]


def test_processes_of_torchrun_that_fairseq_takes_for_single_runs_are_refused(monkeypatch):
    config = OmegaConf.create({"common": {"tpu": False}, "distributed_training": {"distributed_world_size": 1}})
    budgeted_run._check_launch(config)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    budgeted_run._check_launch(config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="--distributed-world-size 2"):
        budgeted_run._check_launch(config)
    config.distributed_training.distributed_world_size = 2
    budgeted_run._check_launch(config)


@pytest.mark.slow
def test_two_workers_stop_together_and_agree_with_one(text, tmp_path):
    """Two gloo processes against one process that accumulates: the same batches in each update."""
    script = Path(__file__).with_name("two_workers.py")
    common = [*MLM, "--user-dir", USER_DIR]
    flags = [*common, "--budget", "20s", "--budget-clock", "calibrated", "--seconds-per-update", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}

    def workers(*flags: str, save_dir: Path) -> list[list[float]]:
        """(learning rates) of each worker, by update."""
        arguments = [str(text), *flags, "--save-dir", str(save_dir)]
        command = [sys.executable, str(script), str(tmp_path), *arguments]
        done = forked.run(command, env=environment, timeout=300)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return [[float(word) for word in (tmp_path / f"rates{rank}").read_text().split()] for rank in (0, 1)]

    rates = workers(*flags, save_dir=tmp_path / "two")
    assert len(rates[0]) == 20
    assert rates[0] == rates[1]
    two = runlog.read(tmp_path / "two" / runlog.NAME)
    child = process(text, *flags, "--update-freq", "2", save_dir=tmp_path / "one")
    one = ending(child, tmp_path / "one")
    for name in ("updates", "tokens", "flops"):
        assert one[-1][name] == two[-1][name]
    losses = [[line["loss"] for line in of_kind(lines, "train")] for lines in (one, two)]
    assert len(losses[0]) == 20
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)

    # On the clock of the first worker, too: neither waits for the other for ever, and both had the same rates.
    rates = workers(*common, "--budget", "3s", save_dir=tmp_path / "timed")
    assert rates[0] == rates[1]
    timed = runlog.read(tmp_path / "timed" / runlog.NAME)
    assert timed[-1]["reason"] == "budget"
    assert timed[-1]["updates"] == len(rates[0])

    # Taken up again, by both.
    more = workers(*common, "--budget", "5s", save_dir=tmp_path / "timed")
    assert more[0] == more[1]
    timed = runlog.read(tmp_path / "timed" / runlog.NAME)
    assert of_kind(timed, "resume")[0]["updates"] == len(rates[0])
    assert timed[-1]["updates"] == len(rates[0]) + len(more[0])


@pytest.mark.slow
def test_two_workers_that_go_on_begin_with_the_same_wall_clock(text, tmp_path):
    """Though the first one has written to the log before the second one begins."""
    script = Path(__file__).with_name("two_workers.py")
    flags = [text, *MLM, "--budget", "100s", "--budget-clock", "wall", "--user-dir", USER_DIR, "--disable-validation"]

    def rates(updates: int, **more: str) -> list[list[float]]:
        """Of each worker, by update."""
        command = [sys.executable, script, tmp_path, *flags, "--max-update", updates, "--save-dir", tmp_path]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **more}
        done = forked.run(list(map(str, command)), env=environment, timeout=300)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return [[float(word) for word in (tmp_path / f"rates{rank}").read_text().split()] for rank in (0, 1)]

    rates(3)
    used = runlog.read(tmp_path / runlog.NAME)[-1]["wall_seconds"]
    first, second = rates(6, LATE="1")
    assert first == second
    assert first[0] == pytest.approx(0.01 * budget.warmup_then_linear(used / 100, 0.2))
    assert len(first) == 3


def test_flops_of_a_translation_are_of_both_sides():
    """By sides of other lengths, widths and vocabularies."""
    model = Namespace(encoder_layers=2, encoder_embed_dim=16, encoder_ffn_embed_dim=64, encoder_attention_heads=4)
    vars(model).update(decoder_layers=3, decoder_embed_dim=8, decoder_ffn_embed_dim=20, decoder_attention_heads=2)
    task = Namespace(source_dictionary=range(50), target_dictionary=range(70))
    criterion = Namespace(run=Namespace(root=Namespace(model=model)), task=task)
    sample = {"net_input": {"src_tokens": torch.zeros(4, 10)}, "target": torch.zeros(4, 13)}
    found = BudgetedLabelSmoothedCrossEntropyCriterion.flops(criterion, sample)
    assert found == flops.translation_train_flops(
        Size(2, 16, 64, 4), vocabulary=70, source_length=10, target_length=13, sequences=4, decoder=Size(3, 8, 20, 2)
    )


@pytest.mark.parametrize(("workers", "batch"), [(1, 12), (2, 24)])
def test_a_table_of_step_times_is_asked_for_the_sequences_of_all_workers(monkeypatch, workers, batch):
    asked = []
    monkeypatch.setattr(step_times, "seconds_per_update", lambda *given: asked.append(given) or 1.0)
    model = {"encoder_layers": 2, "encoder_embed_dim": 16, "encoder_ffn_embed_dim": 64, "encoder_attention_heads": 4}
    one = object.__new__(budgeted_run.BudgetedRun)
    one.vocabulary = 50
    one.section = OmegaConf.create({"seconds_per_update": "steps.csv", "budget_clock": "calibrated"})
    one.root = OmegaConf.create(
        {
            "dataset": {"batch_size": 4},
            "optimization": {"update_freq": [3]},
            "distributed_training": {"distributed_world_size": workers},
            "task": {"tokens_per_sample": 16},
            "model": model,
        }
    )
    assert one._seconds_per_update() == 1.0
    assert asked == [(Path("steps.csv"), Size(2, 16, 64, 4), batch, 16, 50)]


def test_a_gpu_s_milliseconds_are_seconds():
    waited = []
    end = SimpleNamespace(synchronize=lambda: waited.append(1))
    start = SimpleNamespace(elapsed_time=lambda other: 1500.0 if other is end else None)
    assert device.CudaTimer().between(start, end) == 1.5
    assert waited


def test_a_run_on_the_cpu_of_a_machine_with_a_gpu_is_timed_on_its_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kinds = {cpu: type(device.timer_for(OmegaConf.create({"common": {"cpu": cpu}}))) for cpu in (True, False)}
    assert kinds == {True: device.HostTimer, False: device.CudaTimer}


def test_a_target_is_of_the_first_subset(text, tmp_path, clock):
    """`train1` is the second one's name in the log."""
    flags = ["--valid-subset", "valid,train", "--validate-interval-updates", "2", "--max-update", "6"]
    lines = run(text, *MLM, "--budget", "1d", *flags, save_dir=tmp_path / "seen")
    losses = {line["subset"]: line["perplexity"] for line in of_kind(lines, "valid")[-2:]}
    worse, better = sorted(losses, key=losses.get, reverse=True)
    between = str((losses[worse] * losses[better]) ** 0.5)
    for first, second, reason in ((worse, better, "max_update"), (better, worse, "target_ppl")):
        flags[1] = f"{first},{second}"
        lines = run(text, *MLM, "--budget", "1d", *flags, "--target-ppl", between, save_dir=tmp_path / first)
        assert lines[-1]["reason"] == reason, first


def test_as_many_validation_batches_as_fairseq_looks_at(text, tmp_path, clock):
    """One more than --max-valid-steps says: 10 s each on the clock of the test."""
    flags = ["--max-valid-steps", "2", "--batch-size-valid", "2", "--max-update", "3", "--no-save"]
    lines = run(text, *MLM, "--budget", "1d", *flags, save_dir=tmp_path)
    assert lines[-1]["wall_seconds"] == 3 + 3 * 10


def test_a_run_has_its_own_patience(text, tmp_path, clock):
    """The one before it in this process was better than it can be."""
    flags = ["--patience", "1", "--validate-interval-updates", "1", "--max-update", "4"]
    run(text, *MLM, "--budget", "1d", *flags, save_dir=tmp_path / "one")
    fairseq_train.should_stop_early.best = 0.0
    lines = run(text, *MLM, "--budget", "1d", *flags, save_dir=tmp_path / "two")
    assert lines[-1]["updates"] > 1


def test_at_sigterm_there_is_no_time_for_a_validation(text, tmp_path, clock, monkeypatch):
    upstream = fairseq_train.Trainer.train_step

    def train_step(self, *args, **more):
        if self.get_num_updates() == 3:
            budgeted_run.current.take_sigterm()
        return upstream(self, *args, **more)

    monkeypatch.setattr(fairseq_train.Trainer, "train_step", train_step)
    lines = run(text, *MLM, "--budget", "1d", save_dir=tmp_path, finish=False)
    budgeted_run.current._finished = True  # its end would be this process's
    assert of_kind(lines, "valid") == []
    assert [line["updates"] for line in of_kind(lines, "checkpoint")] == [4]


TRANSLATE = "--task translation --criterion budgeted_label_smoothed_cross_entropy --arch transformer --encoder-layers 1"
TRANSLATE += " --decoder-layers 1 --encoder-embed-dim 16 --decoder-embed-dim 16 --encoder-ffn-embed-dim 32"
TRANSLATE += " --decoder-ffn-embed-dim 32 --encoder-attention-heads 2 --decoder-attention-heads 2 --batch-size 8"


def test_the_loss_of_a_translation_is_of_a_word_though_gradients_are_of_sentences(pairs, tmp_path, clock):
    flags = [*TRANSLATE.split(), *COMMON, "--lr-scheduler", "fixed", "--lr", "1e-6", "--sentence-avg"]
    lines = run(pairs, *flags, "--max-update", "2", save_dir=tmp_path)
    [valid] = of_kind(lines, "valid")
    assert [line["loss"] for line in of_kind(lines, "train")] == pytest.approx([valid["loss"]] * 2, rel=0.1)
