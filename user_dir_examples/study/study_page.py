"""A study as one self-contained HTML page, and its figures as PNG and SVG files.

The page has no script, loads nothing from elsewhere, and is light or dark as the reader's system is."""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import study_figures
import study_tables
from markupsafe import Markup

import train_large.report
from train_large.errors import UserError
from train_large.files import whole
from train_large.report.drawing import palette
from train_large.report.page import together

if TYPE_CHECKING:
    from verdicts import Comparison, Verdict

TITLE = "Train Large, Then Compress: the paper’s experiments, measured again"


@dataclass(frozen=True)
class Section:
    """What the page says of an experiment: its heading, the paper's figure or table, and what the paper says there."""

    heading: str
    figure: str
    paper: str


SECTIONS = {
    "depth": Section(
        "Deeper models",
        "Figures 2 and 3",
        "Deeper models reach a perplexity in fewer updates, and up to a size in less time. The paper draws 3 to 24 "
        "layers of 768H and prints no numbers.",
    ),
    "width": Section(
        "Wider models",
        "Figure 4",
        "Wider models reach a perplexity in fewer updates, and up to a size in less time. The paper draws widths from "
        "256 to 1536 and prints no numbers.",
    ),
    "flops": Section(
        "Floating-point operations",
        "Figure 10",
        "For the same operations larger models are better. The curves of Figures 2, 4 and 13 once more.",
    ),
    "batch_size": Section(
        "Batch size",
        "Figure 13, Table 1",
        "A larger batch needs fewer updates; in time, batches beyond 2048 gain little.",
    ),
    "dataset_size": Section(
        "Less text",
        "Figure 14",
        "With 5 % of the text the largest models are no faster than smaller ones; with 1 % their perplexity is worse, "
        "for they overfit.",
    ),
    "layer_sharing": Section(
        "Sharing layers",
        "Figure 11",
        "Sharing saves memory, 41 % with all layers shared at a batch of 32, but slows convergence.",
    ),
    "finetuning": Section(
        "Finetuning at the same perplexity",
        "Table 2",
        "Sizes that were stopped at about the same perplexity finetune to comparable accuracies.",
    ),
    "compression": Section(
        "Compression",
        "Figures 6 and 7",
        "All sizes are pretrained for the same time. Larger models lose less by quantization and by pruning; for most "
        "sizes in bytes the best is a large model, heavily compressed. Strong, the paper says, is to prune 30 to 40 % "
        "and quantize to 6 or 8 bits; it prints no other numbers.",
    ),
    "sst2_grid": Section(
        "Compression of the best of a grid",
        "Figure 12",
        "The paper chooses the finetuning on SST-2 by validation from a grid (Appendix D), and finds the same as on "
        "MNLI.",
    ),
    "convergence": Section(
        "Convergence and compression",
        "Figure 8",
        "What 4 bits lose depends on the size, hardly on how long the model was pretrained.",
    ),
    "weight_error": Section(
        "How far compression moves the weights",
        "Figure 9",
        "The mean and the variance of the difference between the weights and the compressed ones fall as models grow.",
    ),
    "translation": Section(
        "Translation",
        "Figure 5",
        "Larger models need fewer updates, and up to a size less time; wide models do better than deep ones. The paper "
        "draws BLEU of newstest2013 and prints no numbers.",
    ),
}


def write_page(results: Path, verdicts: Sequence[Verdict], page: Path, about: Mapping[str, str]) -> None:
    """The page for the CSV files of a study, whole or not at all.

    `about` says how it was measured, as headings with their text. Raises UserError for a CSV file that is none of ours,
    and where the page cannot be written."""
    text = render(results, verdicts, about)
    with whole(page) as aside:
        aside.write_text(text, encoding="utf-8")


def render(results: Path, verdicts: Sequence[Verdict], about: Mapping[str, str]) -> str:
    """The page as text."""
    names = study_figures.experiments(results)
    parts = []
    for name in names:
        drawings = [(drawing, Markup(drawing.svg)) for drawing in study_figures.draw_experiment(results, name)]
        section = SECTIONS.get(name, Section(name.replace("_", " "), "beyond the paper", ""))
        parts.append((name, section, drawings, study_tables.tables(results, name)))
    counts = sorted({drawing.sizes for _, _, drawings, _ in parts for drawing, _ in drawings})
    return (
        _environment()
        .get_template("study.html.j2")
        .render(
            results={"title": TITLE},
            palette=(),
            palettes=[(count, palette(count)) for count in counts],
            claims=[(verdict, measured(verdict)) for verdict in verdicts],
            tally=tally(verdicts) if verdicts else "",
            where=where,
            parts=parts,
            missing=[SECTIONS[name].figure for name in study_figures.ORDER if name not in names],
            about=about,
        )
    )


