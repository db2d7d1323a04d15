"""Whether a run that was begun had this budget: ends with a sentence and status 2 where it was another.

    python same_budget.py RUN 1000000

RUN is a --save-dir or --output_dir that has a run log. Runs in Tensor2Tensor's environment, on Python 3.7 too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from train_large import runlog
from train_large.budget import parse_duration
from train_large.errors import UserError


def main(arguments=None) -> int:
    options = parser().parse_args(arguments)
    try:
        check(options.run, options.budget)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(prog="same_budget.py")
    words.add_argument("run", type=Path, metavar="RUN")
    words.add_argument("budget", metavar="BUDGET", help="as the run would be given it: 2h, 7200")
    return words


def check(run: Path, budget: str) -> None:
    """Raises UserError where the run was begun or gone on with by another budget."""
    seconds = parse_duration(budget, "BUDGET")
    for line in runlog.read(str(run / runlog.NAME)):
        theirs = line.get("budget_seconds")
        if theirs not in (None, seconds):
            raise UserError(
                f"{run} was trained with a budget of {theirs:.10g} s, and BUDGET={budget} is another: give another "
                "OUT, so that models of two budgets are not mixed."
            )


if __name__ == "__main__":
    sys.exit(main())
