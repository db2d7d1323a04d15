"""What a study shows: the claims with their verdicts, every figure and table, as one page and as files.

python study_report.py RESULTS REPORT makes it again from CSV files alone, such as those of docs/results/pocket.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import about
import measurements
import study_page
import verdicts
from verdicts import Comparison, Verdict

from train_large.errors import UserError
from train_large.files import whole

IN_WORDS = {True: "holds", False: "does not hold", None: "cannot be told"}
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
    """index.html, figures/, claims.csv and claims.md in `folder`. Raises UserError for files that are none of ours."""
    judged = verdicts.judge(results)
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / "claims.csv") as aside, aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(row for verdict in judged for row in _rows(verdict))
    with whole(folder / "claims.md") as aside:
        aside.write_text(markdown(judged), encoding="utf-8")
    study_page.write_figures(results, folder / "figures")
    study_page.write_page(results, judged, folder / "index.html", about.read(results))


def _rows(verdict: Verdict) -> list[list[str]]:
    of_claim = [verdict.claim, verdict.section, verdict.figure, verdict.test, IN_WORDS[verdict.holds]]
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
        measured = "<br>".join(map(_measured, verdict.comparisons)) or "not measured"
        place = f"{verdict.section}, {verdict.figure}"
        lines.append(f"| {verdict.claim} | {place} | {verdict.test} | {measured} | **{IN_WORDS[verdict.holds]}** |")
    return "\n".join(lines) + "\n"


def _measured(comparison: Comparison) -> str:
    figures = f"{comparison.mean:.3g} ({comparison.low:.3g} to {comparison.high:.3g}) {comparison.unit}"
    return f"{comparison.what}: {figures}".replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
