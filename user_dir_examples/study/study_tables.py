"""The paper's tables, and the numbers of its figures, from the CSV files of a study; the paper's own numbers beside
them where it prints any."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measurements
from measurements import Accuracy, Error, Memory, Point, Translated, best_finetunings
from study_figures import PAPER_SHARING_SAVES, STATISTICS, ways
from study_series import (
    SHARED,
    Level,
    Setting,
    Spread,
    by_setting,
    chosen,
    ends,
    frontier,
    kinds_in_order,
    levels,
    names_of,
)

from train_large.report.units import (
    format_bleu,
    format_bytes,
    format_count,
    format_error,
    format_flops,
    format_percent,
    format_perplexity,
    format_seconds,
)
from train_large.sizes import LEARNING_RATES

PAPER_TABLE_2 = (
    ("12-layer, 768H", "4.3", "84.3", "93.0"),
    ("18-layer, 768H", "4.1", "85.4", "92.6"),
    ("24-layer, 768H", "4.0", "85.2", "93.1"),
    ("12-layer, 1024H", "3.9", "85.5", "93.2"),
    ("12-layer, 1536H", "4.3", "85.1", "93.8"),
)


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the rows. `of_paper`: the numbers are the paper's own."""

    experiment: str
    name: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    of_paper: bool = False


def tables(results: Path, experiment: str) -> list[Table]:
    """The tables of one experiment that there are measurements for. Raises UserError for a CSV file that is none of
    ours."""
    folder = results / experiment
    points = measurements.read(folder, Point)
    accuracies = measurements.read(folder, Accuracy)
    errors = measurements.read(folder, Error)
    memory = measurements.read(folder, Memory)
    translated = measurements.read(folder, Translated)
    match experiment:
        case "batch_size":
            found = [*_rates(points), _paper_rates()]
        case "finetuning":
            found = [*_finetuned(accuracies), _paper_finetuned()]
        case "compression" | "sst2_grid":
            found = [*(_recipes(accuracies) if experiment == "sst2_grid" else []), *_compressed(accuracies)]
        case "convergence":
            found = _checkpoints(accuracies)
        case "weight_error":
            found = _weight_errors(errors)
        case "depth" | "width" | "flops" | "dataset_size" | "layer_sharing" | "translation":
            found = [*_ends(points if not translated else []), *_translated(translated), *_memory(memory)]
        case _:
            found = [*_ends(points if not translated else []), *_translated(translated), *_memory(memory)]
            found += [*_compressed(accuracies), *_weight_errors(errors)]
    return [table for table in (_named(table, experiment) for table in found) if table.of_paper or table.rows]


def _named(table: Table, experiment: str) -> Table:
    return Table(experiment, f"{experiment}-{table.name}", table.caption, table.columns, table.rows, table.of_paper)


def _spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """`61.2 (60.8–61.9)`: the mean, and the least and the most where they differ."""
    return _of(Spread.of(values), form)


def _of(spread: Spread, form: Callable[[float], str]) -> str:
    low, high = form(spread.low), form(spread.high)
    return form(spread.mean) + (f" ({low}–{high})" if low != high else "")


def _time(seconds: float) -> str:
    return format_seconds(float(f"{seconds:.3g}"))


def _points(share: float) -> str:
    """0.7821 to `78.2`: accuracy in per cent, as the paper prints it."""
    return format_percent(share).rstrip("%")


def _told(what: str, rows: Iterable[Any]) -> str:
    seeds = len({row.seed for row in rows})
    return f"{what} " + ("One seed." if seeds == 1 else f"Means of {seeds} seeds (least–most).")


# ------------------------------------------------------------------------------------------------ training


def _ends(points: Sequence[Point]) -> list[Table]:
    if not points:
        return []
    settings = ends(points)
    names = names_of(settings)
    columns = ("Run", "Perplexity", "Parameters", "Updates", "Time", "Cost", "Seeds")
    rows = tuple(
        (
            names[setting],
            _spread([point.perplexity for point in last], format_perplexity),
            format_count(setting.parameters),
            f"{statistics.fmean(point.updates for point in last):,.0f}",
            _time(statistics.fmean(point.seconds for point in last)),
            format_flops(statistics.fmean(point.flops for point in last)),
            f"{len(last)}",
        )
        for setting, last in settings.items()
    )
    return [Table("", "ends", _told("At the end of training.", points), columns, rows)]


def _rates(points: Sequence[Point]) -> list[Table]:
    if not points:
        return []
    settings = ends(points)
    sizes = sorted({setting.size for setting in settings})
    several = len(sizes) > 1
    columns = (*(("Size",) if several else ()), "Batch size", "Learning rate", "Perplexity", "Updates", "Time", "Seeds")
    rows = tuple(
        (
            *((setting.size,) if several else ()),
            f"{setting.batch:,}",
            f"{setting.rate:g}",
            _spread([point.perplexity for point in last], format_perplexity),
            f"{statistics.fmean(point.updates for point in last):,.0f}",
            _time(statistics.fmean(point.seconds for point in last)),
            f"{len(last)}",
        )
        for setting, last in settings.items()
    )
    return [Table("", "rates", _told(f"Here: {', '.join(sizes)}, at the end of training.", points), columns, rows)]


