"""The paper's claims, each tested on a study's measurements: which number must be larger than which, over the seeds.

A claim is one or several comparisons. A comparison is a difference that the claim says lies above zero, measured once
for each seed; its 95 % interval is Student's over the seeds (n - 1 degrees of freedom), so it tells how far another
seed would change it, not how far another text would. A claim holds if every one of its intervals lies above zero. It
does not hold if one of them lies below zero, at 95 % for all of its comparisons together (Bonferroni). Else it cannot
be told, and never from fewer than three seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, product
from pathlib import Path

import measurements
from measurements import Accuracy, Error, Memory, Point, Trained, Translated
from scipy import stats

from train_large.sizes import Size

LEVEL = 0.95
LEAST_SEEDS = 3
MARGIN = 0.01
"""Accuracies that differ by less count as comparable: Table 2's differ by up to 1.2 points and are called so."""
LAYER_KINDS = ("attention q, k, v", "attention out", "fc1", "fc2")


@dataclass(frozen=True)
class Comparison:
    """A difference, one value for each seed. `what` says what is subtracted from what, in `unit`."""

    what: str
    unit: str
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def low(self) -> float:
        return self.interval(LEVEL)[0]

    @property
    def high(self) -> float:
        return self.interval(LEVEL)[1]

    def interval(self, level: float) -> tuple[float, float]:
        """Student's interval of the mean; all numbers where there is one seed, or one whose run diverged."""
        n = len(self.values)
        if n < 2 or not all(map(math.isfinite, self.values)):
            return -math.inf, math.inf
        half = float(stats.t.ppf((1 + level) / 2, n - 1)) * statistics.stdev(self.values) / math.sqrt(n)
        return self.mean - half, self.mean + half


@dataclass(frozen=True)
class Verdict:
    """A claim, where the paper makes it, the test in words, and what came out; `holds` is None where it cannot be
    told."""

    claim: str
    section: str
    figure: str
    test: str
    holds: bool | None
    comparisons: tuple[Comparison, ...]

    @property
    def in_words(self) -> str:
        if not self.comparisons:
            return "not measured"
        return {True: "holds", False: "does not hold", None: "cannot be told"}[self.holds]


def judge(results: Path) -> list[Verdict]:
    """Every claim, from the CSV files of a study; one whose experiment was not run is without comparisons."""
    return [
        Verdict(claim, section, figure, test, _holds(comparisons), comparisons)
        for claim, section, figure, test, compare in CLAIMS
        for comparisons in [tuple(c for c in compare(results) if c.values)]  # no seed of both: not measured
    ]


def _holds(comparisons: Sequence[Comparison]) -> bool | None:
    if not comparisons or any(len(c.values) < LEAST_SEEDS for c in comparisons):
        return None
    if all(c.low > 0 for c in comparisons):
        return True
    together = 1 - (1 - LEVEL) / len(comparisons)
    return False if any(c.interval(together)[1] < 0 for c in comparisons) else None


# ------------------------------------------------------------------------------------------------ curves


Curve = list[Point]
Curves = dict[int, Curve]
"""One setting's curve for each seed, by updates."""


def curves(results: Path, experiment: str, **wanted: object) -> list[Curves]:
    """Each setting's curves, the settings in order of parameters and batch."""
    grouped: dict[tuple, Curves] = {}
    for point in measurements.select(measurements.read(results / experiment, Point), **wanted):
        key = (point.parameters, point.layers, point.size, point.batch, point.rate, point.share, point.data)
        key += (point.target or 0,)
        grouped.setdefault(key, {}).setdefault(point.seed, []).append(point)
    for of_setting in grouped.values():
        for curve in of_setting.values():
            curve.sort(key=lambda point: point.updates)
    return [grouped[key] for key in sorted(grouped)]


