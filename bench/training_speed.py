"""Tokens per second of masked LM training beside stock fairseq and Hugging Face: `make bench` writes
bench/training_speed.csv.

Every run is a process of its own, as a user starts it, on the same data; they take turns, and each is paired with the
rate of a large matrix product just before it, so that a busy moment shows. Updates before `WARM` are not counted. The
figure of a run is the tokens of its other updates over their median time.

python bench/training_speed.py DATA... [--peers PYTHON] [--rounds N] [--sizes 4x256x32,...]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import table
import torch

from train_large import machine

HERE = Path(__file__).parent
LENGTH, MASKED, WARM = 128, 0.15, 3
SIZES = "4x256x32,6x512x16,6x512x32,12x768x8,12x768x32"  # layers x hidden x sequences of a batch
RATE = """
import time, torch
from train_large.compression.products import product
a, times = torch.randn(2048, 2048).to(torch.{dtype}), []
for _ in range(12):
    start = time.perf_counter()
    product(a, a)
    times.append(time.perf_counter() - start)
print(sorted(times)[4])
"""

COMMON = (
    "--cpu --task masked_lm --tokens-per-sample 128 --max-positions 128 --lr 5e-4 --clip-norm 1 --weight-decay 0.01"
)
COMMON += " --adam-eps 1e-6 --lr-scheduler polynomial_decay --warmup-updates 20 --total-num-update 1000 --dropout 0.1"
COMMON += " --attention-dropout 0.1 --no-save --disable-validation --log-interval 1 --log-format none --num-workers 1"
OURS = "--user-dir fairseq_plugins --arch prenorm_roberta --optimizer fused_adam --criterion budgeted_masked_lm"
OURS += " --budget 1h"
CONTENDERS = {
    "stock fairseq, fp32": "--arch roberta_prenorm --criterion masked_lm --optimizer adam",
    "ours": OURS,
    "ours, fp32": f"{OURS} --matmul-precision fp32",
}


def flops_per_token(layers: int, hidden: int, vocabulary: int) -> float:
    """Of matrix products in training: 2 per weight and token forwards, twice that backwards."""
    layer = 12 * hidden**2 + 2 * LENGTH * hidden
    head = MASKED * (hidden**2 + hidden * vocabulary)
    return 6.0 * (layers * layer + head)


def large_product(dtype: str) -> float:
    """FLOP per second of a product of 2,048 x 2,048 matrices, by the quicker library."""
    command, environment = [sys.executable, "-c", RATE.format(dtype=dtype)], {**os.environ, "PYTHONPATH": "."}
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return 2 * 2048**3 / float(said.stdout)


def run(command: list[str], out: Path, **environment: str) -> dict:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ".", **environment})
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)}\n{(done.stdout + done.stderr)[-2000:]}")
    return json.loads(out.read_text())


def tokens_per_second(notes: dict) -> float:
    times = [after - before for before, after in zip(notes["ends"][WARM:], notes["ends"][WARM + 1 :], strict=False)]
    return statistics.mean(notes["tokens"][WARM + 1 :]) / statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path, nargs="+", help="folders of fairseq-preprocess, of several vocabularies")
    parser.add_argument("--peers", help="a Python with transformers and accelerate (make env-peers)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--out", type=Path, default=HERE / "training_speed.csv")
    args = parser.parse_args()
    rows = []
    for data, size in itertools.product(args.data, args.sizes.split(",")):
        vocabulary = sum(1 for _ in (data / "dict.txt").open()) + 5
        layers, hidden, batch = map(int, size.split("x"))
        found: dict[str, list[dict]] = {}
        for _ in range(args.rounds):
            for name in [*CONTENDERS, *(["Hugging Face, bf16"] if args.peers else [])]:
                rate = large_product("float32" if "fp32" in name else "bfloat16")
                with tempfile.TemporaryDirectory() as folder:
                    out = Path(folder) / "notes"
                    if name in CONTENDERS:
                        shape = f"--encoder-layers {layers} --encoder-embed-dim {hidden}"
                        shape += f" --encoder-ffn-embed-dim {4 * hidden} --encoder-attention-heads {hidden // 64}"
                        flags = f"{COMMON} {shape} --batch-size {batch} --max-update {args.updates} --save-dir {folder}"
                        command = [sys.executable, HERE / "training/fairseq_run.py", out, data]
                        command += f"{flags} {CONTENDERS[name]}".split()
                    else:
                        command = [args.peers, HERE / "training/hugging_face_run.py", out, data]
                        command += [layers, hidden, batch, args.updates]
                    notes = run(list(map(str, command)), out)
                speed = tokens_per_second(notes)
                share = speed * flops_per_token(layers, hidden, vocabulary) / rate
                found.setdefault(name, []).append({"speed": speed, "share": share, "peak": notes["peak"], "rate": rate})
                print(
                    f"{size}, vocabulary {vocabulary}, {name}: {speed:.0f} tokens/s, {share:.2f} of a product",
                    flush=True,
                )
        medians = {name: statistics.median(turn["speed"] for turn in turns) for name, turns in found.items()}
        for name, turns in found.items():
            rows.append(
                {
                    "layers": layers,
                    "hidden": hidden,
                    "batch": batch,
                    "vocabulary": vocabulary,
                    "contender": name,
                    "tokens_per_second": round(medians[name]),
                    "lowest": round(min(turn["speed"] for turn in turns)),
                    "highest": round(max(turn["speed"] for turn in turns)),
                    "ours_over_it": round(medians["ours"] / medians[name], 3),
                    "share_of_large_product": round(statistics.median(turn["share"] for turn in turns), 3),
                    "large_product_gflops": round(statistics.median(turn["rate"] for turn in turns) / 1e9),
                    "peak_bytes": round(statistics.median(turn["peak"] for turn in turns)),
                    "turns": len(turns),
                    "machine": machine.describe(torch.get_num_threads()),
                }
            )
        table.write(rows, args.out)


if __name__ == "__main__":
    main()
