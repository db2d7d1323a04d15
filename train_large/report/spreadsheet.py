"""Every measurement of a study as one row of a CSV file, with the machine beside it."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from pathlib import Path

from train_large.report.results import Results, write_whole

OF_THE_MODEL = (
    *("layers", "hidden", "heads", "parameters_without_embeddings", "learning_rate"),
    *("updates", "train_seconds", "tokens", "flops", "perplexity"),
)


def write_csv(results: Results, path: Path) -> None:
    """One row for each size, sparsity and bit width; written whole or not at all."""
    machine = ", ".join(f"{name} {value}" for name, value in asdict(results.machine).items())
    study = {"budget_seconds": results.budget.seconds, "clock": results.budget.clock, "machine": machine}
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
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0] if rows else ["model"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())
