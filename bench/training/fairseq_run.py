"""`python fairseq_run.py OUT [flags of fairseq-train]`: fairseq-train as it is, with the end of every update noted.

OUT gets JSON: `ends`, seconds on a clock at the end of every update (after the optimizer's step; between two of them
lies all that a run does, reading data included), `tokens` and `losses` (nats) of each, `valid`, the loss of the last
validation (nats), None without one, and `peak`, the largest resident size in bytes.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from pathlib import Path

import fairseq_cli.train
from fairseq.trainer import Trainer


def main() -> None:
    out = Path(sys.argv.pop(1))
    ends: list[float] = []
    tokens: list[int] = []
    losses: list[float] = []
    valid: list[float] = []
    upstream, validate = Trainer.train_step, fairseq_cli.train.validate

    def train_step(self, samples, *args, **kwargs):
        result = upstream(self, samples, *args, **kwargs)
        ends.append(time.perf_counter())
        tokens.append(sum(sample["ntokens"] for sample in samples))
        losses.append(float(result["loss"]) * math.log(2))
        return result

    def noted(*args, **kwargs):
        result = validate(*args, **kwargs)
        valid.extend(loss * math.log(2) for loss in result)
        return result

    Trainer.train_step, fairseq_cli.train.validate = train_step, noted
    fairseq_cli.train.cli_main()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    notes = {"ends": ends, "tokens": tokens, "losses": losses, "valid": (valid or [None])[-1], "peak": peak}
    out.write_text(json.dumps(notes))


main()
