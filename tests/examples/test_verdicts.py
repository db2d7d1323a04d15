"""The claims' tests: intervals against scipy's own, costs by hand, and verdicts on studies whose truth is known."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import measurements
import pytest
import study_results
import verdicts
from hypothesis import given
from hypothesis import strategies as st
from measurements import Accuracy, Error, Memory, Point
from scipy import stats
from verdicts import Comparison

SIZES = {"1l_64h": (1, 64), "2l_64h": (2, 64), "4l_64h": (4, 64), "2l_32h": (2, 32), "2l_128h": (2, 128)}
SIZES["8l_64h"] = (8, 64)


@given(st.lists(st.floats(-10, 10), min_size=3, max_size=8))
def test_the_interval_is_students(values):
    comparison = Comparison("", "", tuple(values))
    if len(set(values)) == 1:
        assert comparison.low == pytest.approx(values[0])
        return
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (comparison.low, comparison.high) == pytest.approx((low, high))


@pytest.mark.parametrize(
    ("comparisons", "holds"),
    [
        ([(1.0, 1.1, 0.9)], True),
        ([(-1.0, -1.1, -0.9)], False),
        ([(1.0, 1.1, -0.9)], None),
        ([(1.0, 1.1)], None),
        ([(1.0, 1.1, math.inf)], None),  # a run diverged
        ([], None),
        ([(1.0, 1.1, 0.9), (1.0, -1.1, 0.9)], None),
        ([(1.0, 1.1, 0.9), (-1.0, -1.1, -0.9)], False),
        # Below zero at 95 % by itself, but not at 95 % for both together: five and ten times its standard error.
        ([(1.0, 1.1, 0.9), (-1.0, -1.35, -0.65)], None),
    ],
)
def test_when_a_claim_holds(comparisons, holds):
    assert verdicts._holds([Comparison("", "", values) for values in comparisons]) is holds


def point(size: str, seed: int, updates: int, perplexity: float, **other) -> Point:
    layers, hidden = SIZES[size]
    fields = {
        **{"run": f"{size}-seed{seed}", "size": size, "layers": layers, "hidden": hidden, "seed": seed},
        **{"parameters": layers * hidden**2, "layer_parameters": layers * hidden**2, "batch": 32, "rate": 1e-3},
        **{"share": "none", "data": 100.0, "target": None, "updates": updates, "perplexity": perplexity},
        **{"seconds": updates * 0.01, "flops": 1e6 * updates, "tokens": 512 * updates, "bleu": None},
    }
    return Point(**{**fields, **other})


def test_the_cost_of_a_perplexity_by_hand():
    curve = [point("1l_64h", 1, 100, 100.0), point("1l_64h", 1, 200, 25.0)]
    assert verdicts.cost(curve, 50.0, "updates") == pytest.approx(150)  # halfway in the logarithm
    assert verdicts.cost(curve, 50.0, "seconds") == pytest.approx(1.5)
    assert verdicts.cost(curve, 100.0, "updates") == 100
    with pytest.raises(ValueError, match="never"):
        verdicts.cost(curve, 20.0, "updates")
    assert verdicts.at(curve, 150, "updates") == pytest.approx(math.log(50))
    assert verdicts.at(curve, 1000, "updates") == pytest.approx(math.log(25))


def power(size: str, seed: int, speed: float, slowness: float = 1.0) -> list[Point]:
    """A curve that falls as a power of the updates, sooner by the factor `speed`, with a little of its own a seed."""
    return [
        point(
            size,
            seed,
            updates,
            500 * (1 + speed * updates / 100) ** -0.5 * (1 + 0.003 * seed),
            seconds=0.01 * slowness * updates,
            flops=1e6 * slowness * updates,
        )
        for updates in range(100, 2001, 100)
    ]


def judged(folder: Path) -> dict[str, bool | None]:
    return {verdict.claim: verdict.holds for verdict in verdicts.judge(folder)}


FEWER = "Larger models reach a perplexity in fewer updates."
TIME = "Larger models reach a perplexity in less time, up to a size."
FLOPS = "Larger models reach a perplexity with fewer FLOPs."


def write_series(folder: Path, speeds: dict[str, float], slowness: dict[str, float]) -> None:
    for series, sizes in (("depth", ("1l_64h", "2l_64h", "4l_64h")), ("width", ("2l_32h", "2l_64h", "2l_128h"))):
        rows = [p for size in sizes for seed in (1, 2, 3) for p in power(size, seed, speeds[size], slowness[size])]
        measurements.write(rows, folder / series)


def test_larger_is_sooner_where_it_is(tmp_path):
    speeds = {"2l_32h": 1, "1l_64h": 1, "2l_64h": 4, "4l_64h": 9, "2l_128h": 9}
    write_series(tmp_path, speeds, {size: math.sqrt(speed) for size, speed in speeds.items()})
    found = judged(tmp_path)
    assert (found[FEWER], found[TIME], found[FLOPS]) == (True, True, True)
    # As many updates, but each takes longer than it gains.
    write_series(tmp_path, speeds, {size: speed**2 for size, speed in speeds.items()})
    found = judged(tmp_path)
    assert (found[FEWER], found[TIME], found[FLOPS]) == (True, False, False)
    write_series(tmp_path, {size: 1 / speed for size, speed in speeds.items()}, dict.fromkeys(speeds, 1.0))
    assert judged(tmp_path)[FEWER] is False


def test_translation_leaves_no_size_out(tmp_path):
    """Of as many layer parameters, the deep and the wide one each stand beside the next smaller."""
    speeds = {"2l_64h": 1.0, "2l_128h": 4.0, "8l_64h": 0.5}
    rows = [p for size, speed in speeds.items() for seed in (1, 2, 3) for p in power(size, seed, speed)]
    measurements.write(rows, tmp_path / "translation")
    (verdict,) = [v for v in verdicts.judge(tmp_path) if v.claim == "Larger translation models need fewer updates."]
    assert {comparison.what: comparison.mean > 0 for comparison in verdict.comparisons} == {
        "updates of 2l_64h / updates of 2l_128h, to the same perplexity": True,
        "updates of 2l_64h / updates of 8l_64h, to the same perplexity": False,
    }
    assert verdict.holds is False


def test_two_seeds_tell_nothing(tmp_path):
    rows = [p for size, speed in (("1l_64h", 1), ("2l_64h", 4)) for seed in (1, 2) for p in power(size, seed, speed)]
    measurements.write(rows, tmp_path / "depth")
    (verdict,) = [verdict for verdict in verdicts.judge(tmp_path) if verdict.claim == FEWER]
    assert verdict.holds is None
    assert len(verdict.comparisons[0].values) == 2


def test_sizes_without_a_seed_in_common_are_not_compared(tmp_path):
    rows = [*power("1l_64h", 1, 1.0), *power("2l_64h", 2, 4.0), *power("4l_64h", 2, 9.0)]
    measurements.write(rows, tmp_path / "depth")
    (verdict,) = [verdict for verdict in verdicts.judge(tmp_path) if verdict.claim == FEWER]
    assert verdict.holds is None
    assert [comparison.what[:20] for comparison in verdict.comparisons] == ["updates of 2l_64h / "]


def test_what_was_not_run_is_not_told(tmp_path):
    assert set(judged(tmp_path).values()) == {None}


def test_memory_is_a_share_of_what_is_saved(tmp_path):
    rows = [
        Memory(size="12l_768h", share=share, batch=32, length=128, seed=seed, peak_bytes=peak + seed)
        for share, peak in (("none", 10**9), ("attention", 8 * 10**8), ("all", 6 * 10**8))
        for seed in (1, 2, 3)
    ]
    measurements.write(rows, tmp_path / "layer_sharing")
    assert [c.mean for c in verdicts.sharing_memory(tmp_path)] == pytest.approx([0.2, 0.4], abs=1e-6)
    assert judged(tmp_path)["Sharing layers saves memory."] is True


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [*power("2l_64h", 1, 1.0), replace(point("1l_64h", 2, 5, 3.5), target=60.0, bleu=1.25)]
    measurements.write(rows, tmp_path)
    assert sorted(map(repr, measurements.read(tmp_path, Point))) == sorted(map(repr, rows))


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "curves.csv").write_text("a,b\n1,2\n")
    with pytest.raises(measurements.UserError, match="curves.csv"):
        measurements.read(tmp_path, Point)


# ------------------------------------------------------------------------------------------------ parts of a study

FOUR_BITS = "Larger models lose less accuracy at 4 bits."
PRUNED = "Larger models can be pruned more."
DEEP = "Deep models can be pruned more than wide ones."
FRONTIER = "Large models, heavily compressed, beat small ones at the same memory."
BOTH = "Pruning and quantizing together are best."
CONVERGENCE = "Convergence does not change compressibility."
OF_ACCURACY = {FOUR_BITS, PRUNED, DEEP, FRONTIER, BOTH, CONVERGENCE}


@pytest.mark.parametrize(
    ("has", "lacking"),
    [
        (lambda row: True, set()),
        (lambda row: row.bits in (32, 8), {FOUR_BITS, CONVERGENCE}),
        (lambda row: row.bits in (8, 4), OF_ACCURACY),
        (lambda row: row.sparsity == 0, {PRUNED, DEEP, BOTH}),
        (lambda row: row.sparsity <= 0.45, {DEEP}),
    ],
    ids=["all", "no 4 bits", "not whole", "not pruned", "little pruned"],
)
def test_a_claim_whose_levels_were_not_measured_is_not_told(tmp_path, has, lacking):
    for name in ("compression", "convergence", "weight_error"):
        rows = study_results.rows(name)
        measurements.write([row for row in rows if not isinstance(row, (Accuracy, Error)) or has(row)], tmp_path / name)
    words = {verdict.claim: verdict.in_words for verdict in verdicts.judge(tmp_path)}
    assert {claim for claim in OF_ACCURACY if words[claim] == "not measured"} == lacking


def test_of_several_finetunings_the_best_is_judged(tmp_path):
    """A worse rate, whose rows come last in the file, changes no verdict."""
    study_results.write(tmp_path / "one", "compression")
    rows = measurements.read(tmp_path / "one" / "compression", Accuracy)
    worse = [replace(row, finetune_rate=9.0, accuracy=row.accuracy / 2 if row.bits == 32 else 0.01) for row in rows]
    errors = measurements.read(tmp_path / "one" / "compression", Error)
    measurements.write([*rows, *worse, *errors], tmp_path / "two" / "compression")
    assert len(measurements.read(tmp_path / "two" / "compression", Accuracy)) == 2 * len(rows)
    assert verdicts.judge(tmp_path / "one") == verdicts.judge(tmp_path / "two")


def test_a_size_not_yet_finetuned_from_the_end_is_left_out(tmp_path):
    rows = study_results.rows("convergence")
    sizes = [row.size for row in rows]
    last = sizes[-1]
    measurements.write([row for row in rows if (row.size, row.checkpoint) != (last, 1.0)], tmp_path / "convergence")
    told = [comparison.what for comparison in verdicts.convergence(tmp_path)]
    assert len(told) == 2 * (len(set(sizes)) - 1)
    assert not any(last in what for what in told)


def entry(seed: int, sparsity: float, bits: int, accuracy: float, size: int, hidden: int = 128) -> Accuracy:
    (model,) = {row for row in study_results.compressed(f"2l_{hidden}h", seed, pruned=False) if row.bits == 32}
    return replace(model, sparsity=sparsity, bits=bits, accuracy=accuracy, bytes=size)


def test_of_those_as_good_by_the_other_seeds_the_smaller_is_taken(tmp_path):
    """At seed 3 two entries of the larger model tie by the others, and the one of more bytes is better at seed 3."""
    rows = [entry(seed, 0.0, 32, 0.5, 1000, hidden=64) for seed in (1, 2, 3)]
    for seed, (few, many) in {1: (0.6, 0.7), 2: (0.7, 0.6), 3: (0.55, 0.75)}.items():
        rows += [entry(seed, 0.0, 32, 0.8, 4000), entry(seed, 0.9, 8, few, 800), entry(seed, 0.6, 8, many, 900)]
    measurements.write(rows, tmp_path / "compression")
    (comparison,) = verdicts.frontier(tmp_path)
    # By the others: at seed 1 (0.7 + 0.55) and (0.6 + 0.75), at seed 2 (0.6 + 0.55) and (0.7 + 0.75), at seed 3 a tie.
    assert comparison.values == pytest.approx((20, 10, 5))


def test_gains_in_time_are_paired_by_seed(tmp_path):
    """The first step was measured at seeds 1 and 2, the last at 2 and 3: seed 2 alone tells."""
    speed = {(8, 1): 1, (8, 2): 1, (32, 1): 9, (32, 2): 4, (32, 3): 4, (128, 2): 6, (128, 3): 30}
    rows = [
        replace(p, batch=batch) for (batch, seed), of_seed in speed.items() for p in power("2l_128h", seed, of_seed)
    ]
    measurements.write(rows, tmp_path / "batch_size")
    (comparison,) = verdicts.batch_time(tmp_path)
    first, last = (
        verdicts.sooner({2: power("2l_128h", 2, speed[a, 2])}, {2: power("2l_128h", 2, speed[b, 2])}, "seconds").values[
            0
        ]
        for a, b in ((8, 32), (32, 128))
    )
    assert comparison.values == pytest.approx((first - last,))


def test_gains_with_little_data_are_paired_by_size(tmp_path):
    """Of each amount of text another size is missing."""
    sizes = {100.0: ("2l_32h", "2l_64h"), 1.0: ("2l_32h", "2l_128h")}
    rows = [replace(p, data=data) for data, names in sizes.items() for name in names for p in power(name, 1, len(name))]
    measurements.write(rows, tmp_path / "dataset_size")
    assert list(verdicts.small_data(tmp_path)) == []
    rows += [replace(p, data=1.0) for p in power("2l_64h", 1, 4.0)]
    measurements.write(rows, tmp_path / "dataset_size")
    assert [comparison.what[:22] for comparison in verdicts.small_data(tmp_path)] == [
        "gain of 2l_64h over 2l",
        "perplexity of 2l_64h /",
    ]


def test_a_size_beside_which_nothing_fits_at_one_of_the_seeds_is_not_told(tmp_path):
    """At seed 3 the larger model's file is a little too large; the other seeds alone would be another claim."""
    rows = [entry(seed, 0.0, 32, 0.5, 1000, hidden=64) for seed in (1, 2, 3)]
    rows += [entry(seed, 0.0, 32, 0.8, 4000) for seed in (1, 2, 3)]
    rows += [entry(seed, 0.9, 8, 0.6, size) for seed, size in ((1, 1000), (2, 1000), (3, 1001))]
    measurements.write(rows, tmp_path / "compression")
    assert list(verdicts.frontier(tmp_path)) == []
    fitting = [replace(row, bytes=min(row.bytes, 1000)) if row.bits == 8 else row for row in rows]
    measurements.write(fitting, tmp_path / "compression")
    (comparison,) = verdicts.frontier(tmp_path)  # as many bytes are not too many
    assert comparison.values == pytest.approx((10, 10, 10))


