"""The best of a grid of finetunings by validation (Appendix D): python select_best.py SETTINGS.yaml EXPERIMENT/RUN

Writes best.json: its name, and the accuracy of each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import experiments
import jobs

from train_large import runlog
from train_large.files import whole


def main() -> None:
    settings_file, name = sys.argv[1:]
    settings = experiments.load(Path(settings_file))
    grid = jobs.find(settings, f"select/{name}").work
    assert isinstance(grid, experiments.Grid)
    accuracies = {run.name: best_accuracy(jobs.folder(settings, run)) for run in grid.finetunings}
    best = max(accuracies, key=lambda name: accuracies[name])  # the first of those that tie
    with whole(jobs.folder(settings, grid) / "best.json") as aside:
        aside.write_text(json.dumps({"name": best, "accuracies": accuracies}, indent=1) + "\n")


def best_accuracy(folder: Path) -> float:
    """That of checkpoint_best.pt: the highest of a finetuning's validations."""
    lines = runlog.read(str(folder / runlog.NAME))
    return max(line["accuracy"] for line in lines if line["kind"] == "valid" and line["subset"] == "valid")


if __name__ == "__main__":
    main()
