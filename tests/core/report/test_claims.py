"""The verdicts, on experiments changed so that each must come out one way and then the other."""

import math
from dataclasses import replace

import numpy as np
import pytest

from train_large.report import claims as module
from train_large.report.claims import judge_claims, standard_error
from train_large.report.results import CurvePoint
from train_large.report.training_claims import _rising_with_perplexity, _updates_to_rise
from train_large.report.units import format_bytes

NAMES = ["updates", "larger", "diminish", "bits", "sparsity60", "sparsity90", "limits", "recipe", "weights"]


def judged(results):
    verdicts = judge_claims(results)
    assert len(verdicts) == len(NAMES)
    return dict(zip(NAMES, verdicts))


def change(results, **by_name):
    """The results with each model replaced by function(model, its place by size), for each field."""
    models = results.by_size
    for field, function in by_name.items():
        models = [replace(model, **{field: function(model, place)}) for place, model in enumerate(models)]
    return replace(results, models=tuple(models))


def with_accuracy(results, accuracy):
    """accuracy(model, place, entry) in every entry."""
    return change(
        results,
        compressed=lambda model, place: tuple(
            replace(entry, accuracy=accuracy(model, place, entry)) for entry in model.compressed
        ),
    )


def many(results, valid=1_000_000):
    """So many validation examples that every difference counts."""
    return replace(results, task=replace(results.task, valid=valid))


def test_standard_error_is_that_of_draws():
    draws = np.random.default_rng(0).binomial(400, 0.7, size=20_000) / 400
    assert standard_error(0.7, 400) == pytest.approx(draws.std(), rel=0.02)


def updates_to_reach(curve, perplexity):
    return _updates_to_rise(_rising_with_perplexity(curve), -math.log(perplexity))


def test_updates_to_reach_is_log_linear():
    curve = [
        CurvePoint(10, 1, 1, 800.0),
        CurvePoint(20, 2, 2, 400.0),
        CurvePoint(40, 4, 4, 100.0),
        CurvePoint(50, 5, 5, 200.0),
    ]
    assert updates_to_reach(curve, 900) == 10
    assert updates_to_reach(curve, 400) == pytest.approx(20)
    assert updates_to_reach(curve, 800 / math.sqrt(2)) == pytest.approx(15)
    assert updates_to_reach(curve, 200) == pytest.approx(30)  # the first time, not after the rise
    assert updates_to_reach(curve, 99) is None


def test_invented_experiment_shows_what_it_was_made_to_show(results, new_results):
    results = change(results, weight_errors=lambda model, place: new_results.by_size[place].weight_errors)
    verdicts = judged(many(results))
    assert {name for name, claim in verdicts.items() if claim.shows} == set(NAMES)
    assert [claim.section for claim in verdicts.values()] == [
        "3",
        "3",
        "3",
        "4.2",
        "4.3",
        "4.3",
        "4.1-4.3",
        "4.3",
        "5.3",
    ]


def test_fewer_updates(results):
    claim = judged(results)["updates"]
    assert claim.shows is True
    assert "6 of 6 pairs" in claim.measured
    assert "2l_32h after 35,800" in claim.measured
    assert "Perplexity 419" in claim.measured

    # All in as many updates: no size is faster. Larger ones slower: against it. One pair the other way: mixed.
    def stretched(factors):
        return change(
            results,
            curve=lambda model, place: tuple(
                CurvePoint(factors[place] * k, k, k, 500.0 - 10 * k) for k in range(1, 10)
            ),
        )

    assert judged(stretched([1, 1, 1, 1]))["updates"].shows is False
    assert judged(stretched([1, 2, 3, 4]))["updates"].shows is False
    assert judged(stretched([4, 3, 1, 2]))["updates"].shows is None
    assert judged(stretched([4, 3, 2, 1]))["updates"].shows is True
    assert judged(change(results, curve=lambda model, place: ()))["updates"].shows is None


def test_best_size_and_diminishing_returns(results):
    def verdicts(*perplexities):
        changed = judged(change(results, perplexity=lambda model, place: float(perplexities[place])))
        return changed["larger"].shows, changed["diminish"].shows

    assert verdicts(4, 3, 2, 3) == (True, True)
    assert verdicts(5, 4, 3, 2) == (True, False)
    assert verdicts(2, 3, 4, 5) == (False, True)
    measured = judged(results)["larger"].measured
    assert "3l_128h 108" in measured
    assert "3l_128h 74.0%" in measured
    assert "1,006" in measured


