"""The speed of sizes that were not run."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pilot_logs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pilot_logs import BIGGER, SIZES, Truth, write_logs

from train_large.flops import train_flops
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
    error = math.log(seconds_per_token(size, pilots) / pilot_logs.seconds_per_token(size))
    assert abs(error) < min(0.3, 1.645 * deviation(size, pilots))


def seconds(layers, flops):
    return 0.01 + 0.004 * layers + flops / 5e10


WORKS = [(2, 1e8), (2, 4e8), (4, 2e8), (16, 6e8), (2, 5e9)]


def test_its_three_parts_are_found():
    """Five sizes tell how long an update takes whatever the model, how long a layer, and how long a FLOP."""
    runs = {work: seconds(*work) for work in WORKS}
    for work in [(8, 1e9), (2, 2e10), (24, 5e9)]:
        assert predicted(work, runs)[0] == pytest.approx(seconds(*work), rel=0.03)


def test_what_the_runs_do_not_tell_is_a_third_each():
    one = {(4, 1e9): 1.0}
    assert predicted((4, 1e9), one)[0] == pytest.approx(1.0)
    assert predicted((8, 1e9), one)[0] == pytest.approx(4 / 3)
    assert predicted((4, 2e9), one)[0] == pytest.approx(4 / 3)
    assert predicted((8, 2e9), one)[0] == pytest.approx(5 / 3)


def test_its_deviation_is_that_of_bayes_rule():
    """With the precision of each run and of what is assumed, by the textbook's matrices."""
    runs, work = {(2, 1e9): 1.0, (4, 2e9): 1.7, (2, 3e9): 1.9}, (6, 9e9)
    design = np.array([[1, layers / 4, flops / 3e9] for layers, flops in runs])
    noise = np.diag([(0.05 * each) ** 2 for each in runs.values()])
    covariance = np.linalg.inv(design.T @ np.linalg.inv(noise) @ design + np.eye(3) / (0.25 * 1.9) ** 2)
    target = np.array([1, 6 / 4, 3])
    found, error = predicted(work, runs)
    expected = math.hypot(math.sqrt(target @ covariance @ target) / found, 0.15 + 0.1 * math.log(3))
    assert error == pytest.approx(expected)


@pytest.mark.parametrize(
    ("chosen", "asked"),
    [
        ([(6, 768), (12, 768)], (12, 1536)),
        ([(3, 512), (6, 512), (12, 512)], (12, 1024)),
        ([(2, 512), (4, 512)], (4, 2048)),
    ],
)
def test_pilots_of_one_width_do_not_tell_of_a_wider_one(chosen, asked):
    """Their time is all in FLOPs, and might be in the layers: the interval knows."""

    def work(layers, hidden):
        return layers, train_flops(Size(layers, hidden), 10_000, 128, 32)

    def truth(size):
        return work(*size)[1] / 5e11

    known = {work(*size): truth(size) for size in chosen}
    found, error = predicted(work(*asked), known)
    assert 0.25 < math.log(truth(asked) / found) < 1.645 * error
    known[work(6, 256)] = truth((6, 256))
    better, surer = predicted(work(*asked), known)
    assert abs(math.log(truth(asked) / better)) < 0.2
    assert surer < error


positive = st.tuples(st.integers(1, 24), st.floats(1e6, 1e15))


@given(st.dictionaries(positive, st.floats(1e-3, 1e3), min_size=1, max_size=6))
def test_more_work_is_never_predicted_to_take_less(runs):
    layers, flops = (max(each) for each in zip(*runs))
    less, error = predicted((layers, flops), runs)
    assert 0 < less <= predicted((layers + 1, flops), runs)[0] * (1 + 1e-9)
    assert less <= predicted((layers, 2 * flops), runs)[0] * (1 + 1e-9)
    assert 0.15 <= error < math.inf


@given(st.floats(1e-3, 1e3))
def test_the_unit_of_time_does_not_matter(unit):
    runs = {(2, 1e8): 1.0, (4, 5e8): 1.5, (2, 1e9): 2.5}
    scaled = {work: unit * each for work, each in runs.items()}
    expected, error = predicted((6, 3e9), runs)
    assert predicted((6, 3e9), scaled) == pytest.approx((unit * expected, error))


def test_an_update_of_more_tokens_has_more_flops_and_no_more_calls(tmp_path):
    """Pilots of different batches, whose updates take as long as their layers and FLOPs do."""
    sizes = [*SIZES, BIGGER]
    read = read_pilots(write_logs(tmp_path, Truth(), sizes))
    pilots = []
    for pilot, batch in zip(read, (512, 4096, 1024, 512, 2048), strict=True):
        per_update = seconds(pilot.size.layers, batch * pilot.flops_per_token)
        pilots.append(dataclasses.replace(pilot, batch_tokens=batch, seconds_per_token=per_update / batch))
    *known, largest = pilots
    assert batch_tokens(largest.size, known) == pytest.approx(512)  # as the nearest has it
    expected = seconds(largest.size.layers, 512 * largest.flops_per_token) / 512
    assert seconds_per_token(largest.size, known) == pytest.approx(expected, rel=0.05)
    assert batch_tokens(largest.size, pilots) == pytest.approx(2048)


def test_runs_of_a_size_count_as_one(pilots):
    repeated = [*pilots, *[pilots[0]] * 7]
    assert seconds_per_token(BIGGER, repeated) == seconds_per_token(BIGGER, pilots)
    assert deviation(BIGGER, repeated) == deviation(BIGGER, pilots)


def test_the_speed_of_padded_batches(pilots):
    """A log counts the FLOPs of padding, too, for each token that is none."""
    padded = [
        dataclasses.replace(
            p,
            batch_tokens=p.batch_tokens / 2,
            seconds_per_token=2 * p.seconds_per_token,
            flops_per_token=2 * p.flops_per_token,
        )
        for p in pilots
    ]
    assert seconds_per_token(BIGGER, padded) == pytest.approx(2 * seconds_per_token(BIGGER, pilots))


def test_sizes_of_as_many_parameters_are_told_apart(pilots):
    """As layers that share their weights are."""
    twin = dataclasses.replace(pilots[0], size=Size(4, 32, heads=2), batch_tokens=8 * pilots[0].batch_tokens)
    for order in ([*pilots, twin], [twin, *pilots]):
        assert [batch_tokens(each.size, order) for each in (twin, pilots[0])] == pytest.approx([8 * 512, 512])


def test_a_size_that_was_run_is_known_best(pilots):
    assert deviation(pilots[1].size, pilots) == 0.03
    assert 0.15 < deviation(SIZES[3], pilots) < deviation(Size(24, 1024), pilots)


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
