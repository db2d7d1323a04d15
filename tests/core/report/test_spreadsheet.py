"""The CSV holds what results.json holds."""

from __future__ import annotations

import csv
from dataclasses import replace

from report.invented import make_translation_model, write_run_log

from train_large.report.runs import read_runs
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


def test_a_row_for_each_validation(translation, t2t_runs, tmp_path):
    path = tmp_path / "study.csv"
    for study in (translation, read_runs(t2t_runs)):
        write_csv(study, path)
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        points = [(model, point) for model in study.models for point in model.curve]
        for row, (model, point) in zip(rows, points, strict=True):
            assert (row["model"], int(row["parameters"])) == (model.name, model.parameters)
            assert (float(row["perplexity"]), int(row["updates"])) == (model.perplexity, model.updates)
            for name in ("updates", "train_seconds", "flops", "perplexity", "approx_bleu"):
                assert float(row[f"at_{name}"]) == getattr(point, name)
            assert row["at_bleu"] == ("" if point.bleu is None else str(point.bleu))
            assert (row["budget_seconds"], row["clock"]) == ("180.0", "train")
            if study is translation:
                assert float(row["test_bleu_paper"]) == model.scores.paper
                assert float(row["test_bleu_sacrebleu"]) == model.scores.sacrebleu
                assert "tensor2tensor 1.15.7" in row["machine"]
            else:
                assert row["learning_rate"] == ""
                assert not any("test_bleu" in name or name == "machine" for name in row)


def test_seconds_on_the_clock_of_the_budget(tmp_path):
    model = make_translation_model("2l_64h", 2, 64, 1, 900, 100, 500, 9.0, 5.0)
    facts = {"budget_seconds": 250.0, "budget_clock": "calibrated", "seconds_per_update": 0.5}
    write_csv(read_runs([write_run_log(tmp_path / "run", model, facts)]), tmp_path / "runs.csv")
    with open(tmp_path / "runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["at_used_seconds"]) for row in rows] == [25.0 * k for k in range(1, 11)]
    assert [float(row["at_train_seconds"]) for row in rows] == [18.0 * k for k in range(1, 11)]
    assert {row["used_seconds"] for row in rows} == {"250.0"}


def test_a_run_without_validations_has_a_row(t2t_runs, tmp_path):
    runs = read_runs(t2t_runs)
    begun = replace(runs, budget=None, models=(replace(runs.models[0], curve=(), perplexity=None),))
    write_csv(begun, tmp_path / "runs.csv")
    with open(tmp_path / "runs.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["model"], row["updates"], row["at_updates"], row["perplexity"]) == ("2l_64h", "5400", "", "")
    assert (row["budget_seconds"], row["clock"]) == ("", "")
