"""The CSV file that a benchmark leaves."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from train_large.files import whole


def write(rows: Sequence[dict], out: Path) -> None:
    """Rows with the same keys, the first line naming them; whole or not at all."""
    with whole(out) as aside, aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
