"""Hold-outs: what a fit on a part of the runs says of the rest."""

from __future__ import annotations

import json

import pytest
from pilot_logs import BIGGER, SIZES, TRUTH, write_logs

from train_large.errors import UserError
from train_large.hold_out import hold_out
from train_large.report.plans import as_json, describe_hold_out


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    return write_logs(tmp_path_factory.mktemp("pilots"), TRUTH, (*SIZES, BIGGER))


def test_hold_out_by_size(logs):
    held = hold_out(logs, "size")
    assert held.fitted_on == ("2l_32h", "2l_64h")
    assert [each.size for each in held.errors] == ["3l_128h", "4l_192h", "6l_256h"]
    for each in held.errors:
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
