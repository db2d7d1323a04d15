"""Pilots, by a stand-in for fairseq-train that writes run logs; one test at the end runs the real one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import forked
import numpy as np
import pytest

from train_large import pilots, runlog
from train_large.errors import UserError
from train_large.pilot_runs import read_pilots
from train_large.pilots import Recipe, command, is_done, run_pilots
from train_large.sizes import Size

ROOT = Path(__file__).parents[2]
SIZES = (Size(1, 16), Size(2, 16))
FLAGS = ("--lr", "0.001", "--batch-size", "8")

# One update takes half a second of its clock. It obeys --budget and --max-update, and fails for the size in FAIL.
TRAINER = """
    import os, signal, sys, time
    from train_large import runlog
    def flag(name, default=None):
        return sys.argv[len(sys.argv) - sys.argv[::-1].index(name)] if name in sys.argv else default
    folder, hidden, layers = flag("--save-dir"), int(flag("--encoder-embed-dim")), int(flag("--encoder-layers"))
    with open(os.environ["TOLD"], "a") as told:
        told.write(" ".join(sys.argv[1:]) + chr(10))
    print("CUDA went away", flush=True)
    if os.environ.get("FAIL") == f"{layers}l":
        sys.exit(3)
    unit = {"s": 1, "m": 60}
    budget = flag("--budget")
    seconds = float(budget.rstrip("sm")) * unit.get(budget[-1], 1)
    log = os.path.join(folder, runlog.NAME)
    def line(kind, n, **fields):
        runlog.append(log, kind, dict(zip(runlog.COUNTERS, (n, n / 2, n / 2, n * 64, n * 1e6))), **fields)
    def stop(n, reason, status=0):
        open(os.path.join(folder, "checkpoint_last.pt"), "w").write(str(n))
        line("stop", n, reason=reason)
        sys.exit(status)
    last = os.path.join(folder, "checkpoint_last.pt")
    n = int(open(last).read()) if os.path.exists(last) else 0
    line("resume" if n else "start", n, layers=layers, hidden=hidden, arch="prenorm_roberta")
    terminated = []
    signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))
    every = int(flag("--validate-interval-updates", 10**9))
    while n < int(flag("--max-update", 10**9)) and n / 2 < seconds:
        n += 1
        line("train", n, loss=5.0, lr=0.001)
        if n % every == 0:
            line("valid", n, subset="valid", loss=5.0 - n / 100, perplexity=9.0)
        if os.environ.get("SLOW"):
            time.sleep(0.05)
        if terminated:
            stop(n, "SIGTERM", 143)
    stop(n, "budget")
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    (tmp_path / "user_dir").mkdir()
    (tmp_path / "stand_in.py").write_text(textwrap.dedent(TRAINER))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "dict.txt").write_text("a 1\n")
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return Recipe(tmp_path / "bin", "30s", FLAGS, tmp_path / "user_dir", "stand_in")


def told(recipe: Recipe) -> list[list[str]]:
    """The words of every run of the stand-in, without the probes'."""
    path = recipe.data.parent / "told"
    runs = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [words for words in runs if "--no-save" not in words]


def run(recipe: Recipe, sizes=SIZES) -> list[Path]:
    return run_pilots(recipe, sizes, recipe.data.parent / "out", say=lambda _: None)


def test_every_size_is_trained_for_the_budget(recipe, tmp_path):
    folders = run(recipe)
    assert folders == [tmp_path / "out" / "1l_16h", tmp_path / "out" / "2l_16h"]
    for folder, words in zip(folders, told(recipe), strict=True):
        assert is_done(folder)
        lines = runlog.read(folder / runlog.NAME)
        assert lines[-1]["train_seconds"] == 30
        assert words[words.index("--save-dir") + 1] == str(folder)
        assert words[words.index("--lr") + 1] == "0.001"
        # 60 updates, so a validation every fourth makes 15.
        assert sum(line["kind"] == "valid" for line in lines) == 15
        assert words[words.index("--log-interval") + 1] == "1"


@pytest.mark.parametrize(("updates", "flags", "every"), [(4000, (), "26"), (4000, ("--log-interval", "7"), None)])
def test_the_log_has_lines_enough_for_the_rate_unless_told_otherwise(recipe, updates, flags, every):
    recipe = replace(recipe, budget=f"{updates / 2}s", extra=(*FLAGS, *flags))
    run(recipe)
    words = told(recipe)[0]
    assert words.count("--log-interval") == 1
    assert words[words.index("--log-interval") + 1] == (every or "7")


def test_what_is_done_is_not_run_again(recipe):
    run(recipe)
    before = len(told(recipe))
    said: list[str] = []
    run_pilots(recipe, SIZES, recipe.data.parent / "out", said.append)
    assert len(told(recipe)) == before
    assert all("done before" in line for line in said)
    run(recipe, (*SIZES, Size(3, 16)))
    assert len(told(recipe)) == before + 1


