"""The figures, as SVG to set inline in a page, in the style of train_large/report/drawing.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Literal, Sequence

from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from train_large.report.claims import standard_error
from train_large.report.drawing import (
    MARKS,
    drawing_style,
    label_points,
    legend,
    log_axis,
    number_points,
    panel,
    style_of,
    svg_of,
)
from train_large.report.pareto import frontier_of, measurements
from train_large.report.results import Compressed, CurvePoint, Model, Results, Study
from train_large.report.tables import ErrorTable, error_tables
from train_large.report.units import (
    flops_unit,
    format_bleu,
    format_bytes,
    format_count,
    format_percent,
    format_perplexity,
    seconds_unit,
    without_zeros,
)


@dataclass(frozen=True)
class Drawing:
    """A figure for the page: its heading, the lines below it, what it shows in words for those who cannot see it, and
    the SVG element."""

    group: Literal["training", "trade-off", "methods", "sizes", "weights"]
    name: str
    title: str
    caption: str
    words: str
    svg: str


def draw(study: Study) -> list[Drawing]:
    """Every figure that the study has data for, in the order of the page."""
    drawings: list[Drawing] = []
    with drawing_style():
        for curve in (_BLEU, _APPROX_BLEU, _PERPLEXITY):
            if curve is _APPROX_BLEU and drawings:
                continue  # there is BLEU of real translations
            drawings += _training_curves(study, curve)
        if isinstance(study, Results):
            if measurements(study.models):
                drawings += [_trade_off(study), _quantization_only(study), _pruning_only(study)]
                drawings += [_one_size(study, model) for model in study.by_size if model.compressed]
            drawings += _weight_errors(study)
    return drawings


# ------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class _Curve:
    """What is drawn against updates, time and FLOPs; None where a validation did not measure it."""

    name: str
    title: str
    label: str
    height: Callable[[CurvePoint], float | None]
    form: Callable[[float], str]
    logarithmic: bool


_PERPLEXITY = _Curve(
    "perplexity", "Perplexity", "validation perplexity", lambda point: point.perplexity, format_perplexity, True
)
_BLEU = _Curve("bleu", "BLEU", "validation BLEU", lambda point: point.bleu, format_bleu, False)
_APPROX_BLEU = _Curve(
    "approx-bleu", "Approximate BLEU", "validation approx_bleu", lambda point: point.approx_bleu, format_bleu, False
)


def _training_curves(study: Study, curve: _Curve) -> list[Drawing]:
    points = [point for model in study.models for point in model.curve if curve.height(point) is not None]
    if not points:
        return []
    clock = study.clock
    time_unit, seconds = seconds_unit(max(point.seconds_on(clock) for point in points))
    flop_unit, flops = flops_unit(max(point.flops for point in points))
    clocks = {"train": "training time", "wall": "wall-clock time", "calibrated": "calibrated time"}
    axes: tuple[tuple[str, str, Callable[[CurvePoint], float], bool], ...] = (
        ("updates", "updates", lambda point: point.updates, True),
        ("time", f"{clocks[clock]} ({time_unit})", lambda point: point.seconds_on(clock) / seconds, False),
        ("FLOPs", f"floating-point operations ({flop_unit})", lambda point: point.flops / flops, True),
    )
    return [_training_curve(study, curve, *axis) for axis in axes]


def _training_curve(
    study: Study, curve: _Curve, what: str, label: str, place: Callable[[CurvePoint], float], logarithmic: bool
) -> Drawing:
    name = f"{curve.name}-{what.lower()}"
    figure, axis = panel()
    ends = []
    for i, model in enumerate(study.by_size):
        heights = [(point, curve.height(point)) for point in model.curve]
        measured = [(place(point), height) for point, height in heights if height is not None]
        ends += [f"{model.name} {curve.form(height)}" for _, height in measured[-1:]]
        points = [(x, height) for x, height in measured if x > 0 or not logarithmic]
        # About eight markers a curve tell it apart; one on every validation would hide it.
        every = max(1, len(points) // 8)
        # Where the axis begins at 0, what lies on it is drawn whole.
        axis.plot(*_columns(points), **style_of(i), markevery=every, label=model.name, clip_on=curve.logarithmic)
    if logarithmic:
        log_axis(axis.xaxis, lambda number: without_zeros(format_count(number)) if number >= 1 else f"{number:g}")
    else:
        axis.set_xlim(left=0)
    if curve.logarithmic:
        log_axis(axis.yaxis, lambda height: f"{height:,g}")
    else:
        axis.set_ylim(0, max(1, axis.get_ylim()[1]))
    axis.set_xlabel(label)
    axis.set_ylabel(curve.label)
    legend(figure, axis)
    scale = ", on a logarithmic axis," if curve.logarithmic else ""
    words = f"{curve.label[0].upper()}{curve.label[1:]}{scale} against {label}; a curve for each size. At the end: "
    words += f"{', '.join(ends)}."
    svg = svg_of(figure, name, len(study.models))
    return Drawing("training", name, f"{curve.title} against {what}", "", words, svg)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


# ------------------------------------------------------------------------------------------------ compression


def _trade_off(results: Results) -> Drawing:
    figure, axis = panel(4.6, 3.9)
    _accuracy_axes(axis, results, _bytes_label(results), most=7)
    for i, model in enumerate(results.by_size):
        style = style_of(i)
        for quantized in (False, True):
            entries = [e for e in model.compressed if (e.bits < 32) == quantized]
            axis.plot(
                [e.stored_bytes for e in entries],
                [e.accuracy for e in entries],
                linestyle="none",
                marker=style["marker"],
                color=style["color"],
                markerfacecolor=style["color"] if quantized else MARKS.paper,
                markersize=4.2,
                markeredgewidth=0.9,
                zorder=2,
            )
    points = _draw_frontier(axis, results)
    axis.margins(x=0.06, y=0.08)
    number_points(figure, axis, points)
    handles: list[Any] = []
    for i in range(len(results.models)):
        style = style_of(i)
        handles.append(Line2D([], [], color=style["color"], marker=style["marker"], linestyle="none", markersize=5))
    handles.append(Line2D([], [], color=MARKS.ink, linewidth=1.1))
    handles.append(
        Line2D([], [], color=MARKS.ink, marker="o", linestyle="none", markerfacecolor=MARKS.paper, markersize=4.5)
    )
    legend(figure, axis, handles, [*(model.name for model in results.by_size), "Pareto frontier", "32 bits"])
    count = len(measurements(results.models))
    caption = (
        f"Every size, sparsity and bit width ({count} points). Steps: the Pareto frontier, numbered as in the table "
        "where there is room. Hollow: 32 bits. Shaded: within one standard error of the best."
    )
    words = f"Accuracy against bytes to store, {count} points, with the Pareto frontier of {len(points)} points. "
    words += "The table of the frontier has its numbers."
    svg = svg_of(figure, "trade-off", len(results.models))
    return Drawing("trade-off", "trade-off", "Accuracy against bytes", caption, words, svg)


def _quantization_only(results: Results) -> Drawing:
    caption = "Not pruned; labels are bits a weight."
    return _one_way(
        results,
        "quantization",
        "Quantization only",
        caption,
        _bytes_label(results),
        format_bytes,
        lambda entry: entry.stored_bytes if entry.sparsity == 0 else None,
        lambda entry: f"{entry.bits}",
    )


def _pruning_only(results: Results) -> Drawing:
    caption = "At 32 bits; labels are per cent pruned."
    return _one_way(
        results,
        "pruning",
        "Pruning only",
        caption,
        "parameters that are not zero",
        format_count,
        lambda entry: entry.nonzero if entry.bits == 32 else None,
        lambda entry: f"{entry.sparsity:.0%}".rstrip("%"),
    )


def _one_way(
    results: Results,
    name: str,
    title: str,
    caption: str,
    label: str,
    units: Callable[[float], str],
    cost: Callable[[Compressed], int | None],
    mark: Callable[[Compressed], str],
) -> Drawing:
    """The paper's figure 6: one compression method, a curve for each size, each point labelled where there is room."""
    figure, axis = panel()
    _accuracy_axes(axis, results, label, units)
    marks = []
    for i, model in enumerate(results.by_size):
        entries = sorted(((cost(e), e) for e in model.compressed if cost(e)), key=lambda pair: pair[0] or 0)
        points = [(float(place or 0), entry.accuracy) for place, entry in entries]
        axis.plot(*_columns(points), **style_of(i), label=model.name)
        marks += [(x, y, mark(entry)) for (x, y), (_, entry) in zip(points, entries)]
    axis.margins(x=0.06, y=0.1)
    legend(figure, axis)
    label_points(figure, axis, marks)
    words = f"{title}: accuracy against {label}, a curve for each size. {caption} The tables below have the numbers."
    return Drawing("methods", name, title, caption, words, svg_of(figure, name, len(results.models)))


