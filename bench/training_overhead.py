"""What the budget, the run log and the pruning task add to an update: `make bench` writes bench/training_overhead.csv.

The time within their own functions, in a pruning run of its own process; `--log-interval 1`, the most that is logged.

python bench/training_overhead.py DATA [--sizes 4x256x32,...]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import table
import torch
from training_speed import COMMON, HERE, WARM, run

from train_large import machine

SIZES = "4x256x32,6x512x32,12x768x32"  # layers x hidden x sequences: the masks cost by weights, the rest by tokens
TASK = "--task pruning_masked_lm --sparsity-levels 0.45 --recovery 10 --recovery-interval 100000"
TASK += " --criterion budgeted_masked_lm --user-dir fairseq_plugins --arch prenorm_roberta --optimizer fused_adam"
TASK += " --max-valid-steps 2 --budget 1h"  # a model that has learned nothing would be as good pruned


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--updates", type=int, default=14)
    parser.add_argument("--out", type=Path, default=HERE / "training_overhead.csv")
    args = parser.parse_args()
    rows = []
    for size in args.sizes.split(","):
        layers, hidden, batch = map(int, size.split("x"))
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "notes"
            shape = f"--encoder-layers {layers} --encoder-embed-dim {hidden} --encoder-ffn-embed-dim {4 * hidden}"
            shape += f" --encoder-attention-heads {hidden // 64} --batch-size {batch} --max-update {args.updates}"
            common = COMMON.replace("--task masked_lm ", "").replace("--disable-validation ", "")
            command = [sys.executable, HERE / "training/overhead_run.py", out, args.data]
            command += f"{common} {TASK} {shape} --save-dir {folder}".split()
            updates = run(list(map(str, command)), out)[WARM:]
        seconds, budget, masks = (
            statistics.median(update[part] for update in updates) for part in ("seconds", "budget", "masks")
        )
        rows.append(
            {
                "layers": layers,
                "hidden": hidden,
                "batch": batch,
                "update_seconds": f"{seconds:.4f}",
                "budget_and_log_seconds": f"{budget:.6f}",
                "masks_seconds": f"{masks:.6f}",
                "share": f"{(budget + masks) / seconds:.5f}",
                "updates": len(updates),
                "machine": machine.describe(torch.get_num_threads()),
            }
        )
        print(rows[-1], flush=True)
    table.write(rows, args.out)


if __name__ == "__main__":
    main()
