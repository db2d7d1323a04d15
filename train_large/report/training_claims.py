"""Section 3's claims, that larger models train faster, held against the curves and the last figures of any study.

BLEU counts only beyond a standard error: that of the difference of two test scores, from their bootstrap errors, which
add in squares; on n dev sentences instead of N test sentences it is taken to be sqrt(N / n) times as large. Where no
error was measured, differences of less than `UNTOLD` are left open. The sizes translate the same sentences, so the true
error of a difference is smaller: the verdicts err on the side of "cannot be told"."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Callable, Sequence, TypeVar

from train_large.report.results import (
    Claim,
    CurvePoint,
    Results,
    Run,
    Runs,
    Study,
    TranslationModel,
    TranslationResults,
)
from train_large.report.units import format_bleu, format_perplexity

UNTOLD = 1.0
"""BLEU that two models must differ by where no error was measured: a round figure, chosen and not derived."""

AnyRun = TypeVar("AnyRun", bound=Run)


def pairs(models: Sequence[AnyRun]) -> list[tuple[AnyRun, AnyRun]]:
    """Every (smaller, larger) of models sorted by size; none where sizes are not known."""
    return [(a, b) for a, b in combinations(models, 2) if (a.parameters or 0) < (b.parameters or 0)]


def listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


# ------------------------------------------------------------------------------------------------ curves


def _rising_with_perplexity(curve: Sequence[CurvePoint]) -> list[tuple[int, float]]:
    return [(point.updates, -math.log(point.perplexity)) for point in curve]


def _rising_with_bleu(curve: Sequence[CurvePoint]) -> list[tuple[int, float]]:
    return [(point.updates, point.bleu) for point in curve if point.bleu is not None]


def _updates_to_rise(points: Sequence[tuple[int, float]], level: float) -> float | None:
    """Updates until this height is first come to, linear between two that were measured; None if it never is."""
    before = None
    for updates, height in points:
        if height >= level:
            if before is None:
                return updates
            return before[0] + (level - before[1]) / (height - before[1]) * (updates - before[0])
        before = (updates, height)
    return None


# ------------------------------------------------------------------------------------------------ claims


def judge_training(study: Study, besides: str = "") -> tuple[Claim, ...]:
    """The claims of section 3 by perplexity, and by BLEU where it was measured; none where no two sizes are known.

    `besides` is a sentence on what else was measured at the end of the budget."""
    if isinstance(study, Runs) and not pairs(study.by_size):
        return ()
    claims = []
    if any(model.perplexity is not None for model in study.models):
        claims += [_fewer_updates(study), _larger_is_best(study, besides), _returns_diminish(study)]
    if isinstance(study, Runs) and len(study.decodings) > 1:
        return tuple(claims)  # BLEU of translations made in different ways is not to be compared
    if any(_rising_with_bleu(model.curve) for model in study.models):
        claims.insert(1, _fewer_updates_to_bleu(study))
    if any(final_bleu(model) is not None for model in study.models):
        claims += [_larger_is_best_by_bleu(study), _returns_diminish_by_bleu(study)]
    return tuple(claims)


def _fewer_updates(study: Study) -> Claim:
    text = "Larger models reach a given perplexity in fewer updates."
    return _fewer(
        text,
        [model for model in study.by_size if model.curve],
        _rising_with_perplexity,
        lambda height: f"Perplexity {format_perplexity(math.exp(-height))}, the lowest",
        "at the lowest perplexity",
        0.0,
    )


def _fewer_updates_to_bleu(study: Study) -> Claim:
    text = "Larger models reach a given BLEU in fewer updates."
    margin, note = _dev_error(study)
    claim = _fewer(
        text,
        [model for model in study.by_size if _rising_with_bleu(model.curve)],
        _rising_with_bleu,
        lambda height: f"BLEU {format_bleu(height)}, the highest",
        "at the highest BLEU",
        margin,
    )
    return Claim(text, claim.section, claim.shows, claim.measured + note)


def _fewer(
    text: str,
    models: Sequence[Run],
    rising: Callable[[Sequence[CurvePoint]], list[tuple[int, float]]],
    told: Callable[[float], str],
    where: str,
    margin: float,
) -> Claim:
    """Whether the larger of every two comes sooner to the best height that both reached, and by more than the margin:
    sooner even than the other comes to within the margin of it."""
    curves = {model.name: rising(model.curve) for model in models}
    compared = pairs(models)
    if not compared:
        return Claim(text, "3", None, "There are no two sizes with validation curves to compare.")
    best = {name: max(height for _, height in points) for name, points in curves.items()}

    def updates(model: Run, level: float) -> float:
        reached = _updates_to_rise(curves[model.name], level)
        assert reached is not None, "the level is one that the model reached"
        return reached

    for_it = against = 0
    for small, large in compared:
        level = min(best[small.name], best[large.name])
        for_it += updates(large, level) < updates(small, level - margin)
        against += updates(small, level) < updates(large, level - margin)
    common = min(best.values())
    reached = [f"{model.name} after {updates(model, common):,.0f}" for model in models]
    sooner = "the larger needs fewer updates" if not margin else "the larger clearly needs fewer updates"
    measured = (
        f"{told(common)} that every size reached: {listed(reached)} updates. "
        f"Taking every two sizes {where} both reached, {sooner} in "
        f"{for_it} of {len(compared)} pairs and more in {against}."
    )
    open_pairs = len(compared) - for_it - against if margin else 0
    shows = True if for_it == len(compared) else False if against >= for_it + open_pairs else None
    return Claim(text, "3", shows, measured)


def _unequal_budgets(study: Study) -> str:
    """A sentence if the models did not use the same time on the clock of the budget, or if that is not known, else
    nothing."""
    clock = study.clock
    if study.budget and study.budget.clock != clock:
        return f" But what the sizes used of the budget on its {study.budget.clock} clock is not known."
    seconds = [model.seconds_on(clock) for model in study.models]
    allowed = study.budget.seconds if study.budget else max(seconds)
    if max(seconds) - min(seconds) > 0.05 * allowed:
        on = "" if clock == "train" else f" on the {clock} clock"
        return (
            f" But the sizes were not trained for the same time{on}: {min(seconds):.4g} to {max(seconds):.4g} seconds."
        )
    return ""


def _with_perplexity(study: Study) -> list[tuple[Run, float]]:
    return [(model, model.perplexity) for model in study.by_size if model.perplexity is not None]


def _larger_is_best(study: Study, besides: str) -> Claim:
    text = "At the same training budget, a larger model than the smallest is best."
    if not isinstance(study, Results):
        text = "At the same training budget, a larger model than the smallest has the lowest perplexity."
    measured, unequal = _with_perplexity(study), _unequal_budgets(study)
    shows = _is_beaten(measured[0][0], measured, unequal)
    told = listed([f"{model.name} {format_perplexity(perplexity)}" for model, perplexity in measured])
    return Claim(text, "3", shows, f"Perplexity at the end of the budget: {told}.{besides}{unequal}")


def _returns_diminish(study: Study) -> Claim:
    text = "Returns diminish as size increases: the largest model is not the best."
    if not isinstance(study, Results):
        text = "Returns diminish as size increases: the largest model does not have the lowest perplexity."
    measured, unequal = _with_perplexity(study), _unequal_budgets(study)
    best, least = min(measured, key=lambda pair: pair[1])
    largest = measured[-1][0]
    of_largest = _best_like(largest, measured)
    told = (
        f"Lowest perplexity at the end of the budget: {best.name}, {format_perplexity(least)}; "
        f"the largest, {largest.name}, has {format_perplexity(of_largest)}."
    )
    return Claim(text, "3", _is_beaten(largest, measured, unequal), told + unequal)


def _is_beaten(model: Run, measured: Sequence[tuple[Run, float]], unequal: str) -> bool | None:
    """Whether the best run of other sizes has a lower perplexity than the best of the size of `model`; None where
    that is not to be told."""
    others = [pair for pair in measured if pair[0].parameters != model.parameters]
    if unequal or not others:
        return None
    return min(perplexity for _, perplexity in others) < _best_like(model, measured)


def _best_like(model: Run, measured: Sequence[tuple[Run, float]]) -> float:
    """The lowest perplexity of the runs of its size."""
    return min(perplexity for other, perplexity in measured if other.parameters == model.parameters)


# ------------------------------------------------------------------------------------------------ BLEU at the end


def final_bleu(model: Run) -> float | None:
    """BLEU by the paper's measure on the test set, or else that of the last validation which has one."""
    if isinstance(model, TranslationModel):
        return model.scores.paper
    return next((point.bleu for point in reversed(model.curve) if point.bleu is not None), None)