@pytest.mark.parametrize("reason", ["ended", "target_ppl", "max_update", "SIGTERM"])
def test_only_a_whole_budget_is_done(tmp_path, reason):
    counters = dict.fromkeys(runlog.COUNTERS, 1)
    runlog.append(tmp_path / runlog.NAME, "stop", counters, reason=reason)
    assert not is_done(tmp_path)
    runlog.append(tmp_path / runlog.NAME, "stop", counters, reason="budget")
    assert is_done(tmp_path)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_killed_pilot_goes_on(recipe, tmp_path, monkeypatch, sent):
    """A signal to the one who runs the pilots: the run saves itself, and takes its budget up where it was."""
    monkeypatch.setenv("SLOW", "1")
    code = f"""
        import signal
        from pathlib import Path
        from train_large.pilots import Recipe, run_pilots
        from train_large.sizes import Size
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        recipe = Recipe(Path({str(recipe.data)!r}), "30s", {FLAGS!r}, Path({str(recipe.user_dir)!r}), "stand_in")
        run_pilots(recipe, [Size(1, 16), Size(2, 16)], Path({str(tmp_path / "out")!r}))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stderr=subprocess.DEVNULL)
    log = tmp_path / "out" / "1l_16h" / runlog.NAME
    until = time.monotonic() + 60
    while not (log.exists() and '"updates": 10,' in log.read_text()) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(sent)
    assert process.wait(60) != 0
    assert not is_done(log.parent)
    stopped = runlog.read(log)[-1]
    assert (stopped["kind"], stopped["reason"]) == ("stop", "SIGTERM")
    monkeypatch.delenv("SLOW")
    run(recipe)
    assert is_done(log.parent)
    kinds = [line["kind"] for line in runlog.read(log)]
    assert kinds.count("start") == kinds.count("resume") == 1
    assert runlog.read(log)[-1]["train_seconds"] == 30


def test_lines_of_a_run_that_saved_nothing_are_not_kept(recipe, tmp_path):
    run(recipe)
    folder = tmp_path / "out" / "1l_16h"
    (folder / "checkpoint_last.pt").unlink()
    lines = (folder / runlog.NAME).read_text().splitlines(keepends=True)
    (folder / runlog.NAME).write_text("".join(lines[:9]))
    run(recipe)
    assert [line["kind"] for line in runlog.read(folder / runlog.NAME)].count("start") == 1
    assert is_done(folder)


def test_a_failure_names_the_log(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIL", "2l")
    with pytest.raises(UserError) as error:
        run(recipe)
    sentence = str(error.value)
    assert str(tmp_path / "out" / "logs" / "2l_16h.log") in sentence
    assert "status 3" in sentence
    assert sentence.endswith("CUDA went away")
    assert "\n" not in sentence
    assert is_done(tmp_path / "out" / "1l_16h")
    monkeypatch.delenv("FAIL")
    run(recipe)
    assert len(told(recipe)) == 2  # the failed one's probe failed, the first was not run again


def test_other_settings_need_another_folder(recipe):
    run(recipe)
    other = Recipe(recipe.data, "60s", recipe.extra, recipe.user_dir, recipe.trainer)
    with pytest.raises(UserError, match="1l_16h holds a pilot with other settings: give another --out"):
        run(other)


def test_a_run_of_someone_else_is_not_touched(recipe, tmp_path):
    runlog.append(tmp_path / "out" / "2l_16h" / runlog.NAME, "start", dict.fromkeys(runlog.COUNTERS, 0))
    with pytest.raises(UserError, match="2l_16h holds a run that no pilot has made"):
        run(recipe)
    assert told(recipe) == []


def test_the_users_interval_is_taken(recipe):
    extra = (*FLAGS, "--validate-interval-updates=7")
    run(Recipe(recipe.data, "30s", extra, recipe.user_dir, recipe.trainer))
    words = told(recipe)[0]
    assert words[words.index("--save-interval-updates") + 1] == "7"
    assert len((recipe.data.parent / "told").read_text().splitlines()) == 2  # no probes


def test_the_users_flags_come_last():
    words = command(Recipe(Path("bin"), "5m", ("--optimizer", "lamb", "--lr", "1")), Size(2, 64, heads=4), Path("out"))
    assert words[-4:] == ["--optimizer", "lamb", "--lr", "1"]
    assert words[words.index("--encoder-attention-heads") + 1] == "4"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"extra": ("--batch-size", "8")}, "-- --lr 0.001"),
        ({"extra": ("--lr", "1")}, "-- --batch-size 32"),
        ({"extra": (*FLAGS, "--budget=5m")}, "--budget behind -- is set by"),
        ({"extra": (*FLAGS, "--max-epoch", "1")}, "--max-epoch behind -- is set by"),
        ({"extra": (*FLAGS, "--validate-interval-updates", "x")}, "--validate-interval-updates x: give"),
        ({"budget": "soon"}, "--pilot 'soon'"),
        ({"data": Path("nowhere")}, "nowhere: no dict.txt"),
        ({"user_dir": Path("nowhere")}, "nowhere: no such folder"),
    ],
)
def test_bad_flags(recipe, change, match):
    with pytest.raises(UserError, match=match):
        run(Recipe(**{**vars(recipe), **change}))
    assert told(recipe) == []


def test_sizes_are_two_and_different(recipe):
    with pytest.raises(UserError, match="at least two sizes"):
        run(recipe, SIZES[:1])
    with pytest.raises(UserError, match="1l_16h is there twice"):
        run(recipe, (*SIZES, Size(1, 16, heads=2)))


def test_settings_that_cannot_be_read(recipe, tmp_path):
    run(recipe)
    (tmp_path / "out" / "1l_16h" / pilots.SETTINGS).write_text(json.dumps([1]))
    with pytest.raises(UserError, match="pilot.json cannot be read: remove"):
        run(recipe)


@pytest.mark.slow
def test_fairseq_makes_logs_that_can_be_planned_from(tmp_path):
    text = " ".join(f"w{i * i % 40}" for i in range(4000)) + "\n"
    for name in ("train", "valid"):
        (tmp_path / name).write_text(text * 8 if name == "train" else text[:1000])
    places = {"--trainpref": tmp_path / "train", "--validpref": tmp_path / "valid", "--destdir": tmp_path / "bin"}
    command = [sys.executable, "-m", "fairseq_cli.preprocess", "--only-source", "--workers", "1"]
    forked.run([*command, *(str(word) for pair in places.items() for word in pair)]).check_returncode()
    extra = ("--cpu", *FLAGS, "--tokens-per-sample", "16", "--sample-break-mode", "none", "--num-workers", "0")
    recipe = Recipe(tmp_path / "bin", "4s", extra, ROOT / "fairseq_plugins")
    folders = run_pilots(recipe, SIZES, tmp_path / "out", say=lambda _: None)
    found = read_pilots(folders)
    assert [pilot.size for pilot in found] == list(SIZES)
    assert all(pilot.seconds[-1] >= 4 and len(pilot.losses) > 1 for pilot in found)
    assert found[0].length == 16
    assert run_pilots(recipe, SIZES, tmp_path / "out", say=lambda _: None) == folders


def interval(tmp_path, monkeypatch, seconds, durations):
    """What `_interval` makes of a probe whose updates take so long, and the words of the probe."""
    words: list[str] = []

    def probe(command, *_):
        words.extend(command)
        log = Path(command[command.index("--save-dir") + 1]) / runlog.NAME
        for n, at in enumerate(np.cumsum(durations), start=1):
            runlog.append(log, "train", dict(zip(runlog.COUNTERS, (n, at, at, n, n))))

    monkeypatch.setattr(pilots, "_fairseq", probe)
    recipe = Recipe(tmp_path, f"{seconds}s", ("--lr", "1", "--budget", "9m"))
    return pilots._interval(recipe, Size(1, 16), tmp_path / "log"), words


def test_a_slow_start_of_the_probe_does_not_count(tmp_path, monkeypatch):
    updates, words = interval(tmp_path, monkeypatch, 30, [9.0] * 10 + [0.75] * 10)
    assert updates == 3  # 2.67: no more than 15 validations
    # Twentieth part of the budget, and it comes last.
    assert [after for word, after in zip(words, words[1:]) if word == "--budget"][-1] == "1.500"


def test_of_a_flag_that_is_given_twice_the_last_counts():
    words = ("--validate-interval-updates", "7", "--validate-interval-updates=9")
    assert pilots._given("--validate-interval-updates", words) == 9


def test_how_often_to_validate_is_found_out_once(recipe, tmp_path):
    """A pilot that goes on validates as often as before, or its curve would change on the way."""
    run(recipe)
    folder = tmp_path / "out" / "1l_16h"
    settings, log = folder / pilots.SETTINGS, folder / runlog.NAME
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "interval": 5}))
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))  # its end
    before = (tmp_path / "told").read_text().count("\n")
    run(recipe)
    words = told(recipe)[-1]
    assert words[words.index("--validate-interval-updates") + 1] == "5"
    assert (tmp_path / "told").read_text().count("\n") == before + 1  # no probe


def test_all_that_was_printed_is_kept(recipe, tmp_path):
    run(recipe)
    printed = (tmp_path / "out" / "logs" / "1l_16h.log").read_text()
    assert printed.count("$ ") == printed.count("CUDA went away") == 2  # of the probe, then of the run
