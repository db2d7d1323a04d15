"""The paper's figures, from the CSV files of a study, in the style of train_large/report/drawing.py.

Curves are means over the seeds, with a band from the least to the most. An experiment that is partly measured is drawn
as far as it goes; of an experiment that is not the paper's everything that its files hold is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import measurements
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from measurements import Accuracy, Error, Memory, Point
from study_series import (
    SHARED,
    Level,
    Line,
    Spread,
    by_setting,
    chosen,
    frontier,
    kinds_in_order,
    levels,
    lines,
    names_of,
    series_of,
)

from train_large.report.drawing import (
    MARKS,
    Colours,
    drawing_style,
    label_points,
    legend,
    light,
    log_axis,
    number_points,
    panel,
    style_of,
    svg_of,
)
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

ORDER = (
    *("depth", "width", "flops", "batch_size", "dataset_size", "layer_sharing", "finetuning"),
    *("compression", "sst2_grid", "convergence", "weight_error", "translation"),
)
"""The experiments in the order of a report; others come after them."""
PAPER_SHARING_SAVES = 0.41
"""Of the memory of training, by sharing all layers, at a batch of 32 (Appendix C)."""
DOTS_PER_INCH = 200

Paint = Callable[[Colours], Figure]


@dataclass(frozen=True)
class Drawing:
    """A figure: its heading, the lines below it, what it shows in words for those who cannot see it, and the <svg>
    element, whose colours are CSS variables: --ink, --soft, --grid, --paper and --size-0 to --size-(sizes - 1).

    `name` is unlike that of any other figure of the study."""

    experiment: str
    name: str
    title: str
    caption: str
    words: str
    svg: str
    sizes: int
    paint: Paint = field(repr=False, compare=False)

    def save(self, png: Path, svg: Path) -> None:
        """The figure on white paper as two files."""
        colours = light(self.sizes)
        with drawing_style(colours):
            figure = self.paint(colours)
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(svg, format="svg", facecolor=colours.paper, metadata=nothing)
            figure.savefig(png, format="png", dpi=DOTS_PER_INCH, facecolor=colours.paper, metadata={"Software": None})


def draw(results: Path) -> list[Drawing]:
    """Every figure that there are measurements for. Raises UserError for a CSV file that is none of ours."""
    return [drawing for experiment in experiments(results) for drawing in draw_experiment(results, experiment)]


def experiments(results: Path) -> list[str]:
    """The experiments with measurements, in the order of a report."""
    found = measurements.experiments(results)
    return sorted(found, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def draw_experiment(results: Path, experiment: str) -> list[Drawing]:
    """The figures of one experiment. Raises as `draw` does."""
    folder = results / experiment
    points = measurements.read(folder, Point)
    accuracies = measurements.read(folder, Accuracy)
    errors = measurements.read(folder, Error)
    memory = measurements.read(folder, Memory)
    match experiment:
        case "depth" | "width" | "batch_size":
            return _perplexity(experiment, points, "updates", "seconds")
        case "flops":
            return _flops(points)
        case "dataset_size":
            return _dataset_sizes(points)
        case "layer_sharing":
            return _perplexity(experiment, points, "updates", "seconds") + _memory(experiment, memory)
        case "finetuning":
            return _perplexity(experiment, points, "seconds")
        case "compression" | "sst2_grid":
            return _compression(experiment, accuracies)
        case "convergence":
            return _convergence(experiment, accuracies)
        case "weight_error":
            return _weight_errors(experiment, errors)
        case "translation":
            return _bleu(experiment, points)
    return [
        *(_bleu(experiment, points) or _perplexity(experiment, points, "updates", "seconds", "flops")),
        *_memory(experiment, memory),
        *_compression(experiment, accuracies),
        *(_convergence(experiment, accuracies) if len({row.checkpoint for row in accuracies}) > 1 else []),
        *_weight_errors(experiment, errors),
    ]


def _drawing(experiment: str, name: str, title: str, caption: str, words: str, sizes: int, paint: Paint) -> Drawing:
    name = f"{experiment}-{name}"
    with drawing_style():
        svg = svg_of(paint(MARKS), name, sizes)
    return Drawing(experiment, name, title, caption, words, svg, sizes, paint)


# ------------------------------------------------------------------------------------------------ curves


@dataclass(frozen=True)
class _Across:
    """What is drawn from left to right: its label, its place for a validation, and whether it is logarithmic."""

    what: str
    label: str
    place: Callable[[Point], float]
    logarithmic: bool


def _across(points: Sequence[Point], what: str) -> _Across:
    if what == "updates":
        return _Across("updates", "updates", lambda point: point.updates, True)
    if what == "seconds":
        unit, length = seconds_unit(max(point.seconds for point in points))
        return _Across("time", f"training time ({unit})", lambda point: point.seconds / length, False)
    unit, size = flops_unit(max(point.flops for point in points))
    return _Across("FLOPs", f"floating-point operations ({unit})", lambda point: point.flops / size, True)


def _perplexity(experiment: str, points: Sequence[Point], *against: str) -> list[Drawing]:
    drawings = []
    for what in against if points else ():
        across = _across(points, what)
        name = f"perplexity-{across.what.lower()}"
        drawings += _curves(experiment, name, f"Perplexity against {across.what}", points, across)
    return drawings


def _flops(points: Sequence[Point]) -> list[Drawing]:
    drawings = []
    for name, rows in series_of(points):
        title = f"Perplexity against FLOPs, by {name}"
        drawings += _curves("flops", name.replace(" ", "-"), title, rows, _across(rows, "flops"))
    return drawings


def _dataset_sizes(points: Sequence[Point]) -> list[Drawing]:
    drawings = []
    for percent in sorted({point.data for point in points}, reverse=True):
        rows = [point for point in points if point.data == percent]
        title = "All of the text" if percent == 100 else f"{percent:g} % of the text"
        drawings += _curves(
            "dataset_size", f"time-{percent:g}".replace(".", "_"), title, rows, _across(rows, "seconds")
        )
    return drawings


def _bleu(experiment: str, points: Sequence[Point]) -> list[Drawing]:
    rows = [point for point in points if point.bleu is not None]
    drawings = []
    for what in ("updates", "seconds") if rows else ():
        across = _across(rows, what)
        name = f"bleu-{across.what.lower()}"
        drawings += _curves(experiment, name, f"BLEU against {across.what}", rows, across, bleu=True)
    return drawings


def _curves(
    experiment: str, name: str, title: str, points: Sequence[Point], across: _Across, bleu: bool = False
) -> list[Drawing]:
    """Perplexity on a logarithmic axis that begins where the curves part, or BLEU on one from zero."""
    curves = lines(points, across.place, lambda point: point.bleu if bleu else point.perplexity)
    if not curves:
        return []
    names = names_of(line.setting for line in curves)
    targets = {line.setting.target for line in curves if line.setting.target is not None}

    def paint(colours: Colours) -> Figure:
        figure, axis = panel()
        for i, line in enumerate(curves):
            xs, heights = _from_above_zero(line) if across.logarithmic else (line.xs, line.heights)
            style = style_of(i, colours)
            means = [height.mean for height in heights]
            axis.plot(xs, means, **style, markevery=max(1, len(xs) // 8), label=names[line.setting], zorder=3)
            if max((height.seeds for height in heights), default=1) > 1:
                low, high = [height.low for height in heights], [height.high for height in heights]
                axis.fill_between(xs, low, high, color=style["color"], alpha=0.18, linewidth=0, zorder=2)
        axis.set_xlabel(across.label)
        if bleu:
            axis.set_ylabel("validation BLEU")
            axis.set_ylim(0, max(1.0, axis.get_ylim()[1]))
        else:
            axis.set_ylabel("validation perplexity")
            bottom, top = _height(curves)
            axis.set_ylim(bottom, top)
            log_axis(axis.yaxis, lambda height: f"{height:,g}")
            for target in targets:
                axis.axhline(target, color=colours.ink, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
        if across.logarithmic:
            log_axis(axis.xaxis, lambda place: without_zeros(format_count(place)) if place >= 1 else f"{place:g}", 5)
            axis.set_xlim(*_width(curves, math.inf if bleu else top))
        else:
            axis.set_xlim(left=0)
        legend(figure, axis)
        return figure

    form = format_bleu if bleu else format_perplexity
    told = ", ".join(f"{names[line.setting]} {form(line.heights[-1].mean)}" for line in curves)
    words = f"{'BLEU' if bleu else 'Validation perplexity, on a logarithmic axis,'} against {across.label}. "
    words += f"At the end: {told}."
    caption = _seeds(height.seeds for line in curves for height in line.heights[-1:])
    caption += " Dotted: where training was stopped." if targets and not bleu else ""
    return [_drawing(experiment, name, title, caption, words, len(curves), paint)]


def _from_above_zero(line: Line) -> tuple[list[float], list[Spread]]:
    pairs = [(x, height) for x, height in zip(line.xs, line.heights, strict=True) if x > 0]
    return [x for x, _ in pairs], [height for _, height in pairs]


def _height(curves: Sequence[Line]) -> tuple[float, float]:
    """From the lowest perplexity to as far above the worst at the end as that is above the best: the steep descent that
    all have in common stays above the panel."""
    best = min(height.low for line in curves for height in line.heights)
    worst = max(line.heights[-1].high for line in curves)
    highest = max(height.high for line in curves for height in line.heights)
    top = min(highest, worst * max(worst / best, 1.5))
    room = (top / best) ** 0.04 if top > best else 1.05
    return best / room, top * room


def _width(curves: Sequence[Line], top: float) -> tuple[float, float]:
    """From the last place where a curve is still above the panel, or its first, to the end."""
    starts = []
    for line in curves:
        pairs = [(x, height.mean) for x, height in zip(line.xs, line.heights, strict=True) if x > 0]
        above = [x for x, mean in pairs if mean > top]
        inside = [x for x, mean in pairs if mean <= top]
        if inside:
            starts.append(max([x for x in above if x < inside[0]], default=inside[0]))
    last = max(line.xs[-1] for line in curves)
    first = min(starts, default=last)
    room = (last / first) ** 0.04 if last > first > 0 else 1.5
    return first / room, last * room


def _seeds(counts: Any) -> str:
    """How many seeds a drawing shows, in words."""
    least, most = min(counts := list(counts)), max(counts)
    if most == 1:
        return "One seed."
    number = f"{most}" if least == most else f"{least} to {most}"
    return f"Mean of {number} seeds; the band goes from the least to the most."


# ------------------------------------------------------------------------------------------------ memory


def _memory(experiment: str, rows: Sequence[Memory]) -> list[Drawing]:
    """Figure 11's other half: the memory of a training process, and what the paper says that sharing saves."""
    shares = [share for share in SHARED if any(row.share == share for row in rows)]
    if not shares:
        return []
    peaks = {share: Spread.of([row.peak_bytes for row in rows if row.share == share]) for share in shares}
    whole = peaks["none"].mean if "none" in peaks else None

    def paint(colours: Colours) -> Figure:
        figure, axis = panel()
        for i, share in enumerate(shares):
            peak = peaks[share]
            colour = colours.sizes[len(shares) - 1 - i]  # that of its curve: there the fewest parameters come first
            axis.bar(i, peak.mean, width=0.6, color=colour, zorder=2)
            if peak.high > peak.low:
                axis.vlines(i, peak.low, peak.high, color=colours.ink, linewidth=1.2, zorder=3)
            told = format_bytes(peak.mean)
            if whole and share != "none":
                told += f"\n{_less(peak.mean, whole)}"
            axis.annotate(
                told,
                (i, peak.high),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=8.5,
            )
        if whole:
            left = whole * (1 - PAPER_SHARING_SAVES)
            axis.axhline(left, color=colours.ink, linewidth=1, linestyle=(0, (1, 2)), zorder=4)
            handle = Line2D([], [], color=colours.ink, linewidth=1, linestyle=(0, (1, 2)))
            legend(
                figure, axis, [handle], [f"{PAPER_SHARING_SAVES:.0%} less: the paper, all layers".replace("%", " %")]
            )
        axis.set_xticks(range(len(shares)), [SHARED[share].replace(" shared", "\nshared") for share in shares])
        axis.tick_params(axis="x", length=0)
        axis.grid(axis="x", visible=False)
        axis.set_xlim(-0.6, len(shares) - 0.4)
        axis.set_ylim(0, 1.22 * max(peak.high for peak in peaks.values()))
        axis.set_ylabel("memory of training (bytes)")
        axis.yaxis.set_major_locator(MaxNLocator(5))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda size, _: without_zeros(format_bytes(size))))
        return figure

    told = ", ".join(f"{SHARED[share]} {format_bytes(peaks[share].mean)}" for share in shares)
    sizes = ", ".join(sorted({f"{row.size}, batch {row.batch}, {row.length} tokens" for row in rows}))
    caption = f"{sizes}. The most memory that training takes above what it has loaded before."
    words = f"The most memory that training takes: {told}. The paper prints {PAPER_SHARING_SAVES:.0%} less with all "
    words += "layers shared."
    return [_drawing(experiment, "memory", "Memory", caption, words, len(shares), paint)]