def cost(curve: Curve, perplexity: float, of: str) -> float:
    """Updates, seconds or FLOPs (`of`) until the curve first comes to this perplexity: log-linear between validations.
    The curve must come to it."""
    before = None
    for point in curve:
        if point.perplexity <= perplexity:
            if before is None:
                return getattr(point, of)
            here, there = math.log(point.perplexity), math.log(before.perplexity)
            share = (there - math.log(perplexity)) / (there - here)
            return getattr(before, of) + share * (getattr(point, of) - getattr(before, of))
        before = point
    raise ValueError(f"a perplexity of {perplexity} is never reached")


def at(curve: Curve, amount: float, of: str) -> float:
    """The logarithm of the perplexity at so many updates, seconds or FLOPs, linear between validations."""
    before = curve[0]
    for point in curve:
        if getattr(point, of) >= amount:
            gap = getattr(point, of) - getattr(before, of)
            share = (amount - getattr(before, of)) / gap if gap else 1.0
            return (1 - share) * math.log(before.perplexity) + share * math.log(point.perplexity)
        before = point
    return math.log(curve[-1].perplexity)


def lowest(curve: Curve) -> float:
    return min(point.perplexity for point in curve)


def end(curve: Curve) -> float:
    """The logarithm of the perplexity at the end."""
    return math.log(curve[-1].perplexity)


def _seeds(*settings: dict[int, object]) -> list[int]:
    return sorted(set.intersection(*(set(setting) for setting in settings)))


def _name(curves: Curves) -> str:
    return next(iter(curves.values()))[0].size


def sooner(small: Curves, large: Curves, of: str, names: tuple[str, str] | None = None) -> Comparison:
    """How much sooner `large` comes to the lowest perplexity that both come to: the logarithm of the ratio."""
    values = tuple(_sooner(small, large, of).values())
    first, second = names or (_name(small), _name(large))
    unit = {"updates": "updates", "seconds": "seconds", "flops": "FLOPs"}[of]
    return Comparison(f"{unit} of {first} / {unit} of {second}, to the same perplexity", "ln ratio", values)


def _sooner(small: Curves, large: Curves, of: str) -> dict[int, float]:
    found = {}
    for seed in _seeds(small, large):
        level = max(lowest(small[seed]), lowest(large[seed]))
        found[seed] = math.log(max(cost(small[seed], level, of), 1e-9) / max(cost(large[seed], level, of), 1e-9))
    return found


def better(worse: Curves, better_one: Curves, what: str) -> Comparison:
    """How much lower the perplexity of one is at the end than that of another: the logarithm of the ratio."""
    values = tuple(end(worse[seed]) - end(better_one[seed]) for seed in _seeds(worse, better_one))
    return Comparison(what, "ln ratio", values)


SERIES = ("depth", "width")


def fewer_updates(results: Path) -> Iterable[Comparison]:
    for series in SERIES:
        for small, large in pairwise(curves(results, series)):
            yield sooner(small, large, "updates")


def less_time(results: Path) -> Iterable[Comparison]:
    """Only the first step of each series is tested: the paper too says that it ends."""
    for series in SERIES:
        for small, large in list(pairwise(curves(results, series)))[:1]:
            yield sooner(small, large, "seconds")


def diminishing(results: Path) -> Iterable[Comparison]:
    for series in SERIES:
        sizes = curves(results, series)
        if len(sizes) > 2:
            gains = [_gains(*pair) for pair in (sizes[:2], sizes[-2:])]
            values = tuple(gains[0][seed] - gains[1][seed] for seed in _seeds(*gains))
            names = [_name(size) for size in (*sizes[:2], *sizes[-2:])]
            what = "gain in perplexity from {} to {}, less that from {} to {}, at the end of the budget"
            yield Comparison(what.format(*names), "ln ratio", values)


def _gains(small: Curves, large: Curves) -> dict[int, float]:
    return {seed: end(small[seed]) - end(large[seed]) for seed in _seeds(small, large)}


