"""The report as one self-contained HTML page: no script, nothing loaded from elsewhere, light and dark."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from train_large.files import write_text
from train_large.report import drawing, figures, training_tables, units
from train_large.report.claims import above_chance, standard_error
from train_large.report.pareto import frontier_of
from train_large.report.results import Results, Study, TranslationResults
from train_large.report.tables import STATISTICS, VERDICTS, claims_of, error_tables, memory_limits, ship_parts
from train_large.report.training_claims import choice_parts
from train_large.report.training_tables import Training

CLOCKS = {
    "train": "training clock (validation, saving and loading excluded)",
    "wall": "wall clock (everything since the start)",
    "calibrated": "calibrated clock (updates times the seconds per update measured beforehand)",
}


def write_page(study: Study, path: Path, memory_limit: int | None = None) -> None:
    """Writes the page, whole or not at all.

    `memory_limit` is in bytes; without one a few round limits are answered. It is of no account where nothing was
    compressed."""
    write_text(path, render(study, memory_limit))


def render(study: Study, memory_limit: int | None = None) -> str:
    """The page as text."""
    of_kind = _of_compression(study, memory_limit) if isinstance(study, Results) else _of_training(study)
    kind = "compression" if isinstance(study, Results) else "training"
    return (
        _environment()
        .get_template(f"{kind}.html.j2")
        .render(
            results=study,
            drawings=[(drawing, Markup(drawing.svg)) for drawing in figures.draw(study)],
            group=lambda drawings, name: [pair for pair in drawings if pair[0].group == name],
            palette=drawing.palette(len(study.models)),
            claims=[(claim, VERDICTS[claim.shows]) for claim in claims_of(study)],
            clocks=CLOCKS,
            **of_kind,
        )
    )


def _of_compression(results: Results, memory_limit: int | None) -> dict[str, Any]:
    limits = memory_limits(results) if memory_limit is None else [memory_limit]
    return {
        "ship": [ship_parts(results, limit) for limit in limits],
        "frontier": frontier_of(results),
        "best_perplexity": min(model.perplexity for model in results.models),
        "standard_error": max(standard_error(m.finetuned.accuracy, results.task.valid) for m in results.models),
        "above_chance": above_chance,
        "weight_errors": error_tables(results),
        "statistics": [heading for heading, _ in STATISTICS],
    }


def _of_training(study: Training) -> dict[str, Any]:
    translated = study if isinstance(study, TranslationResults) else None
    return {
        "about": training_tables.about_training(study),
        "choice": choice_parts(translated) if translated else None,
        "columns": training_tables.columns_of(study, on_page=True),
        "is_best": training_tables.is_best,
        "paper_bleu": training_tables.PAPER_BLEU,
        "paper_error": training_tables.paper_error,
        "scores": training_tables.about_scores(study),
        "translation": translated.translation if translated else None,
        "told_decoding": training_tables.told_decoding,
        "about_curves": training_tables.about_curves(study),
    }


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for form in (
        units.format_bleu,
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
    return environment


def together(text: str) -> Markup:
    """Escaped, with numbers kept on one line with their units, and differences with both their terms."""
    text = text.replace(" − ", "\u00a0−\u00a0")
    return Markup(re.sub(r"(?<=\d) (?=[kMGT]?B\b|bits\b|points\b|s\b|min\b)", "\u00a0", str(escape(text))))
