"""The optimizers that `--user-dir fairseq_plugins` adds to fairseq's `--optimizer`."""

from . import fused_adam  # noqa: F401