def _less(part: float, whole: float) -> str:
    change = 1 - part / whole
    return f"{abs(change):.0%} {'less' if change >= 0 else 'more'}".replace("%", " %")


# ------------------------------------------------------------------------------------------------ compression


def _compression(experiment: str, rows: Sequence[Accuracy]) -> list[Drawing]:
    """Figures 6 and 7, or 12: quantization, pruning, and both."""
    measured = levels(chosen(rows))
    quantized = [level for level in measured if level.sparsity == 0]
    pruned = [level for level in measured if level.bits == 32]
    drawings = []
    if quantized:
        drawings.append(
            _one_way(
                experiment,
                "quantization",
                "Quantization",
                "Not pruned; labels are bits a weight.",
                quantized,
                ("bytes to store", format_bytes),
                lambda level: level.bytes,
                lambda level: f"{level.bits}",
            )
        )
    if any(level.sparsity > 0 for level in pruned):
        drawings.append(
            _one_way(
                experiment,
                "pruning",
                "Pruning",
                "At 32 bits; labels are per cent pruned.",
                pruned,
                ("parameters that are not zero", format_count),
                lambda level: level.nonzero,
                lambda level: f"{100 * level.sparsity:.0f}",
            )
        )
    if any(level.sparsity > 0 and level.bits < 32 for level in measured):
        drawings.append(_both(experiment, measured))
    return drawings


