r"""Labels in int8 beside float32's, and how many are decided again: `make bench` writes bench/close_calls.csv.

    PYTHONPATH=. .venv/bin/python bench/close_calls.py --demo runs/demo \
        --sentences runs/downloads/movie-reviews/reviews.tsv

On the packed files that the demo keeps. An error is that of the lead of one class over another; it and the lead under
which finer numbers decide (docs/runtime.md) are in units of the root mean square that the model measured when it was
loaded, for what decides again as for what decides first.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import torch

from train_large.compression import vocabulary
from train_large.compression.kernels import FLOAT32
from train_large.compression.runtime import CAUTION, Model, load_model
from train_large.files import whole
from train_large.machine import describe

BATCH = 64


@torch.inference_mode()
def measure(model: Model, lines: Sequence[str]) -> dict[str, object]:
    pieces = [vocabulary.sentence([ids], model.task) for ids in model._vocabulary.encode(lines)]
    batches = [[ids[: model.network.max_length] for ids in pieces[i : i + BATCH]] for i in range(0, len(pieces), BATCH)]
    tensors = [[torch.tensor(ids) for ids in batch] for batch in batches]
    deciding = model.deciding[: len(model.doubts)]
    *rough, exact = (
        torch.cat([model._logits(batch, precision) for batch in tensors]) for precision in (*deciding, FLOAT32)
    )
    told, again = (torch.cat(part) for part in zip(*(model.logits(batch) for batch in batches)))
    units, quick = [doubt / CAUTION for doubt in model.doubts], rough[0]
    largest = [float(_spread(one - exact).max()) / unit for one, unit in zip(rough, units)]
    leads = [_spread(one.topk(2).values) for one in rough]
    close = torch.stack([lead < doubt for lead, doubt in zip(leads, model.doubts)])
    assert torch.equal(again, close[0])
    changed = quick.argmax(1) != exact.argmax(1)
    return {
        "sentences": len(lines),
        "precision": model.precision,
        "decided_again": f"{float(again.float().mean()):.4f}",
        "decided_by_the_last": int(close.all(0).sum()),
        "labels_changed_without": int(changed.sum()),
        "labels_changed": int((told.argmax(1) != exact.argmax(1)).sum()),
        "largest_error": f"{largest[0]:.2f}",
        "largest_error_of_the_next": f"{largest[1]:.2f}" if largest[1:] else "",
        "largest_lead_of_a_changed_label": f"{max([0.0, *leads[0][changed].tolist()]) / units[0]:.2f}",
        "decided_again_below": CAUTION,
    }


def _spread(rows: torch.Tensor) -> torch.Tensor:
    return rows.amax(1) - rows.amin(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="the demo's folder")
    parser.add_argument("--sentences", type=Path, required=True, help="a TSV whose first column has sentences")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    lines = [line.split("\t")[0].strip() for line in args.sentences.read_text(encoding="utf-8").splitlines()[1:]]
    rows = []
    for path in sorted(args.demo.glob("*/measure/packed_[468].safetensors")):
        row = {"model": path.parts[-3], "bits": path.stem.removeprefix("packed_")}
        model = load_model(path)
        if not model.doubts:
            print(*row.values(), f"computes in {model.precision} here, and decides nothing again", sep="\t", flush=True)
            continue
        row |= measure(model, lines)
        rows.append(row | {"machine": describe(torch.get_num_threads()), "torch": torch.__version__})
        print(*row.values(), sep="\t", flush=True)
    if not rows:
        return  # what was measured elsewhere stays
    with whole(args.out) as aside, aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
