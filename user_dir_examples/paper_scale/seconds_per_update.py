"""Seconds per update of a run of Tensor2Tensor, once they are stable (section 2.2): prints the mean of the last N.

    python seconds_per_update.py RUN --updates 100

RUN is an --output_dir. Runs in Tensor2Tensor's environment, on Python 3.7 too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from train_large import runlog
from train_large.errors import UserError


def main(arguments=None) -> int:
    options = parser().parse_args(arguments)
    try:
        print(f"{seconds_per_update(options.run, options.updates):.6g}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(prog="seconds_per_update.py")
    words.add_argument("run", type=Path, metavar="RUN")
    words.add_argument("--updates", type=int, required=True)
    return words


def seconds_per_update(run: Path, updates: int) -> float:
    """The mean over the last `updates` of the run, or a little more where the log has no line just there.

    Raises UserError where the run made fewer."""
    path = run / runlog.NAME
    lines = [line for line in runlog.read(str(path)) if line["kind"] in ("start", "train")]
    last = lines[-1] if lines else None
    before = [line for line in lines if last and line["updates"] <= last["updates"] - updates]
    if last is None or not before:
        raise UserError(f"{path}: there are fewer than {updates} updates in it; remove the run and start it again.")
    return (last["train_seconds"] - before[-1]["train_seconds"]) / (last["updates"] - before[-1]["updates"])


if __name__ == "__main__":
    sys.exit(main())