def test_unequal_training_times_cannot_be_compared(results):
    late = change(results, train_seconds=lambda model, place: 700.0 if place == 2 else 600.0)
    verdicts = judged(late)
    assert verdicts["larger"].shows is None
    assert verdicts["diminish"].shows is None
    assert "600 to 700 seconds" in verdicts["larger"].measured
    within = change(results, train_seconds=lambda model, place: 600.0 + place)
    assert judged(within)["larger"].shows is True


@pytest.mark.parametrize(
    ("name", "sparsity", "bits"), [("bits", 0.0, 4), ("sparsity60", 0.6, 32), ("sparsity90", 0.9, 32)]
)
def test_robustness(results, name, sparsity, bits):
    def losing(losses, valid=1_000_000):
        return judged(
            many(
                with_accuracy(
                    results,
                    lambda model, place, entry: (
                        0.8 - (losses[place] if (entry.sparsity, entry.bits) == (sparsity, bits) else 0)
                    ),
                ),
                valid,
            )
        )[name]

    assert losing([0.08, 0.06, 0.04, 0.02]).shows is True
    assert losing([0.02, 0.04, 0.06, 0.08]).shows is False
    assert losing([0.05, 0.05, 0.05, 0.05]).shows is None
    few = losing([0.08, 0.06, 0.04, 0.02], valid=100)
    assert few.shows is None  # the same differences on few examples tell nothing
    assert "100 validation examples" in few.measured
    assert "2l_32h 8.0, 2l_64h 6.0, 3l_128h 4.0 and 4l_256h 2.0" in few.measured


def test_slope_and_its_error_are_those_of_least_squares():
    rng = np.random.default_rng(1)
    x, y, errors = [1.0, 2.0, 4.0, 7.0], np.array([3.0, 1.0, 2.5, -1.0]), np.array([0.1, 0.4, 0.2, 0.3])
    slope, error = module._slope(x, list(zip(y, errors)))
    assert slope == pytest.approx(np.polyfit(x, y, 1)[0])
    slopes = [np.polyfit(x, y + errors * rng.normal(size=4), 1)[0] for _ in range(4000)]
    assert error == pytest.approx(np.std(slopes), rel=0.05)


def test_a_model_that_only_guesses_is_not_called_robust(results):
    guessing = with_accuracy(results, lambda model, place, entry: 0.505 if place == 3 else entry.accuracy)
    claim = judged(guessing)["bits"]
    assert "Left out" in claim.measured
    assert claim.measured.endswith("4l_256h.")
    assert "4l_256h 0.0" not in claim.measured
    nobody = with_accuracy(results, lambda model, place, entry: 0.5)
    assert judged(nobody)["bits"].shows is None


def test_limits_against_a_grid_of_limits(results):
    """The exact shares agree with brute force over two thousand limits."""
    few = results
    for results in (few, many(few)):
        wins, loses, least, most = module._shares_of_limits(results, lambda entry: entry.bytes)
        n, counts = results.task.valid, [0, 0]
        limits = np.exp(np.linspace(math.log(least), math.log(most), 2001)[:-1])
        for limit in limits:
            whole = [
                (e.accuracy, m.parameters)
                for m in results.models
                for e in m.compressed
                if e.bytes <= limit * (1 + 1e-12) and e.bits == 32 and e.sparsity == 0
            ]
            accuracy, parameters = max(whole)
            larger = max(
                [
                    e.accuracy
                    for m in results.models
                    for e in m.compressed
                    if e.bytes <= limit * (1 + 1e-12) and (e.bits < 32 or e.sparsity > 0) and m.parameters > parameters
                ],
                default=0,
            )
            error = (accuracy * (1 - accuracy) / n + larger * (1 - larger) / n) ** 0.5
            counts[0] += larger - accuracy > error
            counts[1] += accuracy - larger > error
        assert wins == pytest.approx(counts[0] / len(limits), abs=0.003)
        assert loses == pytest.approx(counts[1] / len(limits), abs=0.003)
        assert least == 131_000 * 4
        assert most == 1_030_000 * 4  # the most accurate whole model, not the largest


