"""What to train: for a budget of seconds and a limit of bytes at inference, the size, how long, and how to compress it.

`plan` reads the run logs of pilots, fits train_large.scaling's law, and goes through the candidates: the pilots' sizes
and any that are asked for, or else one size beyond the largest pilot. Bytes are those of
train_large.compression.storage, or of the files of a study where it has measured that size. What compression costs in
quality is known only from such a study (train_large.studies); without one, the mildest compression that fits is
chosen and its cost said to be unknown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from train_large import pilot_runs, scaling, sizes, speed
from train_large.errors import UserError
from train_large.pilot_runs import Pilot
from train_large.report.units import format_bytes, format_seconds
from train_large.scaling import Law
from train_large.sizes import Size
from train_large.studies import Study

BITS = (32, 8, 6, 4)  # the paper's (section 4.2)
SPARSITIES = (0.0, 0.15, 0.30, 0.45, 0.60, 0.75, 0.90)  # the paper's (section 4.3)
UNSTUDIED_SPARSITY = 0.30  # the most that is proposed where nobody has measured what it costs
QUANTILES = (0.05, 0.5, 0.95)
CAUTION = 0.75  # the pick is that of the best quantile: a size of which little is known has to be better
NEAR = 4  # a study tells of sizes up to so many times its own
FAR = 10  # budgets so many times the pilots' are said to be far away

Interval = tuple[float, float]


@dataclass(frozen=True)
class Compression:
    """`measured` says whether `bytes` are those of a real file of the study's; else they are a forecast. `loss` is the
    accuracy that it costs (a share), None where it is unknown."""

    bits: int
    sparsity: float
    bytes: int
    measured: bool
    loss: float | None


@dataclass(frozen=True)
class Option:
    """One size, given the whole budget."""

    size: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    parameters: int
    """with embeddings"""
    logged: bool
    """whether there is a pilot of it"""
    updates: int
    tokens: int
    seconds_per_update: float
    batch_tokens: int
    length: int | None
    """tokens per sequence, where the logs tell"""
    learning_rate: float | None
    loss: float
    perplexity: float
    interval: Interval
    """of the perplexity, 90 %"""
    cautious: float
    """the perplexity that three of four runs would be below; the pick has the least"""
    accuracy: float | None
    """on the study's task, before compression"""
    accuracy_interval: Interval | None
    on_plateau: bool
    compression: Compression | None
    """the mildest that fits, or the one with the best accuracy; None if nothing fits, or if no limit was given"""


@dataclass(frozen=True)
class Plan:
    """The answer. `options` are all candidates, by rising size."""

    budget_seconds: float
    clock: str
    limit_bytes: int | None
    pick: Option
    smaller: Option | None
    larger: Option | None
    options: tuple[Option, ...]
    law: str
    caveats: tuple[str, ...]


@dataclass(frozen=True)
class Accuracy:
    """logit(accuracy) = level + slope x loss, give or take `error` of accuracy (90 %)."""

    level: float
    slope: float
    error: float


def plan(
    logs: Sequence[Path],
    budget_seconds: float,
    limit_bytes: int | None = None,
    *,
    candidates: Sequence[Size] = (),
    study: Study | None = None,
    positions: int | None = None,
    draws: int = scaling.DRAWS,
) -> Plan:
    """What to train for so many seconds (on the clock of the logs) and to store in so many bytes.

    `candidates` are sizes to consider beside the pilots'; without any, it is one beyond the largest. `study` is one
    of compressed models of the same data; `positions` the model's `--max-positions` (default: the
    sequence length).
    Raises UserError: no log, logs that do not compare, fewer than two sizes, a budget shorter than any pilot's first
    validation, a limit below any size.
    """
    pilots = pilot_runs.read_pilots(logs)
    return plan_from(pilots, budget_seconds, limit_bytes, candidates, study, positions, draws)


