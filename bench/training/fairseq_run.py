"""`python fairseq_run.py OUT [--float64] [flags of fairseq-train]`: fairseq-train as it is, every update's end noted.

OUT gets JSON: `ends`, seconds on a clock at the end of every update (after the optimizer's step; between two of them
lies all that a run does, reading data included), `tokens` and `losses` (nats) of each, `valid`, the loss of the last
validation (nats), None without one, and `peak`, the largest resident size in bytes.

With --float64 the process computes in float64 wherever it would in float32.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from pathlib import Path

import torch


def in_float64() -> None:
    """Before fairseq is imported: what it, and this project, name float32 is float64 from now on."""
    torch.set_default_dtype(torch.float64)
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    torch.FloatTensor = torch.DoubleTensor
    kernel = torch._fused_adamw_

    def fused_adamw(parameters, gradients, *args, grad_scale=None, **kwargs):
        if grad_scale is not None:  # the kernel reads it as a float32
            torch._foreach_div_(gradients, grad_scale)
        return kernel(parameters, gradients, *args, grad_scale=None, **kwargs)

    torch._fused_adamw_ = fused_adamw


def main() -> None:
    out = Path(sys.argv.pop(1))
    if "--float64" in sys.argv:
        sys.argv.remove("--float64")
        in_float64()

    import fairseq_cli.train
    from fairseq.trainer import Trainer

    ends: list[float] = []
    tokens: list[int] = []
    losses: list[float] = []
    valid: list[float] = []
    upstream, log_stats, validate = Trainer.train_step, Trainer._reduce_and_log_stats, fairseq_cli.train.validate

    def train_step(self, samples, *args, **kwargs):
        result = upstream(self, samples, *args, **kwargs)
        ends.append(time.perf_counter())
        tokens.append(sum(sample["ntokens"] for sample in samples))
        return result

    def noted_stats(self, logging_outputs, sample_size, *args, **kwargs):  # what `train_step` gives is rounded
        losses.append(float(sum(log["loss"] for log in logging_outputs)) / float(sample_size))
        return log_stats(self, logging_outputs, sample_size, *args, **kwargs)

    def noted(*args, **kwargs):
        result = validate(*args, **kwargs)
        valid.extend(loss * math.log(2) for loss in result)
        return result

    Trainer.train_step, Trainer._reduce_and_log_stats, fairseq_cli.train.validate = train_step, noted_stats, noted
    fairseq_cli.train.cli_main()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    notes = {"ends": ends, "tokens": tokens, "losses": losses, "valid": (valid or [None])[-1], "peak": peak}
    out.write_text(json.dumps(notes))


main()
