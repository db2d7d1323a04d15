"""What keeping pruned weights at zero costs, as a share of a training step: `make bench` writes bench/pruning_step.csv.

Steps with and without the masks are made in turn (A B A B), in one process, on a 6-layer model 512 wide; medians.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from fairseq.data import Dictionary
from fairseq.models.roberta.model import RobertaModel

from fairseq_plugins.models.prenorm_roberta import PrenormRobertaModel
from fairseq_plugins.tasks.pruning import PruningMaskedLMTask
from train_large.machine import describe

LAYERS, HIDDEN, ENTRIES, BATCH, LENGTH, SPARSITY = 6, 512, 8000, 16, 128, 0.45


class Words:
    """As much of a task as a model asks for."""

    source_dictionary = Dictionary()


def build() -> RobertaModel:
    for i in range(ENTRIES - len(Words.source_dictionary)):
        Words.source_dictionary.add_symbol(str(i))
    args = argparse.Namespace(encoder_layers=LAYERS, encoder_embed_dim=HIDDEN, max_positions=LENGTH)
    return PrenormRobertaModel.build_model(args, Words)


def main(out: Path, rounds: int) -> None:
    torch.manual_seed(1)
    model = build().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    # The task's own pruning and masking, without a run around it.
    task = PruningMaskedLMTask.__new__(PruningMaskedLMTask)
    task.cfg = argparse.Namespace(prune_head=False, prune_scope="global", prune_structure="weights")
    task._model, task._optimizer, task._masked = model, optimizer, []
    task._prune(SPARSITY)
    tokens = torch.randint(5, ENTRIES, (BATCH, LENGTH))
    masked = torch.rand(BATCH, LENGTH) < 0.15

    def step(keep_zero: bool) -> tuple[float, float]:
        begin = time.perf_counter()
        logits = model(tokens, masked_tokens=masked)[0]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, tokens[masked]).backward()
        optimizer.step()
        middle = time.perf_counter()
        if keep_zero:
            task._keep_zero()
        end = time.perf_counter()
        return end - begin, end - middle

    step(True), step(False)
    pairs = [(step(True), step(False)) for _ in range(rounds)]
    with_masks, without = (statistics.median(pair[i][0] for pair in pairs) for i in (0, 1))
    masks = statistics.median(pair[0][1] for pair in pairs)
    ratios = sorted(pair[0][0] / pair[1][0] for pair in pairs)
    row = {
        "model": f"{LAYERS}l_{HIDDEN}h",
        "batch": f"{BATCH}x{LENGTH}",
        "sparsity": SPARSITY,
        "rounds": rounds,
        "step_with_masks_seconds": f"{with_masks:.4f}",
        "step_without_seconds": f"{without:.4f}",
        "masks_seconds": f"{masks:.5f}",
        "masks_share_of_step": f"{masks / without:.5f}",
        "ratio_of_pairs_median": f"{statistics.median(ratios):.4f}",
        "ratio_of_pairs_quartiles": "{0:.4f} to {2:.4f}".format(*statistics.quantiles(ratios)),
        "machine": describe(torch.get_num_threads()),
        "torch": torch.__version__,
    }
    print("\n".join(f"{name}: {value}" for name, value in row.items()))
    aside = out.with_suffix(".tmp")
    with open(aside, "w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)
    os.replace(aside, out)


if __name__ == "__main__":
    main(Path(__file__).with_suffix(".csv"), int(sys.argv[1]) if len(sys.argv) > 1 else 15)
