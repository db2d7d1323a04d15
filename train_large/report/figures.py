"""The figures, as SVG to set inline in a page.

Each figure is a panel small enough to be legible on a phone. Colours are CSS variables (`--ink`, `--grid`, `--size-0`
and so on) that the page gives a light and a dark value, text is text, and the same results give the same bytes. Sizes
differ in luminance, marker and line style, so the figures survive a grey printer."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from typing import Any, Callable, Literal, Sequence

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

from train_large.report.claims import standard_error
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

_MARKERS = "osD^vPX*"
_LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
# Smallest to largest model: darker and darker on white, lighter and lighter on black, and hues that differ as well.
_LIGHT = ("#c96a1b", "#bd3a5e", "#7d3aa6", "#26367f", "#0c1a3a")
_DARK = ("#b5652a", "#dd6f88", "#bb9bea", "#a3cdfb", "#f4f7ff")
# These stand for the page's CSS variables of the same names until the SVG is written out.
_INK, _SOFT, _GRID, _PAPER = "#010203", "#0a0b0c", "#040506", "#070809"


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


def palette(sizes: int) -> list[tuple[str, str]]:
    """(colour on white, colour on black) for each size, from the smallest to the largest."""

    def along(anchors: Sequence[str], share: float) -> str:
        left = min(int(share * (len(anchors) - 1)), len(anchors) - 2)
        part = share * (len(anchors) - 1) - left
        ends = [[int(anchors[left + end][i : i + 2], 16) for i in (1, 3, 5)] for end in (0, 1)]
        return "#" + "".join(f"{round(a + part * (b - a)):02x}" for a, b in zip(*ends))

    shares = [0.5] if sizes == 1 else [i / (sizes - 1) for i in range(sizes)]
    return [(along(_LIGHT, share), along(_DARK, share)) for share in shares]


def draw(study: Study) -> list[Drawing]:
    """Every figure that the study has data for, in the order of the page."""
    drawings: list[Drawing] = []
    # Our settings on matplotlib's defaults, whatever the user's own matplotlibrc says.
    with matplotlib.style.context(["default", _SETTINGS]):
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
    time_unit, seconds = seconds_unit(max(point.train_seconds for point in points))
    flop_unit, flops = flops_unit(max(point.flops for point in points))
    clocks = {"train": "training time", "wall": "wall-clock time", "calibrated": "calibrated time"}
    clock = clocks[study.budget.clock if study.budget else "train"]
    axes: tuple[tuple[str, str, Callable[[CurvePoint], float], bool], ...] = (
        ("updates", "updates", lambda point: point.updates, True),
        ("time", f"{clock} ({time_unit})", lambda point: point.train_seconds / seconds, False),
        ("FLOPs", f"floating-point operations ({flop_unit})", lambda point: point.flops / flops, True),
    )
    return [_training_curve(study, curve, *axis) for axis in axes]


def _training_curve(
    study: Study, curve: _Curve, what: str, label: str, place: Callable[[CurvePoint], float], logarithmic: bool
) -> Drawing:
    name = f"{curve.name}-{what.lower()}"
    figure, axis = _panel()
    ends = []
    for i, model in enumerate(study.by_size):
        heights = [(point, curve.height(point)) for point in model.curve]
        measured = [(place(point), height) for point, height in heights if height is not None]
        ends += [f"{model.name} {curve.form(height)}" for _, height in measured[-1:]]
        points = [(x, height) for x, height in measured if x > 0 or not logarithmic]
        # About eight markers a curve tell it apart; one on every validation would hide it.
        every = max(1, len(points) // 8)
        # Where the axis begins at 0, what lies on it is drawn whole.
        axis.plot(*_columns(points), **_style(i), markevery=every, label=model.name, clip_on=curve.logarithmic)
    if logarithmic:
        _log_axis(axis.xaxis, lambda number: without_zeros(format_count(number)) if number >= 1 else f"{number:g}")
    else:
        axis.set_xlim(left=0)
    if curve.logarithmic:
        _log_axis(axis.yaxis, lambda height: f"{height:,g}")
    else:
        axis.set_ylim(0, max(1, axis.get_ylim()[1]))
    axis.set_xlabel(label)
    axis.set_ylabel(curve.label)
    _legend(figure, axis)
    scale = ", on a logarithmic axis," if curve.logarithmic else ""
    words = f"{curve.label[0].upper()}{curve.label[1:]}{scale} against {label}; a curve for each size. At the end: "
    words += f"{', '.join(ends)}."
    svg = _svg(figure, name, len(study.models))
    return Drawing("training", name, f"{curve.title} against {what}", "", words, svg)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


# ------------------------------------------------------------------------------------------------ compression


def _trade_off(results: Results) -> Drawing:
    figure, axis = _panel(4.6, 3.9)
    _accuracy_axes(axis, results, _bytes_label(results), most=7)
    for i, model in enumerate(results.by_size):
        style = _style(i)
        for quantized in (False, True):
            entries = [e for e in model.compressed if (e.bits < 32) == quantized]
            axis.plot(
                [e.stored_bytes for e in entries],
                [e.accuracy for e in entries],
                linestyle="none",
                marker=style["marker"],
                color=style["color"],
                markerfacecolor=style["color"] if quantized else _PAPER,
                markersize=4.2,
                markeredgewidth=0.9,
                zorder=2,
            )
    points = _draw_frontier(axis, results)
    axis.margins(x=0.06, y=0.08)
    _number_points(figure, axis, points)
    handles: list[Any] = []
    for i in range(len(results.models)):
        style = _style(i)
        handles.append(Line2D([], [], color=style["color"], marker=style["marker"], linestyle="none", markersize=5))
    handles.append(Line2D([], [], color=_INK, linewidth=1.1))
    handles.append(Line2D([], [], color=_INK, marker="o", linestyle="none", markerfacecolor=_PAPER, markersize=4.5))
    _legend(figure, axis, handles, [*(model.name for model in results.by_size), "Pareto frontier", "32 bits"])
    count = len(measurements(results.models))
    caption = (
        f"Every size, sparsity and bit width ({count} points). Steps: the Pareto frontier, numbered as in the table "
        "where there is room. Hollow: 32 bits. Shaded: within one standard error of the best."
    )
    words = f"Accuracy against bytes to store, {count} points, with the Pareto frontier of {len(points)} points. "
    words += "The table of the frontier has its numbers."
    svg = _svg(figure, "trade-off", len(results.models))
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
    figure, axis = _panel()
    _accuracy_axes(axis, results, label, units)
    marks = []
    for i, model in enumerate(results.by_size):
        entries = sorted(((cost(e), e) for e in model.compressed if cost(e)), key=lambda pair: pair[0] or 0)
        points = [(float(place or 0), entry.accuracy) for place, entry in entries]
        axis.plot(*_columns(points), **_style(i), label=model.name)
        marks += [(x, y, mark(entry)) for (x, y), (_, entry) in zip(points, entries)]
    axis.margins(x=0.06, y=0.1)
    _legend(figure, axis)
    _label_points(figure, axis, marks)
    words = f"{title}: accuracy against {label}, a curve for each size. {caption} The tables below have the numbers."
    return Drawing("methods", name, title, caption, words, _svg(figure, name, len(results.models)))


def _one_size(results: Results, model: Model) -> Drawing:
    """One size at every sparsity and bit width, before the frontier of all sizes."""
    place = results.by_size.index(model)
    name = f"size-{place}"
    figure, axis = _panel()
    _accuracy_axes(axis, results, _bytes_label(results))
    _draw_frontier(axis, results, faint=True)
    colour = _style(place)["color"]
    for i, bits in enumerate(sorted({entry.bits for entry in model.compressed}, reverse=True)):
        entries = sorted((e for e in model.compressed if e.bits == bits), key=lambda e: e.stored_bytes)
        style = {**_style(i), "color": colour, "markersize": 4.5}
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
    _legend(figure, axis)
    best = max(model.compressed, key=lambda e: (e.accuracy, -e.stored_bytes))
    caption = "Along each line, more is pruned to the left. Grey steps: the Pareto frontier of all sizes."
    words = (
        f"Accuracy of {model.name} against bytes to store, a line for each bit width. Most accurate: "
        f"{format_percent(best.accuracy)}, {format_percent(best.sparsity, 0)} pruned at {best.bits} bits."
    )
    return Drawing("sizes", name, model.name, caption, words, _svg(figure, name, len(results.models)))


def _accuracy_axes(
    axis: Any, results: Results, label: str, units: Callable[[float], str] = format_bytes, most: int = 5
) -> None:
    axis.set_xlabel(label)
    axis.set_ylabel("accuracy (%)")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.4g}"))
    axis.axhline(results.task.majority, color=_INK, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
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
    _log_axis(axis.xaxis, lambda cost: without_zeros(units(cost)), most)


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
    style = {"color": _SOFT, "linewidth": 0.9} if faint else {"color": _INK, "linewidth": 1.1}
    axis.plot(costs, values, drawstyle="steps-post", zorder=1.5, **style)
    if not faint:
        best = max(values)
        error = standard_error(best, results.task.valid)
        axis.axhspan(best - error, best, color=_GRID, alpha=0.5, linewidth=0, zorder=0)
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
    figure, axis = _panel(3.9, 1.35 + 0.24 * len(kinds))
    for i, model in enumerate(errors.models):
        place = results.by_size.index(model)
        points = [(values[i], row) for row, (_, values) in enumerate(kinds) if values[i]]
        # Sizes side by side within the row, so that none hides another.
        shift = 0.5 * ((i + 0.5) / len(errors.models) - 0.5)
        style = {**_style(place), "linestyle": "none", "markersize": 4.5}
        axis.plot([x for x, _ in points], [y + shift for _, y in points], **style, label=model.name, clip_on=False)
    axis.set_yticks(range(len(kinds)), [kind for kind, _ in kinds])
    axis.set_ylim(len(kinds) - 0.45, -0.55)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    for row in range(1, len(kinds)):
        axis.axhline(row - 0.5, color=_GRID, linewidth=0.7, zorder=0)
    _log_axis(axis.xaxis, lambda error: f"{error:g}", most=5)
    axis.set_xlabel(label)
    _legend(figure, axis)
    title = errors.how[0].upper() + errors.how[1:] + (", in standard deviations" if scaled else "")
    words = f"{label} by kind of module, on a logarithmic axis, a point for each size. The table below has the numbers."
    return Drawing("weights", name, title, "", words, _svg(figure, name, len(results.models)))


# ------------------------------------------------------------------------------------------------ drawing


def _style(place: int) -> dict[str, Any]:
    return {
        "color": f"#a000{place:02x}",  # becomes var(--size-<place>)
        "marker": _MARKERS[place % len(_MARKERS)],
        "linestyle": _LINES[place % len(_LINES)],
        "linewidth": 1.5,
        "markersize": 5,
        "markeredgewidth": 0.9,
    }


_SETTINGS = {
    "svg.hashsalt": "train-large",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.parse_math": False,  # names may hold dollar signs
    "axes.labelsize": 9.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.xmargin": 0.04,
}


def _panel(width: float = 3.9, height: float = 3.1) -> tuple[Figure, Any]:
    """A figure of one plot; inches, but the page scales it."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _log_axis(axis: Any, form: Callable[[float], str], most: int = 6) -> None:
    """A logarithmic axis whose ticks are round numbers in plain words, placed when it is drawn."""

    class Round(FixedLocator):
        def __init__(self) -> None:
            super().__init__([])

        def __call__(self) -> Any:
            low, high = sorted(axis.get_view_interval())
            return round_ticks(low, high, most)

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(Round())
    axis.set_minor_locator(LogLocator(subs=range(2, 10), numticks=99))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda number, _: form(number)))


