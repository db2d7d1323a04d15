"""`python overhead_run.py OUT [flags of fairseq-train]`: a budgeted pruning run, with the time that this project adds.

OUT gets JSON: `seconds` of every update and of `budget` (clocks, decisions, the run log) and `masks` (keeping pruned
weights at zero) in each.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fairseq_cli.train
from fairseq.trainer import Trainer

from fairseq_plugins.budgeted_run import BudgetedRun
from fairseq_plugins.tasks.ladder import Ladder

PARTS = {
    "budget": (BudgetedRun, ("begin_update", "stamp", "remember", "end_update")),
    "masks": (Ladder, ("_keep_zero",)),
}


def main() -> None:
    out = Path(sys.argv.pop(1))
    updates: list[dict[str, float]] = []

    def timed(function: Callable, part: str) -> Callable:
        def run(*args, **kwargs):
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            updates[-1][part] += time.perf_counter() - begin
            return result

        return run

    for part, (owner, names) in PARTS.items():
        for name in names:
            setattr(owner, name, timed(getattr(owner, name), part))
    upstream = Trainer.train_step

    def train_step(self, samples, *args, **kwargs):
        begin = time.perf_counter()
        updates.append(dict.fromkeys(PARTS, 0.0))
        result = upstream(self, samples, *args, **kwargs)
        updates[-1]["seconds"] = time.perf_counter() - begin
        return result

    Trainer.train_step = train_step
    fairseq_cli.train.cli_main()
    out.write_text(json.dumps(updates))


main()