def _one_way(
    experiment: str,
    name: str,
    title: str,
    caption: str,
    measured: Sequence[Level],
    units: tuple[str, Callable[[float], str]],
    cost: Callable[[Level], float],
    mark: Callable[[Level], str],
) -> Drawing:
    names = names_of(level.setting for level in measured)
    settings = list(by_order(measured))
    label, form = units

    def paint(colours: Colours) -> Figure:
        figure, axis = panel()
        marks = []
        for i, setting in enumerate(settings):
            style = style_of(i, colours)
            here = sorted((level for level in measured if level.setting == setting), key=cost)
            xs = [cost(level) for level in here]
            axis.plot(xs, [level.accuracy.mean for level in here], **style, label=names[setting], zorder=3)
            low, high = [level.accuracy.low for level in here], [level.accuracy.high for level in here]
            axis.vlines(xs, low, high, color=style["color"], alpha=0.45, linewidth=1.1, zorder=2)
            marks += [(x, level.accuracy.mean, mark(level)) for x, level in zip(xs, here, strict=True)]
        _accuracy_axis(axis)
        axis.set_xlabel(label)
        log_axis(axis.xaxis, lambda place: without_zeros(form(place)), 5)
        axis.margins(x=0.06, y=0.1)
        legend(figure, axis)
        label_points(figure, axis, marks)
        return figure

    words = f"{title}: accuracy against {label}, a curve for each size. {caption} The tables have the numbers."
    seeds = [level.accuracy.seeds for level in measured]
    told = f" {_mean_of(seeds)}" + (" Upright lines: least to most." if max(seeds) > 1 else "")
    return _drawing(experiment, name, title, caption + told, words, len(settings), paint)