def plan_from(
    pilots: Sequence[Pilot],
    budget_seconds: float,
    limit_bytes: int | None,
    candidates: Sequence[Size],
    study: Study | None,
    positions: int | None,
    draws: int = scaling.DRAWS,
) -> Plan:
    """As `plan`, of logs that have been read."""
    if positions is not None and positions < 1:
        raise UserError(f"--max-positions {positions}: give the positions of the model, 1 at least.")
    first = min(pilot.seconds[0] for pilot in pilots)
    if not budget_seconds >= first:
        raise UserError(
            f"a budget of {format_seconds(budget_seconds)} is below every pilot's first validation, at "
            f"{format_seconds(first)}: give more, or run pilots that validate sooner (--validate-interval-updates)."
        )
    if limit_bytes is not None and (pilots[0].arch != "prenorm_roberta" or pilots[0].vocabulary is None):
        raise UserError(
            f"{pilots[0].path} is not of a masked LM whose vocabulary is known, so the bytes of compressed models "
            "cannot be counted: leave the limit out, or give logs of budgeted masked LMs."
        )
    _check_study(study, pilots)
    law = scaling.fit(pilots, draws)
    accuracy = _accuracy_of(study)
    tried = considered(pilots, candidates)
    options = tuple(
        _option(size, pilots, law, budget_seconds, limit_bytes, study, positions, accuracy) for size in tried
    )
    fitting = [option for option in options if limit_bytes is None or option.compression is not None]
    if not fitting:
        assert limit_bytes is not None
        least, name = min(
            ((each, size.name) for size in tried for each in _compressions(size, pilots, study, positions)),
            key=lambda pair: pair[0].bytes,
        )
        raise UserError(
            f"a limit of {format_bytes(limit_bytes)} is below every size: the smallest, {name}, takes "
            f"{format_bytes(least.bytes)} at {least.bits} bits and {least.sparsity:.0%} sparse; give at least that, or "
            "run a pilot of a smaller size."
        )
    pick = min(fitting, key=lambda option: _badness(option, accuracy, fitting))
    at = options.index(pick)
    return Plan(
        budget_seconds=budget_seconds,
        clock=pilots[0].clock,
        limit_bytes=limit_bytes,
        pick=pick,
        smaller=options[at - 1] if at > 0 else None,
        larger=options[at + 1] if at + 1 < len(options) else None,
        options=options,
        law=law.describe(),
        caveats=tuple(_caveats(pilots, law, pick, options, budget_seconds, limit_bytes, study)),
    )


def _presumed_loss(compression: Compression, others: Sequence[Compression]) -> float:
    """What it costs. Where that is unknown, no more than what is harder is known to cost, or the most that is known:
    what nobody has tried must not be chosen for that."""
    if compression.loss is not None:
        return compression.loss
    known = [(other, other.loss) for other in others if other.loss is not None]
    harder = [lost for o, lost in known if o.bits <= compression.bits and o.sparsity >= compression.sparsity]
    return min(harder, default=max((lost for _, lost in known), default=0.0))


def _badness(option: Option, level: Accuracy | None, options: Sequence[Option]) -> float:
    """Less is better: perplexity, at odds of CAUTION; where a study tells of accuracy, that after compression."""
    if level is None:
        return option.cautious
    chosen = [each.compression for each in options if each.compression is not None]
    lost = _presumed_loss(option.compression, chosen) if option.compression is not None else 0.0
    return lost - _share(level, math.log(option.cautious))


def _share(accuracy: Accuracy, loss: float) -> float:
    return 1 / (1 + math.exp(-(accuracy.level + accuracy.slope * loss)))


def considered(pilots: Sequence[Pilot], asked: Sequence[Size]) -> list[Size]:
    """By rising size: the pilots' sizes, those asked for, and, where none are, one beyond the largest pilot."""
    first = pilots[0]
    found = dict.fromkeys(pilot.size for pilot in pilots)
    largest = pilots[-1].size
    if not asked:
        # Twice as wide, in as wide heads and the same proportions.
        found[Size(largest.layers, 2 * largest.hidden, 2 * largest.ffn, 2 * largest.heads)] = None
    named = {size.name for size in found}
    for size in asked:
        if size.name not in named:
            found[_like(size, pilots)] = None
    return sorted(found, key=lambda size: (pilot_runs.parameters_like(first, size), size.layers))


def _like(size: Size, pilots: Sequence[Pilot]) -> Size:
    """`size` with heads as wide and FFNs in the same proportion as the nearest pilot's."""
    near = min(pilots, key=lambda pilot: abs(math.log(pilot.size.hidden / size.hidden))).size
    width = near.hidden / near.heads
    possible = [heads for heads in range(1, size.hidden + 1) if size.hidden % heads == 0]
    heads = min(possible, key=lambda heads: abs(math.log(size.hidden / heads / width)))
    return Size(size.layers, size.hidden, round(near.ffn / near.hidden * size.hidden), heads)


