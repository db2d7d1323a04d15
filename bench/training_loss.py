"""What the quicker training loses, and what it wins: `make bench` writes bench/training_loss.csv and
bench/training_race.csv.

Loss: as many updates by stock fairseq and by ours, from the same weights, on the same batches; once with dropout and
matrix products in bf16 where ours takes them, once without dropout in fp32, where every loss should be stock's.

Race: stock fairseq, Hugging Face and ours train the same size on the same text for as many minutes, one after the other
with the machine to itself; then they are validated.

python bench/training_loss.py DATA [--peers PYTHON] [--updates N] [--minutes M]
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from pathlib import Path

import table
import torch
from training_speed import CONTENDERS, HERE, run

from train_large import machine

LAYERS, HIDDEN, BATCH = 4, 256, 32
RATE, WARM_UP = 1e-3, 100
LAST = 50  # updates at the end, whose mean loss is compared
COMMON = f"--cpu --task masked_lm --tokens-per-sample 128 --max-positions 128 --lr {RATE} --clip-norm 1"
COMMON += f" --weight-decay 0.01 --adam-eps 1e-6 --lr-scheduler fixed --warmup-updates {WARM_UP} --no-save"
COMMON += f" --log-interval 1 --log-format none --num-workers 1 --batch-size {BATCH} --encoder-layers {LAYERS}"
COMMON += f" --encoder-embed-dim {HIDDEN} --encoder-ffn-embed-dim {4 * HIDDEN}"
COMMON += f" --encoder-attention-heads {HIDDEN // 64}"
EXACT = "--dropout 0 --attention-dropout 0"
USUAL = "--dropout 0.1 --attention-dropout 0.1"


def fairseq(data: Path, contender: str, flags: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "notes"
        command = [sys.executable, HERE / "training/fairseq_run.py", out, data]
        command += f"{COMMON} {CONTENDERS[contender]} {flags} --save-dir {folder}".split()
        return run(list(map(str, command)), out)


def hugging_face(peers: str, data: Path, seconds: float) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "notes"
        command = [peers, HERE / "training/hugging_face_run.py", out, data, LAYERS, HIDDEN, BATCH]
        return run(list(map(str, [*command, 1_000_000, seconds, RATE, WARM_UP])), out)


def losses(data: Path, updates: int) -> list[dict]:
    rows = []
    for recipe, flags, ours in (("dropout 0.1, bf16", USUAL, "ours"), ("no dropout, fp32", EXACT, "ours, fp32")):
        flags = f"{flags} --max-update {updates} --disable-validation"
        theirs = fairseq(data, "stock fairseq, fp32", flags)["losses"]
        mine = fairseq(data, ours, f"{flags} --no-embedding-norm")["losses"]  # as roberta_prenorm
        last = [statistics.mean(each[-LAST:]) for each in (theirs, mine)]
        rows.append(
            {
                "recipe": recipe,
                "updates": len(mine),
                "stock_first_loss": round(theirs[0], 6),
                "ours_first_loss": round(mine[0], 6),
                f"stock_mean_of_last_{LAST}": round(last[0], 5),
                f"ours_mean_of_last_{LAST}": round(last[1], 5),
                "ours_over_stock": round(last[1] / last[0], 5),
                "largest_difference_of_an_update": f"{max(map(abs, map(float.__sub__, mine, theirs))):.2e}",
            }
        )
        print(rows[-1], flush=True)
    return rows


def race(data: Path, minutes: float, peers: str | None) -> list[dict]:
    rows = []
    for contender in ["ours", "stock fairseq, fp32", *(["Hugging Face, bf16"] if peers else [])]:
        if contender in CONTENDERS:
            flags = f"{USUAL} --stop-time-hours {minutes / 60} --validate-interval-updates 1000000"
            flags += " --validate-interval 1000000"
            notes = fairseq(data, contender, flags)
        else:
            notes = hugging_face(str(peers), data, 60 * minutes)
        rows.append(
            {
                "contender": contender,
                "layers": LAYERS,
                "hidden": HIDDEN,
                "minutes": minutes,
                "updates": len(notes["ends"]),
                "tokens": sum(notes["tokens"]),
                "validation_perplexity": round(math.exp(notes["valid"]), 2),
                "peak_bytes": notes["peak"],
                "machine": machine.describe(torch.get_num_threads()),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--peers", help="a Python with transformers and accelerate (make env-peers)")
    parser.add_argument("--updates", type=int, default=300, help="0 leaves the comparison of losses out")
    parser.add_argument("--minutes", type=float, default=10, help="0 leaves the race out")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    if args.updates:
        table.write(losses(args.data, args.updates), args.out / "training_loss.csv")
    if args.minutes:
        table.write(race(args.data, args.minutes, args.peers), args.out / "training_race.csv")


if __name__ == "__main__":
    main()
