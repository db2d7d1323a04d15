"""The results of an invented study: all experiments, three seeds, curves that are power laws."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measurements

SEEDS = (1, 2, 3)
BUDGET = 300.0
KINDS = (
    "attention q, k, v",
    "attention out",
    "fc1",
    "fc2",
    "token embeddings",
    "position embeddings",
    "norms",
    "biases",
)
BITS = {32: 0.0, 8: 0.001, 6: 0.008, 4: 0.05}
SPARSITIES = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
DEEP = ("1l_64h", "2l_64h", "4l_64h", "8l_64h", "16l_64h")
WIDE = ("2l_32h", "2l_64h", "2l_128h", "2l_256h", "2l_512h")
SEVEN = ("1l_64h", "2l_64h", "4l_64h", "8l_64h", "2l_32h", "2l_128h", "2l_256h")
RATES = {8: 0.0015, 32: 0.003, 128: 0.006, 512: 0.006}


def trained(
    size: str, seed: int, batch: int = 32, share: str = "none", data: float = 100.0, target: float | None = None
):
    layers, hidden = (int(part[:-1]) for part in size.split("_"))
    own = {"none": layers, "all": 1, "attention": (layers * 2 + 1) / 3}[share]
    inner = round(own * 12 * hidden * hidden)
    return {
        "run": f"{size}-batch{batch}-{share}-{data:g}-{target}-seed{seed}",
        **{"size": size, "layers": layers, "hidden": hidden, "parameters": inner + 1064 * hidden},
        **{"layer_parameters": inner, "batch": batch, "rate": RATES.get(batch, 0.5), "share": share, "data": data},
        **{"target": target, "seed": seed},
    }


def wobble(*of: Any) -> float:
    """From -1 to 1, always the same for the same."""
    return math.sin(sum((i + 1) * ord(c) for i, c in enumerate(repr(of))))


def curve(size: str, seed: int, bleu: bool = False, **told: Any) -> Iterator[measurements.Point]:
    fields = trained(size, seed, **told)
    compute = fields["layers"] * 12 * fields["hidden"] ** 2 + 1064 * fields["hidden"]
    batch = fields["batch"]
    step = 0.004 + 2.2e-9 * compute * batch
    worse = {"none": 1.0, "attention": 1.06, "all": 1.12}[fields["share"]]
    for k in range(1, 17):
        updates = max(1, round(BUDGET / step * k / 16))
        tokens = updates * batch * 16
        loss = worse * (2.6 + 9.0 * (fields["layer_parameters"] + 2000) ** -0.16 + 60 * (tokens / batch**0.6) ** -0.42)
        loss += (100 / fields["data"] - 1) * 2e-9 * tokens * math.log(compute) / 10 + 0.012 * wobble(size, seed, k)
        perplexity = math.exp(min(loss, 6.9))
        score = 30 * math.exp(-3e4 / tokens) * (1 - 25 * compute**-0.4) + 0.3 * wobble(seed, k) if bleu else None
        seconds = round(updates * step, 6)
        yield measurements.Point(
            **fields,
            **{"updates": updates, "seconds": seconds, "flops": 6.0 * compute * tokens, "tokens": tokens},
            **{"perplexity": perplexity, "bleu": None if score is None else max(0.0, score)},
        )
        if fields["target"] is not None and perplexity <= fields["target"]:
            return


def compressed(size: str, seed: int, checkpoint: float = 1.0, pruned: bool = True, **finetune: Any) -> Iterator[Any]:
    fields = trained(size, seed)
    n = fields["parameters"]
    best = 0.80 - 0.9 * n**-0.18 - 0.03 * (1 - checkpoint) + 0.004 * wobble(size, seed, checkpoint)
    best -= 20 * abs(finetune.get("finetune_rate", 0.001) - 0.001)
    fragile = 2.5 - 0.3 * math.log10(n)
    recipe = {"finetune_batch": 32, "finetune_rate": 0.001, "finetune_dropout": 0.1, "finetune_seed": seed, **finetune}
    for sparsity in SPARSITIES if pruned else SPARSITIES[:1]:
        for bits, loss in BITS.items():
            nonzero = round(n * (1 - sparsity))
            yield measurements.Accuracy(
                **fields,
                **{"checkpoint": checkpoint, "updates": round(9000 * checkpoint), "seconds": BUDGET * checkpoint},
                **{
                    "perplexity": 40 + 4e4 / n**0.6 + 50 * (1 - checkpoint),
                    "sparsity": sparsity,
                    "bits": bits,
                    **recipe,
                },
                **{"accuracy": best - fragile * (loss + 0.12 * sparsity**4), "examples": 2132, "nonzero": nonzero},
                **{"bytes": min(nonzero * bits // 8 + n // 8, n * bits // 8), "bytes_paper": nonzero * bits // 8},
                **{"recovery_updates": 40 if sparsity else 0, "recovered": sparsity < 0.7},
            )


def weight_errors(size: str, seed: int) -> Iterator[measurements.Error]:
    fields = trained(size, seed)
    for sparsity, bits, scale in ((0.0, 4, 0.3), (0.0, 8, 0.02), (0.6, 32, 0.5)):
        for i, kind in enumerate((*KINDS, "all")):
            if sparsity and kind in ("norms", "biases"):
                continue
            error = scale * (0.02 + 0.01 * i) * fields["hidden"] ** -0.3 * (1 + 0.05 * wobble(kind, seed))
            yield measurements.Error(
                **{**fields, "sparsity": sparsity, "bits": bits, "kind": kind, "weights": 1000 * (i + 1)},
                **{"mean": error / 50, "mean_absolute": error, "variance": 1.3 * error**2, "deviation": 0.05},
            )


def rows(experiment: str, seeds: tuple[int, ...] = SEEDS) -> list[Any]:
    """All measurements of an experiment."""
    found: list[Any] = []
    for seed in seeds:
        if experiment in ("depth", "width"):
            for size in DEEP if experiment == "depth" else WIDE:
                found += curve(size, seed)
        elif experiment == "batch_size":
            for batch in RATES:
                found += curve("2l_128h", seed, batch=batch)
        elif experiment == "flops":
            for size in dict.fromkeys(DEEP + WIDE):
                found += curve(size, seed)
            for batch in (8, 128, 512):
                found += curve("2l_128h", seed, batch=batch)
        elif experiment == "dataset_size":
            for data in (100.0, 5.0, 1.0):
                for size in WIDE[:4]:
                    found += curve(size, seed, data=data)
        elif experiment == "layer_sharing":
            for i, share in enumerate(("none", "attention", "all")):
                found += curve("4l_64h", seed, share=share)
                peak = round((2.4 - 0.45 * i) * 1e9 + 2e7 * wobble(share, seed))
                told = {"size": "12l_768h", "share": share, "batch": 32, "length": 128, "seed": seed}
                found.append(measurements.Memory(**told, peak_bytes=peak))
        elif experiment == "finetuning":
            for size in ("2l_64h", "4l_64h", "8l_64h", "2l_128h", "2l_256h"):
                found += curve(size, seed, target=80.0)
                found += compressed(size, seed, pruned=False)
        elif experiment == "compression":
            for size in SEVEN:
                found += curve(size, seed)
                found += compressed(size, seed)
        elif experiment == "convergence":
            for size in WIDE[:3]:
                for checkpoint in (0.25, 0.5, 0.75, 1.0):
                    found += compressed(size, seed, checkpoint, pruned=False)
        elif experiment == "weight_error":
            for size in SEVEN:
                found += weight_errors(size, seed)
        elif experiment == "translation":
            for size in ("1l_32h", "2l_64h", "2l_128h", "8l_64h", "3l_256h"):
                points = list(curve(size, seed, bleu=True, batch=1024))
                found += points
                end = points[-1]
                told = {name: getattr(end, name) for name in trained(size, seed)}
                told = {**told, "updates": end.updates, "seconds": end.seconds, "perplexity": end.perplexity}
                found.append(measurements.Translated(**told, bleu=end.bleu - 0.4, bleu_error=0.35))
    if experiment == "sst2_grid":
        for size in WIDE[:3]:
            found += compressed(size, 1, finetune_seed=100)
            found += compressed(size, 1, finetune_seed=300, finetune_rate=0.0005, pruned=False)
    return found


ALL = (
    *("depth", "width", "flops", "batch_size", "dataset_size", "layer_sharing", "finetuning"),
    *("compression", "sst2_grid", "convergence", "weight_error", "translation"),
)


def write(results: Path, *experiments: str, seeds: tuple[int, ...] = SEEDS) -> Path:
    """The CSV files of these experiments, or of all, in folders of `results`."""
    for experiment in experiments or ALL:
        measurements.write(rows(experiment, seeds), results / experiment)
    return results