def by_order(measured: Sequence[Level]) -> dict[Any, list[Level]]:
    """The levels of each setting, as they come."""
    found: dict[Any, list[Level]] = {}
    for level in measured:
        found.setdefault(level.setting, []).append(level)
    return found


def _mean_of(seeds: Sequence[int]) -> str:
    least, most = min(seeds), max(seeds)
    return "One seed." if most == 1 else f"Mean of {most if least == most else f'{least} to {most}'} seeds."


def _both(experiment: str, measured: Sequence[Level]) -> Drawing:
    """Figure 7: every size, sparsity and bit width, and the Pareto frontier."""
    names = names_of(level.setting for level in measured)
    settings = by_order(measured)
    best = frontier(measured)

    def paint(colours: Colours) -> Figure:
        figure, axis = panel(4.6, 3.9)
        for i, here in enumerate(settings.values()):
            style = style_of(i, colours)
            for quantized in (False, True):
                shown = [level for level in here if (level.bits < 32) == quantized]
                axis.plot(
                    [level.bytes for level in shown],
                    [level.accuracy.mean for level in shown],
                    linestyle="none",
                    marker=style["marker"],
                    color=style["color"],
                    markerfacecolor=style["color"] if quantized else colours.paper,
                    markersize=4.2,
                    markeredgewidth=0.9,
                    zorder=2,
                )
        costs = [level.bytes for level in best] + [max(level.bytes for level in measured)]
        heights = [level.accuracy.mean for level in best] + [best[-1].accuracy.mean]
        axis.plot(costs, heights, drawstyle="steps-post", color=colours.ink, linewidth=1.1, zorder=1.5)
        _accuracy_axis(axis)
        axis.set_xlabel("bytes to store")
        log_axis(axis.xaxis, lambda place: without_zeros(format_bytes(place)), 7)
        axis.margins(x=0.06, y=0.08)
        number_points(figure, axis, [(level.bytes, level.accuracy.mean) for level in best])
        handles: list[Any] = []
        for i in range(len(settings)):
            style = style_of(i, colours)
            handles.append(Line2D([], [], color=style["color"], marker=style["marker"], linestyle="none", markersize=5))
        handles.append(Line2D([], [], color=colours.ink, linewidth=1.1))
        hollow = {"marker": "o", "linestyle": "none", "markerfacecolor": colours.paper, "markersize": 4.5}
        handles.append(Line2D([], [], color=colours.ink, **hollow))
        legend(figure, axis, handles, [*(names[setting] for setting in settings), "Pareto frontier", "32 bits"])
        return figure

    caption = (
        f"Every size, sparsity and bit width, {len(measured)} points. {_mean_of([x.accuracy.seeds for x in measured])} "
        "Steps: the Pareto frontier, numbered as in the table where there is room. Hollow: 32 bits."
    )
    words = f"Accuracy against bytes to store, {len(measured)} points, with the Pareto frontier of {len(best)} points. "
    words += "The table of the frontier has its numbers."
    return _drawing(experiment, "both", "Quantization and pruning", caption, words, len(settings), paint)


