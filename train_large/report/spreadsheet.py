"""Every measurement of a study as one row of a CSV file, with the machine beside it; the weight errors in another."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from train_large.files import write_text
from train_large.report.results import (
    CurvePoint,
    Results,
    Run,
    Study,
    TranslationModel,
    TranslationResults,
)
from train_large.report.training_tables import Training

OF_THE_MODEL = (
    *("layers", "hidden", "heads", "parameters_without_embeddings", "learning_rate"),
    *("updates", "train_seconds", "used_seconds", "tokens", "flops", "perplexity"),
)


def write_csv(study: Study, path: Path) -> None:
    """One row for each size, sparsity and bit width, or for each validation of each size where nothing was compressed;
    written whole or not at all.

    The columns are those of results.json. A cell is empty for what is not known: `file_bytes` where there is no real
    file, the BLEU of a validation that has none."""
    _write(_of_compression(study) if isinstance(study, Results) else _of_training(study), path)


def _of_compression(results: Results) -> list[dict[str, Any]]:
    study = {"budget_seconds": results.budget.seconds, "clock": results.budget.clock, "machine": _machine(results)}
    return [
        {
            "model": model.name,
            "pretrained_parameters": model.parameters,
            **{name: getattr(model, name) for name in OF_THE_MODEL},
            **asdict(entry),
            **study,
        }
        for model in results.models
        for entry in model.compressed
    ]


def _of_training(study: Training) -> list[dict[str, Any]]:
    """A row for each validation; for a model without any, one with those cells empty."""
    budget = {"budget_seconds": study.budget and study.budget.seconds, "clock": study.budget and study.budget.clock}
    point = [field.name for field in fields(CurvePoint)]
    return [
        {
            "model": model.name,
            "parameters": model.parameters,
            **{name: getattr(model, name) for name in OF_THE_MODEL},
            **_scores(model),
            **{f"at_{name}": getattr(validation, name, None) for name in point},
            **budget,
            **({"machine": _machine(study)} if isinstance(study, TranslationResults) else {}),
        }
        for model in study.models
        for validation in model.curve or (None,)
    ]


def _scores(model: Run) -> dict[str, float | None]:
    if not isinstance(model, TranslationModel):
        return {}
    return {f"test_bleu_{name}": score for name, score in asdict(model.scores).items()}


def write_weight_errors(results: Results, path: Path) -> None:
    """One row for each size, way of compressing and kind of module; a heading alone where none was measured."""
    rows = [
        {
            **{"model": model.name, "layers": model.layers, "hidden": model.hidden},
            "pretrained_parameters": model.parameters,
            **asdict(error),
            "normalized": error.normalized,
            "machine": _machine(results),
        }
        for model in results.models
        for error in model.weight_errors or ()
    ]
    _write(rows, path)


def _machine(results: Results | TranslationResults) -> str:
    return ", ".join(f"{name} {value}" for name, value in asdict(results.machine).items())


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0] if rows else ["model"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
