"""What a study shows: the claims with their verdicts, every figure and table, as one page and as files.

python study_report.py RESULTS REPORT makes it again from CSV files alone, such as those of docs/results/pocket.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import about
import measurements
import study_page
import verdicts
from verdicts import Verdict

from train_large.errors import UserError
from train_large.files import whole

COLUMNS = ("claim", "section", "figure", "test", "verdict", "comparison", "unit", "seeds", "mean", "low", "high")


def main() -> int:
    results, folder = map(Path, sys.argv[1:])
    try:
        if not measurements.experiments(results):
            raise UserError(f"{results}: there are no measurements of a study there; run `make study` first.")
        write(results, folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def write(results: Path, folder: Path) -> None:
    """index.html, figures/, claims.csv, and claims.md and about.md for the documentation, in `folder`.

    Raises UserError for files that are none of ours.
    """
    judged = verdicts.judge(results)
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / "claims.csv") as aside, aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows(judged))
    with whole(folder / "claims.md") as aside:
        aside.write_text(markdown(judged), encoding="utf-8")
    facts = about.read(results)
    with whole(folder / "about.md") as aside:
        aside.write_text(told(facts), encoding="utf-8")
    study_page.write_figures(results, folder / "figures")
    study_page.write_page(results, judged, folder / "index.html", facts)


def rows(judged: Sequence[Verdict]) -> list[list[str]]:
    """Of claims.csv: one for each comparison."""
    return [row for verdict in judged for row in _rows(verdict)]


def _rows(verdict: Verdict) -> list[list[str]]:
    of_claim = [verdict.claim, verdict.section, verdict.figure, verdict.test, verdict.in_words]
    if not verdict.comparisons:
        return [[*of_claim, *[""] * (len(COLUMNS) - len(of_claim))]]
    return [
        [*of_claim, c.what, c.unit, str(len(c.values)), *(f"{value:.4g}" for value in (c.mean, c.low, c.high))]
        for c in verdict.comparisons
    ]


def markdown(judged: Sequence[Verdict]) -> str:
    """The claims table for the documentation."""
    lines = ["| claim | paper | test | measured: mean and 95 % interval | verdict |", "|---|---|---|---|---|"]
    for verdict in judged:
        measured = "<br>".join(f"{what}: {outcome}" for what, outcome in study_page.measured(verdict)) or "–"
        cells = (verdict.claim, study_page.where(verdict), verdict.test, measured, f"**{verdict.in_words}**")
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([study_page.tally(judged), "", *lines]) + "\n"


def told(facts: Mapping[str, str]) -> str:
    """How it was measured, for the documentation."""
    return "".join(f"- **{name}:** {text}\n" for name, text in facts.items())


if __name__ == "__main__":
    sys.exit(main())