def _accuracy_axis(axis: Any) -> None:
    axis.set_ylabel("accuracy (%)")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.4g}"))


def _convergence(experiment: str, rows: Sequence[Accuracy]) -> list[Drawing]:
    """Figure 8: finetuned from several checkpoints of the pretraining, at 32 bits and at the fewest."""
    whole = [row for row in rows if row.sparsity == 0]
    if not whole:
        return []
    bits = sorted({32, min(row.bits for row in whole)}, reverse=True)
    shown = [row for row in whole if row.bits in bits]
    against: tuple[tuple[str, str, Callable[[Accuracy], float]], ...] = (
        ("pretraining", "share of the pretraining (%)", lambda row: 100 * row.checkpoint),
        ("perplexity", "perplexity of the checkpoint", lambda row: row.perplexity),
    )
    return [_checkpoints(experiment, shown, bits, *each) for each in against]


def _checkpoints(
    experiment: str,
    rows: Sequence[Accuracy],
    bits: Sequence[int],
    what: str,
    label: str,
    place: Callable[[Accuracy], float],
) -> Drawing:
    settings = by_setting(rows)
    names = names_of(settings)
    curves = []
    for i, (setting, of_setting) in enumerate(settings.items()):
        for width in bits:
            points = []
            for checkpoint in sorted({row.checkpoint for row in of_setting}):
                here = [row for row in of_setting if row.checkpoint == checkpoint and row.bits == width]
                if here:
                    x = Spread.of([place(row) for row in here]).mean
                    points.append((x, Spread.of([row.accuracy for row in here])))
            curves.append((i, setting, width, points))

    def paint(colours: Colours) -> Figure:
        figure, axis = panel()
        for i, _, width, points in curves:
            style = style_of(i, colours) | {"linestyle": "-" if width == 32 else (0, (3, 1.5))}
            style["markerfacecolor"] = style["color"] if width == 32 else colours.paper
            xs = [x for x, _ in points]
            axis.plot(xs, [spread.mean for _, spread in points], **style, zorder=3)
            low, high = [spread.low for _, spread in points], [spread.high for _, spread in points]
            axis.vlines(xs, low, high, color=style["color"], alpha=0.45, linewidth=1.1, zorder=2)
        _accuracy_axis(axis)
        axis.set_xlabel(label)
        axis.margins(x=0.06, y=0.1)
        if what == "perplexity":
            log_axis(axis.xaxis, lambda x: f"{x:,g}", 5)
            axis.xaxis.set_inverted(True)
        else:
            axis.set_xlim(0, 104)
        handles = [Line2D([], [], **{**style_of(i, colours), "linestyle": "none"}) for i, _ in enumerate(settings)] + [
            Line2D([], [], color=colours.ink, linewidth=1.5, linestyle="-" if width == 32 else (0, (3, 1.5)))
            for width in bits
        ]
        legend(figure, axis, handles, [*names.values(), *(f"{width} bits" for width in bits)])
        return figure

    told = ", ".join(
        f"{names[setting]} {format_percent(points[-1][1].mean)} at {width} bits"
        for _, setting, width, points in curves
        if points
    )
    words = f"Accuracy against the {label}, a pair of curves for each size. From the last checkpoint: {told}."
    seeds = [spread.seeds for *_, points in curves for _, spread in points]
    caption = f"Finetuned from checkpoints of the pretraining; dashed and hollow: at {bits[-1]} bits. {_mean_of(seeds)}"
    caption += " Upright lines: least to most." if max(seeds) > 1 else ""
    caption += " More pretraining is to the right." if what == "perplexity" else ""
    title = f"Accuracy against the {'share of the ' if what == 'pretraining' else ''}{what}"
    return _drawing(experiment, f"accuracy-{what}", title, caption, words, len(settings), paint)