def shape(results: Path) -> Iterable[Comparison]:
    """Between two of about as many layer parameters but other shapes, and one with a quarter of them."""
    everything = [*curves(results, "depth"), *curves(results, "width")]
    found = {_name(size): size for size in everything}
    for deep, wide in _same_weights(found):
        quarter = [name for name in found if 4 * _weights(name) == _weights(wide)]
        base = next((name for name in quarter if _shares_a_side(name, deep) and _shares_a_side(name, wide)), None)
        if base is None:
            continue
        values = []
        for seed in _seeds(found[deep], found[wide], found[base]):
            three = [found[name][seed] for name in (deep, wide, base)]
            updates = min(curve[-1].updates for curve in three)
            of_deep, of_wide, of_base = (at(curve, updates, "updates") for curve in three)
            values.append(abs(of_base - (of_deep + of_wide) / 2) - abs(of_deep - of_wide))
        what = f"difference that four times the layer parameters make ({base} to {deep}, {wide}), less that between"
        yield Comparison(f"{what} the two shapes, after the same updates", "ln ratio", tuple(values))


def _weights(name: str) -> int:
    """What the parameters in the layers of a size are proportional to."""
    size = Size.parse(name, head_width=1)
    return size.layers * size.hidden**2


def _same_weights(names: Iterable[str]) -> list[tuple[str, str]]:
    """(deep, wide): every two sizes of as many parameters in their layers."""
    in_order = sorted(names, key=lambda name: Size.parse(name, head_width=1).hidden)
    return [(deep, wide) for deep, wide in combinations(in_order, 2) if _weights(deep) == _weights(wide)]


def _shares_a_side(name: str, other: str) -> bool:
    one, two = (Size.parse(each, head_width=1) for each in (name, other))
    return one.layers == two.layers or one.hidden == two.hidden


def by_flops(results: Path) -> Iterable[Comparison]:
    for series in SERIES:
        for small, large in list(pairwise(curves(results, series)))[:1]:
            yield sooner(small, large, "flops")


def batch_updates(results: Path) -> Iterable[Comparison]:
    for small, large in pairwise(_batches(results)):
        yield sooner(small, large, "updates", _batch_names(small, large))


def batch_time(results: Path) -> Iterable[Comparison]:
    sizes = _batches(results)
    if len(sizes) > 2:
        first, last = (_sooner(*pair, "seconds") for pair in (sizes[:2], sizes[-2:]))
        values = tuple(first[seed] - last[seed] for seed in _seeds(first, last))
        what = f"gain in time from {' to '.join(_batch_names(*sizes[:2]))}, less that from "
        yield Comparison(what + " to ".join(_batch_names(*sizes[-2:])), "ln ratio", values)


def _batches(results: Path) -> list[Curves]:
    return sorted(curves(results, "batch_size"), key=lambda size: next(iter(size.values()))[0].batch)


def _batch_names(*sizes: Curves) -> tuple[str, str]:
    first, second = (f"batch {next(iter(size.values()))[0].batch}" for size in sizes)
    return first, second


def small_data(results: Path) -> Iterable[Comparison]:
    """The gain of each size over the smallest, of those that were trained on all of the text and on the least; and that
    with the least there is none."""
    shares = sorted({point.data for point in measurements.read(results / "dataset_size", Point)})
    if len(shares) < 2:
        return
    whole, least = (
        {_name(size): size for size in curves(results, "dataset_size", data=share)} for share in (shares[-1], shares[0])
    )
    names = [name for name in whole if name in least]
    for name in names[1:]:
        gains = [_gains(of_share[names[0]], of_share[name]) for of_share in (whole, least)]
        values = tuple(gains[0][seed] - gains[1][seed] for seed in _seeds(*gains))
        what = f"gain of {name} over {names[0]} with {shares[-1]:g} % of the text, less that with {shares[0]:g} %"
        yield Comparison(what, "ln ratio", values)
        what = f"perplexity of {name} / of {names[0]} with {shares[0]:g} % of the text, at the end of the budget"
        yield better(least[name], least[names[0]], what)


