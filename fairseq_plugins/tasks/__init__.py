"""The pruning ladder of section 4.3, in fairseq's tasks."""

from . import pruning  # noqa: F401
