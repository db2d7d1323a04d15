"""The CSV holds what results.json holds."""

from __future__ import annotations

import csv

from train_large.report.spreadsheet import write_csv


def test_a_row_for_each_measurement(results, tmp_path):
    path = tmp_path / "study.csv"
    write_csv(results, path)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    entries = [(model, entry) for model in results.models for entry in model.compressed]
    assert len(rows) == len(entries)
    for row, (model, entry) in zip(rows, entries, strict=True):
        assert row["model"] == model.name
        assert float(row["perplexity"]) == model.perplexity
        assert (float(row["sparsity"]), int(row["bits"])) == (entry.sparsity, entry.bits)
        assert (float(row["accuracy"]), int(row["bytes"])) == (entry.accuracy, entry.bytes)
        assert results.machine.processor in row["machine"]
