"""The report as text: what to ship, the sizes, the frontier and the claims; readable at 80 columns and in a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from train_large.report.claims import above_chance, judge_claims, standard_error
from train_large.report.pareto import best_within, frontier_of, measurements
from train_large.report.results import Claim, Compressed, Model, Results, Runs, Study, TranslationResults, WeightError
from train_large.report.training_claims import choice_parts
from train_large.report.training_tables import Training, about_scores, about_training, columns_of, is_best
from train_large.report.units import (
    format_bytes,
    format_count,
    format_error,
    format_limit,
    format_percent,
    format_perplexity,
    format_seconds,
)

VERDICTS = {True: "shows", False: "does not show", None: "cannot be told"}


def claims_of(study: Study) -> tuple[Claim, ...]:
    """The verdicts written in results.json; where there are none, those that its measurements give now."""
    if isinstance(study, Runs) or study.claims is None:
        return judge_claims(study)
    return study.claims


def describe(model: Model, entry: Compressed) -> str:
    """`3l_128h, 45% pruned, 6 bits`."""
    pruned = f"{format_percent(entry.sparsity, 0)} pruned" if entry.sparsity else "not pruned"
    return f"{model.name}, {pruned}, {entry.bits} bits"


def memory_limits(results: Results, most: int = 7) -> list[int]:
    """Round limits (1, 2, 5 and their tens) between which the best choice changes, at most so many."""
    sizes = [entry.stored_bytes for _, entry in frontier_of(results)]
    if not sizes:
        return []
    series = [digit * 10**power for power in range(16) for digit in (1, 2, 5)]
    first = next(i for i, limit in enumerate(series) if limit >= min(sizes))
    last = next(i for i, limit in enumerate(series) if limit >= max(sizes))
    limits: list[int] = []
    for limit in series[first : last + 1]:
        if not limits or best_within(results.models, limit) != best_within(results.models, limits[-1]):
            limits.append(limit)
    every = -(-len(limits) // most)
    return limits[::-1][::every][::-1]


def ship_line(results: Results, limit: int) -> str:
    """What to ship within a limit, in a sentence or two."""
    return "".join(ship_parts(results, limit))


def ship_parts(results: Results, limit: int) -> tuple[str, str, str]:
    """(the limit, the most accurate that fits, what the figures leave open), to be read one after the other."""
    within = f"Within {format_limit(limit)}"
    entries = measurements(results.models)
    best = best_within(results.models, limit)
    if best is None:
        if not entries:
            return f"{within}: ", "nothing to ship", ", for no model was compressed."
        model, entry = min(entries, key=lambda pair: pair[1].stored_bytes)
        smallest = f". The smallest is {describe(model, entry)} ({format_bytes(entry.stored_bytes)})."
        return f"{within}: ", "nothing fits", smallest
    model, entry = best
    within, choice = f"{within}, ship this: ", describe(model, entry)
    figures = f" ({format_bytes(entry.stored_bytes)}, accuracy {format_percent(entry.accuracy)})"
    if not above_chance(entry.accuracy, results):
        return within, choice, f"{figures}, which is no better than always guessing the commoner class."
    error = standard_error(entry.accuracy, results.task.valid)
    rivals = [(m, e) for m, e in entries if entry.accuracy - e.accuracy <= error and above_chance(e.accuracy, results)]
    rival, smaller = min(rivals, key=lambda pair: (pair[1].stored_bytes, -pair[1].accuracy))
    if smaller.stored_bytes > 0.9 * entry.stored_bytes:  # not worth a sentence
        return within, choice, f"{figures}."
    return (
        within,
        choice,
        f"{figures}. Smaller, and within one standard error ({100 * error:.1f} points) of it: "
        f"{describe(rival, smaller)} ({format_bytes(smaller.stored_bytes)}, {format_percent(smaller.accuracy)}).",
    )


def sizes_table(results: Results) -> Table:
    table = _table(f"Trained for {format_seconds(results.budget.seconds)} each ({results.budget.clock} clock)")
    table.add_column("model", overflow="fold")
    for heading in ("parameters", "updates", "seconds", "perplexity", f"{results.task.metric}"):
        table.add_column(heading, justify="right")
    best = min(model.perplexity for model in results.models)
    for model in results.by_size:
        table.add_row(
            Text(model.name),
            format_count(model.parameters),
            f"{model.updates:,}",
            f"{model.train_seconds:,.1f}",
            format_perplexity(model.perplexity),
            format_percent(model.finetuned.accuracy),
            style="bold" if model.perplexity == best else "",
        )
    return table


def training_table(study: Training) -> Table:
    """Of a translation study or of run logs; the best figure of each kind is bold."""
    budget = study.budget
    title = f"Trained for {format_seconds(budget.seconds)} each ({budget.clock} clock)" if budget else "As trained"
    table = _table(title)
    table.collapse_padding = True  # eight columns in 80 characters
    columns = columns_of(study, on_page=False)
    table.add_column("model", overflow="fold")
    for column in columns:
        table.add_column(column.heading.replace(" ", "\n"), justify="right", vertical="bottom")
    for model in study.by_size:
        cells = []
        for column in columns:
            value = column.of(model)
            text = "–" if value is None else column.form(value)
            cells.append(Text(text, style="bold" if is_best(study, column, model) else ""))
        table.add_row(Text(model.name), *cells)
    return table


def frontier_table(results: Results) -> Table:
    table = _table("Pareto frontier: nothing smaller is as accurate")
    table.add_column("no.", justify="right")
    table.add_column("model", overflow="fold")
    of_bytes = ("file", "weights") if results.has_files else ("to store",)
    for heading in ("pruned", "bits", *of_bytes, "paper's count", "accuracy"):
        table.add_column(heading, justify="right")
    for number, (model, entry) in enumerate(frontier_of(results), start=1):
        table.add_row(
            str(number),
            Text(model.name),
            format_percent(entry.sparsity, 0),
            str(entry.bits),
            *([format_bytes(entry.stored_bytes)] if results.has_files else []),
            format_bytes(entry.bytes),
            format_bytes(entry.bytes_paper),
            format_percent(entry.accuracy),
        )
    return table


# Figure 9 of the paper: (a name, what was done, sparsity, bits).
WEIGHT_ERRORS = (("quantized", "quantized to 4 bits", 0.0, 4), ("pruned", "60% pruned", 0.6, 32))
# (heading, of one error; None where it has no value)
STATISTICS: tuple[tuple[str, Callable[[WeightError], float | None]], ...] = (
    ("mean |w − w′|", lambda error: error.mean_absolute),
    ("variance of w − w′", lambda error: error.variance),
    ("mean ÷ deviation of w", lambda error: error.normalized),
)


@dataclass(frozen=True)
class ErrorTable:
    """Weight errors of every size that has them: rows are (kind of module, a number for each statistic and model)."""

    name: str
    how: str
    models: tuple[Model, ...]
    rows: tuple[tuple[str, tuple[tuple[float | None, ...], ...]], ...]


def error_tables(results: Results) -> list[ErrorTable]:
    """The tables of figure 9 that the results have data for; kinds without any error are left out."""
    tables = []
    for name, how, sparsity, bits in WEIGHT_ERRORS:
        errors = {m.name: m.weight_errors_at(sparsity, bits) for m in results.by_size}
        models = tuple(model for model in results.by_size if errors[model.name])
        kinds = dict.fromkeys(
            kind for model in models for kind, e in errors[model.name].items() if e.variance or e.mean
        )
        # `all` comes last; what only the larger models have, before it.
        kinds_in_order = [kind for kind in kinds if kind != "all"] + ["all"] * ("all" in kinds)
        rows = tuple(
            (
                kind,
                tuple(
                    tuple(value(errors[m.name][kind]) if kind in errors[m.name] else None for m in models)
                    for _, value in STATISTICS
                ),
            )
            for kind in kinds_in_order
        )
        if rows:
            tables.append(ErrorTable(name, how, models, rows))
    return tables


def weight_error_tables(results: Results) -> list[Table]:
    """For a terminal: the mean of |w - w'| by kind of module, a column for each size."""
    made = []
    for errors in error_tables(results):
        table = _table(f"Weight error, {errors.how}: mean |w - w'|")
        table.add_column("weights", overflow="fold")
        for model in errors.models:
            table.add_column(Text(model.name), justify="right")
        for kind, values in errors.rows:
            table.add_row(kind, *map(format_error, values[0]))
        made.append(table)
    return made


