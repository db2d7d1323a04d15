import io
import re
from dataclasses import replace

from rich.console import Console

from train_large.report.claims import judge_claims
from train_large.report.pareto import best_within, frontier_of
from train_large.report.results import Claim
from train_large.report.tables import claims_of, error_tables, memory_limits, print_report, ship_line
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
            *format_bytes(entry.bytes_paper).split(),
            f"{100 * entry.accuracy:.1f}%",
        ]
        for i, (model, entry) in enumerate(frontier_of(results), start=1)
    ]
    assert rows(text, "Pareto frontier") == expected
    unwrapped = " ".join(text.split())
    for claim in judge_claims(results):
        assert claim.measured in unwrapped


def test_real_files_stand_beside_what_is_computed(results, new_results):
    text = printed(new_results)
    assert max(len(line) for line in text.splitlines()) <= 80
    found = rows(text, "Pareto frontier")
    assert len(found) == len(frontier_of(new_results))
    for row, (_, entry) in zip(found, frontier_of(new_results)):
        sizes = (entry.file_bytes, entry.bytes, entry.bytes_paper)
        assert row[4:-1] == [word for size in sizes for word in format_bytes(size).split()]
    # What to ship goes by the files: each begins to fit where its file does.
    for model, entry in frontier_of(new_results):
        assert best_within(new_results.models, entry.file_bytes) == (model, entry)
        assert best_within(new_results.models, entry.file_bytes - 1) != (model, entry)
        assert f"({format_bytes(entry.file_bytes)}, accuracy" in ship_line(new_results, entry.file_bytes)
    assert any(
        ship_line(new_results, e.file_bytes) != ship_line(results, e.file_bytes) for _, e in frontier_of(new_results)
    )


def test_weight_errors_are_printed_by_kind_and_size(results, new_results):
    text = printed(new_results)
    found = rows(text, "Weight error, quantized to 4 bits")
    assert [row[0] for row in found] == ["attention", "attention", "fc1", "fc2", "token", "biases", "all"]
    fc2 = [model.weight_errors_at(0.0, 4)["fc2"] for model in new_results.by_size]
    assert found[3][1:] == [f"{e.mean_absolute:#.2g}" for e in fc2]
    # Nothing prunes biases: no error, no row.
    assert [row[0] for row in rows(text, "Weight error, 60% pruned")][-2:] == ["token", "all"]
    assert "Weight error" not in printed(results)


def test_tables_of_weight_errors(new_results):
    quantized, pruned = error_tables(new_results)
    assert (quantized.name, pruned.name) == ("quantized", "pruned")
    assert quantized.models == new_results.by_size
    kinds = dict(quantized.rows)
    for kind, values in kinds.items():
        errors = [model.weight_errors_at(0.0, 4)[kind] for model in new_results.by_size]
        assert values == (
            tuple(e.mean_absolute for e in errors),
            tuple(e.variance for e in errors),
            tuple(e.normalized for e in errors),
        )
    # A kind that one size alone has.
    first, *others = new_results.models
    own = replace(first.weight_errors_at(0.0, 4)["fc1"], kind="other")
    odd = replace(new_results, models=(replace(first, weight_errors=(*first.weight_errors, own)), *others))
    kinds = dict(error_tables(odd)[0].rows)
    assert list(kinds)[-2:] == ["other", "all"]
    assert kinds["other"][0] == (own.mean_absolute, None, None, None)


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
