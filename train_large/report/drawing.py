"""The style that all figures share: colours, panels, axes with round ticks, legends, labels, and the SVG.

Each figure is a panel small enough to be legible on a phone. Colours are CSS variables (`--ink`, `--grid`, `--size-0`
and so on) that the page gives a light and a dark value, text is text, and the same results give the same bytes. Sizes
differ in luminance, marker and line style, so the figures survive a grey printer."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from typing import Any, Callable, ContextManager, Sequence

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

_MARKERS = "osD^vPX*"
_LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
# Smallest to largest model: darker and darker on white, lighter and lighter on black, and hues that differ as well.
_LIGHT = ("#c96a1b", "#bd3a5e", "#7d3aa6", "#26367f", "#0c1a3a")
_DARK = ("#b5652a", "#dd6f88", "#bb9bea", "#a3cdfb", "#f4f7ff")


@dataclass(frozen=True)
class Colours:
    """What a figure is drawn with: text and axes, what is in the background, grid lines, paper, and each size's own."""

    ink: str
    soft: str
    grid: str
    paper: str
    sizes: tuple[str, ...]


# These stand for the page's CSS variables of the same names until the SVG is written out.
MARKS = Colours("#010203", "#0a0b0c", "#040506", "#070809", tuple(f"#a000{place:02x}" for place in range(256)))


def light(sizes: int) -> Colours:
    """The colours on white, for files that no page gives its own."""
    return Colours("#1d2126", "#59616b", "#dfe3e8", "#ffffff", tuple(colour for colour, _ in palette(sizes)))


def palette(sizes: int) -> list[tuple[str, str]]:
    """(colour on white, colour on black) for each size, from the smallest to the largest."""

    def along(anchors: Sequence[str], share: float) -> str:
        left = min(int(share * (len(anchors) - 1)), len(anchors) - 2)
        part = share * (len(anchors) - 1) - left
        ends = [[int(anchors[left + end][i : i + 2], 16) for i in (1, 3, 5)] for end in (0, 1)]
        return "#" + "".join(f"{round(a + part * (b - a)):02x}" for a, b in zip(*ends))

    shares = [0.5] if sizes == 1 else [i / (sizes - 1) for i in range(sizes)]
    return [(along(_LIGHT, share), along(_DARK, share)) for share in shares]


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
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.xmargin": 0.04,
}


def drawing_style(colours: Colours = MARKS) -> ContextManager[None]:
    """Our settings on matplotlib's defaults, whatever the user's own matplotlibrc says: draw and save within it."""
    of_colours = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color"), colours.ink)
    of_colours.update({"ytick.color": colours.ink, "grid.color": colours.grid})
    return matplotlib.style.context(["default", {**_SETTINGS, **of_colours}])


def style_of(place: int, colours: Colours = MARKS) -> dict[str, Any]:
    """How the curve of one size looks; places count from the smallest."""
    return {
        "color": colours.sizes[place],
        "marker": _MARKERS[place % len(_MARKERS)],
        "linestyle": _LINES[place % len(_LINES)],
        "linewidth": 1.5,
        "markersize": 5,
        "markeredgewidth": 0.9,
    }


def panel(width: float = 3.9, height: float = 3.1) -> tuple[Figure, Any]:
    """A figure of one plot; inches, but the page scales it."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def log_axis(axis: Any, form: Callable[[float], str], most: int = 6) -> None:
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
    if not low > 0:  # an axis without a point
        return []
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


def legend(figure: Figure, axis: Any, handles: Sequence[Any] | None = None, labels: Sequence[str] = ()) -> None:
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


def number_points(figure: Figure, axis: Any, points: Sequence[tuple[float, float]]) -> None:
    """Numbers from 1 on, in the order of the points, where there is room."""
    label_points(figure, axis, [(x, y, str(number)) for number, (x, y) in enumerate(points, start=1)], above=True)


def label_points(figure: Figure, axis: Any, marks: Sequence[tuple[float, float, str]], above: bool = False) -> None:
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


def svg_of(figure: Figure, name: str, sizes: int) -> str:
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
    for variable in ("ink", "soft", "grid", "paper"):
        svg = svg.replace(getattr(MARKS, variable), f"var(--{variable})")
    for place in range(sizes):
        svg = svg.replace(MARKS.sizes[place], f"var(--size-{place})")
    return svg
