"""The paper's claims, each held against what this experiment measured.

What is told from accuracies counts only beyond its standard error. An accuracy p on n validation examples has the
binomial error sqrt(p (1 - p) / n), and the errors of what is compared add in squares. All are measured on the same
examples, so the true error of a difference is smaller: the verdicts err on the side of "cannot be told".

What training alone shows, section 3, is in training_claims.py."""

from __future__ import annotations

import math
from typing import Callable, Sequence

from train_large.report.pareto import measurements
from train_large.report.results import Claim, Compressed, Results, Study
from train_large.report.training_claims import judge_training, listed, pairs
from train_large.report.units import format_bytes, format_percent


def standard_error(accuracy: float, examples: int) -> float:
    """The binomial standard error of an accuracy measured on so many examples."""
    return math.sqrt(accuracy * (1 - accuracy) / examples)


def above_chance(accuracy: float, results: Results) -> bool:
    """Whether an accuracy exceeds that of always guessing the commoner class by more than its standard error."""
    return accuracy - results.task.majority > standard_error(accuracy, results.task.valid)


def judge_claims(results: Study) -> tuple[Claim, ...]:
    """Every claim of sections 3 to 5.3 that one such experiment can test, with the figures measured and a verdict."""
    if not isinstance(results, Results):
        return judge_training(results)
    return (
        *judge_training(results, besides=_accuracies(results)),
        _robust(results, "4.2", "Larger models lose less accuracy at 4 bits.", "at 4 bits", 0.0, 4),
        _robust(results, "4.3", "Larger models lose less accuracy at 60% sparsity.", "60% pruned", 0.6, 32),
        _robust(results, "4.3", "Larger models lose less accuracy at 90% sparsity.", "90% pruned", 0.9, 32),
        _larger_compressed(results),
        _pruned_and_quantized(results),
        _smaller_error(results),
    )


def _accuracies(results: Results) -> str:
    accuracies = [f"{m.name} {format_percent(m.finetuned.accuracy)}" for m in results.by_size]
    error = max(standard_error(model.finetuned.accuracy, results.task.valid) for model in results.models)
    return (
        f" Accuracy after finetuning: {listed(accuracies)} "
        f"(standard error up to {100 * error:.1f} points: {_error_note(results)})."
    )


def _error_note(results: Results) -> str:
    return f"binomial, {results.task.valid:,} validation examples"


def _robust(results: Results, section: str, text: str, how: str, sparsity: float, bits: int) -> Claim:
    """Whether larger models lose less accuracy, against the same model at 32 bits and not pruned."""
    n = results.task.valid
    losses: dict[str, tuple[float, float]] = {}  # model: (accuracy lost, its standard error)
    chance, models = [], []
    for model in results.by_size:
        whole, part = model.at(0.0, 32), model.at(sparsity, bits)
        if whole is None or part is None:
            continue
        if not above_chance(whole.accuracy, results):
            chance.append(model.name)  # it has nothing to lose, and would look robust
            continue
        error = math.hypot(standard_error(whole.accuracy, n), standard_error(part.accuracy, n))
        losses[model.name] = (whole.accuracy - part.accuracy, error)
        models.append(model)
    left_out = f" Left out, as no better than guessing to begin with: {listed(chance)}." if chance else ""
    if not pairs(models):
        return Claim(text, section, None, f"There are no two sizes measured both whole and {how} to compare.{left_out}")
    slope, error = _slope([math.log2(model.parameters) for model in models], [losses[model.name] for model in models])
    lost = [f"{name} {100 * loss:.1f}" for name, (loss, _) in losses.items()]
    measured = (
        f"Points of accuracy lost {how}: {listed(lost)}. Fitted over the sizes, each doubling of the parameters "
        f"changes the loss by {100 * slope:+.2f} points, with a standard error of {100 * error:.2f} "
        f"({_error_note(results)}).{left_out}"
    )
    return Claim(text, section, None if abs(slope) <= error else slope < 0, measured)