def test_runs_to_other_targets_are_other_curves(tmp_path):
    rows = [row for row in study_results.rows("depth") if row.size == "2l_64h" and row.seed == 1]
    to_target = [replace(row, run=f"{row.run}-to", target=60.0) for row in rows]
    measurements.write([*rows, *to_target], tmp_path / "mine")
    assert [len(curve) for of_setting in verdicts.curves(tmp_path, "mine") for curve in of_setting.values()] == [
        len(rows),
        len(rows),
    ]


def test_one_size_is_not_compared_with_itself(tmp_path):
    rows = [row for row in study_results.rows("compression") if getattr(row, "size", "") == "2l_64h"]
    measurements.write(rows, tmp_path / "compression")
    assert list(verdicts.less_lost_at_four_bits(tmp_path)) == []
    errors = [row for row in study_results.rows("weight_error") if row.size == "2l_64h"]
    measurements.write(errors, tmp_path / "weight_error")
    assert list(verdicts.weight_error(tmp_path)) == []


def test_a_cell_that_is_no_truth_value_is_one_sentence(tmp_path):
    measurements.write([entry(1, 0.0, 32, 0.5, 1000)], tmp_path)
    path = tmp_path / "accuracies.csv"
    path.write_text(path.read_text().replace(",True\n", ",yes\n"))
    with pytest.raises(measurements.UserError, match="accuracies.csv, line 2"):
        measurements.read(tmp_path, Accuracy)
