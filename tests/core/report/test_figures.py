import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import matplotlib
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report.invented import T2T_FACTS, make_translation_model, write_run_log

from train_large.report import drawing as style
from train_large.report import figures
from train_large.report.pareto import frontier_of
from train_large.report.runs import read_runs


def texts(drawing):
    return ["".join(node.itertext()).strip() for node in ElementTree.fromstring(drawing.svg).iter("text")]


def test_every_figure_is_there(drawings):
    assert list(drawings) == [
        "perplexity-updates",
        "perplexity-time",
        "perplexity-flops",
        "trade-off",
        "quantization",
        "pruning",
        *(f"size-{i}" for i in range(4)),
    ]


def test_axes_have_units_and_curves_have_names(drawings):
    labels = {
        "perplexity-updates": "updates",
        "perplexity-time": "training time (minutes)",
        "perplexity-flops": "floating-point operations (TFLOP)",
    }
    for name, label in labels.items():
        assert {label, "validation perplexity"} <= set(texts(drawings[name]))
    for name in ("trade-off", "quantization", "size-2"):
        assert {"bytes to store", "accuracy (%)"} <= set(texts(drawings[name]))
    assert "parameters that are not zero" in texts(drawings["pruning"])
    for name in (*labels, "trade-off", "quantization", "pruning"):
        assert {"2l_32h", "2l_64h", "3l_128h", "4l_256h"} <= set(texts(drawings[name]))
    assert {"32 bits", "8 bits", "6 bits", "4 bits"} <= set(texts(drawings["size-0"]))


def line_through(drawing, colour):
    """The points, in SVG units, of the paths of this colour that are lines."""
    paths = re.findall(rf'<path d="([^"]+)"[^>]*stroke: var\(--{colour}\)', drawing.svg)
    return [[tuple(map(float, p)) for p in re.findall(r"[ML] (\S+) (\S+)", path)] for path in paths]


def test_the_curves_go_through_the_measurements(results, drawings):
    """On the time axis, linear by log: the same straight map must take every validation point to its place."""
    for place, model in enumerate(results.by_size):
        line = next(p for p in line_through(drawings["perplexity-time"], f"size-{place}") if len(p) == len(model.curve))
        xs = [point.train_seconds for point in model.curve]
        scale = (line[-1][0] - line[0][0]) / (xs[-1] - xs[0])
        for (x, _), seconds in zip(line, xs):
            assert x == pytest.approx(line[0][0] + scale * (seconds - xs[0]), abs=0.01)
        perplexities = [point.perplexity for point in model.curve]
        assert [y for _, y in line] == pytest.approx(_log_map(perplexities, line), abs=0.01)  # y points down in SVG


def _log_map(values, line):
    logs = [math.log(value) for value in values]
    scale = (line[-1][1] - line[0][1]) / (logs[-1] - logs[0])
    return [line[0][1] + scale * (log - logs[0]) for log in logs]


def test_the_frontier_is_drawn_in_steps(results, drawings):
    points = frontier_of(results)
    steps = [path for path in line_through(drawings["trade-off"], "ink") if len(path) > len(points)]
    assert len(steps) == 1
    for before, after in zip(steps[0], steps[0][1:]):
        assert after[0] == before[0] or after[1] == before[1]  # never a slope
        assert after[0] >= before[0]
        assert after[1] <= before[1]  # accuracy only rises; y points down


def test_every_measurement_is_a_point(results, drawings):
    markers = re.findall(r"<use [^>]*fill: var\(--(size-\d|paper)\)", drawings["trade-off"].svg)
    in_legend = len(results.models) + 1
    assert len(markers) == 4 * 7 * 4 + in_legend
    assert markers.count("paper") == 4 * 7 + 1  # 32 bits are hollow


def test_the_axes_of_bytes_say_whether_they_are_of_files(drawings, new_drawings):
    for name in ("trade-off", "quantization", "size-2"):
        assert "bytes of the file" in texts(new_drawings[name])
        assert "bytes of the file" not in texts(drawings[name])


def test_weight_errors_are_drawn_as_in_figure_9(new_results, drawings, new_drawings):
    names = ["weights-quantized", "weights-pruned", "weights-quantized-scaled", "weights-pruned-scaled"]
    assert [name for name in new_drawings if name not in drawings] == names
    for name in names:
        drawing = new_drawings[name]
        assert drawing.group == "weights"
        assert {"attention q, k, v", "fc2", "2l_32h", "4l_256h"} <= set(texts(drawing))
        assert ("biases" in texts(drawing)) == ("quantized" in name)  # what is not pruned has no error
        assert "all" not in texts(drawing)
        label = "mean |w − w′| ÷ deviation of w" if "scaled" in name else "mean |w − w′|"
        assert label in texts(drawing)


def points(drawing, place):
    """The markers of a size in the plot, by rows from the top; that of the legend, the lowest, left out."""
    found = re.findall(rf'<use [^>]*x="([\d.]+)" y="([\d.]+)" style="fill: var\(--size-{place}\)', drawing.svg)
    return sorted(((float(x), float(y)) for x, y in found), key=lambda point: point[1])[:-1]


