"""Where the time of an update goes, stock fairseq's and ours: `make bench` writes bench/training_profile.csv.

By torch's profiler, in a process of its own for each: the seconds of each operation on the thread that calls it, by the
kind of work. What is left of an update is Python, and waiting for data. Being watched takes time, too: for speed, see
training_speed.py.

python bench/training_profile.py DATA [--sizes 6x512x16,...]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import table
import torch
from training_speed import COMMON, CONTENDERS, HERE, WARM, run

from train_large import machine

SIZES = "4x256x32,6x512x16,12x768x8"  # layers x hidden x sequences of a batch
KINDS = {  # each operation is of the first kind that has a part of its name
    "matrix products": ("mm", "linear", "addmv", "aten::dot"),
    "attention but its products": ("softmax_backward_data", "aten::_softmax", "scaled_dot_product"),
    "loss": ("log_softmax", "nll_loss", "cross_entropy"),
    "gelu": ("gelu",),
    "norms": ("layer_norm", "LayerNorm"),
    "dropout": ("dropout", "bernoulli", "random_", "bitwise", "clamp", "native_dropout"),
    "optimizer": ("adam", "foreach", "sqrt", "addcdiv", "addcmul", "vector_norm"),
    "embeddings": ("embedding", "index", "gather", "scatter"),
    "copies between layouts and types": ("copy", "cat", "clone", "contiguous", "fill_", "zero"),
    "sums and elementwise": ("aten::",),
}
REST = "Python and the rest"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--updates", type=int, default=8, help="after the first few")
    parser.add_argument("--out", type=Path, default=HERE / "training_profile.csv")
    args = parser.parse_args()
    rows = []
    for size in args.sizes.split(","):
        layers, hidden, batch = map(int, size.split("x"))
        for name, flags in CONTENDERS.items():
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "notes"
                shape = f"--encoder-layers {layers} --encoder-embed-dim {hidden} --encoder-ffn-embed-dim {4 * hidden}"
                shape += f" --encoder-attention-heads {hidden // 64} --batch-size {batch}"
                shape += f" --max-update {WARM + args.updates}"
                command = [sys.executable, HERE / "training/profile_run.py", out, WARM + 1, args.data]
                found = run(list(map(str, [*command, *f"{COMMON} {shape} {flags} --save-dir {folder}".split()])), out)
            seconds = by_kind(found["operations"], found["seconds"])
            for kind, of_kind in seconds.items():
                rows.append(
                    {
                        "layers": layers,
                        "hidden": hidden,
                        "batch": batch,
                        "contender": name,
                        "kind": kind,
                        "milliseconds_an_update": f"{1000 * of_kind / found['updates']:.2f}",
                        "share": f"{of_kind / found['seconds']:.4f}",
                        "updates": found["updates"],
                        "machine": machine.describe(torch.get_num_threads()),
                    }
                )
                print(*list(rows[-1].values())[:7], sep="\t", flush=True)
    table.write(rows, args.out)


def by_kind(operations: dict[str, float], whole: float) -> dict[str, float]:
    """Seconds by kind, what is no operation's being the last."""
    seconds = dict.fromkeys(KINDS, 0.0)
    for operation, of_it in operations.items():
        kind = next((kind for kind, parts in KINDS.items() if any(part in operation for part in parts)), None)
        if kind is not None:
            seconds[kind] += of_it
    return {**seconds, REST: whole - sum(seconds.values())}


if __name__ == "__main__":
    main()
