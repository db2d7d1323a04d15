"""What a study's jobs have left, as rows; and the settings in the jobs' commands."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import experiments
import gather
import jobs
import measurements
import pytest
import select_best
from experiments import Finetuning, Grid, Measuring, MemoryRun, Pretraining, Pruning

from train_large import runlog
from train_large.compression.levels import level_name, parse_levels
from train_large.sizes import Size, parameters, parameters_without_embeddings

RUN = Pretraining("2l_32h", 8, "attention", 5, None, 1)
FINETUNING = Finetuning(RUN, 0.5, 16, 0.0007, 0.25, 9)
EACH = 0.02  # seconds an update


@pytest.fixture
def settings(tmp_path):
    """Of a study whose text and task are there."""
    settings = experiments.load(None, [f"out={tmp_path}", f"step_times={EACH}", "budget=64s", "prune.levels=[0.3]"])
    for folder, summary in (
        (jobs.text_data(settings).parent, {"dictionary_entries": 999}),
        (jobs.task_data(settings), {"splits": {"train": {"a": 60, "b": 40}, "valid": {"a": 7, "b": 4}}}),
    ):
        folder.mkdir(parents=True)
        (folder / "prepared.json").write_text(json.dumps({"summary": summary}))
    return settings


def log(folder: Path, *lines) -> None:
    """(kind, updates, more of the line): the clock of this machine says ten times what is charged."""
    for kind, updates, *more in lines:
        seconds = 10 * EACH * updates
        counters = {"updates": updates, "train_seconds": seconds, "wall_seconds": seconds + 5, "tokens": 9 * updates}
        runlog.append(folder / runlog.NAME, kind, {**counters, "flops": 1e6 * updates}, **dict(*more))


def test_a_curve_goes_by_the_calibrated_clock_and_by_the_validation_set(settings):
    log(
        jobs.folder(settings, RUN),
        ("start", 0),
        ("valid", 100, {"subset": "valid", "perplexity": 50.0}),
        ("valid", 100, {"subset": "test", "perplexity": 49.0}),
        ("stop", 200, {"reason": "budget"}),
    )
    (point,) = gather.rows_of(settings, "mine", RUN)
    assert (point.updates, point.seconds, point.flops, point.tokens) == (100, 100 * EACH, 1e8, 900)
    assert (point.perplexity, point.bleu) == (50.0, None)
    assert (point.batch, point.rate, point.share, point.data, point.seed) == (8, 0.0015, "attention", 5.0, 1)
    size = Size(2, 32, heads=2)
    assert point.parameters == parameters(size, 1000, max_positions=64, share="attention")  # 999 entries and <mask>
    assert point.layer_parameters == parameters_without_embeddings(size, 1000, share="attention")


def test_rows_of_a_compressed_model_are_of_its_checkpoint_and_its_ladder(settings):
    folder = jobs.folder(settings, RUN)
    log(folder, ("start", 0), ("checkpoint", 1600), ("stop", 2000), ("resume", 2000), ("stop", 3200))
    (folder / "checkpoint_1_1600.pt").touch()  # half of 64 s of 0.02 s each
    pruning = Pruning(FINETUNING)
    work = Measuring(FINETUNING, pruning)
    levels = [{"sparsity": 0.0, "updates": 0, "recovered": True}, {"sparsity": 0.3, "updates": 41, "recovered": False}]
    jobs.folder(settings, pruning).mkdir(parents=True)
    (jobs.folder(settings, pruning) / "ladder.jsonl").write_text("".join(json.dumps(line) + "\n" for line in levels))
    cost = {"bits": 4, "nonzero": 70, "bytes": 40, "bytes_paper": 35}
    measured = {
        "perplexity": 33.0,
        "compressed": [{"sparsity": s, "accuracy": a, **cost} for s, a in ((0.0, 0.75), (0.3, 0.5))],
        "weight_errors": [
            {"sparsity": 0.0, "bits": 4, "kind": "fc1", "mean": 1.0, "mean_absolute": 2.0, "variance": 3.0}
            | {"parameters": 5, "deviation": 6.0}
        ],
    }
    jobs.folder(settings, work).mkdir(parents=True)
    (jobs.folder(settings, work) / "measured.json").write_text(json.dumps(measured))

    whole, pruned, error = gather.rows_of(settings, "mine", work)
    assert (whole.recovery_updates, whole.recovered) == (0, True)
    assert (pruned.recovery_updates, pruned.recovered) == (41, False)
    for row in (whole, pruned):
        assert (row.checkpoint, row.updates, row.seconds) == (0.5, 1600, 1600 * EACH)
        assert (row.examples, row.perplexity) == (11, 33.0)
        recipe = (row.finetune_batch, row.finetune_rate, row.finetune_dropout, row.finetune_seed)
        assert recipe == (16, 0.0007, 0.25, 9)
        assert (row.nonzero, row.bytes, row.bytes_paper) == (70, 40, 35)
    assert (whole.accuracy, pruned.accuracy) == (0.75, 0.5)
    assert (error.weights, error.mean, error.mean_absolute, error.variance, error.deviation) == (5, 1, 2, 3, 6)

    at_the_end = replace(FINETUNING, checkpoint=1)
    assert gather._checkpoint_line(settings, at_the_end)["updates"] == 3200


def test_a_run_that_diverged_has_a_perplexity_beyond_all(settings, tmp_path):
    log(jobs.folder(settings, RUN), ("start", 0), ("valid", 100, {"subset": "valid", "perplexity": None}))
    rows = list(gather.rows_of(settings, "mine", RUN))
    measurements.write(rows, tmp_path / "rows")
    assert [row.perplexity for row in measurements.read(tmp_path / "rows", measurements.Point)] == [math.inf]


def test_levels_are_told_as_they_are(settings, tmp_path):
    """Of more than two digits too, in the ladder's flag and in the names of its checkpoints."""
    folder = jobs.folder(settings, RUN)
    folder.mkdir(parents=True)
    (folder / "checkpoint_1_1600.pt").touch()
    own = [f"out={tmp_path}", f"step_times={EACH}", "budget=64s", "prune.levels=[0.123456789,0.985,0.99]"]
    changed, pruning = experiments.load(None, own), Pruning(FINETUNING)
    levels = flags(jobs.command(changed, pruning))["--sparsity-levels"]
    assert parse_levels(levels) == (0.123456789, 0.985, 0.99)
    request = json.loads(jobs.command(changed, Measuring(FINETUNING, pruning))[2])
    expected = [f"checkpoint_sparsity_{level_name(level)}.pt" for level in parse_levels(levels)]
    assert [Path(level["checkpoint"]).name for level in request["levels"][1:]] == expected
    assert len(set(expected)) == 3


