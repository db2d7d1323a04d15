"""The command line: what reaches the functions, and what a user sees of an error."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from argparse import Namespace

import pilot_logs
import pytest
import torch

from train_large import cli, step_times
from train_large.compression import conversion, runtime
from train_large.data import glue


def test_sizes_prints_the_figures_of_the_paper(capsys):
    assert cli.main(["sizes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "l_" in line and "M" in line]) == 25
    row = next(line for line in lines if line.startswith("24l_768h")).split()
    assert row[1] == "209.5M"
    assert row[4] == "0.0015"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["sizes", "12x768"], "12x768"),
        (["quantize", "nowhere.pt", "out.pt", "--bits", "8"], "nowhere.pt"),
        (["quantize", "nowhere.pt", "out.pt", "--bits", "5.5"], "--bits"),
        (["prepare-text", "nowhere.txt", "--out", "out"], "nowhere.txt"),
        (["prepare-text", __file__, "--out", "out", "--subsets", "a"], "--subsets"),
        (["prepare-task", "nowhere", "--task", "sst-2", "--text", "text", "--out", "out"], "nowhere"),
        (["time-steps", "nowhere", "1l_16h", "--batch", "8", "--out", "out.csv"], "nowhere"),
        (["report", "nowhere.json"], "nowhere.json"),
        (["pack", "nowhere.pt", "out.safetensors", "--bits", "6"], "nowhere.pt"),
        (["pack", "nowhere.pt", "out.safetensors"], "--bits"),
        (["pack", "nowhere.pt", "out.safetensors", "--bits", "6", "--target-error", "0.1"], "--target-error"),
        (["pack", "nowhere.pt", "out.safetensors", "--target-bytes", "2 fortnights"], "2 fortnights"),
        (["quantize", "nowhere.pt", "out.pt", "--target-bytes", "2MB"], "--target-bytes"),
        (["unpack", "nowhere.safetensors", "out.pt"], "nowhere.safetensors"),
        (["inspect", __file__], "test_cli.py"),
        (["inspect", "."], ". is a directory"),
        (["inspect", "/dev/null"], "/dev/null is empty"),
        (["predict", "nowhere.safetensors"], "nowhere.safetensors"),
        (["shrink", "nowhere.pt", "out.pt"], "nowhere.pt"),
        (["export-hf", "nowhere.pt", "folder"], "nowhere.pt"),
        (["export-hf", "nowhere.pt", "folder", "--score", "accuracy"], "--score"),
        (["export-hf", "nowhere.pt", "folder", "--score", "=0.5"], "--score"),
        (["export-hf", "nowhere.pt", "folder", "--score", "accuracy=nan"], "--score"),
        (["predict", "a" * 300], "a" * 300),
        (["prepare-text", __file__, "--out", "a" * 300], "a" * 300),
        (["report", "nowhere.json", "--memory-limit", "2 fortnights"], "2 fortnights"),
        (["plan", "nowhere", "--budget", "1h"], "nowhere"),
        (["plan", "nowhere"], "--budget"),
        (["plan", "--budget", "1h"], "--pilot"),
        (["plan", "--budget", "2 fortnights"], "2 fortnights"),
        (["plan", "--budget", "1h", "--pilot", "5m"], "--data"),
        (["plan", "nowhere", "--budget", "1h", "--", "--lr", "1"], "--pilot"),
        (
            ["plan", "--budget", "10s", "--pilot", "5m", "--data", "d", "--out", "o", "--sizes", "1l_16h,2l_16h"],
            "first validation, at about 20 s",
        ),
        (["plan", "nowhere", "--budget", "1h", "--study", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(words, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_no_size_is_too_large_for_a_table_and_a_bad_one_prints_none(capsys):
    assert cli.main(["sizes", "99999999999l_64h"]) == 0
    assert "99999999999l_64h" in capsys.readouterr().out
    assert cli.main(["sizes", "--vocabulary", "0"]) == 2
    assert not capsys.readouterr().out


def test_ctrl_c_before_anything_was_read_is_no_traceback(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_parser", interrupted)
    assert cli.main(["sizes"]) == 130
    assert capsys.readouterr().err == "train-large: interrupted\n"


def test_prepare_task_says_what_was_made(monkeypatch, capsys):
    splits = {"train": {"neg": 1200, "pos": 7}, "valid": {"neg": 3, "pos": 0}}
    monkeypatch.setattr(glue, "prepare_task", lambda *_, **__: glue.TaskSummary(("neg", "pos"), 1, splits, 5))
    assert cli.main(["prepare-task", "in.tsv", "--task", "tsv", "--text", "text", "--out", "out"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "out: sentences of 2 classes",
        "  train: 1,207 rows (neg 1,200, pos 7)",
        "  valid: 3 rows (neg 3, pos 0)",
        "  left out: 5 rows without a class",
    ]


@pytest.mark.parametrize(
    ("files", "missing"),
    [
        ({}, "dictionary (--data) and a BPE (--bpe)"),
        ({"dict.txt": "1 1\n"}, "BPE (--bpe)"),
        ({"dict.txt": "1 1\n", "encoder.json": "{}"}, ""),
    ],
)
def test_pack_says_what_prediction_lacks(tmp_path, monkeypatch, capsys, files, missing):
    cfg = {"model": Namespace(arch="roberta_base", _name="roberta_base"), "task": {}, "criterion": {}}
    state = {"cfg": cfg, "args": None, "model": {"w": torch.randn(4, 4)}, "optimizer_history": [], "extra_state": {}}
    torch.save(state, tmp_path / "in.pt")
    monkeypatch.setattr(conversion, "files_of", lambda *_: files)
    assert cli.main(["pack", str(tmp_path / "in.pt"), str(tmp_path / "out.safetensors"), "--bits", "8"]) == 0
    assert capsys.readouterr().err == (f"without a {missing} it cannot predict from text\n" if missing else "")


def test_plan_answers_for_a_terminal_in_json_and_as_a_picture(tmp_path, capsys):
    runs = [tmp_path / size.name for size in pilot_logs.SIZES]
    for folder, size in zip(runs, pilot_logs.SIZES, strict=True):
        pilot_logs.write_log(folder, size, pilot_logs.Truth())
    words = ["plan", *map(str, runs), "--budget", "450s", "--memory-limit", "1MB"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert cli.main([*words, "--json", "--figure", str(tmp_path / "plan.svg")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert f"Train {found['pick']['size']} " in said
    assert found["pick"]["compression"]["bytes"] <= 1_000_000
    assert (tmp_path / "plan.svg").read_text().count("<svg")
    assert cli.main(["plan", *map(str, runs), "--hold-out", "size"]) == 0
    assert "predicted" in capsys.readouterr().out
    for flags in (["--sizes", "5l_64h"], ["--max-positions", "9"]):  # without a budget there is no plan
        assert cli.main(["plan", *map(str, runs), "--hold-out", "size", *flags]) == 2
        assert f"{flags[0]}: of use for a plan only; add --budget" in capsys.readouterr().err
    for flags in (["--head-width", "16"], ["--user-dir", "nowhere"], ["--data", "bin"], ["--out", "out"]):
        assert cli.main([*words, *flags]) == 2
        assert "are for pilots: add --pilot" in capsys.readouterr().err
    assert cli.main([*words, "--hold-out", "size", "--json"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert both["plan"] == found
    assert both["hold_out"]["best"]


def test_plan_looks_at_its_flags_before_it_runs_pilots(tmp_path, capsys):
    words = ["plan", "--budget", "1h", "--pilot", "5m", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    words += ["--sizes", "2l_208h,2l_48h"]
    assert cli.main([*words, "--head-width", "16", "--figure", "x.gif"]) == 2
    assert "x.gif: give a name that ends in .png" in capsys.readouterr().err
    assert cli.main([*words, "--head-width", "0"]) == 2
    assert "--head-width 0: give" in capsys.readouterr().err
    assert cli.main(words) == 2  # heads of 64
    assert "208 does not divide" in capsys.readouterr().err
    assert cli.main([*words, "--head-width", "16"]) == 2
    assert "no dict.txt there" in capsys.readouterr().err


def test_quantize_writes_a_checkpoint_and_says_what_it_takes(tmp_path, capsys):
    source, target = tmp_path / "in.pt", tmp_path / "out.pt"
    model = {"w": torch.tensor([[0.0, 1.0], [2.0, 4.0]])}
    cfg = {"model": {"_name": "roberta"}, "task": {"_name": "masked_lm"}, "criterion": {"_name": "masked_lm"}}
    torch.save({"model": model, "cfg": cfg, "args": None, "extra_state": {}, "optimizer_history": [{}]}, source)
    assert cli.main(["quantize", str(source), str(target), "--bits", "2"]) == 0
    assert torch.load(target, weights_only=True)["model"]["w"].tolist() == [[0.0, 1.0], [2.0, 4.0]]
    assert "4 parameters, 3 not zero" in capsys.readouterr().out


def test_flags_behind_the_dashes_are_passed_on(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(step_times, "time_steps", lambda *args, **flags: seen.update(flags, sizes=args[1]))
    words = ["time-steps", str(tmp_path), "1l_16h", "2l_16h", "--batch", "8", "--out", "t.csv", "--memory-limit", "1GB"]
    assert cli.main([*words, "--", "--cpu", "--dropout", "0"]) == 0
    assert seen["extra"] == ["--cpu", "--dropout", "0"]
    assert seen["memory_limit"] == 10**9
    assert [size.name for size in seen["sizes"]] == ["1l_16h", "2l_16h"]
    with pytest.raises(SystemExit):
        cli.main(["sizes", "--", "--cpu"])


def test_no_abbreviations_and_no_unknown_flags(capsys):
    for words in (["sizes", "--voc", "5"], ["sizes", "--frobnicate"], []):
        with pytest.raises(SystemExit) as ending:
            cli.main(words)
        assert ending.value.code == 2
        told = capsys.readouterr().err
        assert f"usage: train-large {words[0] if words else '['}" in told  # that of the subcommand
        assert not words or words[1] in told.splitlines()[-1]


def read_by_predict(monkeypatch, stdin) -> list[str]:
    """The lines that `predict` takes from standard input."""
    taken: list[str] = []
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stdin))
    monkeypatch.setattr(runtime, "predict_lines", lambda file, lines, *_: (taken.append(line) or "" for line in lines))
    assert cli.main(["predict", "model"]) == (2 if b"\xff" in getattr(stdin, "getvalue", bytes)() else 0)
    return taken


def test_predict_takes_all_activations_that_there_are():
    for name in runtime.ACTIVATIONS:
        assert cli._parser().parse_args(["predict", "model", "--activations", name]).activations == name


def test_what_predict_reads(monkeypatch, capsys):
    assert read_by_predict(monkeypatch, io.BytesIO("\ufeffgut\r\n\ufeffé\n\nlast".encode())) == [
        "gut",
        "\ufeffé",
        "",
        "last",
    ]
    assert read_by_predict(monkeypatch, io.BytesIO(b"good\n\xff\n")) == ["good"]
    assert "error: line 2: standard input is not UTF-8" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's")
def test_what_cannot_be_printed_is_said():
    command = [sys.executable, "-m", "train_large.cli", "sizes"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "train-large sizes: error: what it prints: No space left on device\n"


def test_no_input_is_replaced(tmp_path, capsys):
    model, log = tmp_path / "m.safetensors", tmp_path / "run" / "run.jsonl"
    log.parent.mkdir()
    for path in (model, log):
        path.write_text("as it was")
    for words in (
        ["inspect", model, "--csv", model],
        ["pack", model, model, "--bits", "8"],
        ["unpack", model, model],
        ["report", log.parent, "--csv", log],
        ["report", log.parent, "--page", log],
    ):
        assert cli.main([*map(str, words)]) == 2
        assert "is read by the same command; give another place" in capsys.readouterr().err
    assert [path.read_text() for path in (model, log)] == ["as it was"] * 2


def test_a_package_that_is_missing_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "train_large.compression.runtime", None)
    with pytest.raises(ModuleNotFoundError):  # ours: the installation is broken, and not for want of an extra
        cli.main(["predict", "model"])
    monkeypatch.undo()
    monkeypatch.setattr(cli, "_predict", lambda options: __import__("nothing_of_this_name"))
    assert cli.main(["predict", "model"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("train-large predict: error: it needs nothing_of_this_name: run make env")
    assert told.count("\n") == 1


def test_sigterm_leaves_no_half_of_a_file(tmp_path):
    code = f"""
import os, signal
from train_large import cli
from train_large.files import whole
def half(options):
    with whole({str(tmp_path / "out")!r}) as aside:
        aside.write_text("half")
        os.kill(os.getpid(), signal.SIGTERM)
        import time
        time.sleep(60)
cli._doctor = half
raise SystemExit(cli.main(["doctor"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "train-large doctor: interrupted\n")
    assert list(tmp_path.iterdir()) == []
