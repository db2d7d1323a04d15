"""A translation study, or runs read from their logs, as one table: what each size cost and how good it became."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Literal, Union

from train_large.report.results import (
    CurvePoint,
    Decoding,
    Run,
    Runs,
    TranslationModel,
    TranslationResults,
)
from train_large.report.units import format_bleu, format_count, format_flops, format_perplexity, format_seconds

Training = Union[TranslationResults, Runs]


@dataclass(frozen=True)
class Column:
    """One figure of each model, None where it is not known. The lowest or the highest of `best` is marked."""

    heading: str
    of: Callable[[Run], float | None]
    form: Callable[[float], str]
    best: Literal["lowest", "highest"] | None = None
    only_on_page: bool = False  # a terminal has 80 columns

    @property
    def title(self) -> str:
        """With a capital letter, except names that are written without."""
        return (
            self.heading if self.heading in ("sacreBLEU", "approx_bleu") else self.heading[0].upper() + self.heading[1:]
        )


def last_measured(model: Run, of: Callable[[CurvePoint], float | None]) -> float | None:
    """The last value on a model's curve, for what is not measured at every validation."""
    return next((value for value in map(of, reversed(model.curve)) if value is not None), None)


def _score(measure: str, heading: str) -> Column:
    def of(model: Run) -> float | None:
        return getattr(model.scores, measure) if isinstance(model, TranslationModel) else None

    return Column(heading, of, format_bleu, "highest")


def paper_error(model: Run) -> float | None:
    """The standard error of a model's BLEU by the paper's measure."""
    return model.scores.paper_error if isinstance(model, TranslationModel) else None


def _format_seconds(seconds: float) -> str:
    return f"{seconds:,.1f}" if seconds < 1e5 else f"{seconds:,.0f}"


PAPER_BLEU = _score("paper", "paper’s BLEU")
_DEV_BLEU = Column("dev BLEU", lambda model: last_measured(model, lambda p: p.bleu), format_bleu, "highest")
_APPROX_BLEU = Column(
    "approx_bleu",
    lambda model: last_measured(model, lambda p: p.approx_bleu),
    format_bleu,
    "highest",
    only_on_page=True,
)
_SECONDS = Column("seconds", lambda model: model.train_seconds, _format_seconds)
_BUDGET_SECONDS = Column("budget seconds", lambda model: model.used_seconds, _format_seconds)
_COLUMNS = (
    Column("parameters", lambda model: model.parameters, format_count),
    PAPER_BLEU,
    _score("t2t", "T2T’s BLEU"),
    _score("sacrebleu", "sacreBLEU"),
    _DEV_BLEU,
    _APPROX_BLEU,
    Column("perplexity", lambda model: model.perplexity, format_perplexity, "lowest"),
    Column("updates", lambda model: model.updates, "{:,}".format),
    _SECONDS,
    _BUDGET_SECONDS,
    Column("cost", lambda model: model.flops, format_flops, only_on_page=True),
    Column("learning rate", lambda model: model.learning_rate, "{:.3g}".format, only_on_page=True),
)


def columns_of(study: Training, on_page: bool) -> list[Column]:
    """The columns for which any model has a figure. T2T's approximation gives way to any BLEU of real translations;
    where there is little room, BLEU on the dev set to that on the test set, and seconds to those of the budget."""

    def known(column: Column) -> bool:
        return any(column.of(model) is not None for model in study.models)

    left_out = {_APPROX_BLEU} if known(_DEV_BLEU) or known(PAPER_BLEU) else set()
    if known(PAPER_BLEU) and not on_page:
        left_out.add(_DEV_BLEU)
        if known(_BUDGET_SECONDS):
            left_out.add(_SECONDS)
    return [c for c in _COLUMNS if known(c) and c not in left_out and (on_page or not c.only_on_page)]


def is_best(study: Training, column: Column, model: Run) -> bool:
    """Whether no other model has a better figure; never where there is nothing to compare with."""
    values = [value for value in map(column.of, study.models) if value is not None]
    if column.best is None or len(values) < 2:
        return False
    return column.of(model) == (min(values) if column.best == "lowest" else max(values))


def told_decoding(decoding: Decoding) -> str:
    return f"{decoding.sentences:,} sentences, beam size {decoding.beam_size}, alpha {decoding.alpha:g}"


def about_training(study: Training) -> list[str]:
    """What was trained, in sentences."""
    on_another_clock = any(model.used_seconds is not None for model in study.models)
    about = ["Seconds are those of updates; budget seconds are by the clock of the budget."] if on_another_clock else []
    if isinstance(study, Runs):
        count = "1 run" if len(study.models) == 1 else f"{len(study.models)} runs"
        problem = f" of Tensor2Tensor’s problem {study.problem}" if study.problem else ""
        return [f"{count}{problem}, read from the run logs.", *about]
    data = study.translation
    count = "1 model size" if len(study.models) == 1 else f"{len(study.models)} model sizes"
    budget = format_seconds(study.budget.seconds)
    return [
        f"{count}, each trained for {budget} to translate {data.source} to {data.target}: {data.corpus}, "
        f"{data.train:,} sentence pairs to train on, {data.dev:,} to validate and {data.test:,} to test.",
        *about,
    ]


def about_scores(study: Training) -> list[str]:
    """How the BLEU in the table was measured, and how sure it is, in sentences; none where there is none."""
    if isinstance(study, Runs):
        told = "; or ".join(told_decoding(decoding) for decoding in study.decodings)
        return [f"Dev BLEU: at the last validation that has it, of {told}."] if told else []
    data = study.translation
    averaged = f"the last {data.averaged} checkpoints averaged" if data.averaged > 1 else "the last checkpoint"
    known = [error for error in map(paper_error, study.models) if error is not None]
    error = f"{format_bleu(max(known))} or less (bootstrap)" if known else "not measured"
    return [
        f"Perplexity on the dev set; BLEU on the test set: {told_decoding(data.decoding)}, {averaged}. "
        f"Standard error of the paper’s BLEU: {error}. The measures are not to be compared with each other.",
        f"sacreBLEU’s signature: {data.signature}",
    ]


def about_curves(study: Training) -> list[tuple[str, str]]:
    """(what is drawn, how it was measured) for each kind of curve that there is."""
    points = [point for model in study.models for point in model.curve]
    told = []
    if points:
        told.append(
            (
                "Perplexity",
                "Of the validation set, for each token of the vocabulary; in the table, at the last validation",
            )
        )
    decodings = study.decodings if isinstance(study, Runs) else (study.translation.curve_decoding,)
    if any(point.bleu is not None for point in points):
        of = "; or ".join(told_decoding(decoding) for decoding in decodings if decoding is not None)
        told.append(("BLEU of the dev set", f"By the paper’s measure{f', of {of}' if of else ''}"))
    elif any(point.approx_bleu is not None for point in points):
        told.append(("approx_bleu", "Tensor2Tensor’s, of words each chosen after the right ones: of no translation"))
    return told
