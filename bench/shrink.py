"""What removing zeroed heads and FFN rows saves: `make bench` writes bench/shrink.csv.

Half of the heads and of the FFN rows of each layer are pruned by magnitude, the checkpoint is shrunk, and both are
loaded. Forward passes of the two are made in turn (A B A B), in one process, by fairseq's own model; medians. Weights
are random: their values change no time.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from fairseq.data import Dictionary
from torch.utils.flop_counter import FlopCounterMode

from fairseq_plugins.models.prenorm_roberta import PrenormRobertaModel
from train_large.compression.checkpoint import read_checkpoint, write_checkpoint
from train_large.compression.shrink import shrink_checkpoint
from train_large.compression.structures import blocks, smallest_structures, spread
from train_large.machine import describe

# layers, hidden, heads, dictionary entries: the largest model of the pocket study, and one of the paper's.
SHAPES = ((3, 128, 8, 1009), (6, 512, 8, 8000))
BATCHES, LENGTH, SPARSITY = (1, 32), 128, 0.5


class Words:
    """As much of a task as a model asks for."""

    def __init__(self, entries: int) -> None:
        self.source_dictionary = Dictionary()
        for i in range(entries - len(self.source_dictionary)):
            self.source_dictionary.add_symbol(str(i))


def load(path: Path, task: Words) -> PrenormRobertaModel:
    checkpoint = read_checkpoint(path)
    model = PrenormRobertaModel.build_model(argparse.Namespace(**checkpoint["cfg"]["model"]), task)
    model.load_state_dict(checkpoint["model"])
    return model.eval()


def pruned_and_shrunk(folder: Path, shape: tuple[int, int, int, int]) -> dict[str, tuple[Path, PrenormRobertaModel]]:
    layers, hidden, heads, entries = shape
    task = Words(entries)
    args = argparse.Namespace(
        arch="prenorm_roberta",
        encoder_layers=layers,
        encoder_embed_dim=hidden,
        encoder_attention_heads=heads,
        max_positions=LENGTH,
    )
    torch.manual_seed(1)
    state = PrenormRobertaModel.build_model(args, task).state_dict()
    found = blocks(state, {f"encoder.sentence_encoder.layers.{i}.self_attn": heads for i in range(layers)})
    for name, gone in spread(found, smallest_structures(found, SPARSITY, "layer")).items():
        state[name].masked_fill_(gone, 0)
    write_checkpoint({"cfg": {"model": vars(args)}, "model": state}, folder / "pruned.pt")
    shrink_checkpoint(folder / "pruned.pt", folder / "shrunk.pt")
    return {name: (folder / f"{name}.pt", load(folder / f"{name}.pt", task)) for name in ("pruned", "shrunk")}


def seconds(model: PrenormRobertaModel, tokens: torch.Tensor) -> float:
    begin = time.perf_counter()
    model(tokens, features_only=True)
    return time.perf_counter() - begin


def flops(model: PrenormRobertaModel, tokens: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(tokens, features_only=True)
    return counter.get_total_flops()


@torch.no_grad()
def measure(shape: tuple[int, int, int, int], rounds: int) -> list[dict[str, str | int | float]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        made = pruned_and_shrunk(Path(folder), shape)
        (pruned_file, pruned), (shrunk_file, shrunk) = made.values()
        counts = [sum(p.numel() for p in model.parameters()) for model in (pruned, shrunk)]
        sizes = [path.stat().st_size for path in (pruned_file, shrunk_file)]
    for batch in BATCHES:
        tokens = torch.randint(5, shape[3], (batch, LENGTH))
        tokens[:, -LENGTH // 8 :] = 1  # some padding, as real batches have
        difference = max((a[0] - b[0]).abs().max().item() for a, b in [(pruned(tokens), shrunk(tokens))])
        turns = rounds if batch > 1 else 4 * rounds
        for _ in range(3):
            seconds(pruned, tokens), seconds(shrunk, tokens)
        pairs = [(seconds(pruned, tokens), seconds(shrunk, tokens)) for _ in range(turns)]
        before, after = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
        ratios = [pair[0] / pair[1] for pair in pairs]
        flops_before, flops_after = flops(pruned, tokens), flops(shrunk, tokens)
        rows.append(
            {
                "model": f"{shape[0]}l_{shape[1]}h",
                "batch": f"{batch}x{LENGTH}",
                "heads_and_rows_left": 1 - SPARSITY,
                "rounds": turns,
                "pruned_milliseconds": f"{1000 * before:.3f}",
                "shrunk_milliseconds": f"{1000 * after:.3f}",
                "speedup_of_pairs_median": f"{statistics.median(ratios):.3f}",
                "speedup_of_pairs_quartiles": "{0:.3f} to {2:.3f}".format(*statistics.quantiles(ratios)),
                "encoder_flops_ratio": f"{flops_before / flops_after:.3f}",
                "pruned_parameters": counts[0],
                "shrunk_parameters": counts[1],
                "pruned_file_bytes": sizes[0],
                "shrunk_file_bytes": sizes[1],
                "largest_logit_difference": f"{difference:.1e}",
                "machine": describe(torch.get_num_threads()),
                "torch": torch.__version__,
            }
        )
        print("\n".join(f"{name}: {value}" for name, value in rows[-1].items()), end="\n\n")
    return rows


def main(out: Path, rounds: int) -> None:
    rows = [row for shape in SHAPES for row in measure(shape, rounds)]
    aside = out.with_suffix(".tmp")
    with open(aside, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    os.replace(aside, out)


if __name__ == "__main__":
    main(Path(__file__).with_suffix(".csv"), int(sys.argv[1]) if len(sys.argv) > 1 else 15)