def difference_error(a: Run, b: Run) -> float:
    """The standard error of the difference of two models' final BLEU, or `UNTOLD`."""
    errors = [model.scores.paper_error or 0.0 for model in (a, b) if isinstance(model, TranslationModel)]
    return math.hypot(*errors) if _is_measured(a, b) else UNTOLD


def _is_measured(*models: Run) -> bool:
    return all(isinstance(model, TranslationModel) and model.scores.paper_error is not None for model in models)


def _dev_error(study: Study) -> tuple[float, str]:
    """(standard error of a difference of BLEU on the dev sentences, a sentence that says so)."""
    decoding = study.translation.curve_decoding if isinstance(study, TranslationResults) else None
    if isinstance(study, TranslationResults) and decoding is not None and _is_measured(*study.models):
        largest = max(model.scores.paper_error or 0.0 for model in study.models)
        error = math.sqrt(2 * study.translation.decoding.sentences / decoding.sentences) * largest
        return error, (
            f" Clearly: beyond {format_bleu(error)} BLEU, the standard error of a difference on {decoding.sentences:,} "
            "sentences, scaled from that on the test set."
        )
    return UNTOLD, f" Clearly: beyond {UNTOLD:g} BLEU, for no standard error was measured."


def _at_the_end(study: Study) -> tuple[list[tuple[Run, float]], str]:
    """((model, BLEU) by size, a sentence that says so)."""
    measured = [(m, bleu) for m, bleu in ((m, final_bleu(m)) for m in study.by_size) if bleu is not None]
    of_test = isinstance(study, TranslationResults)
    place = "on the test set, by the paper’s measure" if of_test else "at the last validation that has it"
    return measured, f"BLEU {place}: {listed([f'{m.name} {format_bleu(bleu)}' for m, bleu in measured])}."


