"""Measure a finetuned model at every sparsity and bit width, and its pretrained model on the whole validation text.

Run by demo.py as `python evaluate.py REQUEST.json RESULT.json`, one process for each size.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, utils

from train_large.compression.quantization import quantize_state
from train_large.compression.storage import storage


def main(request_path: str, result_path: str) -> None:
    logging.getLogger("fairseq").setLevel(logging.WARNING)
    request = json.loads(Path(request_path).read_text())
    utils.import_user_module(Namespace(user_dir=request["user_dir"]))
    result = {
        "perplexity": perplexity(request["pretrained"], request["text_data"]),
        "compressed": [
            entry
            for level in request["levels"]
            for entry in accuracies(level["checkpoint"], level["sparsity"], request["bits"], request["task_data"])
        ],
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


if __name__ == "__main__":
    main(*sys.argv[1:])
