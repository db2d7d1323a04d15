"""The verdicts of section 3 on a translation study changed so that each comes out true, false and open."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report.invented import T2T_FACTS, make_translation_model, write_run_log

from train_large.report import training_claims as module
from train_large.report.claims import judge_claims
from train_large.report.results import Budget, CurvePoint
from train_large.report.runs import read_runs
from train_large.report.training_claims import (
    UNTOLD,
    _rising_with_bleu,
    _rising_with_perplexity,
    _updates_to_rise,
    choice_parts,
)

NAMES = ("updates", "updates to bleu", "larger", "diminish", "larger by bleu", "diminish by bleu")


def judged(study):
    claims = judge_claims(study)
    assert len(claims) == len(NAMES)
    assert {claim.section for claim in claims} == {"3"}
    return dict(zip(NAMES, claims))


def verdicts(study):
    return {name: claim.shows for name, claim in judged(study).items()}


def with_scores(study, scores, error=0.3):
    """The study with these scores by the paper's measure, from the smallest size to the largest."""
    models = [
        replace(model, scores=replace(model.scores, paper=score, paper_error=error))
        for model, score in zip(study.by_size, scores)
    ]
    return replace(study, models=tuple(models))


def with_curves(study, curves):
    """The study with these (updates, BLEU) points, from the smallest size to the largest."""
    drawn = [tuple(CurvePoint(updates, 1, 1, 9.0, bleu) for updates, bleu in points) for points in curves]
    return replace(study, models=tuple(replace(model, curve=curve) for model, curve in zip(study.by_size, drawn)))


def test_the_invented_study_shows_what_it_was_made_to_show(translation):
    assert verdicts(translation) == {
        "updates": True,
        "updates to bleu": None,  # 6l_256h starts as 2l_256h does
        "larger": True,
        "diminish": True,
        "larger by bleu": True,
        "diminish by bleu": True,
    }
    measured = judged(translation)["larger by bleu"].measured
    assert "2l_64h 9.41, 2l_128h 14.91, 2l_256h 17.61 and 6l_256h 6.31" in measured
    assert "2l_256h has 8.20 more than 2l_64h, with a standard error of 0.58 (bootstrap)" in measured


@pytest.mark.parametrize(
    ("scores", "larger", "diminish"),
    [
        ((5, 6, 7, 8), True, False),
        ((8, 7, 6, 5), False, True),
        ((7, 6, 7.2, 6.9), None, None),
        ((7, 8, 7.2, 7.9), True, None),
        ((7.4, 6, 7.2, 5), None, True),
    ],
)
def test_bleu_counts_beyond_its_standard_error(translation, scores, larger, diminish):
    found = verdicts(with_scores(translation, scores))  # the error of a difference: 0.42
    assert (found["larger by bleu"], found["diminish by bleu"]) == (larger, diminish)


@pytest.mark.parametrize(("difference", "shows"), [(0.43, True), (0.42, None), (-0.42, None), (-0.43, False)])
def test_the_error_of_a_difference_is_that_of_both_together(translation, difference, shows):
    draws = np.random.default_rng(0).normal(scale=0.3, size=(2, 100_000))
    assert (draws[0] - draws[1]).std() == pytest.approx(0.424, abs=0.003)
    two = replace(translation, models=translation.by_size[:2])
    assert verdicts(with_scores(two, (7.0, 7.0 + difference)))["larger by bleu"] is shows


@pytest.mark.parametrize(("difference", "shows"), [(1.1, True), (0.9, None), (-0.9, None), (-1.1, False)])
def test_small_differences_are_left_open_where_no_error_was_measured(translation, difference, shows):
    assert UNTOLD == 1
    two = replace(translation, models=translation.by_size[:2])
    claim = judged(with_scores(two, (7.0, 7.0 + difference), error=None))["larger by bleu"]
    assert claim.shows is shows
    assert "no standard error was measured" in claim.measured