def _option(
    size: Size,
    pilots: Sequence[Pilot],
    law: Law,
    budget: float,
    limit: int | None,
    study: Study | None,
    positions: int | None,
    accuracy: Accuracy | None,
) -> Option:
    first = pilots[0]
    own = [pilot for pilot in pilots if pilot.size == size]
    parameters = pilot_runs.parameters_like(first, size)
    per_token = speed.seconds_per_token(size, pilots)
    batch = speed.batch_tokens(size, pilots)
    rated = [pilot for pilot in pilots if pilot.learning_rate]
    rate = speed.interpolated(size, rated, [pilot.learning_rate or 0 for pilot in rated]) if rated else None
    tokens = budget / per_token
    losses = drawn(law, size, parameters, tokens, pilots)
    low, middle, high = np.exp(np.quantile(losses, QUANTILES))
    expected = bounds = None
    if accuracy is not None:
        shares = sorted(_share(accuracy, float(loss)) for loss in np.quantile(losses, QUANTILES))
        expected = shares[1]
        bounds = (max(0.0, shares[0] - accuracy.error), min(1.0, shares[2] + accuracy.error))
    compression = None
    if limit is not None:
        fits = [each for each in _compressions(size, pilots, study, positions) if each.bytes <= limit]
        # What costs no accuracy; then what takes away the least, as the bytes that are left tell.
        compression = min(fits, key=lambda each: (_presumed_loss(each, fits), -each.bytes), default=None)
    return Option(
        size=size.name,
        layers=size.layers,
        hidden=size.hidden,
        ffn=size.ffn,
        heads=size.heads,
        parameters=_all_parameters(size, pilots, positions),
        logged=bool(own),
        updates=max(1, int(tokens / batch)),
        tokens=int(tokens),
        seconds_per_update=per_token * batch,
        batch_tokens=round(batch),
        length=first.length,
        learning_rate=None if rate is None else float(f"{rate:.2g}"),
        loss=float(math.log(middle)),
        perplexity=float(middle),
        interval=(float(low), float(high)),
        cautious=float(np.exp(np.quantile(losses, CAUTION))),
        accuracy=expected,
        accuracy_interval=bounds,
        on_plateau=law.on_plateau(parameters, tokens),
        compression=compression,
    )


def drawn(law: Law, size: Size, parameters: int, tokens: float, pilots: Sequence[Pilot]) -> np.ndarray:
    """Losses of runs of about so many tokens: the speed is not certain either, less so for a size without a pilot."""
    scale = np.exp(speed.deviation(size, pilots) * np.random.default_rng(1).standard_normal(len(law.draws)))
    return np.diagonal(law.losses(size, parameters, tokens * scale))


def _all_parameters(size: Size, pilots: Sequence[Pilot], positions: int | None) -> int:
    first = pilots[0]
    for pilot in pilots:
        if pilot.size == size and pilot.all_parameters:
            return pilot.all_parameters
    vocabulary = first.vocabulary or 0
    if first.arch == "prenorm_roberta":
        positions = positions or first.length or sizes.PAPER_LENGTH
        return sizes.parameters(size, vocabulary, positions, first.embedding_norm, first.share)
    return pilot_runs.parameters_like(first, size) + vocabulary * size.hidden


def _caveats(
    pilots: Sequence[Pilot],
    law: Law,
    pick: Option,
    options: Sequence[Option],
    budget: float,
    limit: int | None,
    study: Study | None,
) -> list[str]:
    said = []
    waiting = sorted({pilot.size.name for pilot in scaling.sort_pilots(pilots).waiting})
    if waiting:
        said.append(
            f"still on the plateau when their pilots ended, so that little is known of them: {', '.join(waiting)}; "
            "longer pilots would tell"
        )
    if len(law.fitted_sizes) < 2:
        said.append(
            f"only {law.fitted_sizes[0].name} has left the plateau: how loss depends on size is assumed from the "
            "literature, not measured"
        )
    if pick.on_plateau:
        said.append(f"{pick.size} is likely to be on the plateau still when the budget ends")
    if not pick.logged:
        said.append(f"no pilot of {pick.size} was run: run one before you spend the budget on it")
    own = [pilot for pilot in pilots if pilot.size.name == pick.size]
    if own and own[0].parameters == pilots[-1].parameters:
        said.append(f"no pilot was larger than {pick.size}, and the best size may be: run one")
    if all(pilot.settings == 1 for pilot in own or pilots):
        said.append("no other batch or rate was tried than the pilots': what they are worth was not compared")
    longest = max(float(pilot.seconds[-1]) for pilot in pilots)
    if budget > FAR * longest:
        said.append(
            f"the budget is {budget / longest:.0f} times the longest pilot's: the interval holds only if the law does "
            "so far, and if there is text enough not to be read again and again"
        )
    close = [
        option.size
        for option in options
        if option is not pick
        and option.logged
        and not option.on_plateau
        and (limit is None or option.compression is not None)
        and pick.interval[0] <= option.perplexity <= pick.interval[1]
    ]
    if close:
        said.append(f"cannot be told apart from {pick.size} in perplexity: {', '.join(close)}")
    if pick.compression is not None and pick.compression.loss is None and _is_compressed(pick.compression):
        said.append(
            "what this compression costs in quality is unknown"
            + (": no study was given" if study is None else ": the study has no size near it")
        )
    return said