def _one_size(results: Results, model: Model) -> Drawing:
    """One size at every sparsity and bit width, before the frontier of all sizes."""
    place = results.by_size.index(model)
    name = f"size-{place}"
    figure, axis = panel()
    _accuracy_axes(axis, results, _bytes_label(results))
    _draw_frontier(axis, results, faint=True)
    colour = style_of(place)["color"]
    for i, bits in enumerate(sorted({entry.bits for entry in model.compressed}, reverse=True)):
        entries = sorted((e for e in model.compressed if e.bits == bits), key=lambda e: e.stored_bytes)
        style = {**style_of(i), "color": colour, "markersize": 4.5}
        axis.plot(
            [e.stored_bytes for e in entries], [e.accuracy for e in entries], **style, label=f"{bits} bits", zorder=3
        )
    costs = [entry.stored_bytes for entry in model.compressed]
    room = (max(costs) / min(costs)) ** 0.06 if max(costs) > min(costs) else 2
    axis.set_xlim(min(costs) / room, max(costs) * room)
    # All such panels have one axis of accuracy, so they compare at a glance.
    accuracies = [results.task.majority, *(entry.accuracy for _, entry in measurements(results.models))]
    bottom, top = min(accuracies), max(accuracies)
    axis.set_ylim(bottom - 0.06 * (top - bottom or 0.1), top + 0.06 * (top - bottom or 0.1))
    legend(figure, axis)
    best = max(model.compressed, key=lambda e: (e.accuracy, -e.stored_bytes))
    caption = "Along each line, more is pruned to the left. Grey steps: the Pareto frontier of all sizes."
    words = (
        f"Accuracy of {model.name} against bytes to store, a line for each bit width. Most accurate: "
        f"{format_percent(best.accuracy)}, {format_percent(best.sparsity, 0)} pruned at {best.bits} bits."
    )
    return Drawing("sizes", name, model.name, caption, words, svg_of(figure, name, len(results.models)))


