"""What row and group ranges, clipped ranges and steps chosen by rate and distortion buy: `make bench` writes
bench/rate.csv.

    PYTHONPATH=.:user_dir_examples/pocket .venv/bin/python bench/rate.py --demo runs/demo --model model.safetensors

Every setting quantizes all parameters of a model, tied ones once. `relative_error` is ||w - w'|| / ||w||,
`entropy_bytes` what the indices take by their zeroth-order entropy, with the ranges (`train-large pack` writes 1 to 4 %
more). `accuracy` is on the demo's validation sentences; of a model in safetensors there is none.
"""

from __future__ import annotations

import argparse
import csv
import logging
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import evaluate
import torch
from fairseq import utils
from safetensors.torch import load_file
from torch import Tensor

from train_large.compression.inspection import entropy_bound
from train_large.compression.quantization import Quantizer, dequantized, quantized, uniform
from train_large.compression.rate import quantizer_for, relative_error
from train_large.files import whole
from train_large.machine import describe

BITS = (8, 6, 4, 3)
GRANULARITIES = ("tensor", "row", "group:64")
ERRORS = (0.0055, 0.0057, 0.0071, 0.02, 0.043, 0.087, 0.15, 0.2)
PLUGIN = Path(__file__).parents[1] / "fairseq_plugins"
FIELDS = ("model", "parameters", "method", "setting", "relative_error", "entropy_bytes", "bits_per_weight", "accuracy")


def settings(state: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Quantizer]]:
    """Every method with its setting, and how it quantizes a model."""
    for clip, method in ((False, "min-max"), (True, "clipped")):
        for granularity in GRANULARITIES:
            for bits in BITS:
                yield f"{method}, {granularity}", f"{bits} bits", uniform(bits, granularity, clip)
    for error in ERRORS:
        yield "rate", f"error {error:g}", quantizer_for(state, target_error=error)


def rows(
    name: str, state: Mapping[str, Tensor], accuracy: Callable[[Mapping[str, Tensor]], float] | None
) -> Iterator[dict[str, Any]]:
    for method, setting, quantizer in settings(state):
        tensors = [(key, entry) for key, entry in quantized(state, quantizer)]
        parts = [entry for _, entry in tensors if not isinstance(entry, (str, Tensor))]
        parameters, size = sum(part.indices.numel() for part in parts), sum(map(entropy_bound, parts))
        row = {
            "model": name,
            "parameters": parameters,
            "method": method,
            "setting": setting,
            "relative_error": f"{relative_error(state, quantizer):.5f}",
            "entropy_bytes": round(size),
            "bits_per_weight": f"{8 * size / parameters:.3f}",
            "accuracy": f"{accuracy(dequantized(tensors)):.4f}" if accuracy else "",
        }
        print(", ".join(str(value) for value in row.values()), flush=True)
        yield row


def demo(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of the finetuned model of every size in a demo's folder."""
    utils.import_user_module(Namespace(user_dir=str(PLUGIN)))
    for checkpoint in sorted(folder.glob("*/finetune/checkpoint_best.pt")):
        model, task, criterion = evaluate.load(str(checkpoint), str(folder / "task"))
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        name = checkpoint.parts[-3]

        def accuracy(other: Mapping[str, Tensor], model: Any, task: Any, criterion: Any) -> float:
            model.load_state_dict(other)
            sums = evaluate.totals(model, task, criterion)
            return sums["ncorrect"] / sums["nsentences"]

        score = partial(accuracy, model=model, task=task, criterion=criterion)
        yield {"model": name, "method": "float32", "accuracy": f"{score(state):.4f}"}
        yield from rows(name, state, score)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="the demo's folder")
    parser.add_argument("--model", type=Path, help="a model's weights in safetensors besides")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    options = parser.parse_args()
    logging.getLogger("fairseq").setLevel(logging.WARNING)
    result = []
    if options.model:
        result += rows(options.model.stem, load_file(options.model), None)
    result += demo(options.demo)
    machine = {"machine": describe(torch.get_num_threads()), "torch": torch.__version__}
    with whole(options.out) as aside, aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*FIELDS, *machine], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **machine} for row in result)


if __name__ == "__main__":
    main()
