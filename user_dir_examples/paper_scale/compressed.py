"""What compression costs and saves, as one table: python compressed.py FOLDER [FOLDER ...] --csv FILE

Reads FOLDER/quantized, where paper_scale/common.sh leaves for each sparsity and bit width the packed file and what
fairseq-validate said. bytes_paper is the paper's count, nonzero parameters times bits (sections 4.1 and 4.3);
bytes_file the packed file's size.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from train_large.compression.inspection import inspect
from train_large.errors import UserError
from train_large.files import whole

NAME = re.compile(r"sparsity(\d+)-(\d+)bits\.log")


@dataclass(frozen=True, order=True)
class Row:
    """One model at one sparsity (per cent) and bit width; its accuracy from 0 to 1."""

    run: str
    sparsity: int
    bits: int
    accuracy: float
    parameters: int
    nonzero: int
    bytes_paper: int
    bytes_file: int


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        rows = sorted(row for folder in options.folders for row in rows_of(folder))
        with whole(options.csv) as aside, aside.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
            table.writeheader()
            table.writerows(map(asdict, rows))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.csv}")
    return 0


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(prog="compressed.py", allow_abbrev=False)
    words.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="where models were compressed")
    words.add_argument("--csv", type=Path, required=True, help="CSV file to write")
    return words


def rows_of(folder: Path) -> list[Row]:
    """A row for each log in folder/quantized. Raises UserError where there is none, or no accuracy in it."""
    logs = sorted(path for path in (folder / "quantized").glob("*.log") if NAME.fullmatch(path.name))
    if not logs:
        raise UserError(f"{folder / 'quantized'}: nothing has been measured there.")
    rows = []
    for log in logs:
        match = NAME.fullmatch(log.name)
        assert match is not None
        packed = inspect(log.with_suffix(".safetensors"))
        total = packed.total
        counts = (total.parameters, total.nonzero, total.bytes_paper, packed.bytes_whole)
        rows.append(Row(folder.name, int(match[1]), int(match[2]), accuracy(log), *counts))
    return rows


def accuracy(log: Path) -> float:
    """The accuracy, 0 to 1, in what `fairseq-validate --log-format json` printed: its last line that has one, in per
    cent to one decimal, which is fairseq's rounding and the paper's. Raises UserError where none has."""
    found = re.findall(r'^.*?(\{.*"(?:\w+_)?accuracy".*\})\s*$', log.read_text(encoding="utf-8"), re.MULTILINE)
    if not found:
        raise UserError(f"{log}: there is no accuracy in it; remove the file and run the script again.")
    line = json.loads(found[-1])
    return round(float(next(value for key, value in line.items() if key.endswith("accuracy"))) / 100, 5)


if __name__ == "__main__":
    sys.exit(main())
