"""Puts every subcommand's own help behind docs/reference/cli.md, so that the page has all flags and no copy of them."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.append(str(Path(__file__).parents[2]))

from train_large import cli  # noqa: E402

PAGE = "reference/cli.md"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs for each page."""
    return markdown + flags() if page.file.src_uri == PAGE else markdown


def flags() -> str:
    """The help of every subcommand, each below a heading of its own, lines of 80."""
    [commands] = (each for each in cli._parser()._actions if isinstance(each, argparse._SubParsersAction))
    with mock.patch.dict(os.environ, COLUMNS="80"):
        return "".join(f"\n## {name}\n\n```text\n{sub.format_help()}```\n" for name, sub in commands.choices.items())