def _larger_is_best_by_bleu(study: Study) -> Claim:
    text = "At the same training budget, a larger model than the smallest has the highest BLEU."
    measured, told = _at_the_end(study)
    larger = [pair for pair in measured if pairs([measured[0][0], pair[0]])]
    return _ahead(study, text, told, larger, measured[0])


def _returns_diminish_by_bleu(study: Study) -> Claim:
    text = "Returns diminish as size increases: the largest model does not have the highest BLEU."
    measured, told = _at_the_end(study)
    smaller = [pair for pair in measured if pairs([pair[0], measured[-1][0]])]
    return _ahead(study, text, told, smaller, measured[-1])


def _ahead(study: Study, text: str, told: str, some: Sequence[tuple[Run, float]], one: tuple[Run, float]) -> Claim:
    """Whether the best of some models has a higher BLEU than one other, by more than the error."""
    if not some:
        return Claim(text, "3", None, f"{told} There are no two sizes to compare.")
    best, bleu = max(some, key=lambda pair: pair[1])
    difference, error = bleu - one[1], difference_error(best, one[0])
    told += (
        f" {best.name} has {format_bleu(abs(difference))} {'more' if difference >= 0 else 'less'} than {one[0].name}"
    )
    if _is_measured(best, one[0]):
        told += f", with a standard error of {format_bleu(error)} (bootstrap)."
    else:
        told += f"; no standard error was measured, so less than {UNTOLD:g} is left open."
    unequal = _unequal_budgets(study)
    shows = None if unequal or abs(difference) <= error else difference > 0
    return Claim(text, "3", shows, told + unequal)


# ------------------------------------------------------------------------------------------------ the choice


def choice_parts(study: TranslationResults) -> tuple[str, str]:
    """(the size with the highest BLEU, what the figures leave open), to be read one after the other."""
    best = max(study.by_size, key=lambda model: model.scores.paper)  # the smallest of those that tie
    figures = (
        f", BLEU {format_bleu(best.scores.paper)} on the test set, perplexity {format_perplexity(best.perplexity)}."
    )
    near = [
        model
        for model in study.by_size
        if model is not best and best.scores.paper - model.scores.paper <= difference_error(best, model)
    ]
    if not near:
        return best.name, figures
    how = (
        "within one standard error"
        if _is_measured(best)
        else f"within {UNTOLD:g} BLEU, with no standard error measured"
    )
    told = listed([f"{model.name} ({format_bleu(model.scores.paper)})" for model in near])
    return best.name, f"{figures} Not to be told from it, {how}: {told}."
