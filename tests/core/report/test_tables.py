import io
import re
from dataclasses import replace

from rich.console import Console

from train_large.report.claims import judge_claims
from train_large.report.pareto import best_within, frontier_of
from train_large.report.results import Claim
from train_large.report.tables import claims_of, memory_limits, print_report, ship_line
from train_large.report.units import format_bytes


def printed(results, memory_limit=None, **console):
    file = io.StringIO()
    print_report(results, memory_limit, Console(file=file, highlight=False, **console))
    return file.getvalue()


def test_a_file_gets_80_columns_without_colour(results, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    text = printed(results)
    assert "\x1b" not in text
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text  # nothing cut off


def test_a_terminal_gets_the_same_words(results):
    plain, coloured = printed(results, width=80), printed(results, width=80, force_terminal=True)
    assert "\x1b" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain


def rows(text, title):
    """The table's rows, each as a list of words, below its rule."""
    lines = text[text.index(title) :].splitlines()
    first = next(i for i, line in enumerate(lines) if "──" in line or "---" in line) + 1
    found = []
    for line in lines[first:]:
        if not line.strip():
            break
        found.append(line.split())
    return found


def test_the_tables_hold_what_was_measured(results):
    text = printed(results)
    assert rows(text, "Trained for 10 min each") == [
        ["2l_32h", "131k", "35,800", "600.0", "419", "58.0%"],
        ["2l_64h", "300k", "28,042", "600.0", "137", "66.0%"],
        ["3l_128h", "1.03M", "15,456", "600.0", "108", "74.0%"],
        ["4l_256h", "4.01M", "5,308", "600.0", "155", "71.0%"],
    ]
    expected = [
        [
            str(i),
            model.name,
            f"{100 * entry.sparsity:.0f}%",
            str(entry.bits),
            *format_bytes(entry.bytes).split(),
            f"{100 * entry.accuracy:.1f}%",
        ]
        for i, (model, entry) in enumerate(frontier_of(results), start=1)
    ]
    assert rows(text, "Pareto frontier") == expected
    unwrapped = " ".join(text.split())
    for claim in judge_claims(results):
        assert claim.measured in unwrapped


def test_what_to_ship(results):
    model, entry = best_within(results.models, 300_000)
    line = ship_line(results, 300_000)
    assert line.startswith(f"Within 300 kB, ship this: {model.name}, ")
    assert f"{entry.bits} bits ({format_bytes(entry.bytes)}, accuracy {100 * entry.accuracy:.1f}%)" in line
    assert line in " ".join(printed(results, 300_000).split())

    assert ship_line(results, 100).startswith(
        "Within 100 B: nothing fits. The smallest is 2l_32h, 90% pruned, 4 bits ("
    )
    smaller = ship_line(results, 10**9)
    assert smaller.startswith(
        "Within 1 GB, ship this: 3l_128h, not pruned, 32 bits (4.12 MB, accuracy 74.0%). Smaller, "
    )
    found = re.search(r"of it: (\w+), (\d+)% pruned, (\d) bits \(", smaller)
    named = next(m for m in results.models if m.name == found[1]).at(int(found[2]) / 100, int(found[3]))
    assert 0.74 - named.accuracy <= (0.74 * 0.26 / 1006) ** 0.5
    for other in results.models:  # and no smaller one is as near
        for e in other.compressed:
            assert e.bytes >= named.bytes or 0.74 - e.accuracy > (0.74 * 0.26 / 1006) ** 0.5

    guessing = replace(results, task=replace(results.task, majority=0.9))
    assert ship_line(guessing, 10**9).endswith("which is no better than always guessing the commoner class.")


def test_limits_are_round_few_and_differ(results):
    limits = memory_limits(results)
    assert 3 <= len(limits) <= 7
    assert limits == sorted(limits)
    assert all(str(limit).rstrip("0") in ("1", "2", "5") for limit in limits)
    answers = [best_within(results.models, limit) for limit in limits]
    assert None not in answers
    assert len({(model.name, entry) for model, entry in answers}) == len(answers)
    assert answers[-1] == best_within(results.models, 10**12)
    assert len(memory_limits(results, 3)) <= 3


def test_claims_in_the_file_are_printed_as_they_are(results):
    own = Claim("A claim of its own.", "9", False, "It measured otherwise.")
    assert claims_of(results) == judge_claims(results)
    text = printed(replace(results, claims=(own,)))
    assert "[does not show] A claim of its own. (section 9)" in text
    assert "It measured otherwise." in text
    assert "Larger models" not in text


def test_names_are_not_markup(results):
    odd = replace(results, title="[red]title", models=(replace(results.models[0], name="[bold]x[/nonsense]"),))
    assert "[red]title" in printed(odd)
    assert "[bold]x[/nonsense]" in printed(odd)


def test_nothing_compressed(results):
    bare = replace(results, models=tuple(replace(model, compressed=()) for model in results.models))
    assert "nothing smaller is as accurate" in printed(results)
    assert "nothing smaller is as accurate" not in printed(bare)
    assert "nothing to ship" in printed(bare, 1000)