def _table(title: str) -> Table:
    return Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)


def print_report(study: Study, memory_limit: int | None = None, console: Console | None = None) -> None:
    """Prints the report to the console (standard output if none is given; no colour codes where that is a file)."""
    console = console or Console(highlight=False)

    def say(text: str, style: str = "") -> None:
        console.print(Text(text, style=style))

    say(study.title, "bold")
    if isinstance(study, Results):
        task, n = study.task, study.task.valid
        say(
            f"Task: {task.name}, {n:,} validation examples; always guessing the commoner class: "
            f"{format_percent(task.majority)}."
        )
        console.print()
        console.print(sizes_table(study))
        if frontier_of(study):
            console.print(frontier_table(study))
        for table in weight_error_tables(study):
            console.print(table)
    else:
        for sentence in about_training(study):
            say(sentence)
        console.print()
        console.print(training_table(study))
        for sentence in about_scores(study):
            say(sentence)
        console.print()
    claims = claims_of(study)
    if claims:
        say("The paper's claims, as measured here", "bold")
    for claim in claims:
        console.print()
        say(f"[{VERDICTS[claim.shows]}] {claim.claim} (section {claim.section})")
        say(claim.measured)
    if isinstance(study, Results):
        console.print()
        for limit in memory_limits(study) if memory_limit is None else [memory_limit]:
            say(ship_line(study, limit), "bold")
    elif isinstance(study, TranslationResults):
        console.print()
        say(f"Train this: {''.join(choice_parts(study))}", "bold")
