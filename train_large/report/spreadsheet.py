"""Every measurement of a study as one row of a CSV file, with the machine beside it; the weight errors in another."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

from train_large.report.results import Results, write_whole

OF_THE_MODEL = (
    *("layers", "hidden", "heads", "parameters_without_embeddings", "learning_rate"),
    *("updates", "train_seconds", "tokens", "flops", "perplexity"),
)


def write_csv(results: Results, path: Path) -> None:
    """One row for each size, sparsity and bit width; written whole or not at all.

    The columns are those of results.json; `file_bytes` is empty where there is no real file."""
    study = {"budget_seconds": results.budget.seconds, "clock": results.budget.clock, "machine": _machine(results)}
    rows = [
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
    _write(rows, path)


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


def _machine(results: Results) -> str:
    return ", ".join(f"{name} {value}" for name, value in asdict(results.machine).items())


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0] if rows else ["model"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())
