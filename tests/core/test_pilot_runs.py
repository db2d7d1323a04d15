"""Pilots: what their logs say, logs that do not compare, and the speed of sizes between them."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from pilot_logs import (
    LENGTH,
    SIZES,
    TRUTH,
    VOCABULARY,
    Truth,
    parameters,
    seconds_per_token,
    write_log,
    write_logs,
)

from train_large import runlog, sizes
from train_large.errors import UserError
from train_large.pilot_runs import parameters_like, read_pilots
from train_large.scaling import fit


def test_a_pilot_is_what_its_log_says(tmp_path):
    size = SIZES[1]
    pilots = read_pilots(write_logs(tmp_path, Truth(), (SIZES[2], size)))
    assert [pilot.size for pilot in pilots] == [size, SIZES[2]]
    pilot = pilots[0]
    assert (pilot.vocabulary, pilot.length) == (VOCABULARY, LENGTH)
    assert pilot.parameters == parameters(size)
    assert pilot.batch_tokens == 512
    assert pilot.learning_rate == pytest.approx(3e-3, rel=0.02)
    assert pilot.seconds_per_token == pytest.approx(seconds_per_token(size))
    assert len(pilot.losses) == 15
    # At the end of a run T is its tokens; at half time it has learned more than half.
    assert pilot.learned[-1] == pytest.approx(pilot.tokens[-1])
    assert pilot.rate[-1] == pytest.approx(0, abs=0.01)
    assert 0.7 < pilot.learned[7] / pilot.tokens[-1] < 0.85


def test_a_log_without_the_peak_of_the_rate(tmp_path):
    """fairseq writes every hundredth update, and warm-up may be over by then."""
    folder = write_log(tmp_path, SIZES[0], Truth(), learning_rate=3e-3)
    lines = [json.loads(line) for line in (folder / runlog.NAME).read_text().splitlines()]
    of_training = [line for line in lines if line["kind"] == "train"]
    of_training = [*of_training[59::60], of_training[-1]]  # a budgeted run's last update is always there
    kept = [line for line in lines if line["kind"] != "train" or line in of_training]
    (folder / runlog.NAME).write_text("".join(json.dumps(line) + "\n" for line in kept))
    pilot = read_pilots([folder])[0]
    assert pilot.learning_rate == 3e-3
    assert pilot.rate[len(pilot.rate) // 2] == pytest.approx(0.5, abs=0.05)


def test_layers_that_share_weights_are_counted_once(tmp_path):
    size, facts = SIZES[2], {"share_layers": "all", "embedding_norm": False}
    shared = write_log(tmp_path / "shared", size, Truth(), **facts)
    (pilot,) = read_pilots([shared])
    counted = sizes.parameters_without_embeddings(size, VOCABULARY, embedding_norm=False, share="all")
    assert pilot.parameters == counted == parameters_like(pilot, size)
    assert parameters_like(pilot, replace(size, layers=2 * size.layers)) == counted
    for name, told in (("share_layers", "--share-layers"), ("embedding_norm", "norm of the embeddings")):
        other = write_log(tmp_path / name, size, Truth(), **{**facts, name: None})
        with pytest.raises(UserError, match=f"differ in their {told}"):
            read_pilots([shared, other])


def test_time_is_that_of_the_clock_of_the_budget(tmp_path):
    (train,) = read_pilots([write_log(tmp_path / "train", SIZES[0], Truth())])
    (wall,) = read_pilots([write_log(tmp_path / "wall", SIZES[0], Truth(), budget_clock="wall")])
    assert list(wall.seconds) == pytest.approx(list(6 + 1.1 * train.seconds))
    calibrated = {"budget_clock": "calibrated", "seconds_per_update": 0.25}
    (pilot,) = read_pilots([write_log(tmp_path / "calibrated", SIZES[0], Truth(), **calibrated)])
    assert list(pilot.seconds) == pytest.approx(list(train.updates / 4))
    with pytest.raises(UserError, match=r"does not say what an update counts on its calibrated clock"):
        read_pilots([write_log(tmp_path / "lost", SIZES[0], Truth(), budget_clock="calibrated")])


def test_a_slow_start_is_not_the_speed(tmp_path):
    folder = write_log(tmp_path, SIZES[0], Truth())
    lines = [json.loads(line) for line in (folder / runlog.NAME).read_text().splitlines()]
    for line in lines[1:]:
        line["train_seconds"] += 60
    (folder / runlog.NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_pilots([folder])[0].seconds_per_token == pytest.approx(seconds_per_token(SIZES[0]))


@pytest.mark.parametrize(("counter", "value"), [("train_seconds", 0.0), ("flops", 0.0), ("train_seconds", math.inf)])
def test_a_log_that_counts_nothing_is_refused(tmp_path, counter, value):
    folder = write_log(tmp_path, SIZES[0], Truth())
    lines = [json.loads(line) for line in (folder / runlog.NAME).read_text().splitlines()]
    lines[1:] = [{**line, counter: value} for line in lines[1:]]
    (folder / runlog.NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"run\.jsonl"):
        read_pilots([folder])


def test_a_torn_last_line_and_a_repeated_validation_do_not_matter(tmp_path):
    folders = write_logs(tmp_path, Truth(), SIZES[:2])
    before = read_pilots(folders)
    log = folders[0] / runlog.NAME
    last = [line for line in log.read_text().splitlines() if '"valid"' in line][-1]
    log.write_text(log.read_text() + last + '\n{"kind": "va')
    for old, new in zip(before, read_pilots(folders)):
        assert np.array_equal(old.losses, new.losses)


def test_a_killed_run_counts_by_its_schedule(tmp_path):
    """Without its second half: T and r are about the same as with it, for the rate is known to go down to zero."""
    folder = write_log(tmp_path / "whole", SIZES[1], Truth())
    (whole,) = read_pilots([folder])
    lines = (folder / runlog.NAME).read_text().splitlines(keepends=True)
    half = [line for line in lines if json.loads(line)["train_seconds"] < 75]
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / runlog.NAME).write_text("".join(half))
    (killed,) = read_pilots([tmp_path / "half"])
    count = len(killed.losses)
    assert count == 7
    assert killed.learned == pytest.approx(whole.learned[:count], rel=0.03)
    assert killed.rate == pytest.approx(whole.rate[:count], abs=0.02)


def test_other_architectures_count_their_own_parameters(tmp_path):
    facts = {"arch": "transformer_budgeted", "vocabulary": 1034, "length": None, "problem": "translate"}
    pilots = read_pilots(write_logs(tmp_path, Truth(), SIZES[:3], **facts))
    assert pilots[0].vocabulary == 1034
    assert pilots[0].length is None
    law = fit(pilots)
    assert math.isfinite(law.losses(SIZES[0], pilots[0].parameters, 1e7).mean())


def test_no_log():
    with pytest.raises(UserError, match="no run log: give .* --pilot 5m"):
        read_pilots([])


def test_a_folder_without_a_log(tmp_path):
    with pytest.raises(UserError, match="run.jsonl"):
        read_pilots([tmp_path])


def test_twice_the_same(tmp_path):
    folder = write_log(tmp_path / "a", SIZES[0], Truth())
    with pytest.raises(UserError, match="given twice"):
        read_pilots([folder, folder / runlog.NAME])


@pytest.mark.parametrize(
    ("facts", "what"),
    [
        ({"arch": "transformer_budgeted"}, "model family"),
        ({"problem": "other"}, "problem"),
        ({"dictionary": "other"}, "dictionary"),
        ({"budget_clock": "wall"}, "clock"),
        ({"vocabulary": 2000}, "vocabulary"),
        ({"vocabulary": None}, "vocabulary"),
        ({"length": 128}, "sequence length"),
        ({"masked": 0.4}, "share of masked tokens"),
        ({"train_tokens": 999}, "number of training tokens"),
    ],
)
def test_logs_of_different_kinds(tmp_path, facts, what):
    told = {"masked": 0.15, "train_tokens": 99_900}
    logs = [
        write_log(tmp_path / "a", SIZES[0], Truth(), **told),
        write_log(tmp_path / "b", SIZES[1], Truth(), **{**told, **facts}),
    ]
    with pytest.raises(UserError, match=f"differ in their {what}.*plan from one of the two"):
        read_pilots(logs)


def test_a_log_that_does_not_tell_its_text_compares_with_any(tmp_path):
    logs = [
        write_log(tmp_path / "a", SIZES[0], Truth()),
        write_log(tmp_path / "b", SIZES[1], Truth(), masked=0.4, train_tokens=999),
    ]
    assert [pilot.train_tokens for pilot in read_pilots(logs)] == [None, 999]


def test_of_several_rates_of_a_size_the_best_counts(tmp_path, caplog):
    logs = [
        *write_logs(tmp_path, TRUTH, SIZES[:2]),
        write_log(tmp_path / "again", SIZES[0], TRUTH, seed=1),  # another seed is no other rate
        write_log(tmp_path / "worse", SIZES[0], replace(TRUTH, floor=2.5), learning_rate=0.01, budget=300.0),
    ]
    caplog.set_level("INFO")
    kept = read_pilots(logs)
    assert [pilot.path.parent.name for pilot in kept] == ["2l_32h", "again", "2l_64h"]
    [told] = caplog.messages
    assert "worse/run.jsonl is left out: after 150 s its 512 tokens an update at a rate of 0.01" in told
    better = [*logs[:3], write_log(tmp_path / "better", SIZES[0], replace(TRUTH, floor=1.0), learning_rate=0.01)]
    assert [pilot.path.parent.name for pilot in read_pilots(better)] == ["better", "2l_64h"]


@pytest.mark.parametrize("loss", [None, 900.0])
def test_a_run_that_diverged(tmp_path, loss):
    logs = write_logs(tmp_path, Truth(), SIZES[:2])
    log = logs[0] / runlog.NAME
    last = runlog.read(log)[-1]
    runlog.append(log, "valid", last, subset="valid", loss=loss, perplexity=None)
    with pytest.raises(UserError, match=r"2l_32h/run\.jsonl is of a run that diverged.* leave it out"):
        read_pilots(logs)


def test_a_log_without_validations(tmp_path):
    runlog.append(tmp_path / runlog.NAME, "start", dict.fromkeys(runlog.COUNTERS, 0), layers=2, hidden=32)
    with pytest.raises(UserError, match="no validation.*longer"):
        read_pilots([tmp_path])


def test_a_log_of_a_shrunk_model(tmp_path):
    """Its layers have not the heads and rows that its size says."""
    facts = {"heads": None, "ffn": None, "layer_heads": "2,1", "layer_ffn": "100,128"}
    logs = write_logs(tmp_path / "whole", Truth(), SIZES[:2], layer_heads=None, layer_ffn=None)
    assert len(read_pilots(logs)) == 2
    shrunk = write_log(tmp_path / "shrunk", SIZES[0], Truth(), **facts)
    with pytest.raises(UserError, match="shrunk/run.jsonl is of a model that was shrunk .--layer-heads 2,1 .*leave it"):
        read_pilots([*logs, shrunk])


def test_a_log_without_a_size(tmp_path):
    runlog.append(tmp_path / runlog.NAME, "start", dict.fromkeys(runlog.COUNTERS, 0))
    with pytest.raises(UserError, match="does not say the size"):
        read_pilots([tmp_path])


def test_a_run_up_to_a_validation_has_it(tmp_path):
    (pilot,) = read_pilots([write_log(tmp_path, SIZES[0], Truth())])
    assert len(pilot.until(pilot.seconds[4]).losses) == 5


def test_of_several_subsets_valid_counts_and_of_its_lines_those_with_a_loss(tmp_path):
    folder = write_log(tmp_path, SIZES[0], Truth())
    (before,) = read_pilots([folder])
    lines = [json.loads(line) for line in (folder / runlog.NAME).read_text().splitlines()]
    more = []
    for line in lines:
        if line["kind"] == "valid":
            more.append({**line, "subset": "valid1", "loss": 9.0})
            more.append(line)
            bleu = {name: value for name, value in line.items() if name not in ("loss", "perplexity")}
            more.append({**bleu, "bleu": 3.0})
        else:
            more.append(line)
    (folder / runlog.NAME).write_text("".join(json.dumps(line) + "\n" for line in more))
    (after,) = read_pilots([folder])
    assert np.array_equal(after.losses, before.losses)


def test_at_a_constant_rate_all_tokens_are_learned(tmp_path):
    folder = write_log(tmp_path, SIZES[0], Truth())
    lines = [json.loads(line) for line in (folder / runlog.NAME).read_text().splitlines()]
    lines = [{**line, "lr": 1e-3} if line["kind"] == "train" else line for line in lines]
    (folder / runlog.NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (pilot,) = read_pilots([folder])
    assert pilot.learned == pytest.approx(pilot.tokens)
