"""Whether a study that was run again says what the first one did: comparison by comparison, claim by claim.

A comparison is reproduced if its mean lies in the first study's 95 % interval. Of three seeds each that is to be
expected of nine in ten, if nothing but chance is between the two: the second mean is as uncertain as the first.

`make study STUDY_FLAGS="--against RESULTS"` says it at its end. Of two folders of CSV files, such as those below
docs/results, python agreement.py RESULTS AGAIN does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import measurements
from verdicts import LEAST_SEEDS, Comparison, judge

from train_large.errors import UserError


def main() -> int:
    folders = list(map(Path, sys.argv[1:]))
    try:
        if len(folders) != 2:
            raise UserError("give two folders of results: python agreement.py RESULTS AGAIN.")
        for folder in folders:
            if not measurements.experiments(folder):
                raise UserError(f"{folder}: there are no measurements of a study there; run `make study` first.")
        print(told(compare(*folders)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


@dataclass(frozen=True)
class Repeated:
    """A claim that both studies have measured: its verdict in each, and the comparisons of both, in pairs. `complete`:
    whether the second has all of the first's, over as many seeds."""

    claim: str
    verdicts: tuple[str, str]
    pairs: tuple[tuple[Comparison, Comparison], ...]
    complete: bool


def compare(first: Path, again: Path) -> list[Repeated]:
    """The claims of which both studies' results have comparisons of the same, the first of enough seeds for an
    interval."""
    found = []
    for one, other in zip(judge(first), judge(again), strict=True):
        theirs = {comparison.what: comparison for comparison in other.comparisons}
        told = [c for c in one.comparisons if len(c.values) >= LEAST_SEEDS]
        pairs = tuple((c, theirs[c.what]) for c in told if c.what in theirs)
        if pairs:
            complete = len(pairs) == len(one.comparisons) == len(other.comparisons)
            complete = complete and all(len(c.values) == len(repeated.values) for c, repeated in pairs)
            found.append(Repeated(one.claim, (one.in_words, other.in_words), pairs, complete))
    return found


def inside(first: Comparison, again: Comparison) -> bool:
    return first.low <= again.mean <= first.high


def told(repeated: Sequence[Repeated]) -> str:
    """All of it in words: a line for each comparison, and how many are reproduced."""
    if not repeated:
        return f"no comparison of the first study, over {LEAST_SEEDS} seeds or more, has been measured again"
    lines = []
    for claim in repeated:
        was, now = claim.verdicts
        lines.append(f"{claim.claim} {was}" + (f", again: {now}" if claim.complete else ", again: not measured whole"))
        for one, other in claim.pairs:
            mark = "in " if inside(one, other) else "OUT"
            figures = f"{other.mean:8.3f} in [{one.low:.3f}, {one.high:.3f}] {one.unit}"
            lines.append(f"  {mark} {figures}: {one.what}")
    pairs = [pair for claim in repeated for pair in claim.pairs]
    whole = [claim for claim in repeated if claim.complete]
    same = sum(was == now for was, now in (claim.verdicts for claim in whole))
    lines.append(
        f"{sum(inside(*pair) for pair in pairs)} of {len(pairs)} comparisons are inside the first study's intervals; "
        f"{same} of {len(whole)} verdicts are the same"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