def _paper_rates() -> Table:
    rows = tuple((f"{batch:,}", f"{rate:g}") for batch, rate in sorted(LEARNING_RATES.items()))
    caption = "The paper’s Table 1: 12 layers, 768H."
    return Table("", "paper-rates", caption, ("Batch size", "Learning rate"), rows, of_paper=True)


def _memory(memory: Sequence[Memory]) -> list[Table]:
    shares = [share for share in SHARED if any(row.share == share for row in memory)]
    if not shares:
        return []
    peaks = {share: [row.peak_bytes for row in memory if row.share == share] for share in shares}
    whole = statistics.fmean(peaks["none"]) if "none" in peaks else None
    rows = []
    for share in shares:
        saved = (
            "–" if whole is None or share == "none" else f"{100 * (1 - statistics.fmean(peaks[share]) / whole):.1f} %"
        )
        paper = f"{100 * PAPER_SHARING_SAVES:.0f} %" if share == "all" else "–"
        rows.append((SHARED[share], _spread(peaks[share], format_bytes), saved, paper, f"{len(peaks[share])}"))
    columns = ("Layers", "Memory", "Saved", "Saved in the paper", "Seeds")
    return [Table("", "memory", _told("The most memory that training takes.", memory), columns, tuple(rows))]


def _translated(rows: Sequence[Translated]) -> list[Table]:
    if not rows:
        return []
    columns = ("Size", "Test BLEU", "± of a test", "Parameters", "Updates", "Dev perplexity", "Time", "Seeds")
    settings = by_setting(rows)
    names = names_of(settings)
    cells = tuple(
        (
            names[setting],
            _spread([row.bleu for row in here], format_bleu),
            format_bleu(statistics.fmean(row.bleu_error for row in here)),
            format_count(setting.parameters),
            f"{statistics.fmean(row.updates for row in here):,.0f}",
            _spread([row.perplexity for row in here], format_perplexity),
            _time(statistics.fmean(row.seconds for row in here)),
            f"{len(here)}",
        )
        for setting, here in settings.items()
    )
    caption = _told("BLEU of the test set by the paper’s measure; ± is one standard error over its sentences.", rows)
    return [Table("", "translated", caption, columns, cells)]


# ------------------------------------------------------------------------------------------------ finetuning


def _finetuned(rows: Sequence[Accuracy]) -> list[Table]:
    """Table 2: stopped at the same perplexity, then finetuned."""
    whole = [row for row in chosen(rows) if row.sparsity == 0 and row.bits == 32]
    if not whole:
        return []
    settings = by_setting(whole)
    names = names_of(settings)
    cells = tuple(
        (
            names[setting],
            _spread([row.perplexity for row in here], format_perplexity),
            _spread([row.accuracy for row in here], _points),
            format_count(setting.parameters),
            _time(statistics.fmean(row.seconds for row in here)),
            f"{len(here)}",
        )
        for setting, here in settings.items()
    )
    columns = ("Model", "Perplexity", "Accuracy (%)", "Parameters", "Pretrained for", "Seeds")
    return [Table("", "finetuned", _told("Here.", whole), columns, cells)]


def _paper_finetuned() -> Table:
    columns = ("Model", "Perplexity", "MNLI (%)", "SST-2 (%)")
    return Table("", "paper-finetuned", "The paper’s Table 2.", columns, PAPER_TABLE_2, of_paper=True)


def _checkpoints(rows: Sequence[Accuracy]) -> list[Table]:
    """Figure 8: what the fewest bits lose, from each checkpoint."""
    whole = [row for row in best_finetunings(rows) if row.sparsity == 0]
    if not whole:
        return []
    fewest = min(row.bits for row in whole)
    settings = by_setting(whole)
    names = names_of(settings)
    cells = []
    for setting, of_setting in settings.items():
        for checkpoint in sorted({row.checkpoint for row in of_setting}):
            here = [row for row in of_setting if row.checkpoint == checkpoint]
            full = {(row.run, row.finetune_seed): row.accuracy for row in here if row.bits == 32}
            few = {(row.run, row.finetune_seed): row.accuracy for row in here if row.bits == fewest}
            both = sorted(set(full) & set(few))
            if both:
                cells.append(
                    (
                        names[setting],
                        f"{100 * checkpoint:g} %",
                        _spread([row.perplexity for row in here], format_perplexity),
                        _spread([full[key] for key in both], _points),
                        _spread([few[key] for key in both], _points),
                        _spread([full[key] - few[key] for key in both], _points),
                        f"{len(both)}",
                    )
                )
    columns = ("Size", "Pretraining", "Perplexity", "Accuracy at 32 bits (%)", f"At {fewest} bits (%)")
    columns += ("Lost (points)", "Seeds")
    return [Table("", "checkpoints", _told("Finetuned from each checkpoint.", whole), columns, tuple(cells))]


