"""The scaling law: recovered from logs that obey a known one, plateau and all."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from pilot_logs import SIZES, Truth, parameters, seconds_per_token, write_log, write_logs

from train_large import runlog
from train_large.errors import UserError
from train_large.pilot_runs import read_pilots
from train_large.scaling import fit, sort_pilots
from train_large.sizes import Size

UNSEEN = Size(3, 96, heads=6)


def perplexities(law, size, tokens):
    return np.exp(np.quantile(law.losses(size, parameters(size), tokens), (0.05, 0.5, 0.95)))


@pytest.mark.parametrize("seed", range(3))
def test_a_known_law_is_recovered(tmp_path, seed):
    truth = Truth()
    law = fit(read_pilots(write_logs(tmp_path, truth, seed=seed)))
    for size in (*SIZES, UNSEEN):
        for budget in (150, 450):
            low, middle, high = perplexities(law, size, budget / seconds_per_token(size))
            true = truth.at(size, budget)
            assert low <= true <= high, (size.name, budget)
            assert middle == pytest.approx(true, rel=0.03 if budget == 150 else 0.15)


def test_intervals_widen_with_the_distance(tmp_path):
    law = fit(read_pilots(write_logs(tmp_path, Truth())))
    size = SIZES[1]
    near, far = (perplexities(law, size, seconds / seconds_per_token(size)) for seconds in (150, 1500))
    assert math.log(far[2] / far[0]) > 1.5 * math.log(near[2] / near[0])
    unseen = perplexities(law, UNSEEN, 150 / seconds_per_token(UNSEEN))
    assert math.log(unseen[2] / unseen[0]) > 1.5 * math.log(near[2] / near[0])


@pytest.mark.parametrize("size", [Size(4, 160, heads=10), Size(4, 384, heads=24)])
def test_of_a_size_without_a_pilot_no_more_is_known_than_of_its_neighbours(tmp_path, size):
    """Small models' runs have many more tokens, beyond which large ones' seldom come."""
    law = fit(read_pilots(write_logs(tmp_path, Truth())))
    low, _, high = perplexities(law, size, 3600 / seconds_per_token(size))
    for pilot in SIZES[2:]:
        least, _, most = perplexities(law, pilot, 3600 / seconds_per_token(pilot))
        assert math.log(high / low) > 0.9 * math.log(most / least)


def test_the_plateau_is_left_out(tmp_path):
    """Those who have left it are fitted from there on, and give their later loss; one that has not is not fitted."""
    truth = Truth(leave=1.6e8, plateau=4.8)
    small = Size(1, 16, heads=1)
    pilots = read_pilots(write_logs(tmp_path, truth, (small, *SIZES[:3])))
    parts = sort_pilots(pilots)
    assert [pilot.size for pilot in parts.waiting] == [small]
    assert parts.plateau == pytest.approx(4.8, abs=0.15)
    assert all(each.start > 0 and each.left_at > 0 for each in parts.fitted)
    law = fit(pilots)
    for size in SIZES[:3]:
        assert perplexities(law, size, 150 / seconds_per_token(size))[1] == pytest.approx(truth.at(size, 150), rel=0.05)
        assert law.on_plateau(parameters(size), 1e5)
        assert not law.on_plateau(parameters(size), 1e8)
    assert law.on_plateau(parameters(small), 150 / seconds_per_token(small))


def test_a_power_law_has_no_plateau(tmp_path):
    pilots = read_pilots(write_logs(tmp_path, Truth()))
    assert [pilot.drop for pilot in pilots] == [None] * 4
    parts = sort_pilots(pilots)
    assert (len(parts.fitted), parts.waiting, parts.plateau) == (4, (), None)


def test_all_on_the_plateau_is_an_error(tmp_path):
    """All begin to fall only with their last validation."""
    folders = write_logs(tmp_path, Truth(), SIZES[:2], validations=6)
    for folder in folders:
        lines = [json.loads(line) for line in (folder / runlog.NAME).read_text().splitlines()]
        losses = iter((5.3, 5.2, 5.15, 5.1, 5.05, 4.7))
        for line in lines:
            if line["kind"] == "valid":
                line["loss"] = next(losses)
        (folder / runlog.NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match="no pilot has left the plateau .* for longer"):
        fit(read_pilots(folders))


def test_repetitions_say_how_far_runs_differ(tmp_path):
    noisy = [write_log(tmp_path / str(i), SIZES[0], Truth(floor=1.8 + 0.2 * i)) for i in range(3)]
    law = fit(read_pilots([*noisy, *write_logs(tmp_path, Truth(), SIZES[1:])]))
    ends = [pilot.losses[-1] for pilot in read_pilots(noisy)]
    of_three = np.sum((np.log(ends) - np.mean(np.log(ends))) ** 2)
    assert law.run_deviation == pytest.approx(np.sqrt((4 * 0.01**2 + of_three) / (4 + 2)))


def test_two_runs_that_end_alike_by_chance_do_not_make_all_certain(tmp_path):
    logs = write_logs(tmp_path, Truth())
    alike = write_log(tmp_path / "again", SIZES[0], Truth())
    assert fit(read_pilots([*logs, alike])).run_deviation > 0.008


def test_one_size_is_not_enough(tmp_path):
    logs = [write_log(tmp_path / name, SIZES[0], Truth()) for name in "ab"]
    with pytest.raises(UserError, match="2l_32h, .* two sizes or more"):
        fit(read_pilots(logs))
    other_heads = write_log(tmp_path / "c", Size(2, 32, heads=1), Truth())
    with pytest.raises(UserError, match="as many parameters.* two sizes or more"):
        fit(read_pilots([*logs, other_heads]))