def sharing_memory(results: Path) -> Iterable[Comparison]:
    rows = measurements.read(results / "layer_sharing", Memory)
    by_share = {
        share: {r.seed: r.peak_bytes for r in rows if r.share == share} for share in ("none", "attention", "all")
    }
    for share in ("attention", "all"):
        seeds = _seeds(by_share["none"], by_share[share])
        values = tuple(1 - by_share[share][seed] / by_share["none"][seed] for seed in seeds)
        if values:
            yield Comparison(f"memory saved by sharing {_SHARED[share]}", "share", values)


_SHARED = {"all": "all layers", "attention": "the attention"}


def sharing_slows(results: Path) -> Iterable[Comparison]:
    of_share = {share: curves(results, "layer_sharing", share=share) for share in ("none", "attention", "all")}
    for share in ("attention", "all"):
        if of_share["none"] and of_share[share]:
            what = f"perplexity with {_SHARED[share]} shared / with nothing shared, at the end of the budget"
            yield better(of_share[share][0], of_share["none"][0], what)


# ------------------------------------------------------------------------------------------------ accuracies


Levels = dict[tuple[float, int], Accuracy]
"""One model's accuracies by sparsity and bits."""
Accuracies = dict[int, Levels]
"""One size's, by seed."""
WHOLE = (0.0, 32)


def accuracies(results: Path, experiment: str, **wanted: object) -> dict[str, Accuracies]:
    """By size, in order of parameters; of several finetunings of a model the best."""
    best = measurements.best_finetunings(measurements.read(results / experiment, Accuracy))
    rows = measurements.select(best, **wanted)
    grouped: dict[str, Accuracies] = {}
    for row in sorted(rows, key=lambda row: (row.parameters, row.layers)):
        grouped.setdefault(row.size, {}).setdefault(row.seed, {})[row.sparsity, row.bits] = row
    return grouped


def lost(model: Levels, levels: Iterable[tuple[float, int]]) -> float:
    """How many points of accuracy are lost at these levels on average."""
    return 100 * statistics.fmean(model[WHOLE].accuracy - model[level].accuracy for level in levels)


def loses_more(
    first: Accuracies, second: Accuracies, wanted: Callable[[float, int], bool], margin: float = 0.0
) -> tuple[float, ...]:
    """How much more the first loses than the second at the levels that are wanted, and the margin; one value for each
    seed at which both were measured whole and at such a level."""
    values = []
    for seed in _seeds(first, second):
        common = first[seed].keys() & second[seed].keys()
        levels = [level for level in common if wanted(*level)]
        if WHOLE in common and levels:
            values.append(lost(first[seed], levels) - lost(second[seed], levels) + 100 * margin)
    return tuple(values)


def _ends(rows: Iterable[Trained]) -> list[tuple[str, str]]:
    """The smallest and the largest size of each series: of those as wide as most others, and of those as deep."""
    pairs = []
    sizes = {row.size: row for row in rows}.values()
    for same, other in (("hidden", "layers"), ("layers", "hidden")):
        groups: dict[int, list[Trained]] = {}
        for row in sizes:
            groups.setdefault(getattr(row, same), []).append(row)
        longest = sorted(max(groups.values(), key=len, default=[]), key=lambda row: getattr(row, other))
        if len(longest) > 1:
            pairs.append((longest[0].size, longest[-1].size))
    return pairs


def _at_four_bits(sparsity: float, bits: int) -> bool:
    return sparsity == 0 and bits == 4


def _pruned(sparsity: float, bits: int) -> bool:
    return sparsity > 0 and bits == 32


def _pruned_much(sparsity: float, bits: int) -> bool:
    return sparsity >= 0.6 and bits == 32