def round_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from low to high for a logarithmic axis: as many as can be, but no more than `most`."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for every, digits in (
        (1, (1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2, 2.2, 2.4, 2.6, 2.8, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9)),
        (1, (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8)),
        (1, (1, 1.5, 2, 3, 4, 6, 8)),
        (1, (1, 2, 3, 5)),
        (1, (1, 2, 5)),
        (1, (1, 3)),
        *((every, (1,)) for every in (1, 2, 3, 4, 6)),
    ):
        ticks = [float(f"{d}e{p}") for p in range(first, last + 1) if p % every == 0 for d in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= most:
            break
    return ticks


def _legend(figure: Figure, axis: Any, handles: Sequence[Any] | None = None, labels: Sequence[str] = ()) -> None:
    """Below the panel, where it hides no point."""
    found, names = axis.get_legend_handles_labels()
    handles, labels = (found, names) if handles is None else (handles, labels)
    longest = max((len(label) for label in labels), default=1)
    most = max(1, min(len(labels), 4, int(figure.get_figwidth() * 13.5) // (longest + 5)))
    columns = math.ceil(len(labels) / math.ceil(len(labels) / most))
    # matplotlib fills column by column; people read row by row.
    rows = [i for column in range(columns) for i in range(column, len(labels), columns)]
    handles, labels = [handles[i] for i in rows], [labels[i] for i in rows]
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        handlelength=2.6,
        columnspacing=1.2,
    )


def _number_points(figure: Figure, axis: Any, points: Sequence[tuple[float, float]]) -> None:
    _label_points(figure, axis, [(x, y, str(number)) for number, (x, y) in enumerate(points, start=1)], above=True)


def _label_points(figure: Figure, axis: Any, marks: Sequence[tuple[float, float, str]], above: bool = False) -> None:
    """Labels the points, each where it covers no other label and no point; a label without room is left out."""
    figure.draw_without_rendering()
    frame = axis.get_window_extent()
    taken = [_box(axis.transData.transform((x, y)), 5, 5) for x, y, _ in marks]
    scale = figure.dpi / 72
    for i, (x, y, text) in enumerate(marks):
        for dx, dy in ((0, 8), (-9, 5), (0, -8), (9, -5)) if not above else ((-4, 8), (0, 9), (-9, 4), (4, 9), (0, 14)):
            centre = axis.transData.transform((x, y)) + (dx * scale, dy * scale)
            box = _box(centre, 5.6 * len(text) * scale, 8.5 * scale)
            inside = frame.x0 <= box[0] and box[2] <= frame.x1 and frame.y0 <= box[1] and box[3] <= frame.y1
            if inside and not any(_meet(box, other) for j, other in enumerate(taken) if j != i):
                axis.annotate(
                    text,
                    (x, y),
                    xytext=(dx, dy),
                    textcoords="offset points",
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    zorder=5,
                )
                taken.append(box)
                break


def _box(centre: Sequence[float], width: float, height: float) -> tuple[float, float, float, float]:
    x, y = centre
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _svg(figure: Figure, name: str, sizes: int) -> str:
    """The figure as an <svg> element that fits into a page: no fixed size, no date, ids of its own, CSS colours."""
    file = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r'<svg [^>]*viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = svg.replace('xlink:href="#', f'href="#{name}-')
    for colour, variable in ((_INK, "ink"), (_SOFT, "soft"), (_GRID, "grid"), (_PAPER, "paper")):
        svg = svg.replace(colour, f"var(--{variable})")
    for place in range(sizes):
        svg = svg.replace(f"#a000{place:02x}", f"var(--size-{place})")
    return svg
