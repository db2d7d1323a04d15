"""One process for each device (`--mode spawn`): their start, and their common end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.distributed.xla_multiprocessing as xmp
import torch_xla.runtime as xr
from fairseq.distributed import utils as distributed_utils
from torch_xla._internal import pjrt, tpu

from train_large.errors import UserError
from xla.patches import Options, apply

Workers = Mapping[Connection, BaseProcess]


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
    pjrt.run_multiprocess = run_processes


def patched_main(index: int, options: Options, main: Callable[..., Any], cfg: Any, kwargs: dict[str, Any]) -> None:
    """What a process does: the patches, then fairseq's own `distributed_main`."""
    apply(options)
    distributed_utils.distributed_main(index, main, cfg, kwargs)


def run_processes(fn: Callable[[], Any], start_method: str = "spawn") -> None:
    """Call `fn` in a process for each device of this host, which all end together.

    Mends `run_multiprocess` (torch_xla/_internal/pjrt.py:125, 2.9.0). There a process trains in a thread, and Python
    lets no thread take SIGTERM; the parent does not pass it on; and when one process fails, the others wait for it in
    a collective, and the parent for them, for ever.

    SIGTERM is passed on, and a second one ends all at once. When a worker fails or is killed, so are the others, and
    SystemExit says why. When they have ended at a SIGTERM, so does this process.
    """
    context = torch.multiprocessing.get_context(start_method)
    count = local_processes()
    workers: dict[Connection, BaseProcess] = {}
    try:
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, count, fn, theirs), name=f"worker {rank}")
            process.start()
            theirs.close()
            workers[ours] = process
        with _passing_sigterm_on(workers):
            _wait(workers)
    finally:
        for process in workers.values():
            process.kill()
            process.join()
    if any(process.exitcode == -signal.SIGTERM for process in workers.values()):
        os.kill(os.getpid(), signal.SIGTERM)


def local_processes() -> int:
    """How many processes the devices of this host are for."""
    return tpu.num_local_processes() if xr.device_type() == "TPU" else 1


@contextlib.contextmanager
def _passing_sigterm_on(workers: Workers) -> Iterator[None]:
    def pass_on(signum: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for connection in workers:
            with contextlib.suppress(OSError):  # a worker that has ended already
                connection.send(signum)

    signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _wait(workers: Workers) -> None:
    """Wait for the end of all workers, or of one that makes the others' impossible: SystemExit then says why."""
    running = dict(workers)
    while running:
        for connection in wait(list(running)):
            process = running.pop(connection)
            try:
                failure = connection.recv()
            except (EOFError, ConnectionError):  # it could not say how it ended
                process.join()
                if process.exitcode == -signal.SIGTERM:
                    return
                raise SystemExit(
                    f"error: {process.name} of {len(workers)} was {_end(process.exitcode)}, so the others were ended "
                    "too; run the same command again to go on from the last checkpoint."
                ) from None
            if failure is not None:
                raise SystemExit(failure)
    for process in workers.values():
        process.join()


def _end(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


# -- in a worker --


def _work(rank: int, count: int, fn: Callable[[], Any], parent: Connection) -> None:
    """Call `fn`, and tell the parent None, or with what the process is to end.

    As `_run_thread_per_device` (torch_xla/_internal/pjrt.py:44, 2.9.0), but in the main thread: these processes have
    one device each (`xla.device.choose_mode` refuses others).
    """
    os.set_inheritable(parent.fileno(), False)
    threading.Thread(target=_obey, args=(parent,), daemon=True).start()
    failure: str | int | None = None
    try:
        pjrt.initialize_multiprocess(rank, count)
        [device] = xm.get_xla_supported_devices()
        torch_xla._XLAC._xla_set_default_device(device)
        xr._init_world_size_ordinal()
        fn()
    except UserError as error:
        failure = f"error: {error}"
    except SystemExit as end:
        failure = end.code or None
    except BaseException:
        failure = f"worker {rank} of {count} has failed:\n{traceback.format_exc()}"
    parent.send(failure)


def _obey(parent: Connection) -> None:
    """Take the parent's SIGTERM, and end when it has gone.

    It comes by this way because the same SIGTERM may have come to this process too, and a second one ends it at once.
    """
    with contextlib.suppress(EOFError, OSError):
        while parent.recv() == signal.SIGTERM:
            plugin = sys.modules.get("fairseq_plugins.budgeted_run")  # fairseq imports it, after the patches
            run = plugin.current if plugin is not None else None
            if run is not None and run.has_begun:
                run.take_sigterm()
            else:
                os.kill(os.getpid(), signal.SIGTERM)
    os._exit(1)