def _drops(results: Path, wanted: Callable[[float, int], bool], how: str) -> Iterable[Comparison]:
    found = accuracies(results, "compression")
    for small, large in _ends(row for of_size in found.values() for row in next(iter(of_size.values())).values()):
        values = loses_more(found[small], found[large], wanted)
        yield Comparison(f"accuracy that {small} loses {how}, less what {large} loses", "points", values)


def less_lost_at_four_bits(results: Path) -> Iterable[Comparison]:
    yield from _drops(results, _at_four_bits, "at 4 bits")


def pruned_more(results: Path) -> Iterable[Comparison]:
    yield from _drops(results, _pruned, "by pruning, the mean of all levels")


def deep_pruned_more(results: Path) -> Iterable[Comparison]:
    found = accuracies(results, "compression")
    for deep, wide in _same_weights(found):
        what = f"accuracy that {wide} loses at 60 % sparsity and above, less what {deep} loses"
        yield Comparison(what, "points", loses_more(found[wide], found[deep], _pruned_much))


def _measured_whole(results: Path) -> tuple[dict[str, Accuracies], list[int]]:
    """The sizes of the experiment compression that were measured whole, and the seeds that they have in common."""
    found = {}
    for name, of_size in accuracies(results, "compression").items():
        whole = {seed: model for seed, model in of_size.items() if WHOLE in model}
        if whole:
            found[name] = whole
    return found, _seeds(*found.values()) if found else []


def _best(
    found: dict[str, Accuracies], seeds: Sequence[int], seed: int, fits: Callable[[Accuracy], bool]
) -> float | None:
    """The accuracy at this seed of the entry that is the best by the other seeds' accuracy, so that choosing among many
    does not flatter it: of those that tie, the one of the fewest bytes, then that of the smallest size."""
    others = [other for other in seeds if other != seed]
    ranked = []
    for of_size in found.values():
        for level, row in of_size[seed].items():
            if others and fits(row) and all(level in of_size[other] for other in others):
                by_others = round(statistics.fmean(of_size[other][level].accuracy for other in others), 9)
                ranked.append((by_others, -row.bytes, row.accuracy))
    return max(ranked, key=lambda entry: entry[:2])[2] if ranked else None


def frontier(results: Path) -> Iterable[Comparison]:
    """At the bytes of each size left whole: the best of the larger ones, pruned and quantized to fit."""
    found, seeds = _measured_whole(results)
    for name, small in list(found.items())[:-1]:
        values = []
        for seed in seeds:
            whole = small[seed][WHOLE]
            best = _best(
                found, seeds, seed, lambda row, of=whole: row.parameters > of.parameters and row.bytes <= of.bytes
            )
            if best is not None:
                values.append(100 * (best - whole.accuracy))
        if len(values) == len(seeds):
            what = (
                f"accuracy of the best larger model compressed to the bytes of {name}, less that of {name} left whole"
            )
            yield Comparison(what, "points", tuple(values))


def both_methods(results: Path) -> Iterable[Comparison]:
    """At a quarter of the bytes of each size left whole: the best that is pruned and quantized, and the best of the
    rest, smaller models left whole among them."""
    found, seeds = _measured_whole(results)
    for name, of_size in list(found.items())[:-1]:
        values = []
        for seed in seeds:
            limit = of_size[seed][WHOLE].bytes / 4
            both, alone = (
                _best(
                    found,
                    seeds,
                    seed,
                    lambda row, together=together, limit=limit: (
                        row.bytes <= limit and (row.sparsity > 0 and row.bits < 32) == together
                    ),
                )
                for together in (True, False)
            )
            if both is not None and alone is not None:
                values.append(100 * (both - alone))
        if len(values) == len(seeds):
            what = f"accuracy of the best pruned and quantized to a quarter of the bytes of {name}, less that of the"
            yield Comparison(f"{what} best by one method or none", "points", tuple(values))