@pytest.mark.parametrize("scaled", [False, True])
def test_a_point_of_each_size_for_each_kind_lies_at_its_error(new_results, new_drawings, scaled):
    drawing = new_drawings["weights-quantized" + ("-scaled" if scaled else "")]
    xs, logs = [], []
    for place, model in enumerate(new_results.by_size):
        errors = [error for kind, error in model.weight_errors_at(0.0, 4).items() if kind != "all"]
        drawn = points(drawing, place)
        assert len(drawn) == len(errors)
        xs += [x for x, _ in drawn]
        logs += [math.log(error.normalized if scaled else error.mean_absolute) for error in errors]
    scale = (max(xs) - min(xs)) / (max(logs) - min(logs))
    assert xs == pytest.approx([min(xs) + scale * (log - min(logs)) for log in logs], abs=0.01)


def test_the_same_results_give_the_same_bytes(results, drawings):
    with matplotlib.rc_context({"lines.linewidth": 9, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert figures.draw(results) == list(drawings.values())  # whatever the user's settings


def test_only_the_page_s_colours_and_nothing_from_elsewhere(drawings):
    for drawing in drawings.values():
        root = ElementTree.fromstring(drawing.svg)  # well formed without a namespace declared
        assert "width" not in root.attrib
        assert set(re.findall(r"#[0-9a-fA-F]{6}\b", drawing.svg)) == set()
        assert not re.search(r"http|<script|<image|<metadata|\d{4}-\d\d-\d\d", drawing.svg)
        # Text that says no colour of its own would be black on a dark page.
        for node in root.iter("text"):
            assert "fill: var(--" in node.get("style", ""), "".join(node.itertext())


def test_ids_are_unique_over_all_figures_and_all_references_hold(drawings):
    svg = "".join(drawing.svg for drawing in drawings.values())
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert len(ids) == len(set(ids))
    for drawing in drawings.values():
        own = set(re.findall(r'\bid="([^"]+)"', drawing.svg))
        assert set(re.findall(r'(?:url\(|href=")#([^")]+)', drawing.svg)) <= own


def luminance(colour):
    """WCAG 2's relative luminance."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("sizes", range(1, 9))
def test_sizes_differ_in_grey_and_from_the_paper(sizes):
    light, dark = ([luminance(colour) for colour in shades] for shades in zip(*style.palette(sizes)))
    assert all(a > b for a, b in zip(light, light[1:]))
    assert all(a < b for a, b in zip(dark, dark[1:]))
    assert all(1.05 / (shade + 0.05) >= 3 for shade in light)
    assert all((shade + 0.05) / (luminance("#14171b") + 0.05) >= 3 for shade in dark)


def test_neighbouring_sizes_differ_in_marker_and_line():
    styles = [style.style_of(place) for place in range(8)]
    assert len({style["marker"] for style in styles}) == 8
    assert all(a["linestyle"] != b["linestyle"] for a, b in zip(styles, styles[1:]))


@given(st.floats(1e-3, 1e12), st.floats(1.05, 1e9), st.integers(5, 7))
def test_ticks_are_few_and_within(low, ratio, most):
    ticks = style.round_ticks(low, low * ratio, most)
    assert len(ticks) <= most
    assert all(low <= tick <= low * ratio for tick in ticks)
    assert ticks == sorted(set(ticks))
    if ratio >= 20:
        assert len(ticks) >= 2


def test_labels_do_not_cover_each_other(results, drawings):
    """Read back from the SVG: the numbers of the frontier, as boxes of their font's size."""
    labels = []
    for node in ElementTree.fromstring(drawings["trade-off"].svg).iter("text"):
        style = node.get("style", "")
        if re.fullmatch(r"\d+", node.text or "") and "7.5px" in style:
            labels.append((float(node.get("x")), float(node.get("y")), 4.2 * len(node.text)))
    assert len(labels) >= len(frontier_of(results)) / 2
    for i, (x, y, width) in enumerate(labels):
        for other_x, other_y, other_width in labels[:i]:
            assert abs(x - other_x) >= (width + other_width) / 2 or abs(y - other_y) >= 7


def test_odd_results_are_drawn(results, new_results):
    """One model, one point of this or that, a name that would be mathematics or markup."""
    model = replace(results.models[0], name="$x_2$ <b> & é")
    one_point = replace(results, models=(replace(model, curve=model.curve[:1], compressed=model.compressed[:1]),))
    drawn = figures.draw(one_point)
    assert [drawing.group for drawing in drawn] == ["training"] * 3 + ["trade-off"] + ["methods"] * 2 + ["sizes"]
    assert all(ElementTree.fromstring(drawing.svg) is not None for drawing in drawn)
    assert "$x_2$ <b> & é" in texts(drawn[0])

    errors = new_results.models[0].weight_errors_at(0.6, 32)
    strange = replace(errors["fc1"], kind="$x_2$ <b>", deviation=0.0)  # no error in deviations: no figure of that
    drawn = figures.draw(replace(one_point, models=(replace(model, weight_errors=(strange,)),)))
    assert [drawing.name for drawing in drawn if drawing.group == "weights"] == ["weights-pruned"]
    assert "$x_2$ <b>" in texts(drawn[-1])
    for none in ((), (errors["all"],), (replace(errors["fc1"], mean_absolute=0.0, variance=0.0, mean=0.0),)):
        drawn = figures.draw(replace(results, models=(replace(model, curve=(), compressed=(), weight_errors=none),)))
        assert drawn == []

    halves = replace(results, models=(replace(model, compressed=()), replace(results.models[1], curve=())))
    hopeless = replace(halves, task=replace(results.task, majority=1.0))  # no frontier
    assert [drawing.group for drawing in figures.draw(hopeless)].count("sizes") == 1
    assert figures.draw(replace(results, models=(replace(model, curve=(), compressed=()),))) == []


def test_a_translation_study_has_bleu_and_perplexity(translation, translation_drawings):
    axes = ("updates", "time", "flops")
    assert list(translation_drawings) == [f"{what}-{axis}" for what in ("bleu", "perplexity") for axis in axes]
    assert {"updates", "validation BLEU", "2l_64h", "6l_256h"} <= set(texts(translation_drawings["bleu-updates"]))
    assert "training time (minutes)" in texts(translation_drawings["bleu-time"])
    assert "At the end: 2l_64h 9.10, 2l_128h 14.60" in translation_drawings["bleu-time"].words


def test_bleu_goes_through_the_validations_that_have_it(translation, translation_drawings):
    """Both axes of BLEU against time are linear: two straight maps take every point to its place."""
    for place, model in enumerate(translation.by_size):
        points = [(point.train_seconds, point.bleu) for point in model.curve if point.bleu is not None]
        lines = line_through(translation_drawings["bleu-time"], f"size-{place}")
        line = next(path for path in lines if len(path) == len(points))
        for axis in (0, 1):
            (first, last), (start, end) = (points[0][axis], points[-1][axis]), (line[0][axis], line[-1][axis])
            for point, drawn in zip(points, line, strict=True):
                expected = start + (end - start) * (point[axis] - first) / (last - first)
                assert drawn[axis] == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("clock", "each", "label", "seconds"),
    [
        ("calibrated", 0.5, "calibrated time (seconds)", lambda point: 0.5 * point["updates"]),
        ("wall", None, "wall-clock time (minutes)", lambda point: 7 + 2 * point["train_seconds"]),
        ("train", None, "training time (minutes)", lambda point: point["train_seconds"]),
        ("calibrated", None, "training time (minutes)", lambda point: point["train_seconds"]),
    ],
)
def test_time_is_drawn_by_the_clock_of_the_budget(tmp_path, clock, each, label, seconds):
    model = make_translation_model("2l_64h", 2, 64, 1, 900, 100, 300, 9.0, 5.0)
    # The first update takes a while, so that no clock is a multiple of another.
    model["curve"] = [{**point, "train_seconds": 40 + point["train_seconds"]} for point in model["curve"]]
    facts = {**T2T_FACTS, "budget_seconds": 150.0, "budget_clock": clock, "seconds_per_update": each}
    drawn = {each.name: each for each in figures.draw(read_runs([write_run_log(tmp_path, model, facts)]))}
    assert label in texts(drawn["perplexity-time"])
    xs = [seconds(point) for point in model["curve"]]
    line = next(path for path in line_through(drawn["perplexity-time"], "size-0") if len(path) == len(xs))
    # Where the axis begins at 0 the map is straight through the axis' own beginning, too.
    left = min(x for path in line_through(drawn["perplexity-time"], "ink") for x, _ in path)
    scale = (line[-1][0] - left) / xs[-1]
    for (x, _), place in zip(line, xs, strict=True):
        assert x == pytest.approx(left + scale * place, abs=0.01)


def test_the_approximation_is_drawn_where_nothing_was_translated(t2t_runs):
    run = read_runs(t2t_runs[:1]).models[0]
    runs = read_runs(t2t_runs[:1])
    curve = tuple(replace(point, bleu=None) for point in run.curve)
    drawn = figures.draw(replace(runs, models=(replace(run, curve=curve),)))
    assert [drawing.name for drawing in drawn][:3] == ["approx-bleu-updates", "approx-bleu-time", "approx-bleu-flops"]
    assert "validation approx_bleu" in texts(drawn[0])
    assert figures.draw(replace(runs, models=(replace(run, curve=()),))) == []


def test_a_model_that_never_translated_a_word_can_be_drawn(translation):
    model = translation.models[0]
    curve = tuple(replace(point, bleu=0.0) for point in model.curve)
    drawn = figures.draw(replace(translation, models=(replace(model, curve=curve),)))
    assert "At the end: 2l_64h 0.00." in drawn[0].words
