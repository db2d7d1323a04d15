"""One process for each device (`--mode spawn`), and the moment before fairseq starts any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch_xla.distributed.xla_multiprocessing as xmp
from fairseq.distributed import utils as distributed_utils

from xla.patches import Options, apply


def listen(options: Options, before_training: Callable[[Any], None]) -> None:
    """Call `before_training(cfg)` when fairseq has parsed its flags, and let it start its processes.

    Listens at `call_main`, and mends it (fairseq/distributed/utils.py:368 and 394, 0.12.3.1): it asks for up to 8
    processes, and torch-xla 2 refuses any number but one and all; and the processes know nothing of the patches.
    """
    call_main, spawn = distributed_utils.call_main, xmp.spawn

    def checked_call_main(cfg: Any, main: Callable[..., Any], **kwargs: Any) -> None:
        before_training(cfg)
        call_main(cfg, main, **kwargs)

    def spawn_all(fn: Callable[..., Any], args: tuple[Any, ...], nprocs: int | None = None) -> None:
        spawn(patched_main, (options, *args), nprocs=None)

    distributed_utils.call_main = checked_call_main
    xmp.spawn = spawn_all


def patched_main(index: int, options: Options, main: Callable[..., Any], cfg: Any, kwargs: dict[str, Any]) -> None:
    """What a process does: the patches, then fairseq's own `distributed_main`."""
    apply(options)
    distributed_utils.distributed_main(index, main, cfg, kwargs)
