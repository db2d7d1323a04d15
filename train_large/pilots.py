"""Pilot runs for the planner: fairseq-train, one size after another, each with the same short budget.

A pilot that is done is not run again, and one that was killed goes on from its checkpoint. The user's own flags decide
on data and recipe; only what makes a run a pilot (its size, budget, validations and checkpoints) is set here.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from train_large import runlog
from train_large.budget import parse_duration
from train_large.errors import UserError
from train_large.files import whole
from train_large.processes import end, ended_by_signals, environment
from train_large.sizes import Size

VALIDATIONS = 15  # on each curve, about
LINES = 10  # of the run log from one to the next, about: by them the planner knows the learning rate
PROBE_SHARE = 0.05  # of the pilot's budget, to see how long an update takes
PROBE_UPDATES = 40
SETTINGS = "pilot.json"
PATIENCE = 60  # seconds for a run to save itself once it is asked to end

_OURS = (
    *("--save-dir", "--restore-file", "--reset-optimizer", "--max-update", "--budget", "--arch", "-a", "--no-save"),
    *("--encoder-layers", "--encoder-embed-dim", "--encoder-ffn-embed-dim", "--encoder-attention-heads"),
    *("--save-interval-updates", "--keep-interval-updates", "--disable-validation"),
    *("--max-epoch", "--stop-time-hours", "--target-ppl"),
)
_BATCH = ("--batch-size", "--max-sentences", "--max-tokens")
_INTERVAL, _LOG_INTERVAL = "--validate-interval-updates", "--log-interval"


@dataclass(frozen=True)
class Recipe:
    """What all the pilots have in common.

    `data` is made by fairseq-preprocess, `budget` as `--budget` takes it (5m), `extra` are the user's flags for
    fairseq-train, which come last and so win. `trainer` is the module that is run as fairseq-train.
    """

    data: Path
    budget: str
    extra: tuple[str, ...] = ()
    user_dir: Path = Path("fairseq_plugins")
    trainer: str = "fairseq_cli.train"


def run_pilots(recipe: Recipe, sizes: Sequence[Size], out: Path, say: Callable[[str], object] = print) -> list[Path]:
    """Train each of `sizes` for the budget, in the folder of its name under `out`; the folders, in order.

    Raises UserError for bad flags, for a folder with a pilot of other settings, and when a run fails: the sentence
    names the file with what it printed. On Ctrl-C and SIGTERM the run saves itself; the next call goes on from there.
    """
    _check(recipe, sizes)
    folders = [out / size.name for size in sizes]
    for size, folder in zip(sizes, folders):
        _check_settings(folder, recipe, size)
    for size, folder in zip(sizes, folders):
        if is_done(folder):
            say(f"{size.name}: done before, in {folder}")
            continue
        _run(recipe, size, folder, out / "logs" / f"{size.name}.log", say)
    return folders


def is_done(folder: Path) -> bool:
    """Whether a run in this folder has come to the end of its budget."""
    log = folder / runlog.NAME
    return log.exists() and runlog.is_used_up(runlog.read(str(log)))


def command(recipe: Recipe, size: Size, folder: Path) -> list[str]:
    """The fairseq-train command of one pilot, but for how often it validates."""
    flags = f"""
        --task masked_lm --criterion budgeted_masked_lm --optimizer fused_adam --lr-scheduler budget_linear
        --arch prenorm_roberta --encoder-layers {size.layers} --encoder-embed-dim {size.hidden}
        --encoder-ffn-embed-dim {size.ffn} --encoder-attention-heads {size.heads} --budget {recipe.budget}
        --log-format simple --no-epoch-checkpoints --keep-interval-updates 1
    """.split()
    start = [sys.executable, "-m", recipe.trainer, str(recipe.data), "--user-dir", str(recipe.user_dir)]
    return [*start, "--save-dir", str(folder), *flags, *recipe.extra]


def _check(recipe: Recipe, sizes: Sequence[Size]) -> None:
    parse_duration(recipe.budget, "--pilot")
    if len(set(sizes)) < 2:
        raise UserError("--sizes: pilots of at least two sizes are needed to tell how loss depends on size.")
    names = [size.name for size in sizes]
    if len(set(names)) < len(names):
        raise UserError(f"--sizes: {max(names, key=names.count)} is there twice; give each size once.")
    if not (recipe.data / "dict.txt").is_file():
        raise UserError(f"{recipe.data}: no dict.txt there; give a folder made by fairseq-preprocess.")
    if not recipe.user_dir.is_dir():
        raise UserError(f"{recipe.user_dir}: no such folder; give the folder fairseq_plugins as --user-dir.")
    given = {word.partition("=")[0] for word in recipe.extra if word.startswith("-")}
    for flag in _OURS:
        if flag in given:
            raise UserError(f"{flag} behind -- is set by --pilot and --sizes themselves: leave it out.")
    if "--lr" not in given:
        raise UserError("the pilots need their peak learning rate: add it behind --, as in -- --lr 0.001.")
    if not given.intersection(_BATCH):
        raise UserError("the pilots need their batch: add it behind --, as in -- --batch-size 32.")


def _check_settings(folder: Path, recipe: Recipe, size: Size) -> None:
    """Raise UserError where another pilot, or something else, lies in the folder."""
    path = folder / SETTINGS
    if not path.exists():
        if (folder / runlog.NAME).exists():
            raise UserError(
                f"{folder} holds a run that no pilot has made: give another --out, or hand its log over as it is."
            )
        return
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        before, _ = settings["command"], settings["interval"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} cannot be read: remove {folder}, and the pilot will be run anew.") from None
    if before != command(recipe, size, folder)[1:]:
        raise UserError(f"{folder} holds a pilot with other settings: give another --out, or remove that folder.")


def _run(recipe: Recipe, size: Size, folder: Path, printed: Path, say: Callable[[str], object]) -> None:
    words = command(recipe, size, folder)
    folder.mkdir(parents=True, exist_ok=True)
    printed.parent.mkdir(parents=True, exist_ok=True)
    settings = folder / SETTINGS
    if settings.exists():
        interval = json.loads(settings.read_text(encoding="utf-8"))["interval"]
    else:
        interval = _given(_INTERVAL, recipe.extra) or _interval(recipe, size, printed)
        with whole(settings) as aside:
            aside.write_text(json.dumps({"command": words[1:], "interval": interval}) + "\n", encoding="utf-8")
    if not (folder / "checkpoint_last.pt").exists():
        (folder / runlog.NAME).unlink(missing_ok=True)  # of a run that was killed before it had saved anything
    words += [_INTERVAL, str(interval), "--save-interval-updates", str(interval)]
    if _given(_LOG_INTERVAL, recipe.extra) is None:
        words += [_LOG_INTERVAL, str(max(1, interval // LINES))]
    say(f"{size.name}: training for {recipe.budget}; what it prints goes to {printed}")
    _fairseq(words, recipe, size, printed)
    if not is_done(folder):
        raise UserError(f"the pilot of {size.name} ended before its budget did: see {printed}, and run this again.")


def _given(flag: str, words: Sequence[str]) -> int | None:
    """The whole number given for a flag, as `--flag 5` or `--flag=5`; None where there is none."""
    values = [word.partition("=")[2] or after for word, after in zip(words, [*words[1:], ""]) if _is(word, flag)]
    if not values:
        return None
    if not values[-1].isdigit() or int(values[-1]) < 1:
        raise UserError(f"{flag} {values[-1]}: give a whole number above 0.")
    return int(values[-1])


def _is(word: str, flag: str) -> bool:
    return word.partition("=")[0] == flag


def _interval(recipe: Recipe, size: Size, printed: Path) -> int:
    """Updates from one validation to the next: a few updates are run to see how long they take."""
    seconds = parse_duration(recipe.budget)
    with tempfile.TemporaryDirectory(prefix="train-large-") as folder:
        words = command(recipe, size, Path(folder))
        words += ["--budget", f"{max(1.0, PROBE_SHARE * seconds):.3f}", "--max-update", str(PROBE_UPDATES)]
        _fairseq([*words, "--no-save", "--disable-validation", "--log-interval", "1"], recipe, size, printed)
        log = Path(folder) / runlog.NAME
        lines = [line for line in runlog.read(str(log)) if line["kind"] == "train"] if log.exists() else []
    if not lines:
        raise UserError(f"the pilot of {size.name} made no update: see {printed}.")
    times = [0.0, *(float(line["train_seconds"]) for line in lines)]
    durations = [after - before for before, after in zip(times, times[1:])]
    # The first updates are slower; where there are no others, they must do.
    return max(1, math.ceil(seconds / VALIDATIONS / statistics.median(durations[len(durations) // 2 :])))


def _fairseq(words: Sequence[str], recipe: Recipe, size: Size, printed: Path) -> None:
    """Run the command to its end. Raises UserError if it fails."""
    with printed.open("ab") as output, ended_by_signals():
        output.write(f"$ {shlex.join(words)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment(recipe.user_dir.resolve().parent),  # an adapter beside fairseq_plugins is to be found
        )
        try:
            status = process.wait()
        except BaseException:
            end([process], PATIENCE)  # a budgeted run saves itself on SIGTERM
            raise
    if status:
        lines = [line.strip() for line in printed.read_text(errors="replace").splitlines() if line.strip()]
        raise UserError(f"the pilot of {size.name} failed with status {status}, see {printed}: {lines[-1][:300]}")
