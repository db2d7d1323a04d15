"""`python profile_run.py OUT FIRST [flags of fairseq-train]`: its updates from number FIRST on are profiled.

OUT gets JSON: `updates`, how many, `seconds` of all of them, from the start of each `Trainer.train_step` to its end,
and `operations`: the seconds in each of torch's operations on the thread that calls it, without those inside it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import fairseq_cli.train
from fairseq.trainer import Trainer
from torch.profiler import ProfilerActivity, profile


def main() -> None:
    out, first = Path(sys.argv.pop(1)), int(sys.argv.pop(1))
    seconds: list[float] = []
    upstream, profiler = Trainer.train_step, profile(activities=[ProfilerActivity.CPU])

    def train_step(self, samples, *args, **kwargs):
        if self.get_num_updates() + 1 == first:
            profiler.start()
        begin = time.perf_counter()
        result = upstream(self, samples, *args, **kwargs)
        if self.get_num_updates() >= first:
            seconds.append(time.perf_counter() - begin)
        return result

    Trainer.train_step = train_step
    fairseq_cli.train.cli_main()
    profiler.stop()
    operations = {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}
    out.write_text(json.dumps({"updates": len(seconds), "seconds": sum(seconds), "operations": operations}))


main()
