"""The CSV holds what results.json holds."""

from __future__ import annotations

import csv

from train_large.report.spreadsheet import write_csv, write_weight_errors


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
        assert row["file_bytes"] == ""


def test_the_bytes_of_the_files(new_results, tmp_path):
    write_csv(new_results, tmp_path / "study.csv")
    with open(tmp_path / "study.csv", newline="") as file:
        found = [int(row["file_bytes"]) for row in csv.DictReader(file)]
    assert found == [entry.file_bytes for model in new_results.models for entry in model.compressed]


def test_a_row_for_each_weight_error(results, new_results, tmp_path):
    path = tmp_path / "weights.csv"
    write_weight_errors(new_results, path)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    errors = [(model, error) for model in new_results.models for error in model.weight_errors]
    for row, (model, error) in zip(rows, errors, strict=True):
        assert (row["model"], row["kind"]) == (model.name, error.kind)
        assert int(row["pretrained_parameters"]) == model.parameters
        assert (float(row["sparsity"]), int(row["bits"])) == (error.sparsity, error.bits)
        for name in ("mean", "mean_absolute", "variance", "deviation", "relative", "normalized"):
            assert float(row[name]) == getattr(error, name)
    write_weight_errors(results, path)
    assert path.read_text() == "model\n"
