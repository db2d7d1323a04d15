"""What the quicker training loses, and what it wins: `make bench` writes bench/training_loss.csv and
bench/training_race.csv.

Loss: as many updates by stock fairseq and by ours, from the same weights, on the same batches; once with dropout and
matrix products in bf16 where ours takes them, once without dropout in fp32, where every loss should be stock's. What
rounding alone makes of a run is told by a third: stock fairseq again, on one thread, which adds in another order. Where
oneDNN makes ours' products there is one more, whose are torch's, as stock's: they round alike. With
rounding all but gone, both in float64, what is left is a difference of the computations. At two rates: a high one for
this batch, by which the loss falls within so few updates, and the lowest of the paper's Table 1.

Race: stock fairseq, Hugging Face and ours train the same size on the same text for as many minutes, one after the other
with the machine to itself; then they are validated.

python bench/training_loss.py DATA [--peers PYTHON] [--updates N] [--minutes M]
    [--recipes dropout,exact,float64] [--rates 1e-3,2e-4]
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import tempfile
from pathlib import Path

import table
import torch
from training_speed import CONTENDERS, HERE, run

from train_large import machine
from train_large.compression.products import is_quick_by_onednn
from train_large.sizes import LEARNING_RATES

LAYERS, HIDDEN, BATCH = 4, 256, 32
RATE, WARM_UP = 1e-3, 100
PAPER_RATE = min(LEARNING_RATES.values())
SMALL_BATCH = 8
EQUAL = 1e-4  # of a loss in nats
STOCK = "stock fairseq, fp32"
LAST = 50  # updates at the end, whose mean loss is compared
COMMON = f"--cpu --task masked_lm --tokens-per-sample 128 --max-positions 128 --lr {RATE} --clip-norm 1"
COMMON += f" --weight-decay 0.01 --adam-eps 1e-6 --lr-scheduler fixed --warmup-updates {WARM_UP} --no-save"
COMMON += f" --log-interval 1 --log-format none --num-workers 1 --batch-size {BATCH} --encoder-layers {LAYERS}"
COMMON += f" --encoder-embed-dim {HIDDEN} --encoder-ffn-embed-dim {4 * HIDDEN}"
COMMON += f" --encoder-attention-heads {HIDDEN // 64}"
EXACT = "--dropout 0 --attention-dropout 0"
USUAL = "--dropout 0.1 --attention-dropout 0.1"


def fairseq(data: Path, contender: str, flags: str, **environment: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "notes"
        command = [sys.executable, HERE / "training/fairseq_run.py", out, data]
        command += f"{COMMON} {CONTENDERS[contender]} {flags} --save-dir {folder}".split()
        return run(list(map(str, command)), out, **environment)


def hugging_face(peers: str, data: Path, seconds: float) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "notes"
        command = [peers, HERE / "training/hugging_face_run.py", out, data, LAYERS, HIDDEN, BATCH]
        return run(list(map(str, [*command, 1_000_000, seconds, RATE, WARM_UP])), out)


def losses(data: Path, updates: int, recipes: list[str], rates: list[float]) -> list[dict]:
    until = f"--max-update {updates} --disable-validation"
    as_stock = "--no-embedding-norm"  # roberta_prenorm has none
    rows = []
    for recipe, rate in itertools.product(recipes, rates):
        if recipe == "dropout":
            flags = f"{until} {USUAL} --lr {rate}"
            stock = fairseq(data, STOCK, flags)["losses"]
            rows.append(row("dropout 0.1", rate, "ours, bf16", stock, fairseq(data, "ours", flags + " " + as_stock)))
            continue
        flags = f"{until} {EXACT} --batch-size {SMALL_BATCH} --lr {rate}"
        if recipe == "float64":
            flags += " --float64"
        stock = fairseq(data, STOCK, flags)["losses"]
        ours = fairseq(data, "ours, fp32", f"{flags} {as_stock}")
        if recipe == "float64":
            rows.append(row("no dropout, stock and ours in float64", rate, "ours, float64", stock, ours))
            continue
        rows.append(row("no dropout", rate, "ours, fp32", stock, ours))
        if is_quick_by_onednn():
            ours = fairseq(data, "ours, fp32", f"{flags} {as_stock}", TRAIN_LARGE_PRODUCTS="torch")
            rows.append(row("no dropout", rate, "ours, fp32, torch's products", stock, ours))
        alone = fairseq(data, STOCK, flags, OMP_NUM_THREADS="1")
        rows.append(row("no dropout", rate, "stock fairseq, fp32, one thread", stock, alone))
    return rows


def row(recipe: str, rate: float, contender: str, stock: list[float], notes: dict) -> dict:
    losses = notes["losses"]
    differences = [abs(one - other) for one, other in zip(losses, stock, strict=True)]
    beyond = (number for number, difference in enumerate(differences, 1) if difference > EQUAL)
    means = [statistics.mean(each[-LAST:]) for each in (stock, losses)]
    found = {
        "recipe": recipe,
        "rate": rate,
        "contender": contender,
        "updates": len(losses),
        f"stock_mean_of_last_{LAST}": round(means[0], 5),
        f"mean_of_last_{LAST}": round(means[1], 5),
        "over_stock": round(means[1] / means[0], 5),
        "largest_difference": f"{max(differences):.1e}",
        f"updates_within_{EQUAL:g}": next(beyond, len(losses) + 1) - 1,
        "machine": machine.describe(torch.get_num_threads()),
    }
    print(found, flush=True)
    return found


def race(data: Path, minutes: float, peers: str | None) -> list[dict]:
    rows = []
    for contender in ["ours", STOCK, *(["Hugging Face, bf16"] if peers else [])]:
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
    parser.add_argument("--recipes", default="dropout,exact,float64")
    parser.add_argument("--rates", default=f"{RATE},{PAPER_RATE}")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    if args.updates:
        recipes, rates = args.recipes.split(","), [float(rate) for rate in args.rates.split(",")]
        table.write(losses(args.data, args.updates, recipes, rates), args.out / "training_loss.csv")
    if args.minutes:
        table.write(race(args.data, args.minutes, args.peers), args.out / "training_race.csv")


if __name__ == "__main__":
    main()
