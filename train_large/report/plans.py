"""Plans and hold-outs for a reader: in a few lines, as JSON, as a figure."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from train_large import pilot_runs, scaling, speed
from train_large.errors import UserError
from train_large.hold_out import HoldOut
from train_large.planner import QUANTILES, Compression, Interval, Option, Plan, considered, drawn
from train_large.report.units import format_bytes, format_count, format_perplexity, format_seconds, seconds_unit
from train_large.sizes import Size

PICTURES = ("png", "svg", "pdf")


def describe(plan: Plan) -> str:
    """The plan in a few lines, for a terminal."""
    pick = plan.pick
    rate = f" at a peak rate of {pick.learning_rate:g}" if pick.learning_rate is not None else ""
    lines = [
        f"Train {pick.size} ({format_count(pick.parameters)} parameters, {pick.heads} "
        f"{'head' if pick.heads == 1 else 'heads'}, feed-forward layers of {pick.ffn:,}) for the whole "
        f"{format_seconds(plan.budget_seconds)}: about {pick.updates:,} updates of {_batch(pick)}{rate}.",
        f"Expected perplexity {format_perplexity(pick.perplexity)}, 90% interval {_range(pick.interval)}.",
    ]
    if pick.accuracy is not None and pick.accuracy_interval is not None:
        low, high = pick.accuracy_interval
        lines.append(f"Expected accuracy once finetuned {pick.accuracy:.1%}, 90% interval {low:.1%} to {high:.1%}.")
    if pick.compression is not None and plan.limit_bytes is not None:
        lines.append(_how_to_store(pick.compression, plan.limit_bytes))
    for what, option in (("smaller", plan.smaller), ("larger", plan.larger)):
        if option is None:
            lines.append(f"No {what} size was considered.")
            continue
        unfit = ", and does not fit the limit" if plan.limit_bytes and option.compression is None else ""
        lines.append(
            f"The next {what}, {option.size}{'' if option.logged else ' (no pilot)'}: "
            f"perplexity {format_perplexity(option.perplexity)}, {_range(option.interval)}{unfit}."
        )
    lines += [f"Note: {caveat}." for caveat in plan.caveats]
    return "\n".join([*lines, f"Fitted: {plan.law}."])


def _batch(option: Option) -> str:
    if option.length is None:
        return f"{option.batch_tokens:,} tokens"
    return f"{round(option.batch_tokens / option.length):,} sequences of {option.length} tokens"


def _how_to_store(compression: Compression, limit: int) -> str:
    ways = []
    if compression.sparsity:
        ways.append(f"pruned to {compression.sparsity:.0%} zeros")
    if compression.bits < 32:
        ways.append(f"quantized to {compression.bits} bits")
    cost = (
        "at a cost in accuracy that is unknown"
        if compression.loss is None
        else f"at a cost of about {100 * compression.loss:.1f} points of accuracy"
    )
    size = f"{format_bytes(compression.bytes)} of {format_bytes(limit)}"
    if not ways:
        return f"Store it as it is: {size}."
    return f"Store it {' and '.join(ways)}: {size}, {cost}."


def _range(interval: Interval) -> str:
    return " to ".join(map(format_perplexity, interval))


def as_json(*found: Plan | HoldOut) -> str:
    """It as a JSON object with a line's end; of both, an object that has them as `plan` and `hold_out`."""
    values = {"plan" if isinstance(each, Plan) else "hold_out": dataclasses.asdict(each) for each in found}
    shown = values if len(values) > 1 else next(iter(values.values()))
    return json.dumps(shown, indent=1, allow_nan=False) + "\n"


def told(found: Plan | HoldOut) -> str:
    """It in a few lines, for a terminal."""
    return describe(found) if isinstance(found, Plan) else describe_hold_out(found)


def describe_hold_out(held: HoldOut) -> str:
    """In a few lines, for a terminal."""
    lines = [f"Hold-out, {held.how} ({', '.join(held.fitted_on)}):"]
    lines += [
        f"  {each.size:<10} perplexity {format_perplexity(each.measured)}, predicted "
        f"{format_perplexity(each.predicted)} ({each.error:+.0%}), 90% interval {_range(each.interval)}"
        for each in held.errors
    ]
    verdict = "which is the best" if held.regret == 0 else f"{held.regret:.1%} worse than the best, {held.best}"
    return "\n".join([*lines, f"  The pick would have been {held.pick}, {verdict}."])


def check_picture(path: Path) -> None:
    """Raise UserError for a name that is no picture's."""
    if path.suffix.lstrip(".").lower() not in PICTURES:
        raise UserError(f"{path}: give a name that ends in {', '.join('.' + each for each in PICTURES)}.")


def draw(
    logs: Sequence[Path],
    budget_seconds: float,
    path: Path,
    candidates: Sequence[Size] = (),
    draws: int = scaling.DRAWS,
) -> None:
    """Predicted perplexity against the budget, a curve with its interval for each size that `plan` considers, and the
    pilots' points.

    The picture's format is that of the name: .png, .svg or .pdf. Points are filled where the fit used them. Raises
    UserError as `plan` does, and where the file cannot be written.
    """
    try:
        import matplotlib.style
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing needs matplotlib: run make env, or pip install '.[report]' in the checkout.") from None
    from train_large.files import whole
    from train_large.report.drawing import palette, round_ticks

    check_picture(path)
    pilots = pilot_runs.read_pilots(logs)
    law = scaling.fit(pilots, draws)
    parts = scaling.sort_pilots(pilots)
    starts = {id(each.pilot): each.start for each in parts.fitted}
    tried = considered(pilots, candidates)
    unit, length = seconds_unit(budget_seconds)
    first = min(float(pilot.seconds[0]) for pilot in pilots)
    times = np.geomspace(first, max(budget_seconds, max(float(p.seconds[-1]) for p in pilots)), 60)
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        axis = figure.add_subplot()
        for size, (colour, _) in zip(tried, palette(len(tried))):
            own = [pilot for pilot in pilots if pilot.size == size]
            parameters = pilot_runs.parameters_like(pilots[0], size)
            tokens = times / speed.seconds_per_token(size, pilots)
            losses = np.stack([drawn(law, size, parameters, each, pilots) for each in tokens])
            low, middle, high = np.exp(np.quantile(losses, QUANTILES, axis=1))
            axis.plot(times / length, middle, color=colour, linestyle="-" if own else "--", label=size.name)
            axis.fill_between(times / length, low, high, color=colour, alpha=0.12, linewidth=0)
            for pilot in own:
                start = starts.get(id(pilot), len(pilot.losses))
                for begin, end, fill in ((0, start, "none"), (start, len(pilot.losses), colour)):
                    heights = np.exp(pilot.losses[begin:end])
                    axis.scatter(
                        pilot.seconds[begin:end] / length, heights, s=18, edgecolors=colour, facecolors=fill, zorder=3
                    )
        axis.axvline(budget_seconds / length, color="grey", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel=f"budget ({unit})", ylabel="validation perplexity")
        for each in (axis.xaxis, axis.yaxis):
            ends = sorted(each.get_view_interval())
            each.set_ticks(round_ticks(ends[0], ends[1], 7))
            each.set_major_formatter("{x:g}")
            each.set_minor_formatter("")
        axis.grid(color="#e0e0e0", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.legend(frameon=False, title="lines: at the end of a run\npoints: on the way", title_fontsize=8, fontsize=8)
        with whole(path) as aside:
            figure.savefig(aside, format=path.suffix.lstrip(".").lower(), dpi=150)
