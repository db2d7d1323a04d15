"""The bytes foreseen, beside those counted of real checkpoints."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from train_large.compression.forecast import forecast_bytes
from train_large.errors import UserError
from train_large.sizes import Size

MEASURED = Path(__file__).parents[3] / "user_dir_examples" / "pocket" / "measured.csv"
VOCABULARY = 1009


def rows():
    with MEASURED.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_there_are_measurements():
    assert len(rows()) >= 28


@pytest.mark.parametrize("name", ["2l_32h", "2l_64h", "3l_128h"])
def test_near_what_was_counted(name):
    for row in (row for row in rows() if row["model"] == name):
        size = Size(int(row["layers"]), int(row["hidden"]), heads=int(row["heads"]))
        # These models were finetuned, and their classification heads not pruned.
        bits, head = int(row["bits"]), size.hidden * (size.hidden + 1) + 2 * (size.hidden + 1)
        body = int(row["parameters"]) - head
        foreseen = forecast_bytes(size, body, VOCABULARY, bits, float(row["sparsity"])) + head * bits // 8
        assert foreseen == pytest.approx(int(row["bytes"]), rel=0.03), (row["sparsity"], row["bits"])


def test_fewer_bits_and_more_zeros_take_fewer_bytes():
    size = Size(12, 768)
    whole = forecast_bytes(size, 125_000_000, 50_265, 32)
    assert whole == 4 * 125_000_000
    by_bits = [forecast_bytes(size, 125_000_000, 50_265, bits, 0.45) for bits in (32, 8, 6, 4)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert forecast_bytes(size, 125_000_000, 50_265, 8, 0.9) < forecast_bytes(size, 125_000_000, 50_265, 8, 0.45)


def test_bits_that_there_are_not():
    with pytest.raises(UserError, match="--bits 1:"):
        forecast_bytes(Size(1, 16), 1000, 100, 1)
