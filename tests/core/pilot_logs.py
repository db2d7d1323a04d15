"""Invented run logs of pilots that obey a known law, in the form that budgeted runs of fairseq leave."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train_large import flops, runlog, sizes
from train_large.budget import warmup_then_linear
from train_large.sizes import Size

VOCABULARY, LENGTH, BATCH, PEAK = 1009, 16, 32, 3e-3
SIZES = tuple(Size(layers, hidden, heads=hidden // 16) for layers, hidden in ((2, 32), (2, 64), (3, 128), (4, 192)))


@dataclass(frozen=True)
class Truth:
    """loss = floor + shape N^-0.35 + data T^-0.4 + anneal r, from `leave` N^-0.2 tokens on; before, the plateau."""

    floor: float = 1.8
    shape: float = 30.0
    data: float = 400.0
    anneal: float = 0.1
    leave: float = 0.0
    plateau: float = 5.0

    def loss(self, size: Size, tokens: float, rate: float = 0.0) -> float:
        n = parameters(size)
        t = tokens - self.leave * n**-0.4
        if self.leave and t <= 0:
            return self.plateau + 0.3 * math.exp(-tokens / 2e5)
        value = self.floor + self.shape * n**-0.35 + self.data * t**-0.4 + self.anneal * rate
        return min(value, self.plateau) if self.leave else value

    def at(self, size: Size, seconds: float) -> float:
        """The perplexity of a run of so many seconds."""
        return math.exp(self.loss(size, seconds / seconds_per_token(size)))


# Small models with cheap updates against a large one that learns more of each: which is best depends on the budget.
TRUTH = Truth(floor=1.8, shape=60.0, data=400.0)
BIGGER = Size(6, 256, heads=16)


def parameters(size: Size) -> int:
    return sizes.parameters_without_embeddings(size, VOCABULARY)


def seconds_per_token(size: Size) -> float:
    return 3e-5 + flops.train_flops(size, VOCABULARY, LENGTH, 1) / LENGTH / 4e10


def write_log(
    folder: Path,
    size: Size,
    truth: Truth,
    budget: float = 150.0,
    noise: float = 0.002,
    validations: int = 15,
    seed: int = 0,
    stop: str | None = "budget",
    peak: float = PEAK,
    **facts: object,
) -> Path:
    """The log of one run; returns its folder."""
    random = np.random.default_rng([seed, size.layers, size.hidden])
    per_update = LENGTH * BATCH * seconds_per_token(size)
    updates = int(budget / per_update)
    cost = flops.train_flops(size, VOCABULARY, LENGTH, BATCH)
    path = str(folder / runlog.NAME)

    def counters(update: int) -> dict[str, float]:
        seconds = update * per_update
        values = (update, seconds, 6 + 1.1 * seconds, update * LENGTH * BATCH, update * cost)
        return dict(zip(runlog.COUNTERS, values))

    known = {"layers": size.layers, "hidden": size.hidden, "ffn": size.ffn, "heads": size.heads}
    given = {"size": size.name, "arch": "prenorm_roberta", **known, "vocabulary": VOCABULARY, "length": LENGTH}
    given |= {"budget_seconds": budget, "budget_clock": "train"}
    runlog.append(path, "start", counters(0), **{**given, **facts})
    marks = {round(updates * k / validations) for k in range(1, validations + 1)}
    every = max(1, updates // 200)
    for update in range(1, updates + 1):
        rate = warmup_then_linear(update / updates, 0.06)
        if update % every == 0 or update == updates:
            runlog.append(path, "train", counters(update), loss=5.0, lr=peak * rate)
        if update in marks:
            share = update / updates
            whole = 0.5 * updates  # the area below the rate of the whole run
            area = share**2 / 0.12 if share < 0.06 else 0.03 + 0.47 - 0.47 * ((1 - share) / 0.94) ** 2
            learned = area * updates / whole * updates * LENGTH * BATCH
            loss = truth.loss(size, learned, 0.0 if share < 0.06 else rate) * math.exp(noise * random.standard_normal())
            runlog.append(path, "valid", counters(update), subset="valid", loss=loss, perplexity=math.exp(loss))
    if stop:
        runlog.append(path, "stop", counters(updates), reason=stop)
    return folder


def write_logs(folder: Path, truth: Truth, chosen=SIZES, **settings) -> list[Path]:
    return [write_log(folder / size.name, size, truth, **settings) for size in chosen]