def _accuracy_axes(
    axis: Any, results: Results, label: str, units: Callable[[float], str] = format_bytes, most: int = 5
) -> None:
    axis.set_xlabel(label)
    axis.set_ylabel("accuracy (%)")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.4g}"))
    axis.axhline(results.task.majority, color=MARKS.ink, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
    axis.annotate(
        "always guessing the commoner class",
        (1, results.task.majority),
        xycoords=("axes fraction", "data"),
        xytext=(-3, 2),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=7.5,
    )
    log_axis(axis.xaxis, lambda cost: without_zeros(units(cost)), most)


def _bytes_label(results: Results) -> str:
    return "bytes of the file" if results.has_files else "bytes to store"


def _draw_frontier(axis: Any, results: Results, faint: bool = False) -> list[tuple[float, float]]:
    points = [(float(entry.stored_bytes), entry.accuracy) for _, entry in frontier_of(results)]
    # To the right of each point nothing better fits until the next: steps, not slopes.
    if not points:
        return points
    right = max(entry.stored_bytes for _, entry in measurements(results.models))
    costs = [x for x, _ in points] + [right]
    values = [y for _, y in points] + [points[-1][1]]
    style = {"color": MARKS.soft, "linewidth": 0.9} if faint else {"color": MARKS.ink, "linewidth": 1.1}
    axis.plot(costs, values, drawstyle="steps-post", zorder=1.5, **style)
    if not faint:
        best = max(values)
        error = standard_error(best, results.task.valid)
        axis.axhspan(best - error, best, color=MARKS.grid, alpha=0.5, linewidth=0, zorder=0)
    return points


# ------------------------------------------------------------------------------------------------ weights


def _weight_errors(results: Results) -> list[Drawing]:
    """The paper's figure 9, quantization left and pruning right; below, in standard deviations of the weights."""
    drawings = []
    for scaled in (False, True):
        for errors in error_tables(results):
            kinds = [(kind, values[2 if scaled else 0]) for kind, values in errors.rows if kind != "all"]
            if any(any(values) for _, values in kinds):
                drawings.append(_weight_error(results, errors, kinds, scaled))
    return drawings


def _weight_error(
    results: Results, errors: ErrorTable, kinds: Sequence[tuple[str, tuple[float | None, ...]]], scaled: bool
) -> Drawing:
    """A row for each kind of module, a point for each size that has an error."""
    name = f"weights-{errors.name}{'-scaled' if scaled else ''}"
    label = "mean |w − w′| ÷ deviation of w" if scaled else "mean |w − w′|"
    figure, axis = panel(3.9, 1.35 + 0.24 * len(kinds))
    for i, model in enumerate(errors.models):
        place = results.by_size.index(model)
        points = [(values[i], row) for row, (_, values) in enumerate(kinds) if values[i]]
        # Sizes side by side within the row, so that none hides another.
        shift = 0.5 * ((i + 0.5) / len(errors.models) - 0.5)
        style = {**style_of(place), "linestyle": "none", "markersize": 4.5}
        axis.plot([x for x, _ in points], [y + shift for _, y in points], **style, label=model.name, clip_on=False)
    axis.set_yticks(range(len(kinds)), [kind for kind, _ in kinds])
    axis.set_ylim(len(kinds) - 0.45, -0.55)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    for row in range(1, len(kinds)):
        axis.axhline(row - 0.5, color=MARKS.grid, linewidth=0.7, zorder=0)
    log_axis(axis.xaxis, lambda error: f"{error:g}", most=5)
    axis.set_xlabel(label)
    legend(figure, axis)
    title = errors.how[0].upper() + errors.how[1:] + (", in standard deviations" if scaled else "")
    words = f"{label} by kind of module, on a logarithmic axis, a point for each size. The table below has the numbers."
    return Drawing("weights", name, title, "", words, svg_of(figure, name, len(results.models)))
