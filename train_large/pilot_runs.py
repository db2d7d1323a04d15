"""Pilots as the planner sees them: run logs of short runs, and how large other sizes are by them.

What a validation tells is learned tokens T and the rate r that are in train_large.scaling.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from train_large import runlog, sizes
from train_large.budget import seconds_used
from train_large.errors import UserError
from train_large.sizes import Size

STEEPER = 1.5  # than before: that is how a plateau is left
FALL = 0.02  # a share of the loss: less may be the noise of validations
ROUGHLY = 0.1  # of logarithms
_SUBSETS = ("valid", "dev")  # fairseq's and the Tensor2Tensor plugin's

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Pilot:
    """One run. The arrays have an entry for each validation, in order; `learned` is T and `rate` is r."""

    path: Path
    size: Size
    arch: str
    problem: str | None
    dictionary: str | None
    """its digest"""
    share: str
    """what the layers have in common, of train_large.sizes.SHARING"""
    embedding_norm: bool
    parameters: int
    """without embeddings"""
    all_parameters: int | None
    vocabulary: int | None
    length: int | None
    """tokens per sequence"""
    masked: float | None
    """the share of the tokens, of a masked LM whose log tells"""
    train_tokens: int | None
    """of the training text, where the log tells"""
    batch_tokens: float
    learning_rate: float | None
    clock: str
    seconds_per_token: float
    flops_per_token: float
    updates: np.ndarray
    seconds: np.ndarray
    tokens: np.ndarray
    losses: np.ndarray
    learned: np.ndarray
    rate: np.ndarray
    settings: int = 1
    """how many batches and rates its size was run with, of which its own are the best"""

    @cached_property
    def drop(self) -> tuple[int, int] | None:
        """(where the sudden descent begins, its steepest point), as indices of validations; None without a plateau.

        A power law is steepest at its beginning (loss against log tokens). A run that becomes half as steep again as it
        was before had been on a plateau."""
        if len(self.losses) < 4:
            return None
        slopes = -np.diff(self.losses) / np.diff(np.log(self.tokens))
        at = int(np.argmax(slopes))
        if at < 1 or slopes[at] < STEEPER * max(float(slopes[:at].min()), 0.01):
            return None
        begin = at
        while begin > 0 and slopes[begin - 1] >= slopes[at] / 2:
            begin -= 1
        if self.losses[begin:].min() > (1 - FALL) * self.losses[begin]:
            return None
        return begin, at + 1

    def until(self, seconds: float) -> Pilot:
        """The same run with its validations up to so many seconds only."""
        keep = self.seconds <= seconds
        names = ("updates", "seconds", "tokens", "losses", "learned", "rate")
        return replace(self, **{name: getattr(self, name)[keep] for name in names})


# ------------------------------------------------------------------------------------------------ reading


def read_pilots(logs: Sequence[Path]) -> list[Pilot]:
    """The runs of these logs (a run.jsonl, or the folder that holds it), by rising size.

    Where a size was run with several batches or rates, only the runs with the best of them; what is left out is logged.
    Raises UserError where there is no log, a log without validations, and logs that are not of one model family,
    dictionary, length, text and clock, whose losses are not to be compared.
    """
    if not logs:
        raise UserError("no run log: give the folders of budgeted runs, or let --pilot 5m make them.")
    files = [path / runlog.NAME if path.is_dir() else path for path in map(Path, logs)]
    for path in files:
        if [other.resolve() for other in files].count(path.resolve()) > 1:
            raise UserError(f"{path} is given twice: give each run once.")
    read = [_read_one(path) for path in files]
    first = read[0]
    for pilot in read[1:]:
        for name, what in (
            ("arch", "model family"),
            ("problem", "problem"),
            ("share", "--share-layers"),
            ("embedding_norm", "norm of the embeddings"),
            ("clock", "clock of the budget"),
            ("vocabulary", "vocabulary"),
            ("dictionary", "dictionary"),
            ("length", "sequence length"),
            ("masked", "share of masked tokens"),
            ("train_tokens", "number of training tokens"),
        ):
            ours, theirs = getattr(first, name), getattr(pilot, name)
            unknown = name in ("masked", "train_tokens") and None in (ours, theirs)  # logs of older versions
            if ours != theirs and not unknown:
                raise UserError(
                    f"{first.path} and {pilot.path} differ in their {what} ({ours} and {theirs}), so their losses do "
                    "not compare: plan from one of the two at a time."
                )
    return sorted(_of_best_settings(read), key=lambda pilot: (pilot.parameters, str(pilot.path)))


def _of_best_settings(pilots: Sequence[Pilot]) -> list[Pilot]:
    """Of each size the runs of that batch and rate whose loss is the lowest when the first of its runs ends."""
    best = []
    for size in dict.fromkeys(pilot.size for pilot in pilots):
        settings: list[list[Pilot]] = []
        for pilot in (pilot for pilot in pilots if pilot.size == size):
            like = next((runs for runs in settings if _is_like(runs[0], pilot)), None)
            like.append(pilot) if like else settings.append([pilot])
        end = min(float(pilot.seconds[-1]) for runs in settings for pilot in runs)
        losses = [float(np.mean([np.interp(end, p.seconds, p.losses) for p in runs])) for runs in settings]
        chosen = settings[int(np.argmin(losses))]
        for runs, loss in zip(settings, losses):
            for pilot in runs if runs is not chosen else ():
                logger.info(
                    f"{pilot.path} is left out: after {end:.3g} s its {_setting(pilot)} have a loss of {loss:.2f}, and "
                    f"{_setting(chosen[0])} one of {min(losses):.2f}"
                )
        best += [replace(pilot, settings=len(settings)) for pilot in chosen]
    return best


def _is_like(one: Pilot, other: Pilot) -> bool:
    """Whether two runs are of one batch and rate; a log, which has a line for some updates only, tells them roughly."""
    rates = one.learning_rate or 1.0, other.learning_rate or 1.0
    return max(abs(math.log(rates[0] / rates[1])), abs(math.log(one.batch_tokens / other.batch_tokens))) < ROUGHLY


def _setting(pilot: Pilot) -> str:
    rate = "" if pilot.learning_rate is None else f" at a rate of {pilot.learning_rate:.2g}"
    return f"{pilot.batch_tokens:,.0f} tokens an update{rate}"


def _read_one(path: Path) -> Pilot:
    try:
        lines = runlog.read(str(path))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a run log: it is not UTF-8.") from None
    facts: dict[str, Any] = {}
    for line in lines:
        if line["kind"] in ("start", "resume"):
            facts.update((name, value) for name, value in line.items() if value is not None)
    shrunk = [f"--{name.replace('_', '-')} {facts[name]}" for name in ("layer_heads", "layer_ffn") if name in facts]
    if shrunk:
        raise UserError(
            f"{path} is of a model that was shrunk ({' '.join(shrunk)}), and a plan is of models whose layers are "
            "whole: leave it out."
        )
    try:
        shape = [int(facts[name]) for name in ("layers", "hidden")]
        size = Size(*shape, *(int(facts[name]) if name in facts else None for name in ("ffn", "heads")))  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{path} does not say the size of its model (layers, hidden): give logs of budgeted runs."
        ) from None
    clock = str(facts.get("budget_clock", "train"))
    valid = _validations(lines)
    if any(line["kind"] == "valid" and "loss" in line and not _is_finite(line["loss"]) for line in lines):
        raise UserError(
            f"{path} is of a run that diverged, with a validation without a finite perplexity: leave it out, or run it "
            "at a lower rate."
        )
    if not valid:
        raise UserError(
            f"{path} has no validation: the run was shorter than its first; run it for longer or validate more often."
        )

    def used(line: dict[str, Any]) -> float:
        seconds = seconds_used(facts, line)
        if seconds is None:
            raise UserError(
                f"{path} does not say what an update counts on its {clock} clock (seconds_per_update): give logs of "
                "runs that do."
            )
        return seconds

    # The first updates are slow (and on the wall clock, loading comes before them): that is not the speed.
    end = max(lines, key=lambda line: line["tokens"])
    begin = next((line for line in lines if 0.1 * end["tokens"] <= line["tokens"] < end["tokens"]), lines[0])
    if begin["tokens"] == end["tokens"] or not end["updates"]:
        raise UserError(f"{path} has only the end of a run, so its speed is not known: give its whole log.")
    early = next((line for line in lines if line["kind"] == "train" and line["tokens"] > 0), end)
    seconds_per_token = (used(end) - used(begin)) / (end["tokens"] - begin["tokens"])
    flops_per_token = float(early["flops"] / early["tokens"])
    if not (0 < seconds_per_token < math.inf and 0 < flops_per_token < math.inf):
        raise UserError(f"{path} counts no seconds or no FLOPs, so its speed is not known: give another log.")
    learned, rate, peak = _learned(lines, valid, facts.get("learning_rate"))
    columns = {name: np.array([float(line[name]) for line in valid]) for name in ("updates", "tokens", "loss")}
    vocabulary, length = (int(facts[name]) if name in facts else None for name in ("vocabulary", "length"))
    total = int(facts["parameters"]) if "parameters" in facts else None
    arch, share = str(facts.get("arch")), str(facts.get("share_layers", "none"))
    embedding_norm = bool(facts.get("embedding_norm", True))
    return Pilot(
        path=path,
        size=size,
        arch="prenorm_roberta" if is_encoder(arch) else arch,
        problem=facts.get("problem"),
        dictionary=facts.get("dictionary"),
        share=share,
        embedding_norm=embedding_norm,
        parameters=_parameters(arch, size, vocabulary or 0, embedding_norm, share),
        all_parameters=total,
        vocabulary=vocabulary,
        length=length,
        masked=facts.get("masked"),
        train_tokens=facts.get("train_tokens"),
        batch_tokens=float(end["tokens"] / end["updates"]),
        learning_rate=peak,
        clock=clock,
        seconds_per_token=seconds_per_token,
        flops_per_token=flops_per_token,
        updates=columns["updates"],
        seconds=np.array([used(line) for line in valid]),
        tokens=columns["tokens"],
        losses=columns["loss"],
        learned=learned,
        rate=rate,
    )


def _is_finite(loss: float | None) -> bool:
    """Whether a loss, which the log has as null if it is not a number, has an exponential."""
    return loss is not None and loss < math.log(sys.float_info.max)


def _validations(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for each validation, of one subset; what was measured twice counts as measured last."""
    found = [line for line in lines if line["kind"] == "valid" and line["tokens"] > 0]
    subsets = [line.get("subset") for line in found]
    subset = next((name for name in (*_SUBSETS, *subsets) if name in subsets), None)
    by_updates = {
        line["updates"]: line
        for line in found
        if line.get("subset") == subset and isinstance(line.get("loss"), (int, float)) and line["loss"] > 0
    }
    return [by_updates[updates] for updates in sorted(by_updates)]


