"""The study's results that are committed: complete, judged and told as they were measured."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

import about
import experiments
import measurements
import pytest
import study_report
import verdicts
from experiments import Measuring, MemoryRun, Pretraining, Translation

ROOT = Path(__file__).parents[2]
RESULTS, REPORT = (ROOT / "docs" / "results" / name for name in ("pocket", "report"))
PUBLISHED = measurements.experiments(RESULTS)


def test_the_claims_are_those_of_the_measurements(tmp_path):
    judged = verdicts.judge(RESULTS)
    assert (REPORT / "claims.md").read_text() == study_report.markdown(judged)
    assert (REPORT / "about.md").read_text() == study_report.told(about.read(RESULTS))
    with (REPORT / "claims.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [list(study_report.COLUMNS), *study_report.rows(judged)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_run_of_the_committed_settings_is_there(name):
    settings = experiments.load()
    runs = experiments.runs_of(settings, name)
    folder = RESULTS / name
    trained = {run.name for run in runs if isinstance(run, (Pretraining, Translation))}
    assert {point.run for point in measurements.read(folder, measurements.Point)} == trained
    accuracies = measurements.read(folder, measurements.Accuracy)
    measured = [run for run in runs if isinstance(run, Measuring)]
    levels = {run.name: 1 + len(settings.prune.levels) * bool(run.pruning) for run in measured}
    assert len(accuracies) == sum(levels.values()) * len(settings.measure.bits)
    memory = {(row.share, row.seed) for row in measurements.read(folder, measurements.Memory)}
    assert memory == {(run.share, run.seed) for run in runs if isinstance(run, MemoryRun)}
    translated = {row.run for row in measurements.read(folder, measurements.Translated)}
    assert translated == {run.name for run in runs if isinstance(run, Translation)}


@pytest.mark.parametrize(
    "name", sorted({"depth", "width", "batch_size", "dataset_size", "layer_sharing", "translation"} & {*PUBLISHED})
)
def test_the_readme_says_what_to_expect(name):
    """Each setting's perplexity at the end, the mean over the seeds."""
    text = (ROOT / "user_dir_examples" / name / "README.md").read_text()
    for of_setting in verdicts.curves(RESULTS, name):
        ends = [curve[-1] for curve in of_setting.values()]
        mean = statistics.fmean(point.perplexity for point in ends)
        assert f"{mean:.1f}" in text, (ends[0].run, f"{mean:.1f}")


@pytest.mark.parametrize("name", sorted({"compression", "convergence"} & {*PUBLISHED}))
def test_the_readme_says_which_accuracies_to_expect(name):
    """In per cent, whole and at 4 bits, the means over the seeds, from each checkpoint."""
    text = (ROOT / "user_dir_examples" / name / "README.md").read_text()
    rows = measurements.read(RESULTS / name, measurements.Accuracy)
    for checkpoint in {row.checkpoint for row in rows}:
        for size, of_seeds in verdicts.accuracies(RESULTS, name, checkpoint=checkpoint).items():
            (line,) = (line for line in text.splitlines() if line.startswith(f"| {size} |"))
            for bits in (32, 4):
                mean = statistics.fmean(of_seed[0.0, bits].accuracy for of_seed in of_seeds.values())
                assert f"{100 * mean:.1f}" in line, (size, checkpoint, bits)


def test_the_translation_page_says_which_scores_to_expect():
    """The mean over the seeds of each size's BLEU, below the size."""
    scores = measurements.read(RESULTS / "translation", measurements.Translated)
    assert scores
    said = table("translation")
    for size in {row.size for row in scores}:
        mean = statistics.fmean(row.bleu for row in scores if row.size == size)
        assert said["BLEU"][size] == f"{mean:.1f}", size


def test_the_finetuning_page_says_which_accuracies_to_expect():
    """The mean over the seeds of what each size was finetuned from, and of its accuracy in per cent."""
    rows = [row for row in measurements.read(RESULTS / "finetuning", measurements.Accuracy) if row.bits == 32]
    assert rows
    said = table("finetuning")
    for size in {row.size for row in rows}:
        of_size = [row for row in rows if row.size == size]
        assert said["perplexity"][size] == f"{statistics.fmean(row.perplexity for row in of_size):.1f}", size
        assert said["seconds"][size] == f"{statistics.fmean(row.seconds for row in of_size):.0f}", size
        assert said["accuracy"][size] == f"{100 * statistics.fmean(row.accuracy for row in of_size):.1f}", size


def test_the_page_of_the_grid_says_which_accuracies_to_expect():
    """In per cent, of the best of each size, at the levels of its columns."""
    rows = measurements.read(RESULTS / "sst2_grid", measurements.Accuracy)
    levels = {
        "whole": (0.0, 32),
        "8 bits": (0.0, 8),
        "6 bits": (0.0, 6),
        "4 bits": (0.0, 4),
        "30 % pruned": (0.3, 32),
        "60 %": (0.6, 32),
        "90 %": (0.9, 32),
        "30 % and 6 bits": (0.3, 6),
        "60 % and 4 bits": (0.6, 4),
    }
    said = table("sst2_grid")
    for size in {row.size for row in rows}:
        measured = {(row.sparsity, row.bits): row.accuracy for row in rows if row.size == size}
        assert said[size] == {column: f"{100 * measured[level]:.1f}" for column, level in levels.items()}, size


def table(name: str) -> dict[str, dict[str, str]]:
    """The first table of an experiment's page: row, column, what stands there."""
    lines = (ROOT / "user_dir_examples" / name / "README.md").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[first:] if line.startswith("|")]
    end = next((number for number, row in enumerate(cells) if row[0] in {"file", "model"}), len(cells))
    head, _, *body = cells[:end]
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in body}
