"""Two workers of one fairseq run, over gloo on this machine. Each writes its learning rates, update by update, to
FOLDER/ratesRANK.

python two_workers.py FOLDER DATA [flags of fairseq-train]

With LATE in the environment, the second worker begins its first epoch two seconds later than the first one.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch.multiprocessing
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.distributed import utils as distributed_utils
from fairseq.trainer import Trainer
from fairseq_cli.train import main


def worker(rank: int, folder: str, arguments: list[str]) -> None:
    rates: list[float] = []
    upstream = Trainer.train_step

    def train_step(self: Trainer, samples: object, raise_oom: bool = False) -> object:
        rates.append(self.get_lr())
        return upstream(self, samples, raise_oom)

    Trainer.train_step = train_step
    if rank and "LATE" in os.environ:
        begin = Trainer.begin_epoch

        def begin_epoch(self: Trainer, epoch: int) -> None:
            if not rates:
                time.sleep(2)
            begin(self, epoch)

        Trainer.begin_epoch = begin_epoch
    parallel = ["--distributed-world-size", "2", "--distributed-rank", str(rank), "--distributed-backend", "gloo"]
    parallel += [
        "--distributed-init-method",
        f"file://{folder}/rendezvous",
        "--distributed-no-spawn",
        "--ddp-backend",
        "legacy_ddp",
    ]
    parser = options.get_training_parser()
    config = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, [*arguments, *parallel]))
    distributed_utils.call_main(config, main)
    Path(folder, f"rates{rank}").write_text(" ".join(map(repr, rates)))


if __name__ == "__main__":
    Path(sys.argv[1], "rendezvous").unlink(missing_ok=True)
    torch.multiprocessing.spawn(worker, (sys.argv[1], sys.argv[2:]), nprocs=2)
