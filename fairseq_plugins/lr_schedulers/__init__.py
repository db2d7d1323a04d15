"""Learning rates over a budget."""

from . import budget_linear  # noqa: F401
