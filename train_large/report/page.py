"""The report as one self-contained HTML page: no script, nothing loaded from elsewhere, light and dark."""

from __future__ import annotations

import re
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from train_large.report import figures, units
from train_large.report.claims import above_chance, standard_error
from train_large.report.pareto import frontier_of
from train_large.report.results import Results, load, write_whole
from train_large.report.tables import STATISTICS, VERDICTS, claims_of, error_tables, memory_limits, ship_parts


def write_report(results_json: Path, page: Path, memory_limit: int | None = None) -> None:
    """The page for a results.json. Raises UserError if that cannot be read, is wrong, or the page cannot be written."""
    write_page(load(results_json), page, memory_limit)


def write_page(results: Results, path: Path, memory_limit: int | None = None) -> None:
    """Writes the page, whole or not at all. `memory_limit` is in bytes; without one a few round limits are answered."""
    write_whole(path, render(results, memory_limit))


def render(results: Results, memory_limit: int | None = None) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for form in (
        units.format_bytes,
        units.format_count,
        units.format_error,
        units.format_flops,
        units.format_percent,
        units.format_perplexity,
        units.format_seconds,
    ):
        environment.filters[form.__name__.replace("format_", "as_")] = form
    environment.filters["together"] = together
    limits = memory_limits(results) if memory_limit is None else [memory_limit]
    return environment.get_template("page.html.j2").render(
        results=results,
        ship=[ship_parts(results, limit) for limit in limits],
        frontier=frontier_of(results),
        drawings=[(drawing, Markup(drawing.svg)) for drawing in figures.draw(results)],
        group=lambda drawings, name: [pair for pair in drawings if pair[0].group == name],
        palette=figures.palette(len(results.models)),
        claims=[(claim, VERDICTS[claim.shows]) for claim in claims_of(results)],
        best_perplexity=min(model.perplexity for model in results.models),
        standard_error=max(standard_error(model.finetuned.accuracy, results.task.valid) for model in results.models),
        above_chance=above_chance,
        weight_errors=error_tables(results),
        statistics=[heading for heading, _ in STATISTICS],
    )


def together(text: str) -> Markup:
    """Escaped, with numbers kept on one line with their units, and differences with both their terms."""
    text = text.replace(" − ", "\u00a0−\u00a0")
    return Markup(re.sub(r"(?<=\d) (?=[kMGT]?B\b|bits\b|points\b|s\b|min\b)", "\u00a0", str(escape(text))))