def test_updates_to_a_bleu(translation):
    """Two sizes; the error of a difference on 250 of 1000 test sentences is 2 * sqrt(2) * 0.3 = 0.85."""
    two = with_scores(replace(translation, models=translation.by_size[:2]), (9, 9))

    def verdict(small, large):
        return verdicts(with_curves(two, (small, large)))["updates to bleu"]

    slow, fast = [(100, 0.0), (1100, 10.0)], [(100, 0.0), (600, 10.0)]
    assert verdict(slow, fast) is True
    assert verdict(fast, slow) is False
    # The larger reaches 10 at 1020; the smaller 9.15 at 1015, so the larger may be no sooner.
    assert verdict(slow, [(100, 0.0), (1020, 10.0)]) is None
    assert verdict(slow, [(100, 0.0), (1010, 10.0)]) is True
    assert verdict(slow, slow) is None
    assert verdict([(100, 0.1)], [(100, 0.2)]) is None
    claim = judged(with_curves(two, (slow, fast)))["updates to bleu"]
    assert "2l_64h after 1,100 and 2l_128h after 600 updates" in claim.measured
    assert "beyond 0.85 BLEU" in claim.measured


def test_one_pair_left_open_cannot_turn_the_others(translation):
    slow, middle, fast = ([(100, 0.0), (100 + gap, 10.0)] for gap in (4000, 2000, 500))
    three = replace(translation, models=translation.by_size[:3])
    assert verdicts(with_curves(three, (slow, middle, fast)))["updates to bleu"] is True
    assert verdicts(with_curves(three, (slow, fast, fast)))["updates to bleu"] is None
    assert verdicts(with_curves(three, (fast, middle, slow)))["updates to bleu"] is False
    assert verdicts(with_curves(three, (fast, slow, slow)))["updates to bleu"] is False  # 2 against, 1 open


def test_unequal_times_leave_it_open(translation):
    models = (replace(translation.models[0], train_seconds=300.0), *translation.models[1:])
    claims = judged(replace(translation, models=models))
    for name in ("larger", "diminish", "larger by bleu", "diminish by bleu"):
        assert claims[name].shows is None
        assert "not trained for the same time: 180 to 300 seconds" in claims[name].measured
    assert claims["updates"].shows is True


@pytest.mark.parametrize("clock", ["wall", "calibrated"])
def test_unequal_parts_of_a_budget_on_another_clock_leave_it_open(translation, clock):
    def told(curve):
        return tuple(replace(point, used_seconds=point.updates / 10) for point in curve)

    def claims(*used):
        models = tuple(
            replace(model, used_seconds=seconds, train_seconds=10.0 * i, curve=told(model.curve))
            for i, (model, seconds) in enumerate(zip(translation.models, used, strict=True), start=1)
        )
        return judged(replace(translation, budget=Budget(180.0, clock), models=models))

    names = ("larger", "diminish", "larger by bleu", "diminish by bleu")
    equal = claims(180.0, 181.0, 180.5, 182.0)  # whatever was measured
    assert [equal[name].shows for name in names] == [True] * 4
    early = claims(180.0, 180.0, 180.0, 43.0)
    unknown = claims(180.0, 180.0, 180.0, None)
    for name in names:
        assert (early[name].shows, unknown[name].shows) == (None, None)
        assert f"same time on the {clock} clock: 43 to 180 seconds" in early[name].measured
        assert f"of the budget on its {clock} clock is not known" in unknown[name].measured


def test_runs_stopped_at_different_parts_of_a_calibrated_budget(tmp_path):
    """900 of 1000 updates by the one, 60 of 250 by the other, in the same measured time."""
    folders = []
    for hidden, updates, each, perplexity in ((64, 900, 1.0, 9.0), (128, 60, 4.0, 5.0)):
        model = make_translation_model(f"2l_{hidden}h", 2, hidden, 1, hidden, 1, updates, perplexity, 5.0)
        budget = {"budget_seconds": 1000.0, "budget_clock": "calibrated", "seconds_per_update": each}
        facts = {**T2T_FACTS, **budget, "parameters": hidden}
        folders.append(write_run_log(tmp_path / model["name"], model, facts))
    claims = judged(read_runs(folders))
    assert claims["larger"].shows is None
    assert "240 to 900 seconds" in claims["larger"].measured