def _slope(places: Sequence[float], values: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(slope, its standard error) of the least-squares line through values that come with standard errors."""
    middle = sum(places) / len(places)
    spread = sum((x - middle) ** 2 for x in places)
    slope = sum((x - middle) * y for x, (y, _) in zip(places, values)) / spread
    return slope, math.hypot(*((x - middle) * error for x, (_, error) in zip(places, values))) / spread


def _larger_compressed(results: Results) -> Claim:
    text = "For most memory limits the best is a larger model compressed, not a smaller one left whole."
    section = "4.1-4.3"
    wins, loses, least, most = _shares_of_limits(results, lambda entry: entry.stored_bytes)
    if not pairs([model for model in results.by_size if model.at(0.0, 32)]):
        return Claim(text, section, None, "There are no two sizes measured whole, so no limits to compare at.")
    if least == most:
        return Claim(text, section, False, "The smallest model left whole is also the most accurate whole one.")
    paper_wins, paper_loses, _, _ = _shares_of_limits(results, lambda entry: entry.bytes_paper)
    ours = [format_percent(share, 0) for share in (wins, loses, abs(1 - wins - loses))]
    paper = [format_percent(share, 0) for share in (paper_wins, paper_loses, abs(1 - paper_wins - paper_loses))]
    measured = (
        f"From {format_bytes(least)}, where the first whole model fits, to {format_bytes(most)}, where the most "
        f"accurate whole one does: at {ours[0]} of these limits (on a logarithmic scale) a larger model compressed "
        f"beats the best whole one that fits by more than a standard error, at {ours[1]} it loses by as much, and at "
        f"{ours[2]} they cannot be told apart ({_error_note(results)}). By the paper's count of bytes, without masks: "
        f"{listed(paper)}."
    )
    # The undecided limits could go either way: true or false only if they cannot turn the majority.
    return Claim(text, section, True if wins > 0.5 else False if 1 - loses <= 0.5 else None, measured)


def _shares_of_limits(results: Results, cost: Callable[[Compressed], int]) -> tuple[float, float, int, int]:
    """(share of limits where a larger model compressed is better, share where it is worse, least limit, greatest).

    The limits are those that bind: from the smallest whole model (32 bits, not pruned) to the most accurate whole one.
    The best within a limit changes only where an entry begins to fit, so the sum over those intervals is exact."""
    entries = measurements(results.models)
    whole = [entry for _, entry in entries if not entry.is_compressed]
    if not whole:
        return 0.0, 0.0, 0, 0
    least = min(cost(entry) for entry in whole)
    most = cost(max(whole, key=lambda entry: (entry.accuracy, -cost(entry))))
    steps = sorted({cost(entry) for _, entry in entries if least <= cost(entry) <= most})
    n, wins, loses = results.task.valid, 0.0, 0.0
    for limit, following in zip(steps, steps[1:]):
        fitting = [(model, entry) for model, entry in entries if cost(entry) <= limit]
        small, left = max((pair for pair in fitting if not pair[1].is_compressed), key=lambda pair: pair[1].accuracy)
        larger = [e.accuracy for m, e in fitting if e.is_compressed and m.parameters > small.parameters]
        best = max(larger, default=0.0)
        error = math.hypot(standard_error(left.accuracy, n), standard_error(best, n))
        width = math.log(following / limit) / math.log(most / least)
        wins += width * (best - left.accuracy > error)
        loses += width * (left.accuracy - best > error)
    return wins, loses, least, most


def _pruned_and_quantized(results: Results) -> Claim:
    text = "Pruning 30 to 45% and then quantizing to 6 or 8 bits is on the Pareto frontier or near it."
    entries = [(model, entry) for model, entry in measurements(results.models) if entry.is_compressed]
    near: dict[bool, int] = {True: 0, False: 0}
    total: dict[bool, int] = {True: 0, False: 0}
    examples = []
    for model, entry in entries:
        best = max(e.accuracy for _, e in measurements(results.models) if e.stored_bytes <= entry.stored_bytes)
        recipe = 0.295 <= entry.sparsity <= 0.455 and entry.bits in (6, 8)
        total[recipe] += 1
        if best - entry.accuracy <= standard_error(best, results.task.valid) and above_chance(entry.accuracy, results):
            near[recipe] += 1
            if recipe:
                examples.append((entry.accuracy, f"{model.name}, {entry.sparsity:.0%} at {entry.bits} bits"))
    if not total[True] or not total[False]:
        return Claim(text, "4.3", None, "There are no entries pruned 30 to 45% at 6 or 8 bits to set beside others.")
    share, others = near[True] / total[True], near[False] / total[False]
    error = math.hypot(standard_error(share, total[True]), standard_error(others, total[False]))
    shows = None if abs(share - others) <= error else share > others
    named = f" Of these the most accurate is {max(examples)[1]}." if examples else ""
    measured = (
        f"{near[True]} of {total[True]} such entries are better than guessing and within one standard error "
        f"({_error_note(results)}) of the best that is no larger, against {near[False]} of the {total[False]} "
        f"other compressed entries.{named}"
    )
    return Claim(text, "4.3", shows, measured)


# The kinds of matrices that every Transformer layer has, by the names of train_large/compression/weight_error.py.
LAYER_KINDS = ("attention q, k, v", "attention out", "fc1", "fc2")


def _smaller_error(results: Results) -> Claim:
    """Figure 9: raw errors, as the paper shows, and errors in standard deviations of the weights.

    Weights are compared, not accuracies, so there is no error of sampling; but a figure is of one training run each."""
    text = "Larger models' weights are easier to approximate: their error is smaller at 4 bits and at 60% sparsity."
    section = "5.3"
    falls: list[bool | None] = []
    parts = []
    for how, sparsity, bits in (("At 4 bits", 0.0, 4), ("At 60% sparsity", 0.6, 32)):
        errors = {}
        for model in results.by_size:
            at = model.weight_errors_at(sparsity, bits)
            if all(kind in at for kind in LAYER_KINDS):
                errors[model.name] = [at[kind] for kind in LAYER_KINDS]
        models = [model for model in results.by_size if model.name in errors]
        compared = [(a.name, b.name) for a, b in pairs(models)]
        if not compared:
            return Claim(text, section, None, "There are no two sizes whose weight errors were measured, to compare.")
        raw = {name: sum(e.mean_absolute for e in of_kind) / len(of_kind) for name, of_kind in errors.items()}
        scaled = {name: sum(e.normalized or 0.0 for e in of_kind) / len(of_kind) for name, of_kind in errors.items()}
        for what, series in ((f"{how}, mean |w − w′|", raw), ("In standard deviations of the weights", scaled)):
            count = sum(series[large] < series[small] for small, large in compared)
            falls.append(True if count == len(compared) else False if 2 * count <= len(compared) else None)
            values = listed([f"{name} {value:.3g}" for name, value in series.items()])
            parts.append(f"{what}: {values}; the larger has the smaller in {count} of {len(compared)} pairs.")
    # The paper's figure is the raw error; but where weights are only smaller, and not nearer to their grid for their
    # size, it cannot be told that they are easier to approximate.
    shows = False if falls[0] is False or falls[2] is False else True if all(falls) else None
    measured = f"Averaged over the attention and feed-forward matrices of the layers. {' '.join(parts)}"
    return Claim(text, section, shows, measured)
