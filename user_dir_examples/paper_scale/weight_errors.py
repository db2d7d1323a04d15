"""How far quantization and pruning move a model's weights (section 5.3, Figure 9), by kind of module:

    python weight_errors.py CHECKPOINT --bits 4 --sparsity 0.60 --csv FILE

train_large/compression/weight_error.py defines the statistics.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from train_large.compression.checkpoint import read_checkpoint
from train_large.compression.weight_error import ALL, WeightError, pruning_error, quantization_error
from train_large.errors import UserError
from train_large.files import whole

COLUMNS = ("sparsity", "bits", "kind", *(field.name for field in fields(WeightError)))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        state = read_checkpoint(options.checkpoint)["model"]
        measured = [
            (0.0, options.bits, quantization_error(state, options.bits)),
            (options.sparsity, 32, pruning_error(state, options.sparsity)),
        ]
        with whole(options.csv) as aside, aside.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            table.writeheader()
            for sparsity, bits, errors in measured:
                for kind, error in [*errors.kinds.items(), (ALL, errors.all)]:
                    table.writerow({"sparsity": sparsity, "bits": bits, "kind": kind, **asdict(error)})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.csv}")
    return 0


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(prog="weight_errors.py", allow_abbrev=False)
    words.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    words.add_argument("--bits", type=int, required=True, help="bit width to quantize to")
    words.add_argument("--sparsity", type=float, required=True, help="share of the weights to prune")
    words.add_argument("--csv", type=Path, required=True, help="CSV file to write")
    return words


if __name__ == "__main__":
    sys.exit(main())
