"""The run log: whole lines, and what a kill leaves."""

from __future__ import annotations

import json

import numpy as np
import pytest

from train_large import runlog
from train_large.errors import UserError


def counters(updates):
    return {
        "updates": updates,
        "train_seconds": updates / 2,
        "wall_seconds": updates,
        "tokens": 10 * updates,
        "flops": 1e9 * updates,
    }


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "new" / runlog.NAME
    runlog.append(path, "start", counters(0), size="3l_128h")
    runlog.append(path, "train", counters(1), loss=0.5)
    lines = runlog.read(path)
    assert [line["kind"] for line in lines] == ["start", "train"]
    assert lines[0]["size"] == "3l_128h"
    assert lines[1]["loss"] == 0.5
    assert {name: lines[1][name] for name in runlog.COUNTERS} == counters(1)


def test_lines_that_a_resume_overtook_are_dropped(tmp_path):
    path = tmp_path / runlog.NAME
    for kind, updates in [("start", 0), ("train", 5), ("checkpoint", 5), ("train", 10), ("resume", 5), ("train", 7)]:
        runlog.append(path, kind, counters(updates))
    assert [(line["kind"], line["updates"]) for line in runlog.read(path)] == [
        ("start", 0),
        ("train", 5),
        ("checkpoint", 5),
        ("resume", 5),
        ("train", 7),
    ]
    assert len(runlog.read_all(path)) == 6


def test_what_a_new_start_overtook_is_dropped(tmp_path):
    """A run that was killed before its first checkpoint begins anew, in the same file."""
    path = tmp_path / runlog.NAME
    for kind, updates in [("start", 0), ("train", 5), ("train", 10), ("start", 0), ("train", 5)]:
        runlog.append(path, kind, counters(updates))
    assert [(line["kind"], line["updates"]) for line in runlog.read(path)] == [("start", 0), ("train", 5)]


@pytest.mark.parametrize(
    ("reason", "finished"),
    [("budget", True), ("ended", True), ("max_update", True), ("SIGTERM", False), ("failed", False)],
)
def test_a_run_is_finished_that_came_to_its_end(tmp_path, reason, finished):
    path = tmp_path / runlog.NAME
    runlog.append(path, "start", counters(0))
    assert not runlog.is_finished(runlog.read(path))
    runlog.append(path, "stop", counters(5), reason=reason)
    assert runlog.is_finished(runlog.read(path)) is finished
    assert not runlog.is_finished([])


def test_a_line_torn_by_a_kill_is_skipped_and_does_not_spoil_the_next(tmp_path):
    path = tmp_path / runlog.NAME
    runlog.append(path, "start", counters(0))
    with open(path, "a") as log:
        log.write('{"kind": "train", "upda')
    assert [line["kind"] for line in runlog.read(path)] == ["start"]
    runlog.append(path, "resume", counters(0))
    assert [line["kind"] for line in runlog.read(path)] == ["start", "resume"]


def test_what_a_loss_of_power_leaves_is_skipped(tmp_path):
    path = tmp_path / runlog.NAME
    runlog.append(path, "start", counters(0))
    with open(path, "ab") as log:
        log.write(bytes(100))
    runlog.append(path, "resume", counters(0))
    assert [line["kind"] for line in runlog.read(path)] == ["start", "resume"]


def test_not_a_log(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.*no run log"):
        runlog.read(tmp_path / "nowhere")
    other = tmp_path / "other.jsonl"
    other.write_text('{"a": 1}\n')
    with pytest.raises(UserError, match="line 1"):
        runlog.read(other)
    other.write_text("hello\nworld\n")
    with pytest.raises(UserError, match="line 1"):
        runlog.read(other)


def test_a_log_of_a_later_format_is_refused(tmp_path):
    path = tmp_path / runlog.NAME
    runlog.append(path, "start", counters(0))
    assert runlog.read(path)[0]["format"] == runlog.FORMAT
    runlog.append(path, "resume", counters(0), format=runlog.FORMAT + 1)
    with pytest.raises(UserError, match=r"run\.jsonl, line 2: a run log of format 2, and this version reads format 1"):
        runlog.read(path)


@pytest.mark.parametrize("value", [None, "512", -1, True, float("inf")])
@pytest.mark.parametrize("name", runlog.COUNTERS)
def test_a_count_that_is_none_is_told(tmp_path, name, value):
    path = tmp_path / runlog.NAME
    path.write_text(json.dumps({"kind": "start", **counters(0), name: value}) + "\n")
    with pytest.raises(UserError, match=rf"run\.jsonl, line 1: {name} is .*; the log is damaged"):
        runlog.read(path)


def test_a_full_disk_is_one_sentence():
    with pytest.raises(UserError, match=r"^/dev/full: the run log could not be written \(No space left on device\)"):
        runlog.append("/dev/full", "start", counters(0))


def test_only_known_kinds_and_numbers_that_json_has(tmp_path):
    with pytest.raises(ValueError, match="lunch"):
        runlog.append(tmp_path / "log", "lunch", counters(0))
    with pytest.raises(ValueError, match="JSON"):
        runlog.append(tmp_path / "log", "train", counters(0), loss=float("nan"))
    assert not (tmp_path / "log").exists() or json.loads((tmp_path / "log").read_text() or "{}") == {}


def test_what_was_said_last_of_a_run_counts(tmp_path):
    path = tmp_path / runlog.NAME
    counters = dict.fromkeys(runlog.COUNTERS, 0)
    runlog.append(path, "start", counters, budget_seconds=60, layers=2)
    runlog.append(path, "resume", counters, budget_seconds=120)
    said = runlog.facts(runlog.read(path))
    assert (said["budget_seconds"], said["layers"]) == (120, 2)


def test_a_run_that_was_taken_up_again_is_not_used_up(tmp_path):
    path = tmp_path / runlog.NAME
    for kind, reason in (("start", None), ("stop", "budget"), ("resume", None), ("train", None)):
        runlog.append(path, kind, dict.fromkeys(runlog.COUNTERS, 0), reason=reason)
        assert runlog.is_used_up(runlog.read(path)) is (kind == "stop")


def test_numbers_of_numpy_are_written(tmp_path):
    path = tmp_path / runlog.NAME
    runlog.append(path, "train", dict.fromkeys(runlog.COUNTERS, np.int64(3)), loss=np.float32(0.5))
    (line,) = runlog.read(path)
    assert (line["updates"], line["loss"]) == (3, 0.5)


def test_what_ctrl_c_ended_is_not_finished():
    assert not runlog.is_finished([{"kind": "stop", "reason": "interrupted"}])
