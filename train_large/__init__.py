"""The core: sizes, budgets, FLOPs, the run log, compression and the report."""

__version__ = "0.1.0"
