"""Hold-outs: what a fit on a part of the runs says of the rest."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pilot_logs
import pytest
from pilot_logs import BIGGER, SIZES, TRUTH, write_log, write_logs

from train_large import hold_out as hold_out_module
from train_large.errors import UserError
from train_large.hold_out import hold_out
from train_large.pilot_runs import read_pilots
from train_large.report.plans import as_json, describe_hold_out


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    return write_logs(tmp_path_factory.mktemp("pilots"), TRUTH, (*SIZES, BIGGER))


def test_hold_out_by_size(logs):
    held = hold_out(logs, "size")
    assert held.fitted_on == ("2l_32h", "2l_64h")
    assert [each.size for each in held.errors] == ["3l_128h", "4l_192h", "6l_256h"]
    for each in held.errors:
        if each.size != "6l_256h":  # 70 times as large as what was fitted, and slower than such small ones let guess
            assert each.interval[0] <= each.measured <= each.interval[1]
        assert each.error == pytest.approx(each.predicted / each.measured - 1)
    assert held.best == min((TRUTH.at(size, 150), size.name) for size in (*SIZES, BIGGER))[1]
    assert held.regret >= 0
    assert f"The pick would have been {held.pick}" in describe_hold_out(held)
    assert json.loads(as_json(held))["best"] == held.best


def test_hold_out_by_time(logs):
    held = hold_out(logs, "time", 0.5)
    assert len(held.errors) == 5
    assert sum(abs(each.error) for each in held.errors) / 5 < 0.15
    assert held.regret < 0.05


def test_hold_out_needs_four_sizes(logs):
    with pytest.raises(UserError, match="four sizes"):
        hold_out(logs[:3])


def test_hold_out_needs_something_to_fit(logs):
    with pytest.raises(UserError, match="no run has a validation in its first 1%"):
        hold_out(logs, "time", 0.01)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Of four sizes, of which two are held out."""
    return write_logs(tmp_path_factory.mktemp("four"), TRUTH, (*SIZES[:3], BIGGER))


def test_what_is_held_out_does_not_show_in_the_prediction(four, tmp_path):
    def predicted(logs):
        return [(each.size, each.predicted, each.interval) for each in hold_out(logs, "size", draws=3).errors]

    worse = [
        *four[:2],
        *(write_log(tmp_path / size.name, size, dataclasses.replace(TRUTH, floor=2.5)) for size in (SIZES[2], BIGGER)),
    ]
    assert predicted(worse) == predicted(four)


def test_how_fast_a_held_out_size_was_does_not_show_either(four, tmp_path, monkeypatch):
    """A run of as many seconds that came half as far."""
    speed = pilot_logs.seconds_per_token
    monkeypatch.setattr(pilot_logs, "seconds_per_token", lambda size: 2 * speed(size))
    slow = [*four[:2], *write_logs(tmp_path, TRUTH, (SIZES[2], BIGGER))]
    found, expected = (hold_out(logs, "size", draws=3).errors for logs in (slow, four))
    # The last validation of a slower run is a few updates nearer.
    assert [e.predicted for e in found] == pytest.approx([e.predicted for e in expected], rel=0.01)
    assert all(one.measured > other.measured for one, other in zip(found, expected, strict=True))


def test_runs_of_different_lengths_have_no_best(four, tmp_path):
    longer = write_log(tmp_path, BIGGER, TRUTH, budget=300.0)
    with pytest.raises(UserError, match=r"ends after 2\.5 min and .* after 4.999 min: .* the same budget"):
        hold_out([*four[:3], longer])


def test_the_pick_is_by_the_cautious_quantile_and_the_regret_is_measured(four, monkeypatch):
    """The largest has the better median, but a quarter and more of its draws are worse than all of the others'."""
    seen = []

    def drawn(law, size, parameters, tokens, pilots):
        seen.append({pilot.size for pilot in pilots})
        return np.log({SIZES[1]: [4.0] * 10, BIGGER: [3.0] * 6 + [9.0] * 4}.get(size, [5.0] * 10))

    monkeypatch.setattr(hold_out_module, "drawn", drawn)
    held = hold_out(four, "size", draws=1)
    truths = {pilot.size.name: math.exp(pilot.losses[-1]) for pilot in read_pilots(four)}
    assert held.pick == SIZES[1].name
    assert held.best == min(truths, key=truths.get)
    assert held.regret == pytest.approx(truths[held.pick] / truths[held.best] - 1)
    assert seen == [set(SIZES[:2])] * 4