def _is_compressed(compression: Compression) -> bool:
    return compression.bits < 32 or compression.sparsity > 0


# ------------------------------------------------------------------------------------------------ compression


def _compressions(size: Size, pilots: Sequence[Pilot], study: Study | None, positions: int | None) -> list[Compression]:
    """Every way to store `size`."""
    first, vocabulary = pilots[0], pilots[0].vocabulary or 0
    total = _all_parameters(size, pilots, positions)
    stored_shape = replace(size, layers=1) if first.share == "all" else size
    parameters = pilot_runs.parameters_like(first, size)
    model = (
        next((m for m in study.sizes if (m.layers, m.hidden) == (size.layers, size.hidden)), None) if study else None
    )
    found = []
    for bits in BITS:
        for sparsity in SPARSITIES:
            entry = model.at(sparsity, bits) if model else None
            whole = bits == 32 and sparsity == 0
            lost = 0.0 if whole else _accuracy_lost(study, parameters, sparsity, bits)
            if lost is None and sparsity > UNSTUDIED_SPARSITY:
                continue
            file = entry.file_bytes if entry else None
            stored = file or _forecast(stored_shape, total, vocabulary, bits, sparsity)
            found.append(Compression(bits, sparsity, stored, file is not None, lost))
    return found


def _forecast(size: Size, parameters: int, vocabulary: int, bits: int, sparsity: float) -> int:
    try:
        from train_large.compression.forecast import forecast_bytes
    except ImportError:
        raise UserError(
            "counting the bytes of compressed models needs PyTorch: run make env, or pip install '.[pack]' in the "
            "checkout."
        ) from None
    return forecast_bytes(size, parameters, vocabulary, bits, sparsity)


def _check_study(study: Study | None, pilots: Sequence[Pilot]) -> None:
    """Raise UserError for a study of another vocabulary, where a size in both tells it."""
    for model in study.sizes if study else ():
        for pilot in pilots:
            same = (model.layers, model.hidden) == (pilot.size.layers, pilot.size.hidden)
            if same and pilot.vocabulary and model.parameters != pilot.parameters:
                raise UserError(
                    f"the study's {model.name} has {model.parameters:,} parameters without "
                    f"embeddings and {pilot.path}'s {pilot.parameters:,}: they are of different vocabularies; give the "
                    "study of the same data."
                )


def _accuracy_lost(study: Study | None, parameters: int, sparsity: float, bits: int) -> float | None:
    """Accuracy that the compression costs: between the study's sizes in the log of their parameters, beyond them as
    the nearest. None where nothing within `NEAR` times the size was measured."""
    known: dict[float, float] = {}
    for model in study.sizes if study else ():
        whole, entry = model.at(0.0, 32), model.at(sparsity, bits)
        if whole is not None and entry is not None and model.parameters:
            known[math.log(model.parameters)] = max(0.0, whole.accuracy - entry.accuracy)
    at = math.log(parameters)
    if not known or min(abs(x - at) for x in known) > math.log(NEAR):
        return None
    xs = sorted(known)
    return float(np.interp(at, xs, [known[x] for x in xs]))


def _accuracy_of(study: Study | None) -> Accuracy | None:
    """Accuracy after finetuning by the loss of pretraining: a line through the study's sizes, in logits. None for
    fewer than three sizes, or where accuracy does not rise as loss falls."""
    if study is None or len(study.sizes) < 3:
        return None
    losses = np.log([model.perplexity for model in study.sizes])
    shares = np.clip([model.accuracy for model in study.sizes], 1e-3, 1 - 1e-3)
    slope, level = np.polyfit(losses, np.log(shares / (1 - shares)), 1)
    if slope >= 0:
        return None
    fitted = 1 / (1 + np.exp(-(level + slope * losses)))
    scatter = float(np.sqrt(np.sum((fitted - shares) ** 2) / (len(shares) - 2)))
    sampling = math.sqrt(float(np.mean(shares * (1 - shares))) / study.examples)
    return Accuracy(float(level), float(slope), 1.645 * math.hypot(scatter, sampling))
