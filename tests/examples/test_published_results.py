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
    "name", sorted({"depth", "width", "batch_size", "dataset_size", "layer_sharing"} & {*PUBLISHED})
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
