"""Measure a finetuned model at every sparsity and bit width, in accuracy and in bytes of its packed file; how far
compression moves its weights; and its pretrained model on the whole validation text.

Run by demo.py as `python evaluate.py REQUEST RESULT.json`, one process for each size; the request is JSON too.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import tempfile
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, utils

from train_large.compression.checkpoint import read_checkpoint
from train_large.compression.conversion import Method, files_of, pack_checkpoint
from train_large.compression.levels import FULL_BITS
from train_large.compression.quantization import quantize_state
from train_large.compression.storage import storage
from train_large.compression.weight_error import ALL, WeightErrors, pruning_error, quantization_error


def main(request_json: str, result_path: str) -> None:
    logging.getLogger("fairseq").setLevel(logging.WARNING)
    request = json.loads(request_json)
    utils.import_user_module(Namespace(user_dir=request["user_dir"]))
    bits, data, folder = request["bits"], request["task_data"], Path(result_path).parent
    compressed = []
    for level in request["levels"]:
        checkpoint, sparsity = level["checkpoint"], level["sparsity"]
        sizes = file_bytes(checkpoint, bits, data, keep=None if sparsity else folder)
        for entry in accuracies(checkpoint, sparsity, bits, data):
            compressed.append({**entry, "file_bytes": sizes[entry["bits"]]})
    result = {
        "perplexity": perplexity(request["pretrained"], request["text_data"]),
        "compressed": compressed,
        "weight_errors": weight_errors(request["finetuned"], bits, request["pruned"]),
    }
    aside = Path(result_path + ".tmp")
    aside.write_text(json.dumps(result, indent=1))
    os.replace(aside, result_path)


def load(checkpoint: str, data: str) -> tuple[Any, Any, Any]:
    """The model in `checkpoint`, its task on `data`, and fairseq's own criterion for the task."""
    (model,), config, task = checkpoint_utils.load_model_ensemble_and_task([checkpoint], arg_overrides={"data": data})
    task.load_dataset("valid")
    return model.eval(), task, task.build_criterion(config.criterion, from_checkpoint=True).eval()


@torch.no_grad()
def totals(model: Any, task: Any, criterion: Any) -> dict[str, float]:
    """The logging outputs of the whole validation split, summed."""
    batches = task.get_batch_iterator(
        task.dataset("valid"), max_sentences=128, ignore_invalid_inputs=True, required_batch_size_multiple=1
    ).next_epoch_itr(shuffle=False, set_dataset_epoch=False)
    sums: dict[str, float] = {}
    for sample in batches:
        for name, value in criterion(model, sample)[2].items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums


def perplexity(checkpoint: str, data: str) -> float:
    sums = totals(*load(checkpoint, data))
    return math.exp(sums["loss"] / sums["sample_size"])


def accuracies(checkpoint: str, sparsity: float, bits: list[int], data: str) -> list[dict[str, Any]]:
    """Accuracy and cost of one level of the ladder at each bit width."""
    model, task, criterion = load(checkpoint, data)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    entries = []
    for width in bits:
        model.load_state_dict(quantize_state(state, width))
        sums = totals(model, task, criterion)
        cost = storage(model.state_dict(), width)
        entries.append(
            {
                "sparsity": sparsity,
                "bits": width,
                "accuracy": sums["ncorrect"] / sums["nsentences"],
                "parameters": cost.parameters,
                "nonzero": cost.nonzero,
                "bytes": cost.bytes,
                "bytes_paper": cost.bytes_paper,
            }
        )
        print(f"sparsity {sparsity:.2f}, {width} bits: {entries[-1]['accuracy']:.4f}", flush=True)
    return entries


def file_bytes(checkpoint: str, bits: list[int], data: str, keep: Path | None) -> dict[int, int]:
    """The bytes of the packed file of one level at each bit width, with its dictionary, labels and BPE inside.

    The files stay in the folder `keep`, as packed_8.safetensors; without one they are measured and removed."""
    files = files_of(Path(checkpoint), Path(data))
    with tempfile.TemporaryDirectory() as folder:
        return {
            width: pack_checkpoint(
                Path(checkpoint), Path(keep or folder) / f"packed_{width}.safetensors", Method(bits=width), files
            )
            for width in bits
        }


def weight_errors(checkpoint: str, bits: list[int], sparsity: float) -> list[dict[str, Any]]:
    """The weight errors of the finetuned model by kind of module, at each bit width below 32 and when pruned so far."""
    state = read_checkpoint(Path(checkpoint))["model"]
    errors: list[tuple[float, int, WeightErrors]] = [
        (0.0, width, quantization_error(state, width)) for width in bits if width != FULL_BITS
    ]
    errors.append((sparsity, FULL_BITS, pruning_error(state, sparsity)))
    return [
        {"sparsity": pruned, "bits": width, "kind": kind, **asdict(error)}
        for pruned, width, of_model in errors
        for kind, error in [*of_model.kinds.items(), (ALL, of_model.all)]
    ]


if __name__ == "__main__":
    main(*sys.argv[1:])