def test_a_second_run_of_a_size_is_no_other_size(tmp_path):
    def of(*runs):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folders = []
        for number, (hidden, perplexity) in enumerate(runs):
            model = make_translation_model(f"2l_{hidden}h", 2, hidden, 1, hidden, 1, 100, perplexity, 5.0)
            facts = {**T2T_FACTS, "parameters": hidden}
            folders.append(write_run_log(folder / str(number) / model["name"], model, facts))
        claims = judged(read_runs(folders))
        return claims["larger"].shows, claims["diminish"].shows

    assert of((64, 21.0), (64, 20.0), (128, 30.0)) == (False, True)
    assert of((64, 21.0), (128, 12.0), (128, 12.2)) == (True, False)


curves = st.lists(
    st.tuples(st.integers(1, 50), st.floats(1.01, 1e4), st.floats(0, 100)),
    min_size=1,
    max_size=8,
    unique_by=lambda p: p[0],
).map(lambda drawn: [CurvePoint(u, u, u, p, bleu) for u, p, bleu in sorted(drawn)])


@given(curves, st.floats(1.01, 1e4), st.floats(0, 100))
def test_updates_to_reach_are_those_of_interpolation(curve, perplexity, bleu):
    for updates, heights, level in (
        (
            _updates_to_rise(_rising_with_perplexity(curve), -math.log(perplexity)),
            [-math.log(p.perplexity) for p in curve],
            -math.log(perplexity),
        ),
        (_updates_to_rise(_rising_with_bleu(curve), bleu), [p.bleu for p in curve], bleu),
    ):
        if updates is None:
            assert max(heights) < level
            continue
        # What the curve so far has at its best, by numpy.
        places = [p.updates for p in curve]
        assert np.interp(updates, places, heights) >= level - 1e-6 * max(1, abs(level))
        assert all(height < level for place, height in zip(places, heights) if place < updates - 1e-6)


def test_validations_without_bleu_are_passed_over():
    curve = [CurvePoint(10, 1, 1, 9.0, 2.0), CurvePoint(20, 2, 2, 8.0), CurvePoint(30, 3, 3, 7.0, 4.0)]
    assert _updates_to_rise(_rising_with_bleu(curve), 3.0) == 20
    assert _updates_to_rise(_rising_with_bleu(curve), 5.0) is None
    assert _rising_with_bleu([CurvePoint(20, 2, 2, 8.0)]) == []


def test_runs_are_judged_by_their_last_dev_bleu(t2t_runs):
    runs = read_runs(t2t_runs)
    claim = judged(runs)["larger by bleu"]
    assert claim.shows is True
    assert "at the last validation that has it: 2l_64h 9.10, 2l_128h 14.60" in claim.measured
    assert module.final_bleu(replace(runs.models[0], curve=())) is None


def test_bleu_of_different_decodings_is_not_compared(t2t_runs):
    runs = read_runs(t2t_runs)
    other = replace(runs.decodings[0], beam_size=1)
    claims = judge_claims(replace(runs, decodings=(*runs.decodings, other)))
    assert len(claims) == 3
    assert not any("BLEU" in claim.claim for claim in claims)


def test_runs_that_cannot_be_told_by_size_are_not_judged(t2t_runs):
    runs = read_runs(t2t_runs)
    assert judge_claims(read_runs(t2t_runs[:1])) == ()
    unknown = replace(runs, models=tuple(replace(run, parameters=None) for run in runs.models))
    assert judge_claims(unknown) == ()
    begun = replace(runs, models=tuple(replace(run, curve=(), perplexity=None) for run in runs.models))
    assert judge_claims(begun) == ()
    no_bleu = [replace(run, curve=tuple(replace(p, bleu=None) for p in run.curve)) for run in runs.models]
    assert len(judge_claims(replace(runs, models=tuple(no_bleu)))) == 3


def test_which_size_to_train(translation):
    assert choice_parts(translation) == ("2l_256h", ", BLEU 17.61 on the test set, perplexity 12.9.")
    name, told = choice_parts(with_scores(translation, (5.0, 7.7, 8.0, 7.4)))
    assert told.endswith("Not to be told from it, within one standard error: 2l_128h (7.70).")
    _, told = choice_parts(with_scores(translation, (5.0, 7.7, 8.0, 7.4), error=None))
    assert told.endswith("within 1 BLEU, with no standard error measured: 2l_128h (7.70) and 6l_256h (7.40).")
    assert choice_parts(with_scores(translation, (8.0, 7.0, 8.0, 7.0)))[0] == "2l_64h"  # the smallest of those that tie
