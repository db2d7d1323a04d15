"""How the plugin ends a process: one sentence, no traceback."""

from __future__ import annotations

import contextlib
import sys

from train_large.errors import UserError


@contextlib.contextmanager
def user_errors_end_the_process():
    """Turn a UserError into its sentence on standard error and a status of 2; Tensor2Tensor would show a traceback."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
