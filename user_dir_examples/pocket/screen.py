"""Progress of all sizes on the screen: a live table on a terminal, a line for each size now and then in a log."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

_SECONDS_BETWEEN_LINES = 15


class Screen:
    """`folders` maps (size, stage) to the folder whose logs tell how far it is; `at` maps a size to its stage."""

    def __init__(self, folders: dict[tuple[str, str], Path], at: dict[str, str], console: Console) -> None:
        self._folders = folders
        self._at = at
        self._console = console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._last_line = 0.0
        self._began = time.monotonic()

    def __enter__(self) -> Screen:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._live:
            self._live.stop()

    def __call__(self) -> None:
        if self._live:
            self._live.update(self._table(), refresh=True)
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            told = "; ".join(
                f"{size} {stage} {how}".rstrip()
                for size, stage, how in self._rows()
                if stage not in ("waiting", "done")
            )
            self._console.print(f"[{self._elapsed()}] {told or 'done'}", highlight=False, markup=False, soft_wrap=True)

    def _elapsed(self) -> str:
        seconds = int(time.monotonic() - self._began)
        return f"{seconds // 60}:{seconds % 60:02d}"

    def _table(self) -> Table:
        table = Table(title=f"{self._elapsed()} since the start", title_justify="left", expand=False)
        for column in ("size", "stage", "how far"):
            table.add_column(column, no_wrap=True)
        for row in self._rows():
            table.add_row(*row)
        return table

    def _rows(self) -> list[tuple[str, str, str]]:
        return [(size, stage, self._how_far(size, stage)) for size, stage in self._at.items()]

    def _how_far(self, size: str, stage: str) -> str:
        folder = self._folders.get((size, stage))
        if folder is None:
            return ""
        if stage == "prune":
            lines = _json_lines(folder / "ladder.jsonl")
            if lines:
                return f"{lines[-1]['sparsity']:.0%} pruned, accuracy {lines[-1]['score']:.1%}"
        run = _json_lines(folder / "run.jsonl")
        trained = [line for line in run if line["kind"] == "train"]
        if not trained:
            return "starting"
        start, last = run[0], trained[-1]
        how = f"{last['updates']:,} updates, {last['train_seconds']:.0f} s"
        if start.get("budget_seconds"):
            how += f" of {start['budget_seconds']:.0f} s"
        valid = [line for line in run if line["kind"] == "valid"]
        if valid and "accuracy" in valid[-1]:
            how += f", accuracy {valid[-1]['accuracy']:.1%}"
        elif valid and valid[-1]["perplexity"]:
            how += f", perplexity {valid[-1]['perplexity']:.1f}"
        return how


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines so far; the last one may be being written, and others have been torn by a kill."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict)]
