"""Bits and levels of sparsity as typed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from train_large.compression.levels import level_name, parse_bits, parse_levels
from train_large.errors import UserError


@pytest.mark.parametrize("text", ["2", "4", "6", "8", "32"])
def test_bits_as_typed(text):
    assert parse_bits(text) == int(text)


@pytest.mark.parametrize("text", ["5.5", "0", "1", "9", "16", "64", "-4", "eight", "", "8 bits", "1e1", "8" * 5000])
def test_other_bits_are_refused_with_the_way_out(text):
    with pytest.raises(UserError, match=r"^--bits .*2 to 8.*32"):
        parse_bits(text)


def test_levels():
    assert parse_levels("0.15,0.30, .45 ,9e-1") == (0.15, 0.30, 0.45, 0.9)
    names = [level_name(level) for level in parse_levels("0.07,0.15,0.29,0.30,0.57,0.58,0.60,0.875,0.999")]
    assert names == ["7", "15", "29", "30", "57", "58", "60", "87.5", "99.9"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("0.3,0.15", "0.15 comes after 0.3"),
        ("0.15,0.30,0.30", "0.30 comes twice"),
        ("0,0.5", "0 is not between"),
        ("-0.1", "-0.1 is not between"),
        ("0.5,1", "1 is not between"),
        ("15,30", "15 is not between"),
        ("nan", "nan is not between"),
        ("0.15,half", "'half' is not a number"),
        ("0.15,,0.30", "'' is not a number"),
        ("", "no level"),
    ],
)
def test_bad_levels_name_the_flag_and_the_way_out(text, why):
    with pytest.raises(UserError) as error:
        parse_levels(text)
    assert "--sparsity-levels" in str(error.value)
    assert why in str(error.value)
    assert "0.15,0.30" in str(error.value)


def test_they_are_read_without_torch():
    code = "import sys; from train_large.compression import levels; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
