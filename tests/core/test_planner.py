"""The planner: the right pick where the truth is known, and what fits a limit."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import pytest
from pilot_logs import BIGGER, SIZES, TRUTH, VOCABULARY, Truth, parameters, write_log, write_logs
from report.conftest import LOSS_AT_BITS, make_model

from train_large import planner, sizes
from train_large.errors import UserError
from train_large.planner import plan
from train_large.report import results as report
from train_large.report.plans import as_json, describe
from train_large.sizes import Size
from train_large.studies import Compressed, StudiedSize, Study


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    return write_logs(tmp_path_factory.mktemp("pilots"), TRUTH, (*SIZES, BIGGER))


def true_best(budget, chosen=(*SIZES, BIGGER)):
    return min(TRUTH.at(size, budget) for size in chosen)


@pytest.fixture(scope="module")
def study():
    """Three of the sizes, with small losses at 4 bits and large ones of pruning."""
    found = []
    for size, perplexity, accuracy in zip(SIZES[:3], (60.0, 40.0, 30.0), (0.60, 0.66, 0.70), strict=True):
        total = sizes.parameters(size, VOCABULARY)
        shape = (size.name, size.layers, size.hidden, size.heads, total, parameters(size))
        model = report.read_record(report.Model, make_model(*shape, 3e-3, 5000, perplexity, accuracy, 0.5))
        entries = tuple(Compressed(c.sparsity, c.bits, c.accuracy, c.stored_bytes) for c in model.compressed)
        found.append(StudiedSize(size.name, size.layers, size.hidden, parameters(size), perplexity, accuracy, entries))
    return Study(1000, tuple(found))


@pytest.mark.parametrize("budget", [60, 150, 450, 1500])
def test_the_pick_is_within_five_percent_of_the_best(logs, budget):
    made = plan(logs, budget)
    picked = Size.parse(made.pick.size)
    chosen = next(size for size in (*SIZES, BIGGER) if size.name == picked.name)
    assert TRUTH.at(chosen, budget) <= 1.05 * true_best(budget)
    assert made.pick.interval[0] <= TRUTH.at(chosen, budget) <= made.pick.interval[1]


def test_a_longer_budget_is_for_a_larger_size(logs):
    short, long = plan(logs, 30).pick, plan(logs, 1500).pick
    assert short.parameters < long.parameters


def test_a_plan_says_what_to_run(logs):
    made = plan(logs, 450)
    pick, seconds = made.pick, 450
    assert pick.learning_rate == 0.003
    assert (pick.batch_tokens, pick.length) == (512, 16)
    assert pick.updates * pick.seconds_per_update == pytest.approx(seconds, rel=0.01)
    assert pick.perplexity == pytest.approx(math.exp(pick.loss))
    assert pick.interval[0] < pick.perplexity <= pick.cautious < pick.interval[1]
    assert pick.compression is None
    names = [option.size for option in made.options]
    assert names == [*(size.name for size in (*SIZES, BIGGER)), "6l_512h"]
    at = names.index(pick.size)
    assert made.larger == made.options[at + 1]
    assert made.smaller == made.options[at - 1]
    words = describe(made)
    for part in (pick.size, "7.5 min", "32 sequences of 16 tokens", "0.003", "next smaller", "next larger", "Fitted"):
        assert part in words
    assert json.loads(as_json(made))["pick"]["size"] == pick.size


def test_sizes_that_are_asked_for(logs):
    made = plan(logs, 450, candidates=[Size(3, 96), SIZES[0]])
    option = next(option for option in made.options if option.size == "3l_96h")
    assert (option.heads, option.ffn, option.logged) == (6, 384, False)  # heads as wide as the pilots'
    assert len(made.options) == 6  # and none beyond the largest
    assert option.interval[0] < TRUTH.at(Size(3, 96, heads=6), 450) < option.interval[1]


def test_heads_are_as_wide_as_the_pilots_or_nearly(logs):
    def heads(hidden):
        return next(
            o.heads for o in plan(logs, 450, candidates=[Size(3, hidden, heads=1)]).options if o.hidden == hidden
        )

    assert heads(96) == 6
    assert heads(100) == 5  # of 20, for 16 is none
    assert "heads, feed-forward layers of" in describe(plan(logs, 450))


def test_what_cannot_be_told_apart_lies_within_the_interval_and_fits(logs):
    free, limited = plan(logs, 450), plan(logs, 450, 60_000)
    assert limited.pick.size == "2l_32h"
    assert limited.pick.interval[0] > free.pick.perplexity  # which is better by far, but does not fit
    for made in (free, limited):
        [said] = [caveat for caveat in made.caveats if "told apart" in caveat] or [""]
        named = set(filter(None, said.rpartition(": ")[2].split(", ")))
        low, high = made.pick.interval
        candidates = [option for option in made.options if option.logged and option != made.pick]
        if made is limited:
            candidates = [option for option in candidates if option.compression is not None]
        assert named == {option.size for option in candidates if low <= option.perplexity <= high}


def test_positions_that_cannot_be(logs):
    for positions in (0, -900):
        with pytest.raises(UserError, match=f"--max-positions {positions}: give"):
            plan(logs, 450, 200_000, positions=positions)


def test_a_limit_makes_the_model_smaller_or_compressed(logs):
    free = plan(logs, 1500)
    whole = 4 * free.pick.parameters
    assert plan(logs, 1500, whole).pick.compression == planner.Compression(32, 0.0, whole, False, 0.0)
    half = plan(logs, 1500, whole // 2)
    assert half.pick.size == free.pick.size
    assert (half.pick.compression.bits, half.pick.compression.loss) == (8, None)
    assert half.pick.compression.bytes <= whole // 2
    assert any("unknown" in caveat for caveat in half.caveats)
    tight = plan(logs, 1500, 60_000)
    assert tight.pick.parameters < free.pick.parameters
    assert tight.pick.compression.bytes <= 60_000
    assert tight.larger.compression is None
    assert "does not fit" in describe(tight)


def test_what_was_not_studied_is_not_pruned_far(logs):
    for option in plan(logs, 450, 30_000).options:
        assert option.compression is None or option.compression.sparsity <= planner.UNSTUDIED_SPARSITY


def test_a_study_says_what_compression_costs(logs, study):
    limit = 80_000
    made = plan(logs, 450, limit, study=study)
    option = next(option for option in made.options if option.size == "2l_64h")
    entries = [entry for entry in study.sizes[1].compressed if entry.file_bytes <= limit]
    best = max(entries, key=lambda entry: entry.accuracy)
    assert (option.compression.bits, option.compression.sparsity) == (best.bits, best.sparsity)
    assert option.compression.measured
    assert option.compression.bytes == best.file_bytes
    assert option.compression.loss == pytest.approx(study.sizes[1].at(0, 32).accuracy - best.accuracy)
    assert made.pick.accuracy is not None
    assert made.pick.accuracy_interval[0] < made.pick.accuracy < made.pick.accuracy_interval[1]
    assert "points of accuracy" in describe(made)


def test_what_nobody_tried_is_not_free():
    tried = planner.Compression(8, 0.30, 900, True, 0.002)
    harder = planner.Compression(4, 0.30, 500, True, 0.03)
    unknown = planner.Compression(4, 0.15, 600, False, None)
    hardest = planner.Compression(4, 0.60, 300, False, None)
    every = [tried, harder, unknown, hardest]
    assert [planner._presumed_loss(each, every) for each in every] == [0.002, 0.03, 0.03, 0.03]
    assert planner._presumed_loss(hardest, [tried, hardest]) == 0.002
    assert planner._presumed_loss(unknown, [unknown, hardest]) == 0


def test_a_size_of_unknown_cost_is_charged_as_the_others(logs, study):
    """Else what no study tells of would win by that."""
    line = planner._accuracy_of(study)
    limit = 30_000
    options = plan(logs, 450, limit, study=study).options
    known = next(o for o in options if o.compression is not None and o.compression.loss)
    unknown = dataclasses.replace(known, compression=dataclasses.replace(known.compression, loss=None))
    free = dataclasses.replace(known, compression=dataclasses.replace(known.compression, loss=0.0))
    both = [known, unknown]
    assert planner._badness(unknown, line, both) == planner._badness(known, line, both)
    assert planner._badness(free, line, both) < planner._badness(unknown, line, both)


def test_between_studied_sizes_the_cost_is_between(study):
    lost = [planner._accuracy_lost(study, parameters(size), 0.3, 4) for size in (SIZES[0], Size(2, 48), SIZES[1])]
    assert lost[0] > lost[1] > lost[2] > 0.9 * LOSS_AT_BITS[4]
    assert planner._accuracy_lost(study, parameters(Size(12, 768)), 0.3, 4) is None  # far from all


def test_accuracy_is_expected_along_the_studys_line(study):
    line = planner._accuracy_of(study)
    assert planner._share(line, math.log(40)) == pytest.approx(0.66, abs=0.02)
    assert planner._share(line, math.log(30)) > planner._share(line, math.log(60))


def test_a_study_of_another_vocabulary(logs, study, tmp_path):
    others = write_logs(tmp_path, TRUTH, SIZES[:2], vocabulary=5000)
    with pytest.raises(UserError, match="different vocabularies; give the study of the same data"):
        plan(others, 450, study=study)


def test_sizes_still_on_the_plateau_are_said_and_not_picked(tmp_path):
    truth = Truth(leave=1.6e8, plateau=4.8)
    small = Size(1, 16, heads=1)
    made = plan(write_logs(tmp_path, truth, (small, *SIZES[:3])), 150)
    assert made.pick.size != small.name
    assert any("plateau" in caveat and small.name in caveat for caveat in made.caveats)
    assert made.options[0].on_plateau
    assert made.options[0].perplexity == pytest.approx(math.exp(4.8), rel=0.1)


def test_what_was_not_tried_is_said(logs, tmp_path):
    """Batches and rates, and sizes beyond the pick."""
    assert any("no other batch or rate was tried" in caveat for caveat in plan(logs, 450, draws=5).caveats)
    assert not any("no pilot was larger" in caveat for caveat in plan(logs, 30, draws=5).caveats)
    slower = write_logs(tmp_path, dataclasses.replace(TRUTH, floor=2.5), (*SIZES, BIGGER), peak=1e-4)
    tried = plan([*logs, *slower], 450, draws=5)
    assert not any("no other batch or rate was tried" in caveat for caveat in tried.caveats)
    largest = plan(logs, 15_000, candidates=[BIGGER], draws=5)
    assert largest.pick.size == BIGGER.name
    assert any(f"no pilot was larger than {BIGGER.name}" in caveat for caveat in largest.caveats)


def test_a_budget_far_away_is_said(logs):
    assert any("times the longest pilot's" in caveat for caveat in plan(logs, 15_000).caveats)
    assert not any("times the longest pilot's" in caveat for caveat in plan(logs, 450).caveats)


def test_the_same_logs_give_the_same_plan(logs):
    assert as_json(plan(logs, 450)) == as_json(plan(logs[::-1], 450))


def test_a_budget_below_every_pilot(logs):
    with pytest.raises(
        UserError, match="a budget of 5 s is below every pilot's first validation, at 9.97 s: give more"
    ):
        plan(logs, 5)


def test_a_limit_below_every_size(logs):
    with pytest.raises(
        UserError, match=r"a limit of 2.00 kB is below every size: the smallest, 2l_32h, takes \d\S+ kB"
    ):
        plan(logs, 450, 2000)


def test_a_limit_without_a_vocabulary(tmp_path):
    logs = write_logs(tmp_path, TRUTH, SIZES[:2], arch="transformer", vocabulary=None, length=None)
    with pytest.raises(UserError, match="not of a masked LM whose vocabulary is known"):
        plan(logs, 450, 10_000)


def test_no_logs():
    with pytest.raises(UserError, match="no run log"):
        plan([], 450)


def test_one_size(tmp_path):
    with pytest.raises(UserError, match="two sizes or more"):
        plan([write_log(tmp_path / "a", SIZES[0], TRUTH)], 450)


def test_torch_is_not_needed_without_a_limit(logs):
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['matplotlib'] = None\n"
        "from pathlib import Path\nfrom train_large.planner import plan\n"
        f"print(plan([Path(p) for p in {list(map(str, logs))!r}], 450).pick.size)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == plan(logs, 450).pick.size, done.stderr