# ------------------------------------------------------------------------------------------------ weights


def ways(errors: Sequence[Error]) -> list[tuple[str, float, int]]:
    """Figure 9's two compressions, as far as they were measured: (in words, sparsity, bits)."""
    found = []
    fewest = min((error.bits for error in errors if error.sparsity == 0 and error.bits < 32), default=None)
    if fewest is not None:
        found.append((f"{fewest} bits", 0.0, fewest))
    for sparsity in sorted({error.sparsity for error in errors if error.sparsity > 0 and error.bits == 32}):
        found.append((f"{100 * sparsity:g} % sparsity", sparsity, 32))
    return found


STATISTICS: tuple[tuple[str, str, Callable[[Error], float]], ...] = (
    ("mean", "mean |w − w′|", lambda error: error.mean_absolute),
    ("variance", "variance of w − w′", lambda error: error.variance),
)


def _weight_errors(experiment: str, errors: Sequence[Error]) -> list[Drawing]:
    drawings = []
    for words, sparsity, bits in ways(errors):
        rows = [error for error in errors if (error.sparsity, error.bits) == (sparsity, bits) and error.kind != "all"]
        for name, label, of in STATISTICS:
            positive = [error for error in rows if of(error) > 0]
            if positive:
                kind = "quantized" if bits < 32 else f"pruned-{100 * sparsity:g}".replace(".", "_")
                title = f"{label[0].upper()}{label[1:]} at {words}"
                drawings.append(_by_kind(experiment, f"{kind}-{name}", title, label, positive, of))
    return drawings


def _by_kind(
    experiment: str, name: str, title: str, label: str, errors: Sequence[Error], of: Callable[[Error], float]
) -> Drawing:
    """A row for each kind of module, a point for each size."""
    kinds = kinds_in_order(error.kind for error in errors)
    settings = by_setting(errors)
    names = names_of(settings)

    def paint(colours: Colours) -> Figure:
        figure, axis = panel(3.9, 1.55 + 0.27 * len(kinds))
        for i, (setting, of_setting) in enumerate(settings.items()):
            # Sizes side by side within the row, so that none hides another.
            shift = 0.64 * ((i + 0.5) / len(settings) - 0.5)
            style = {**style_of(i, colours), "linestyle": "none", "markersize": 4.2}
            spreads = []
            for row, kind in enumerate(kinds):
                values = [of(error) for error in of_setting if error.kind == kind]
                if values:
                    spreads.append((row + shift, Spread.of(values)))
            ys = [y for y, _ in spreads]
            axis.plot([s.mean for _, s in spreads], ys, **style, label=names[setting], clip_on=False, zorder=3)
            low, high = [s.low for _, s in spreads], [s.high for _, s in spreads]
            axis.hlines(ys, low, high, color=style["color"], alpha=0.45, linewidth=1.1, zorder=2)
        axis.set_yticks(range(len(kinds)), kinds)
        axis.set_ylim(len(kinds) - 0.45, -0.55)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="y", visible=False)
        for row in range(1, len(kinds)):
            axis.axhline(row - 0.5, color=colours.grid, linewidth=0.7, zorder=0)
        log_axis(axis.xaxis, lambda error: f"{error:g}", 4)
        axis.set_xlabel(label)
        legend(figure, axis)
        return figure

    seeds = [len(rows) for rows in ([e for e in of_s if e.kind == kinds[0]] for of_s in settings.values()) if rows]
    caption = _mean_of(seeds) + (" Lines: least to most." if max(seeds) > 1 else "")
    words = f"{label}, on a logarithmic axis, by kind of module, a point for each size. The table has the numbers."
    return _drawing(experiment, name, title, caption, words, len(settings), paint)