def test_for_most_limits(results):
    ruined = with_accuracy(many(results), lambda model, place, entry: 0.55 if entry.is_compressed else entry.accuracy)
    assert judged(ruined)["limits"].shows is False
    smallest_best = with_accuracy(many(results), lambda model, place, entry: entry.accuracy - 0.1 * place)
    assert judged(smallest_best)["limits"].shows is False
    assert judged(many(results, 4))["limits"].shows is None
    # A model compressed that is no larger than the best whole one is not what the claim is about.
    same = with_accuracy(
        many(results),
        lambda model, place, entry: 0.6 + 0.02 * place if not entry.is_compressed else 0.8 if place == 0 else 0.55,
    )
    assert judged(same)["limits"].shows is False
    alone = replace(results, models=results.models[:1])
    assert judged(alone)["limits"].shows is None


def test_recipe(results):
    recipe = {(s, b) for s in (0.3, 0.45) for b in (6, 8)}

    def verdict(good, bad):
        changed = with_accuracy(
            results, lambda model, place, entry: good if (entry.sparsity, entry.bits) in recipe else bad
        )
        return judged(changed)["recipe"].shows

    assert verdict(0.8, 0.6) is True
    assert verdict(0.6, 0.8) is False
    assert verdict(0.7, 0.7) is None
    assert verdict(0.5, 0.5) is None  # on the frontier of what only guesses


def with_errors(results, error):
    """error(place, sparsity) gives (mean absolute error, deviation) of every kind."""
    return change(
        results,
        weight_errors=lambda model, place: tuple(
            replace(e, mean_absolute=error(place, e.sparsity)[0], deviation=error(place, e.sparsity)[1])
            for e in model.weight_errors
        ),
    )


def test_weight_errors(new_results):
    def verdict(error):
        return judged(with_errors(new_results, error))["weights"]

    falling = [0.4, 0.3, 0.2, 0.1]
    assert verdict(lambda place, sparsity: (falling[place], 1.0)).shows is True
    assert verdict(lambda place, sparsity: (falling[3 - place], 1.0)).shows is False
    assert verdict(lambda place, sparsity: (0.1, 1.0)).shows is False
    # One of the two ways rises.
    assert verdict(lambda place, sparsity: (falling[3 - place if sparsity else place], 1.0)).shows is False
    # One pair of the six the other way.
    assert verdict(lambda place, sparsity: ([0.4, 0.2, 0.3, 0.1][place], 1.0)).shows is None
    # The weights shrink as their errors do: smaller errors, but no easier to approximate.
    shrinking = verdict(lambda place, sparsity: (falling[place], falling[place]))
    assert shrinking.shows is None
    assert "At 4 bits, mean |w − w′|: 2l_32h 0.4, 2l_64h 0.3, 3l_128h 0.2 and 4l_256h 0.1; " in shrinking.measured
    assert shrinking.measured.count("the larger has the smaller in 6 of 6 pairs") == 2
    assert shrinking.measured.count("2l_32h 1, 2l_64h 1, 3l_128h 1 and 4l_256h 1; the larger has the smaller in 0") == 2


def test_only_the_matrices_of_the_layers_count(new_results):
    """What is in the embeddings, or in all weights together, does not change the verdict."""
    reversed_elsewhere = change(
        new_results,
        weight_errors=lambda model, place: tuple(
            replace(e, mean_absolute=0.1 * (place + 1)) if e.kind in ("token embeddings", "biases", "all") else e
            for e in model.weight_errors
        ),
    )
    assert judged(reversed_elsewhere)["weights"] == judged(new_results)["weights"]


def test_weight_errors_not_measured_cannot_be_told(results, new_results):
    assert judged(results)["weights"].shows is None
    one = change(new_results, weight_errors=lambda model, place: model.weight_errors if place == 1 else None)
    assert "no two sizes" in judged(one)["weights"].measured


def test_real_files_count_where_there_are_any(new_results):
    _, _, least, most = module._shares_of_limits(new_results, lambda entry: entry.stored_bytes)
    measured = judged(new_results)["limits"].measured
    whole = [model.at(0.0, 32).file_bytes for model in new_results.models]
    assert least == min(whole)
    assert measured.startswith(f"From {format_bytes(least)}, where the first whole model fits, to {format_bytes(most)}")


def test_one_model_and_nothing_compressed_cannot_be_told(results):
    alone = replace(results, models=(replace(results.models[0], compressed=(), curve=()),))
    assert {claim.shows for claim in judge_claims(alone)} == {None}
    assert all(claim.measured for claim in judge_claims(alone))