def test_memory_is_above_that_of_the_libraries(settings):
    run = MemoryRun("all", 1)
    jobs.folder(settings, run).mkdir(parents=True)
    (jobs.folder(settings, run) / "memory.json").write_text(json.dumps({"loaded": 300, "trained": 1000}))
    (row,) = gather.rows_of(settings, "layer_sharing", run)
    assert (row.share, row.peak_bytes) == ("all", 700)


def flags(command: list[str]) -> dict[str, str]:
    """The last value of each flag, as fairseq takes it."""
    return {word: command[i + 1] for i, word in enumerate(command[:-1]) if word.startswith("--")}


@pytest.mark.parametrize(
    ("change", "work", "flag", "value"),
    [
        ("pretrain.warmup=0.5", RUN, "--warmup-fraction", "0.5"),
        ("pretrain.masked=0.3", RUN, "--mask-prob", "0.3"),
        ("pretrain.length=24", RUN, "--tokens-per-sample", "24"),
        ("pretrain.curve_batches=9", RUN, "--max-valid-steps", "8"),
        ("pretrain.rates.8=0.1", RUN, "--lr", "0.1"),
        ("model.embedding_std=0.2", RUN, "--embedding-std", "0.2"),
        ("model.positions=48", RUN, "--max-positions", "48"),
        ("model.head_width=8", RUN, "--encoder-attention-heads", "4"),
        ("seeds=[1]", replace(RUN, target=60.0), "--target-ppl", "60.0"),
        ("finetune.epochs=5", FINETUNING, "--max-update", "35"),  # of 7 updates: 100 examples by 16
        ("seeds=[1]", FINETUNING, "--batch-size", "16"),
        ("seeds=[1]", FINETUNING, "--lr", "0.0007"),
        ("seeds=[1]", FINETUNING, "--dropout", "0.25"),
        ("seeds=[1]", FINETUNING, "--seed", "9"),
        ("seeds=[1]", FINETUNING, "--share-layers", "attention"),
        ("prune.rate=0.1", Pruning(FINETUNING), "--lr", "0.1"),
        ("prune.levels=[0.2,0.7]", Pruning(FINETUNING), "--sparsity-levels", "0.2,0.7"),
        ("seeds=[1]", Pruning(FINETUNING), "--share-layers", "attention"),
        ("seeds=[1]", Pruning(FINETUNING), "--seed", "9"),
        ("seeds=[1]", Pruning(FINETUNING), "--dropout", "0.25"),
        ("seeds=[1]", Pruning(FINETUNING), "--batch-size", "16"),
    ],
)
def test_settings_arrive_in_the_commands(settings, tmp_path, change, work, flag, value):
    jobs.folder(settings, RUN).mkdir(parents=True)
    (jobs.folder(settings, RUN) / "checkpoint_1_1600.pt").touch()
    changed = experiments.load(None, [f"out={tmp_path}", f"step_times={EACH}", "budget=64s", change])
    assert flags(jobs.command(changed, work))[flag] == value


