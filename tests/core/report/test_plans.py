"""A plan's figure. What it says in words and as JSON is tested with what it plans, in test_planner.py."""

from __future__ import annotations

import pytest
from pilot_logs import BIGGER, SIZES, TRUTH, write_logs

from train_large.errors import UserError
from train_large.planner import plan
from train_large.report.plans import draw
from train_large.sizes import Size


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    return write_logs(tmp_path_factory.mktemp("pilots"), TRUTH, (*SIZES, BIGGER))


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")])
def test_the_figure(logs, tmp_path, name, start):
    draw(logs, 450, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_figure_is_of_the_plans_sizes(logs, tmp_path):
    asked = Size(4, 96, heads=6)
    draw(logs, 450, tmp_path / "a.svg", [asked])
    drawn = (tmp_path / "a.svg").read_text()
    for option in plan(logs, 450, candidates=[asked]).options:
        assert f"<!-- {option.size} -->" in drawn


def test_a_figure_of_no_known_kind(logs, tmp_path):
    with pytest.raises(UserError, match="a.txt: give a name that ends in .png"):
        draw(logs, 450, tmp_path / "a.txt")
