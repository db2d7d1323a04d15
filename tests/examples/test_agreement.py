"""Two studies beside each other: themselves, another one, and one of which a part is missing."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import agreement
import measurements
import pytest
import study_results
import verdicts
from verdicts import Comparison


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    study_results.write(folder)
    return folder


def test_a_study_says_what_it_says(results):
    repeated = agreement.compare(results, results)
    assert [claim.claim for claim in repeated] == [v.claim for v in verdicts.judge(results) if v.comparisons]
    assert all(claim.complete and claim.verdicts[0] == claim.verdicts[1] for claim in repeated)
    pairs = [pair for claim in repeated for pair in claim.pairs]
    assert all(agreement.inside(*pair) for pair in pairs)
    last = agreement.told(repeated).splitlines()[-1]
    assert last.startswith(f"{len(pairs)} of {len(pairs)} comparisons")
    assert last.endswith(f"{len(repeated)} of {len(repeated)} verdicts are the same")


def test_another_study_says_something_else(results, tmp_path):
    """The smallest of the series by depth becomes the best: its claims are not what they were."""
    other = tmp_path / "other"
    shutil.copytree(results, other)
    points = [
        replace(point, perplexity=point.perplexity / 10) if point.size == "1l_64h" else point
        for point in measurements.read(results / "depth", measurements.Point)
    ]
    measurements.write(points, other / "depth")
    found = agreement.compare(results, other)
    assert any(claim.verdicts[0] != claim.verdicts[1] for claim in found)
    assert "  OUT" in agreement.told(found)


def test_what_only_one_has_measured_is_left_out(results, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(results / "depth", part / "depth")
    found = {claim.claim: claim for claim in agreement.compare(results, part)}
    assert not found["Larger models reach a perplexity in fewer updates."].complete
    assert "Sharing layers saves memory." not in found
    assert "again: not measured whole" in agreement.told(list(found.values()))


def test_of_one_seed_there_is_no_interval_to_lie_in(results, tmp_path):
    one = study_results.write(tmp_path, seeds=(1,))
    assert agreement.compare(one, results) == []
    assert "no comparison of the first study" in agreement.told([])


def test_a_study_of_fewer_seeds_is_not_whole(results, tmp_path):
    repeated = agreement.compare(results, study_results.write(tmp_path, seeds=(1,)))
    assert repeated
    assert not any(claim.complete for claim in repeated)


def test_inside_is_by_the_first_ones_interval():
    first = Comparison("", "", (1.0, 1.1, 0.9))
    assert agreement.inside(first, Comparison("", "", (0.0, 2.0, 1.0)))
    assert not agreement.inside(first, Comparison("", "", (2.0, 2.0, 2.0)))


def test_of_two_folders_by_a_command(results, tmp_path, monkeypatch, capsys):
    part = tmp_path / "part"
    shutil.copytree(results / "depth", part / "depth")
    monkeypatch.setattr("sys.argv", ["agreement.py", str(results), str(part)])
    assert agreement.main() == 0
    assert capsys.readouterr().out == agreement.told(agreement.compare(results, part)) + "\n"
    for folders, named in (([results], "two folders"), ([results, tmp_path / "nowhere"], "nowhere")):
        monkeypatch.setattr("sys.argv", ["agreement.py", *map(str, folders)])
        assert agreement.main() == 2
        assert named in capsys.readouterr().err


def test_what_is_said_of_the_committed_studies():
    root = Path(__file__).parents[2]
    committed = [root / "docs/results" / name for name in ("pocket", "again")]
    last = agreement.told(agreement.compare(*committed)).splitlines()[-1]
    assert f"> {last}\n" in (root / "user_dir_examples/study/README.md").read_text()


def test_inside_is_not_by_the_second_ones_interval():
    """Seeds that differ much have a wide interval; it does not make their mean one that the first study said."""
    first, again = Comparison("", "", (1.0, 1.1, 0.9)), Comparison("", "", (-2.0, 8.0, 0.0))
    assert again.low < first.mean < again.high
    assert not agreement.inside(first, again)
    assert agreement.inside(again, first)


def test_what_only_the_second_has_measured_makes_a_claim_not_whole(results, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(results / "depth", part / "depth")
    found = {claim.claim: claim for claim in agreement.compare(part, results)}
    assert not found["Larger models reach a perplexity in fewer updates."].complete


def test_what_is_told_is_the_first_study_s_verdict_and_the_second_ones_mean():
    first, again = Comparison("a / b", "points", (1.0, 1.1, 0.9)), Comparison("a / b", "points", (5.0, 5.1, 4.9))
    repeated = agreement.Repeated("A claim.", ("holds", "does not hold"), ((first, again),), True)
    claim, line, last = agreement.told([repeated]).splitlines()
    assert claim == "A claim. holds, again: does not hold"
    assert line == f"  OUT    5.000 in [{first.low:.3f}, {first.high:.3f}] points: a / b"
    assert last.startswith("0 of 1 comparisons")


def test_verdicts_are_in_the_order_of_the_studies(results, tmp_path):
    one = study_results.write(tmp_path, "depth", seeds=(1,))
    (claim, *_) = [
        c for c in agreement.compare(results, one) if c.claim.startswith("Larger models reach a perplexity in fewer")
    ]
    assert claim.verdicts[1] == "cannot be told"
    assert claim.verdicts[0] != "cannot be told"
