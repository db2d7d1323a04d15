"""Compilations: how many there were, and what made one where there should be none."""

from __future__ import annotations

import logging
from typing import Any

import torch

logger = logging.getLogger(__name__)

# The first update has no momentum yet and the second is the first that has; with gradient accumulation the last update
# of an epoch may be a short one. What comes after these is not expected to need another program.
WARM_UP = 3


def compilations() -> int:
    """How many programs torch-xla has compiled in this process."""
    import torch_xla.debug.metrics as met

    data = met.metric_data("CompileTime")
    return data[0] if data is not None else 0


def shapes(samples: Any) -> tuple[str, ...]:
    """The shapes of all tensors in the micro-batches of one update, each once, such as "src_tokens 8x128"."""
    found: dict[str, None] = {}

    def look(value: Any, name: str) -> None:
        if torch.is_tensor(value):
            found[f"{name} {'x'.join(map(str, value.shape))}"] = None
        elif isinstance(value, dict):
            for key, item in value.items():
                look(item, key)
        elif isinstance(value, list):
            for item in value:
                look(item, name)

    look(samples, "batch")
    if isinstance(samples, list):
        found[f"{len(samples)} micro-batches"] = None
    return tuple(found)


class Watch:
    """Warns of updates that had to be compiled when training was under way."""

    def __init__(self) -> None:
        self.updates = 0
        self._before = 0
        self._seen: set[str] = set()

    def begin_update(self) -> None:
        self._before = compilations()

    def end_update(self, samples: Any) -> None:
        """`samples`: the micro-batches of the update."""
        self.updates += 1
        new = [shape for shape in shapes(samples) if shape not in self._seen]
        self._seen.update(new)
        compiled = compilations() - self._before
        if compiled and self.updates > WARM_UP:
            cause = f"new in it: {', '.join(new)}" if new else "its shapes are not new"
            logger.warning(
                f"update {self.updates} of this process was compiled anew ({compiled} programs; {cause}); this takes "
                "time that is not charged to the budget, and should not happen again and again"
            )