def not_harder_to_finetune(results: Path) -> Iterable[Comparison]:
    found = accuracies(results, "finetuning", sparsity=0.0, bits=32)
    for small, large in pairwise(found):
        values = tuple(
            100 * (found[large][s][0.0, 32].accuracy - found[small][s][0.0, 32].accuracy + MARGIN)
            for s in _seeds(found[small], found[large])
        )
        yield Comparison(f"accuracy of {large} less that of {small}, and {100 * MARGIN:g} point", "points", values)


def convergence(results: Path) -> Iterable[Comparison]:
    rows = measurements.read(results / "convergence", Accuracy)
    shares = sorted({row.checkpoint for row in rows})
    if len(shares) < 2:
        return
    early, late = (accuracies(results, "convergence", checkpoint=share) for share in (shares[0], shares[-1]))
    for name in (name for name in early if name in late):
        pairs = {"early less that late": (early, late), "late less that early": (late, early)}
        for words, (first, second) in pairs.items():
            what = f"accuracy that {name} loses at 4 bits, {words}, and {100 * MARGIN:g} point"
            yield Comparison(what, "points", loses_more(first[name], second[name], _at_four_bits, MARGIN))


def weight_error(results: Path) -> Iterable[Comparison]:
    yield from _weight_errors(results, lambda error: error.mean_absolute, "mean |w - w'|")
    yield from _weight_errors(results, lambda error: error.variance, "variance of w - w'")


def scaled_weight_error(results: Path) -> Iterable[Comparison]:
    yield from _weight_errors(results, lambda e: e.mean_absolute / e.deviation, "mean |w - w'| in deviations of w")


def _weight_errors(results: Path, of: Callable[[Error], float], words: str) -> Iterable[Comparison]:
    rows = [row for row in measurements.read(results / "weight_error", Error) if row.kind in LAYER_KINDS]
    ways = sorted({(row.sparsity, row.bits) for row in rows if row.bits == 4 or row.sparsity})
    for sparsity, bits in ways:
        found: dict[str, dict[int, float]] = {}
        shapes: dict[str, Error] = {}
        for row in rows:
            if (row.sparsity, row.bits) == (sparsity, bits):
                shapes[row.size] = row
                of_size = found.setdefault(row.size, {})
                of_size[row.seed] = of_size.get(row.seed, 0.0) + of(row) / len(LAYER_KINDS)
        way = f"at {bits} bits" if bits < 32 else f"at {100 * sparsity:g} % sparsity"
        for small, large in _ends(shapes.values()):
            seeds = _seeds(found[small], found[large])
            values = tuple(math.log(found[small][seed] / found[large][seed]) for seed in seeds)
            yield Comparison(f"{words} of {small} / of {large}, {way}", "ln ratio", values)


# ------------------------------------------------------------------------------------------------ translation


def _translations(results: Path) -> dict[str, dict[int, Translated]]:
    found: dict[str, dict[int, Translated]] = {}
    for row in measurements.read(results / "translation", Translated):
        found.setdefault(row.size, {})[row.seed] = row
    return found


def wide_translates_better(results: Path) -> Iterable[Comparison]:
    found = _translations(results)
    for deep, wide in _same_weights(found):
        seeds = _seeds(found[wide], found[deep])
        values = tuple(found[wide][seed].bleu - found[deep][seed].bleu for seed in seeds)
        yield Comparison(f"BLEU of {wide} less that of {deep}", "BLEU", values)


def translation_updates(results: Path) -> Iterable[Comparison]:
    """Where two sizes have as many parameters in their layers, each of them beside each neighbour."""
    by_weights: dict[int, list[Curves]] = {}
    for size in curves(results, "translation"):
        by_weights.setdefault(_weights(_name(size)), []).append(size)
    for smaller, larger in pairwise(by_weights[weights] for weights in sorted(by_weights)):
        for small, large in product(smaller, larger):
            yield sooner(small, large, "updates")


