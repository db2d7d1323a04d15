"""The speed of sizes that were not run."""

from __future__ import annotations

import dataclasses

import numpy as np
import pilot_logs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pilot_logs import BIGGER, SIZES, Truth, parameters, write_logs

from train_large.pilot_runs import read_pilots
from train_large.sizes import Size
from train_large.speed import _between, batch_tokens, deviation, flops_per_token, predicted, seconds_per_token


@pytest.fixture
def pilots(tmp_path):
    return read_pilots(write_logs(tmp_path, Truth(), SIZES[:3]))


def test_a_size_that_was_run_is_as_fast_as_it_was(pilots):
    for pilot in pilots:
        assert seconds_per_token(pilot.size, pilots) == pytest.approx(pilot_logs.seconds_per_token(pilot.size))


def test_of_several_runs_it_is_the_mean(pilots):
    slower = dataclasses.replace(pilots[0], seconds_per_token=4 * pilots[0].seconds_per_token)
    both = seconds_per_token(pilots[0].size, [*pilots, slower])
    assert both == pytest.approx(2 * pilots[0].seconds_per_token)


@pytest.mark.parametrize("size", [Size(1, 64, heads=4), Size(3, 96, heads=6), BIGGER])
def test_other_sizes_are_as_fast_as_an_update_and_its_flops_take(pilots, size):
    """Smaller, between and larger; in these logs time is a straight line in FLOPs."""
    assert seconds_per_token(size, pilots) == pytest.approx(pilot_logs.seconds_per_token(size), rel=0.2)


def test_its_three_parts_are_found():
    """Five sizes tell how long an update takes whatever the model, how long a layer, and how long a FLOP."""

    def seconds(layers, flops):
        return 0.01 + 0.004 * layers + flops / 5e10

    works = [(2, 1e8), (2, 4e8), (4, 2e8), (16, 6e8), (2, 5e9)]
    runs = [(work, seconds(*work)) for work in works]
    for work in [(8, 1e9), (2, 2e10), (24, 5e9)]:
        assert predicted(work, runs) == pytest.approx(seconds(*work), rel=0.02)


@given(st.lists(st.tuples(st.integers(1, 24), st.floats(1e6, 1e15), st.floats(1e-3, 1e3)), min_size=1, max_size=6))
def test_more_work_is_never_predicted_to_take_less(runs):
    known = [((layers, flops), seconds) for layers, flops, seconds in runs]
    layers, flops = max(layers for layers, _, _ in runs), max(flops for _, flops, _ in runs)
    less = predicted((layers, flops), known)
    assert 0 < less <= predicted((layers + 1, flops), known) + 1e-12
    assert less <= predicted((layers, 2 * flops), known) + 1e-12


@given(st.floats(1e-3, 1e3))
def test_the_unit_of_time_does_not_matter(unit):
    runs = [((2, 1e8), 1.0), ((4, 5e8), 1.5), ((2, 1e9), 2.5)]
    scaled = [(work, unit * seconds) for work, seconds in runs]
    assert predicted((6, 3e9), scaled) == pytest.approx(unit * predicted((6, 3e9), runs))


def test_an_update_of_more_tokens_has_more_flops_and_no_more_calls(pilots):
    """Pilots of twice the batch whose updates take as long: all of it is in the calls, and so it is for other sizes."""
    long = [dataclasses.replace(p, batch_tokens=2 * p.batch_tokens, seconds_per_token=1e-4) for p in pilots]
    same = [dataclasses.replace(p, seconds_per_token=2e-4) for p in pilots]
    assert batch_tokens(BIGGER, long) == pytest.approx(2 * batch_tokens(BIGGER, same))
    assert seconds_per_token(BIGGER, long) == pytest.approx(seconds_per_token(BIGGER, same) / 2)


def test_the_farther_the_less_is_known(pilots):
    run, near, far = (deviation(size, pilots) for size in (SIZES[2], SIZES[3], Size(24, 1024)))
    assert run < near < far
    step = np.log(parameters(Size(24, 1024)) / parameters(SIZES[3]))
    assert far - near == pytest.approx(0.1 * step, rel=0.01)


def test_flops_are_clarks_or_a_power_law(tmp_path, pilots):
    size = SIZES[1]
    assert flops_per_token(size, pilots) == pytest.approx(4e10 * (pilot_logs.seconds_per_token(size) - 3e-5))
    facts = {"arch": "transformer_budgeted", "vocabulary": 1034, "length": None, "problem": "translate"}
    translations = read_pilots(write_logs(tmp_path / "translation", Truth(), SIZES[:3], **facts))
    assert flops_per_token(size, translations) == pytest.approx(translations[1].flops_per_token)


def test_straight_lines_in_logarithms():
    known = {1.0: 2.0, 4.0: 8.0}
    assert _between(2.0, known) == pytest.approx(4.0)
    assert _between(16.0, known) == pytest.approx(32.0)
    assert _between(9.0, {1.0: 1.0, 3.0: 1.0}) == pytest.approx(3**0.3)  # more work never comes for nothing
    assert _between(4.0, {2.0: 3.0}) == pytest.approx(6.0)


def test_below_the_smallest_its_own_slope_goes_on():
    assert _between(1.0, {2.0: 2.0, 4.0: 2.0 * 2**0.5, 8.0: 4.0 * 2**0.5}) == pytest.approx(2.0 * 2**-0.5)
