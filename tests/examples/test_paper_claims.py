"""What the full-scale scripts leave, as the study's measurements and claims: here an invented folder of theirs."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import measurements
import pytest
import torch

from train_large import runlog, sizes
from train_large.compression.packed import write_packed
from train_large.compression.quantization import quantize_tensor
from train_large.sizes import Size

SCRIPT = Path(__file__).parents[2] / "user_dir_examples" / "paper_scale" / "claims.py"
SEEDS = (1, 2, 3)
EACH = 0.5  # seconds an update
UPDATES = (100, 200, 400, 800)


@pytest.fixture(scope="module")
def claims() -> ModuleType:
    spec = importlib.util.spec_from_file_location("paper_scale_claims", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


def counters(updates: int) -> dict[str, float]:
    values = (updates, 0.3 * updates, 0.4 * updates, 128 * 8192 * updates, 1e9 * updates)
    return dict(zip(runlog.COUNTERS, values, strict=True))


def pretrain(out: Path, name: str, speed: float, epochs: int = 0, **facts: Any) -> Path:
    """The log of a run whose perplexity after so many updates falls with `speed`, and that it is done."""
    folder = out / "pretrain" / name
    log = str(folder / runlog.NAME)
    said = {"vocabulary": 50_265, "learning_rate": 0.0015, "budget_clock": "calibrated", "seconds_per_update": EACH}
    runlog.append(log, "start", counters(0), **said, **facts)
    for number, updates in enumerate(UPDATES):
        ppl = 3 + 1000 / (speed * updates)
        runlog.append(log, "valid", counters(updates), subset="valid", loss=1.0, perplexity=ppl)
        if number < epochs:
            runlog.append(log, "checkpoint", counters(updates), file=f"checkpoint{3 * number + 3}.pt")
    runlog.append(log, "stop", counters(UPDATES[-1]), reason="budget")
    (folder / "done").touch()
    return folder


def quantized(folder: Path, accuracies: dict[tuple[int, int], float]) -> None:
    (folder / "quantized").mkdir(parents=True)
    w = torch.arange(-64.0, 64.0).reshape(16, 8)
    for (sparsity, bits), accuracy in accuracies.items():
        stem = folder / "quantized" / f"sparsity{sparsity}-{bits}bits"
        pruned = w.masked_fill(w.abs() < 0.64 * sparsity, 0)
        tensor = pruned if bits == 32 else quantize_tensor(pruned, bits)
        write_packed([("w", tensor)], {"cfg": {}}, {}, stem.with_suffix(".safetensors"))
        stem.with_suffix(".log").write_text(json.dumps({"valid_accuracy": f"{100 * accuracy:.1f}"}) + "\n")


def finished(folder: Path, *accuracies: float) -> None:
    log = str(folder / runlog.NAME)
    runlog.append(log, "start", counters(0))
    for accuracy in accuracies:
        runlog.append(log, "valid", counters(10), subset="valid", accuracy=accuracy)
    (folder / "done").touch()


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("paper")
    speeds = {"3l_768h": 1.0, "6l_768h": 4.0, "12l_768h": 8.0, "12l_256h": 1.0, "12l_512h": 4.0}
    for seed in SEEDS:
        wobble = 1 + 0.01 * seed
        for size, speed in speeds.items():
            pretrain(out, f"{size}-batch8192-seed{seed}", speed * wobble, epochs=4)
        pretrain(out, f"12l_768h-batch256-seed{seed}", wobble)
        pretrain(out, f"12l_768h-batch8192-share_all-seed{seed}", wobble)
        pretrain(out, f"6l_768h-batch8192-data1-seed{seed}", wobble)
        pretrain(out, f"12l_768h-batch8192-to4.3-seed{seed}", wobble)
        finished(out / "finetune" / "mnli" / f"12l_768h-batch8192-to4.3-seed{seed}", 0.7, 0.8, 0.75)
        for size, loss in (("3l_768h", 0.2), ("12l_768h", 0.05)):
            name = f"{size}-batch8192-seed{seed}"
            levels = {(0, 32): 0.8, (0, 4): 0.8 - loss * wobble, (60, 32): 0.7}
            quantized(out / "compress" / "mnli" / name, levels)
            (out / "compress" / "mnli" / name / "ladder.jsonl").write_text(
                json.dumps({"sparsity": 0.0, "updates": 0, "recovered": True})
                + "\n"
                + json.dumps({"sparsity": 0.6, "updates": 77, "recovered": False})
                + "\n"
            )
    name = "12l_768h-batch8192-seed1"
    for epoch in (3, 6):
        quantized(out / "convergence" / f"{name}-epoch{epoch}", {(0, 32): 0.8, (0, 4): 0.7})
    quantized(out / "sst2_grid" / f"{name}-compressed", {(0, 32): 0.9, (0, 4): 0.8})
    (out / "sst2_grid" / name).mkdir()
    (out / "sst2_grid" / name / "best").symlink_to("batch16,rate5e-4,seed300,dropout0.2")
    for task, examples in (("mnli", 9815), ("sst-2", 872)):
        (out / task).mkdir()
        record = {"summary": {"splits": {"valid": {"0": examples - 1, "1": 1}}}}
        (out / task / "prepared.json").write_text(json.dumps(record))
    (out / "weight_error-12l_768h-seed1.csv").write_text(
        "sparsity,bits,kind,parameters,mean,mean_absolute,variance,deviation,relative\n"
        "0.0,4,fc1,2359296,0.001,0.002,0.003,0.04,0.05\n"
    )
    (out / "memory-all.csv").write_text("size,peak_memory_bytes\n12l_768h,123456789\n")
    pretrain(out, "24l_768h-batch8192-seed1", 1.0)
    (out / "pretrain" / "24l_768h-batch8192-seed1" / "done").unlink()  # still going on
    return out


@pytest.fixture(scope="module")
def results(claims, out, tmp_path_factory) -> Path:
    report = tmp_path_factory.mktemp("report")
    assert claims.main([str(out), str(report)]) == 0
    assert (report / "index.html").stat().st_size > 10_000
    return report / "results"


def test_runs_are_in_the_experiments_whose_scripts_ask_for_them(results):
    found = {
        name: {p.run for p in measurements.read(results / name, measurements.Point)}
        for name in ("depth", "width", "batch_size", "flops", "dataset_size", "layer_sharing", "finetuning")
    }
    one = {name: {run.removesuffix("-seed1") for run in runs if run.endswith("-seed1")} for name, runs in found.items()}
    usual = {f"{size}-batch8192" for size in ("3l_768h", "6l_768h", "12l_768h")}
    wide = {f"{size}-batch8192" for size in ("12l_256h", "12l_512h", "12l_768h")}
    assert one == {
        "depth": usual,
        "width": wide,
        "batch_size": {"12l_768h-batch8192", "12l_768h-batch256"},
        "flops": usual | wide | {"12l_768h-batch256"},
        "dataset_size": usual | {"6l_768h-batch8192-data1"},
        "layer_sharing": {"12l_768h-batch8192", "12l_768h-batch8192-share_all"},
        "finetuning": {"12l_768h-batch8192-to4.3"},
    }


def test_a_point_is_what_the_log_says_on_the_clock_of_the_budget(results):
    point = next(p for p in measurements.read(results / "depth", measurements.Point) if p.updates == 200)
    assert (point.seconds, point.tokens, point.rate, point.batch) == (100.0, 128 * 8192 * 200, 0.0015, 8192)
    size = Size.parse(point.size)
    assert point.parameters == sizes.parameters(size, 50_265, max_positions=128)
    assert point.layer_parameters == sizes.parameters_without_embeddings(size, 50_265)


def test_accuracies_are_those_of_the_logs_and_files(results, out):
    rows = measurements.read(results / "compression", measurements.Accuracy)
    row = next(r for r in rows if (r.size, r.seed, r.sparsity, r.bits) == ("3l_768h", 2, 0.6, 32))
    assert (row.accuracy, row.recovery_updates, row.recovered, row.examples) == (0.7, 77, False, 9815)
    file = out / "compress" / "mnli" / row.run / "quantized" / "sparsity60-32bits.safetensors"
    assert row.bytes == file.stat().st_size
    assert (row.checkpoint, row.updates, row.seconds) == (1.0, 800, 400.0)
    assert row.perplexity == pytest.approx(3 + 1000 / (1.02 * 800))
    [grid] = {
        (r.finetune_batch, r.finetune_rate, r.finetune_seed, r.finetune_dropout, r.examples)
        for r in measurements.read(results / "sst2_grid", measurements.Accuracy)
    }
    assert grid == (16, 5e-4, 300, 0.2, 872)
    shares = {(r.checkpoint, r.updates) for r in measurements.read(results / "convergence", measurements.Accuracy)}
    assert shares == {(0.5, 100), (1.0, 200)}
    assert {r.accuracy for r in measurements.read(results / "finetuning", measurements.Accuracy)} == {0.8}
    [error] = measurements.read(results / "weight_error", measurements.Error)
    assert (error.kind, error.weights, error.variance, error.seed) == ("fc1", 2359296, 0.003, 1)
    [memory] = measurements.read(results / "layer_sharing", measurements.Memory)
    assert (memory.share, memory.peak_bytes) == ("all", 123456789)


def test_the_claims_are_judged(results):
    with (results.parent / "claims.csv").open(newline="") as file:
        verdicts = {row["claim"]: row["verdict"] for row in csv.DictReader(file)}
    assert verdicts["Larger models reach a perplexity in fewer updates."] == "holds"
    assert verdicts["Larger models lose less accuracy at 4 bits."] == "holds"
    assert verdicts["Larger batches converge in fewer updates."] == "holds"
    assert verdicts["In translation width beats depth."] == "not measured"


def test_a_translation_has_its_curve_and_its_score(claims, tmp_path):
    folder = tmp_path / "translate" / "6l_512h-gpus8-seed3"
    log = str(folder / runlog.NAME)
    said = {"parameters": 60_000_000, "vocabulary": 32_000, "batch_tokens": 4096, "budget_clock": "calibrated"}
    runlog.append(log, "start", counters(0), **said, seconds_per_update=EACH)
    runlog.append(log, "valid", counters(50), subset="dev", loss=1.0, perplexity=9.0, bleu=12.5)
    runlog.append(log, "stop", counters(60), reason="budget")
    (folder / "scores.json").write_text(json.dumps({"paper": 33.25, "paper_error": 0.5}))
    point, end = claims.gather(tmp_path)["translation"]
    assert (point.seconds, point.bleu, point.batch, point.layer_parameters) == (
        25.0,
        12.5,
        4096,
        60_000_000 - 32_000 * 512,
    )
    assert (end.bleu, end.bleu_error, end.perplexity, end.seconds, end.seed) == (33.25, 0.5, 9.0, 30.0, 3)


def test_where_nothing_is_finished_it_says_so(claims, tmp_path, capsys):
    assert claims.main([str(tmp_path), str(tmp_path / "report")]) == 2
    assert "nothing is finished there" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()