def _learned(
    lines: Sequence[dict[str, Any]], valid: Sequence[dict[str, Any]], given: float | None
) -> tuple[Any, Any, float | None]:
    """(T, r, the peak of the rate) at the validations; (tokens, zeros, None) without rates. given: the run's `--lr`,
    since the log, which has a line for some updates only, may lack the peak."""
    tokens = np.array([float(line["tokens"]) for line in valid])
    steps = [
        (line["tokens"], line["lr"])
        for line in lines
        if line["kind"] == "train" and isinstance(line.get("lr"), (int, float))
    ]
    peak = max((rate for _, rate in [*steps, (0, given or 0.0)])) if steps else 0.0
    if not peak:
        return tokens, np.zeros(len(tokens)), None
    # Linear between the lines of the log, from zero tokens on.
    at = np.array([0.0, *(step for step, _ in steps)])
    rates = np.array([steps[0][1], *(rate for _, rate in steps)]) / peak
    area = np.concatenate([[0.0], np.cumsum(np.diff(at) * (rates[1:] + rates[:-1]) / 2)])
    last = float(rates[-1])
    if runlog.is_finished(lines):
        mean = float(area[-1] / at[-1])
    else:  # a rate that has begun to go down goes down to zero in a straight line
        mean, last = (0.5, 0.0) if last < 0.98 and int(np.argmax(rates)) < len(rates) - 1 else (1.0, 1.0)
    past = np.maximum(tokens - at[-1], 0.0) * rates[-1]
    learned = (np.interp(tokens, at, area) + past) / mean
    left = np.clip(np.interp(tokens, at, rates) - last, 0.0, 1.0)
    return np.maximum(learned, 1.0), left, float(peak)


# ------------------------------------------------------------------------------------------------ sizes


def is_encoder(arch: str) -> bool:
    """Whether it is a masked LM, whose size tells all of its FLOPs."""
    return "roberta" in arch


def parameters_like(pilot: Pilot, size: Size) -> int:
    """Parameters without token embeddings of `size` in the architecture of a pilot."""
    return _parameters(pilot.arch, size, pilot.vocabulary or 0, pilot.embedding_norm, pilot.share)


def _parameters(arch: str, size: Size, vocabulary: int, embedding_norm: bool, share: str) -> int:
    if is_encoder(arch):
        return sizes.parameters_without_embeddings(size, vocabulary, embedding_norm, share)
    if arch.startswith("transformer_budgeted"):
        return sizes.tensor2tensor_parameters(size, 0)
    return sizes.translation_parameters(size, 0)