# (claim, section, figure, test, its comparisons)
CLAIMS: tuple[tuple[str, str, str, str, Callable[[Path], Iterable[Comparison]]], ...] = (
    (
        "Larger models reach a perplexity in fewer updates.",
        *("3", "Figures 3 and 4", "Of every two neighbours in depth and in width, the larger needs fewer updates."),
        fewer_updates,
    ),
    (
        "Larger models reach a perplexity in less time, up to a size.",
        *("3", "Figures 2 and 4", "The second smallest of each series needs less time than the smallest."),
        less_time,
    ),
    (
        "Larger models reach a perplexity with fewer FLOPs.",
        *("A.1", "Figure 10", "The second smallest of each series needs fewer FLOPs than the smallest."),
        by_flops,
    ),
    (
        "Returns diminish as size increases.",
        *("3", "Figures 2 and 4", "The step to the largest gains less perplexity than the step from the smallest."),
        diminishing,
    ),
    (
        "The shape matters little beside the number of parameters.",
        *("3", "Figures 2 to 4", "Four times the parameters change more than their shape does."),
        shape,
    ),
    (
        "Larger batches converge in fewer updates.",
        *("3", "Figure 13", "Of every two neighbours, the larger batch needs fewer updates."),
        batch_updates,
    ),
    (
        "Beyond a point a larger batch gains little time.",
        *("3", "Figure 13", "The last step in batch size gains less time than the first."),
        batch_time,
    ),
    (
        "Larger models are not harder to finetune.",
        *("3", "Table 2", "From the same perplexity, no larger model is a point less accurate than the next smaller."),
        not_harder_to_finetune,
    ),
    (
        "Larger models lose less accuracy at 4 bits.",
        *("4.2", "Figure 6", "The smallest of each series loses more than its largest."),
        less_lost_at_four_bits,
    ),
    (
        "Larger models can be pruned more.",
        *("4.3", "Figure 6", "The smallest of each series loses more than its largest, on average over the levels."),
        pruned_more,
    ),
    (
        "Deep models can be pruned more than wide ones.",
        *("4.3", "Figure 6", "Of as many layer parameters, the wide model loses more at 60 % sparsity and above."),
        deep_pruned_more,
    ),
    (
        "Large models, heavily compressed, beat small ones at the same memory.",
        *("4.3", "Figures 6 and 7", "At the bytes of each size left whole, a larger one compressed is more accurate."),
        frontier,
    ),
    (
        "Pruning and quantizing together are best.",
        *(
            "4.3",
            "Figure 7",
            "At a quarter of the bytes of each size, both together beat one or neither.",
        ),
        both_methods,
    ),
    (
        "Convergence does not change compressibility.",
        *(
            "4.4",
            "Figure 8",
            "What is lost at 4 bits differs by less than a point from the first checkpoint to the last.",
        ),
        convergence,
    ),
    (
        "The weights of larger models are approximated with less error.",
        *(
            "5.3",
            "Figure 9",
            "The error of each series' largest has a smaller mean and variance than its smallest's.",
        ),
        weight_error,
    ),
    (
        "They are so in proportion to their spread, too.",
        *("beyond the paper", "Figure 9", "The same, in standard deviations of the weights."),
        scaled_weight_error,
    ),
    (
        "Little data removes the gain from size.",
        *(
            "5.1",
            "Figure 14",
            "Each size gains less over the smallest with the least text, and is no better then.",
        ),
        small_data,
    ),
    (
        "Sharing layers saves memory.",
        *("C", "Figure 11", "Training takes less memory with layers shared."),
        sharing_memory,
    ),
    (
        "Sharing layers slows convergence.",
        *("C", "Figure 11", "The perplexity is higher with layers shared, at the end of the budget."),
        sharing_slows,
    ),
    (
        "Larger translation models need fewer updates.",
        *("3", "Figure 5", "Of every two neighbours in layer parameters, the larger needs fewer updates."),
        translation_updates,
    ),
    (
        "In translation width beats depth.",
        *("3", "Figure 5", "Of as many layer parameters, the wide model has the higher BLEU."),
        wide_translates_better,
    ),
)
