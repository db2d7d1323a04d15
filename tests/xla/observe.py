"""`python observe.py RECORD KIND DATA FLAGS`: a run as of `python -m xla.KIND DATA FLAGS`, watched from inside.

RECORD gets a line of JSON after every update, and one at the end: how often torch-xla has compiled so far, has brought
something from the device to the host and has waited for it, and has executed; which samples the update was of; the
seconds on the clock of the budget; and how sparse the weights were to be (for a pruning task).
"""

from __future__ import annotations

import json
import sys
from typing import Any, TextIO

import fairseq_cli.train  # noqa: F401  (sets up the log, before anything else of fairseq)
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as met
from fairseq.trainer import Trainer

from xla import batches, launch
from xla.compilations import compilations


def number_of(metric: str) -> int:
    data = met.metric_data(metric)
    return data[0] if data is not None else 0


def keep_ids() -> None:
    """Let padded batches keep the numbers of their samples, in plain values, which are not sent to the device."""
    upstream = batches.pad_batch

    def pad_batch(batch: dict[str, Any], shape: batches.Shape) -> dict[str, Any]:
        return {**upstream(batch, shape), "ids": batch["id"].tolist()}

    batches.pad_batch = pad_batch


def count_waits() -> None:
    upstream = xm.wait_device_ops

    def wait_device_ops(*args: Any) -> None:
        waits.append(1)
        upstream(*args)

    xm.wait_device_ops = wait_device_ops


waits: list[int] = []


def record_updates(record: TextIO) -> None:
    upstream = Trainer.train_step

    def train_step(self: Trainer, samples: Any, *args: Any, **kwargs: Any) -> Any:
        result = upstream(self, samples, *args, **kwargs)
        progress = getattr(self.task, "progress", None)
        note(record, [sample["ids"] for sample in samples if sample], progress.sparsity if progress else None)
        return result

    Trainer.train_step = train_step


def note(record: TextIO, ids: list[list[int]], sparsity: float | None = None) -> None:
    from fairseq_plugins import budgeted_run  # not earlier: the launcher's patches go before the plugin's

    run = budgeted_run.current
    line = {
        "ids": [number for micro_batch in ids for number in micro_batch],
        "compilations": compilations(),
        "fetched": number_of("TransferFromDeviceTime"),
        "issued": sum(met.counter_value(name) or 0 for name in ("ExecuteComputation", "ExecuteReplicated")),
        "waited": len(waits),
        "seconds": run.clock.seconds if run is not None and run.has_begun else None,
        "sparsity": sparsity,
    }
    print(json.dumps(line), file=record, flush=True)


def main(path: str, kind: str, *arguments: str) -> None:
    with open(path, "a", encoding="utf-8") as record:
        keep_ids()
        count_waits()
        record_updates(record)
        launch.main(kind, list(arguments))
        note(record, [])


if __name__ == "__main__":
    main(*sys.argv[1:])