def test_checkpoints_are_kept_at_every_quarter_that_can_be_finetuned(settings):
    """Of a budget that the validations do not divide evenly too."""
    for budget in ("64s", "63s", "65.5s"):
        settings.budget = budget
        words = flags(jobs.command(settings, RUN))
        kept, each = int(words["--keep-interval-updates-pattern"]), int(words["--save-interval-updates"])
        end = experiments.updates_of(settings, RUN)
        for share in experiments.CHECKPOINTS[:-1]:
            folder = jobs.folder(settings, RUN)
            updates = next(n for n in range(each, end + each, each) if n % kept == 0 and n >= share * end - 1e-9)
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"checkpoint_1_{updates}.pt"
            path.touch()
            assert jobs.checkpoint(settings, RUN, share) == path
        assert each * settings.pretrain.validations >= end


def test_what_is_measured_is_the_text_whole_at_the_checkpoint_that_was_finetuned(settings):
    folder = jobs.folder(settings, RUN)
    folder.mkdir(parents=True)
    (folder / "checkpoint_1_1600.pt").touch()
    request = json.loads(jobs.command(settings, Measuring(FINETUNING, None))[2])
    assert request["pretrained"] == str(folder / "checkpoint_1_1600.pt")
    assert request["text_data"] == str(jobs.text_data(settings))
    assert request["levels"] == [{"sparsity": 0.0, "checkpoint": request["finetuned"]}]


def test_the_best_of_a_grid_is_the_highest_validation_of_any(settings, tmp_path, monkeypatch):
    grid = Grid("sst2_grid", RUN, (FINETUNING, replace(FINETUNING, seed=8), replace(FINETUNING, seed=7)))
    for run, accuracies in zip(grid.finetunings, ((0.5, 0.7), (0.8, 0.6), (0.75, 0.75)), strict=True):
        lines = [("valid", n, {"subset": "valid", "accuracy": a}) for n, a in enumerate(accuracies, 1)]
        log(jobs.folder(settings, run), ("start", 0), *lines, ("valid", 2, {"subset": "test", "accuracy": 0.9}))
    found = {run.name: select_best.best_accuracy(jobs.folder(settings, run)) for run in grid.finetunings}
    assert list(found.values()) == [0.7, 0.8, 0.75]
    jobs.save_settings(settings)
    monkeypatch.setattr(jobs, "find", lambda settings, path: jobs.job_of(grid))
    monkeypatch.setattr("sys.argv", ["select_best.py", str(jobs.settings_file(settings)), grid.name])
    jobs.folder(settings, grid).mkdir(parents=True)
    select_best.main()
    path, chosen = jobs.finetuned(settings, grid)
    assert chosen == grid.finetunings[1]
    assert path == jobs.folder(settings, chosen) / "checkpoint_best.pt"


def test_jobs_depend_on_the_settings_that_their_commands_have(settings, tmp_path):
    def told(work, *changes):
        return jobs.settings_of(experiments.load(None, [f"out={tmp_path}", f"step_times={EACH}", *changes]), work)

    for change, works in {
        "finetune.epochs=9": [FINETUNING],
        "task.classes=3": [FINETUNING],
        "prune.rate=1e-3": [Pruning(FINETUNING)],
        "prune.levels=[0.5]": [Pruning(FINETUNING)],
        "measure.bits=[32]": [Measuring(FINETUNING, None)],
        "memory.updates=5": [MemoryRun("all", 1)],
        "translate.alpha=1.0": [experiments.Translation("1l_32h", 1)],
        "step_times=0.5": [RUN, experiments.Translation("1l_32h", 1)],
        "pretrain.warmup=0.1": [RUN],
        "pretrain.curve_batches=3": [RUN],
        "model.embedding_std=0.3": [RUN, FINETUNING],
    }.items():
        for work in works:
            assert told(work, change) != told(work), (change, work.name)


def test_other_finetunings_are_other_jobs(settings):
    """Two of one name would be one job: the second would never be trained, and be told with the first one's scores."""
    for change in ({"checkpoint": 1.0}, {"batch": 32}, {"rate": 0.0005}, {"dropout": 0.1}, {"seed": 8}):
        assert replace(FINETUNING, **change).name != FINETUNING.name
    finetunings = [run for run in experiments.runs_of(settings, "sst2_grid") if isinstance(run, Finetuning)]
    assert len({run.name for run in finetunings}) == len(finetunings)
    one = Grid("sst2_grid", RUN, (FINETUNING,))
    assert replace(one, experiment="mine").name != one.name
