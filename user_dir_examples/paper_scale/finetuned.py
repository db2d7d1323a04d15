"""The accuracy of finished finetunings, and the best of them by validation (Appendix D): their run logs say it.

    python finetuned.py RUN [RUN ...] --csv accuracies.csv
    python finetuned.py RUN [RUN ...] --best LINK [--remove-others]

--best makes LINK a link to the best of the runs that hold a file `done`; --remove-others removes the checkpoints of the
rest of those, and leaves their logs.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from train_large import runlog
from train_large.errors import UserError
from train_large.files import whole


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    runs = [folder for folder in options.runs if not folder.is_symlink()]  # a glob finds the link to the best as well
    try:
        if options.best:
            runs = [folder for folder in runs if (folder / "done").exists()]
        if not runs:
            raise UserError(f"{options.runs[0]}: no finished finetuning is there.")
        accuracies = {folder: best_accuracy(folder) for folder in runs}
        if options.csv:
            write(accuracies, options.csv)
        if options.best:
            best = max(accuracies, key=lambda folder: accuracies[folder])  # the first of those that tie
            link(best, options.best)
            if options.remove_others:
                remove_checkpoints(folder for folder in runs if folder != best)
            print(f"the best of {len(runs)}: {best.name}, {accuracies[best]:.4f}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(prog="finetuned.py", allow_abbrev=False)
    words.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="--save-dir of a finetuning")
    words.add_argument("--csv", type=Path, help="CSV file to write: run, accuracy")
    words.add_argument("--best", type=Path, metavar="LINK", help="make this a link to the best that is done")
    words.add_argument("--remove-others", action="store_true", help="remove the checkpoints of the others")
    return words


def best_accuracy(folder: Path) -> float:
    """That of checkpoint_best.pt, 0 to 1: the highest of the validations. Raises UserError where there is none."""
    lines = runlog.read(str(folder / runlog.NAME))
    found = [line["accuracy"] for line in lines if line["kind"] == "valid" and line["subset"] == "valid"]
    if not found:
        raise UserError(f"{folder / runlog.NAME}: the finetuning has not been validated; let it end.")
    return max(found)


def write(accuracies: dict[Path, float], path: Path) -> None:
    """A row for each run, sorted, named by its folder and, where several tasks have it, the folder above."""
    with whole(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("run", "accuracy"))
        table.writerows(sorted((f"{folder.parent.name}/{folder.name}", accuracies[folder]) for folder in accuracies))


def link(target: Path, at: Path) -> None:
    """Make `at` a link to its neighbour `target`, in the place of the link that was there."""
    aside = at.with_name(f".{at.name}.{os.getpid()}")
    aside.symlink_to(os.path.relpath(target, at.parent))
    os.replace(aside, at)


def remove_checkpoints(folders) -> None:
    for folder in folders:
        for checkpoint in folder.glob("checkpoint*.pt"):
            checkpoint.unlink()


if __name__ == "__main__":
    sys.exit(main())
