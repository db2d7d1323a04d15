"""One layer forwards and backwards by this project's two ways and by torch.compile, in turn: `make bench` writes
bench/training_layer.csv.

python bench/training_layer.py [--rounds N]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import table
import torch
from fairseq.models.transformer import TransformerConfig
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase
from torch import Tensor

from fairseq_plugins.models import fast_layer, sdpa_layer
from fairseq_plugins.models.fast_layer import Setting, tokens_of
from train_large import machine

HERE = Path(__file__).parent
LENGTH, RATE = 128, 0.1


def build(hidden: int) -> TransformerEncoderLayerBase:
    cfg = TransformerConfig()
    cfg.encoder.embed_dim, cfg.encoder.ffn_embed_dim, cfg.encoder.attention_heads = hidden, 4 * hidden, hidden // 64
    cfg.encoder.normalize_before, cfg.activation_fn = True, "gelu"
    cfg.dropout = cfg.attention_dropout = RATE
    return TransformerEncoderLayerBase(cfg)


def measure(hidden: int, batch: int, rounds: int) -> list[dict]:
    layer = build(hidden)
    parameters = fast_layer.parameters_of(layer)
    x = torch.randn(batch * LENGTH, hidden, requires_grad=True)
    gradient = torch.randn(batch * LENGTH, hidden)
    tokens = tokens_of(None, batch, LENGTH)
    setting = Setting(hidden // 64, RATE, RATE, torch.bfloat16, (1e-5, 1e-5))

    def stock() -> Tensor:
        return layer(x.view(batch, LENGTH, hidden).transpose(0, 1), None).transpose(0, 1).reshape(-1, hidden)

    compiled = torch.compile(lambda x, parameters: sdpa_layer.encoder_layer(x, tokens, setting, parameters))
    ways: dict[str, Callable[[], Tensor]] = {
        "fairseq, fp32": stock,
        "fast_layer, bf16": lambda: fast_layer.encoder_layer(x, tokens, setting, parameters),
        "sdpa_layer, bf16": lambda: sdpa_layer.encoder_layer(x, tokens, setting, parameters),
        "sdpa_layer, bf16, torch.compile": lambda: compiled(x, parameters),
    }

    def seconds(forward: Callable[[], Tensor]) -> float:
        begin = time.perf_counter()
        torch.autograd.grad(forward(), [x, *parameters], gradient)
        return time.perf_counter() - begin

    first = {name: seconds(forward) + seconds(forward) for name, forward in ways.items()}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, forward in ways.items():
            taken[name].append(seconds(forward))
    medians = {name: statistics.median(times) for name, times in taken.items()}
    return [
        {
            "hidden": hidden,
            "batch": batch,
            "way": name,
            "milliseconds": round(1e3 * medians[name], 2),
            "over_fast_layer": round(medians[name] / medians["fast_layer, bf16"], 3),
            "first_two_seconds": round(first[name], 1),
            "rounds": rounds,
            "machine": machine.describe(torch.get_num_threads()),
        }
        for name in ways
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=HERE / "training_layer.csv")
    args = parser.parse_args()
    logging.disable()  # fairseq turns all of it on, and torch.compile tells much
    rows = measure(256, 32, args.rounds) + measure(512, 16, args.rounds)
    for row in rows:
        print(row)
    table.write(rows, args.out)


if __name__ == "__main__":
    main()