def _environment() -> jinja2.Environment:
    folders = [Path(__file__).parent, Path(train_large.report.__file__).parent]  # the page's style is the report's
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["together"] = together
    return environment


def tally(verdicts: Sequence[Verdict]) -> str:
    """`9 claims hold, 2 do not hold, 3 cannot be told at this scale; 1 is not measured.`"""
    counts = Counter(verdict.in_words for verdict in verdicts)
    held, failed, missing = counts["holds"], counts["does not hold"], counts["not measured"]
    said = [
        "1 claim holds" if held == 1 else f"{held} claims hold",
        f"{failed} {'does' if failed == 1 else 'do'} not hold",
        f"{counts['cannot be told']} cannot be told at this scale",
    ]
    return ", ".join(said) + (f"; {missing} {'is' if missing == 1 else 'are'} not measured." if missing else ".")


def where(verdict: Verdict) -> str:
    """`Section 4.2, Figure 6`, `Appendix C, Figure 11`: where the paper makes the claim."""
    section = verdict.section
    if re.fullmatch(r"\d[\d.]*", section):
        section = f"Section {section}"
    elif re.fullmatch(r"[A-Z](\.\d+)*", section):
        section = f"Appendix {section}"
    return ", ".join(part for part in (section, verdict.figure) if part)


def measured(verdict: Verdict) -> list[tuple[str, str]]:
    """(what is compared, what came out, with its interval) for each comparison of a claim."""
    return [(comparison.what, outcome(comparison)) for comparison in verdict.comparisons]


def outcome(comparison: Comparison) -> str:
    """`× 1.32 (1.20 to 1.45)` for the logarithm of a ratio, `+1.20 points (+0.31 to +2.09)` for a difference."""
    if not comparison.values:
        return "no seed measured both"
    if not all(map(math.isfinite, comparison.values)):
        return "a run diverged: no interval"
    form, unit = _form(comparison.unit)
    text = form(comparison.mean) + unit
    if math.isinf(comparison.low) or math.isinf(comparison.high):
        return f"{text} (one seed: no interval)"
    low, high = (form(end).removeprefix("× ") for end in (comparison.low, comparison.high))
    return f"{text} ({low} to {high})"


def _form(unit: str) -> tuple[Any, str]:
    if unit == "ln ratio":
        return (lambda value: f"× {_digits(math.exp(min(value, 700.0)))}"), ""
    if unit == "share":
        return (lambda value: f"{100 * value:+.1f}".replace("-", "−")), " %"
    return (lambda value: f"{value:+.2f}".replace("-", "−")), f" {unit}"


def _digits(number: float) -> str:
    """Three significant digits, those after the point no more than three."""
    return f"{number:,.0f}" if number >= 99.5 else f"{number:.3f}" if number < 0.1 else f"{number:#.3g}"


# ------------------------------------------------------------------------------------------------ files


def write_figures(results: Path, folder: Path) -> list[Path]:
    """Every figure as NAME.png (200 dots an inch) and NAME.svg on white in `folder`: all of them, or none. Others that
    lie there are removed.

    Gives the files. Raises UserError for a CSV file that is none of ours, and where a file cannot be written."""
    drawings = study_figures.draw(results)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: no figures can be written there ({error.strerror}).") from None
    files = [[folder / f"{drawing.name}.{kind}" for kind in ("png", "svg")] for drawing in drawings]
    with contextlib.ExitStack() as stack:  # none takes its place before the last is drawn
        for drawing, paths in zip(drawings, files, strict=True):
            drawing.save(*(stack.enter_context(whole(path)) for path in paths))
    written = [path for paths in files for path in paths]
    for path in {*folder.glob("*.png"), *folder.glob("*.svg")} - {*written}:  # of what is no longer measured
        path.unlink()
    return written
