"""Packages that only the export needs: they are imported when it runs, and named when they are missing."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from train_large.errors import UserError


def need(name: str) -> Any:
    """The module `name`. Raises UserError that says what to install when its package is missing."""
    if name == "transformers":
        _hide_broken_torchaudio()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{name} cannot be imported ({error}): run `make env`, or `pip install '.[pack,hf]'` in the checkout."
        ) from error


def _hide_broken_torchaudio() -> None:
    """fairseq wants torchaudio installed, and transformers imports it with its models wherever it is installed
    (transformers/audio_utils.py:53, 5.23.0). PyPI's is built for CUDA and fails to load beside a torch for CPUs: then
    transformers is to find none."""
    try:
        importlib.import_module("torchaudio")
    except (ImportError, OSError):
        sys.modules["torchaudio"] = None  # type: ignore[assignment]  # what import and find_spec take for "not there"
