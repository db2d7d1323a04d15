"""`--mode spawn` on the CPU, for tests: two processes of one device each.

torch-xla's CPU devices have no collectives, so gloo's take their place, and it would start one process; all else is
what `python -m xla.pretrain --mode spawn` does. Each process writes to FOLDER what `Seen` has seen.

python two_processes.py FOLDER DATA [flags of xla.pretrain]

With LATE in the environment, the second process begins its first update later than the first one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch_xla
import torch_xla.core.xla_env_vars as xenv
import torch_xla.core.xla_model as xm
import torch_xla.distributed.xla_multiprocessing as xmp
import torch_xla.runtime as xr

PROCESSES = 2
SECONDS_LATE = 2


class Gloo:
    """Collectives on tensors of any device, by way of the host.

    The group is not torch's default one: fairseq would take it for the run's own.
    """

    def __init__(self, folder: str, rank: int) -> None:
        store = dist.FileStore(f"{folder}/rendezvous", PROCESSES)
        self.rank = rank
        self._group = dist.ProcessGroupGloo(store, rank, PROCESSES)

    def all_reduce(
        self, reduce_type: str, inputs: Any, scale: float = 1.0, groups: Any = None, pin_layout: bool = True
    ) -> Any:
        """As `xm.all_reduce`: a list is reduced in place, a tensor is not."""
        assert reduce_type == "sum"
        assert not groups or groups == [list(range(PROCESSES))]
        tensors = [inputs] if torch.is_tensor(inputs) else list(inputs)
        sums = torch_xla._XLAC._xla_get_cpu_tensors(tensors)  # all of them by one program
        for total in sums:
            self._group.allreduce([total]).wait()
            total.mul_(scale)
        sums = xm.send_cpu_data_to_device(sums, tensors[0].device)
        if torch.is_tensor(inputs):
            return sums[0]
        for tensor, total in zip(tensors, sums, strict=True):
            tensor.copy_(total)
        return inputs

    def rendezvous(self, tag: str, payload: bytes = b"", replicas: Any = ()) -> None:
        self._group.barrier().wait()

    def take_their_place(self) -> None:
        xm.all_reduce, xm.rendezvous = self.all_reduce, self.rendezvous
        xr.world_size = lambda: PROCESSES
        xr.global_ordinal = xr.local_ordinal = lambda: self.rank


class Seen:
    """What a process has seen of its run.

    FOLDER/seenRANK.json: the learning rate of every update, the kind of its run, the seconds of budget that were used
    when it began, whether fairseq's wrapper is around the model, and whether its two tied weights are one.
    FOLDER/modelRANK.pt: its weights. FOLDER/pidRANK: its process.
    """

    def __init__(self, late: bool) -> None:
        from fairseq.trainer import Trainer

        self.rates: list[float] = []
        self.trainer: Any = None
        upstream = Trainer.train_step

        def train_step(trainer: Any, samples: Any, raise_oom: bool = False) -> Any:
            if late and self.trainer is None:
                time.sleep(SECONDS_LATE)
            self.trainer = trainer
            self.rates.append(trainer.get_lr())
            return upstream(trainer, samples, raise_oom)

        Trainer.train_step = train_step

    def write(self, folder: Path, rank: int) -> None:
        from fairseq.distributed.tpu_distributed_data_parallel import TPUDistributedDataParallel

        from fairseq_plugins import budgeted_run

        encoder = self.trainer.get_model().encoder
        facts = {
            "rates": self.rates,
            "run": type(budgeted_run.current).__name__,
            "began_at": budgeted_run.current._first_reading[1],
            "wrapper_is_fairseqs": isinstance(self.trainer.model.module, TPUDistributedDataParallel),
            "tied": encoder.lm_head.weight is encoder.sentence_encoder.embed_tokens.weight,
        }
        (folder / f"seen{rank}.json").write_text(json.dumps(facts))
        weights = {name: value.cpu() for name, value in self.trainer.get_model().state_dict().items()}
        torch.save(weights, folder / f"model{rank}.pt")


def worker(index: int, folder: str, main: Callable[..., None], args: tuple[Any, ...]) -> None:
    rank = int(os.environ[xenv.PJRT_LOCAL_PROCESS_RANK])
    Path(folder, f"pid{rank}").write_text(str(os.getpid()))
    Gloo(folder, rank).take_their_place()
    seen = Seen(late=rank > 0 and "LATE" in os.environ)
    main(rank, *args)
    seen.write(Path(folder), rank)


def start(folder: str, arguments: list[str]) -> None:
    os.environ |= {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "1"}
    from xla import device, launch, spawn

    upstream = xmp.spawn
    xmp.spawn = lambda main, args, nprocs: upstream(worker, (folder, main, args), nprocs)
    spawn.local_processes = lambda: PROCESSES
    device.local_devices = lambda which: PROCESSES
    device.choose_mode = lambda asked, which: "spawn"  # which it refuses where there are no collectives
    launch.main("pretrain", arguments)


if __name__ == "__main__":
    Path(sys.argv[1], "rendezvous").unlink(missing_ok=True)
    start(sys.argv[1], sys.argv[2:])