# ------------------------------------------------------------------------------------------------ compression


def _compressed(rows: Sequence[Accuracy]) -> list[Table]:
    rows = chosen(rows)
    measured = levels(rows)
    if not measured:
        return []
    names = names_of(level.setting for level in measured)
    found = []
    quantized = [level for level in measured if level.sparsity == 0]
    widths = sorted({level.bits for level in quantized}, reverse=True)
    caption = _told("Accuracy (%) by bits a weight, not pruned.", rows)
    columns = ("Size", "Parameters", *(f"{bits} bits" for bits in widths))
    found.append(Table("", "quantized", caption, columns, _grid(quantized, names, widths, lambda level: level.bits)))
    pruned = [level for level in measured if level.bits == 32]
    steps = sorted({level.sparsity for level in pruned})
    if len(steps) > 1:
        caption = _told("Accuracy (%) by share pruned, at 32 bits.", rows)
        columns = ("Size", "Parameters", *(f"{100 * step:g} %" for step in steps))
        found.append(Table("", "pruned", caption, columns, _grid(pruned, names, steps, lambda level: level.sparsity)))
        found.append(_frontier(measured, names, rows))
    return found


def _grid(
    measured: Sequence[Level], names: dict[Setting, str], places: Sequence[float], place: Callable[[Level], float]
) -> tuple[tuple[str, ...], ...]:
    """A row for each setting, a column for each of the places."""
    rows = []
    for setting in dict.fromkeys(level.setting for level in measured):
        at = {place(level): level.accuracy for level in measured if level.setting == setting}
        cells = []
        for each in places:
            spread = at.get(each)
            cells.append("–" if spread is None else _of(spread, _points))
        rows.append((names[setting], format_count(setting.parameters), *cells))
    return tuple(rows)


def _frontier(measured: Sequence[Level], names: dict[Setting, str], rows: Sequence[Accuracy]) -> Table:
    cells = tuple(
        (
            f"{number}",
            names[level.setting],
            f"{100 * level.sparsity:g} %",
            f"{level.bits}",
            _of(level.accuracy, _points),
            format_bytes(level.bytes),
            format_bytes(level.bytes_paper),
        )
        for number, level in enumerate(frontier(measured), start=1)
    )
    columns = ("No.", "Size", "Pruned", "Bits", "Accuracy (%)", "To store", "Paper’s count")
    caption = _told("The Pareto frontier: nothing that takes fewer bytes is as accurate.", rows)
    return Table("", "frontier", caption, columns, cells)


def _recipes(rows: Sequence[Accuracy]) -> list[Table]:
    """Appendix D: which finetuning of the grid was the best of each size."""
    cells = []
    best = [row for row in chosen(rows) if row.sparsity == 0 and row.bits == 32]
    for setting, here in by_setting(best).items():
        for row in here:
            recipe = (f"{row.finetune_batch}", f"{row.finetune_rate:g}", f"{row.finetune_dropout:g}")
            cells.append((setting.size, *recipe, f"{row.finetune_seed}", _points(row.accuracy)))
    columns = ("Size", "Batch", "Learning rate", "Dropout", "Seed", "Accuracy (%)")
    caption = "The finetuning that is best by validation. The paper’s grid: batch 16, 32, 64; rate 5e-4, 3e-4, 1e-4; "
    caption += "seed 100, 300, 500; dropout 0.1, 0.2, 0.3."
    return [Table("", "recipes", caption, columns, tuple(cells))]


# ------------------------------------------------------------------------------------------------ weights


def _weight_errors(errors: Sequence[Error]) -> list[Table]:
    """Figure 9: a row for each kind of module, a column for each size."""
    found = []
    for words, sparsity, bits in ways(errors):
        rows = [error for error in errors if (error.sparsity, error.bits) == (sparsity, bits)]
        settings = by_setting(rows)
        names = names_of(settings)
        for name, label, of in STATISTICS:
            kinds = [kind for kind in kinds_in_order(error.kind for error in rows) if kind != "all"]
            cells = tuple(
                (kind, *(_mean([of(e) for e in here if e.kind == kind]) for here in settings.values()))
                for kind in [*kinds, *(["all"] if any(error.kind == "all" for error in rows) else [])]
            )
            way = f"{bits}-bits" if bits < 32 else f"pruned-{100 * sparsity:g}"
            caption = f"{label[0].upper()}{label[1:]} at {words}. Means over the seeds."
            found.append(Table("", f"{way}-{name}", caption, ("Weights", *names.values()), cells))
    return found


def _mean(values: Sequence[float]) -> str:
    return format_error(statistics.fmean(values)) if values else "–"
