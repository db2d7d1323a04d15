"""The models that `--user-dir fairseq_plugins` adds to fairseq's `--arch`."""

from . import prenorm_roberta  # noqa: F401
