"""Which of what makes this project quick works on this machine, and why the rest does not.

What torch and fairseq have to be asked for is asked by `fairseq_plugins/doctor.py`, in another process: the core
imports neither. The rest, what the system and the installed packages say, is found here.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from train_large import machine
from train_large.processes import environment
from train_large.report.units import format_bytes
from train_large.sizes import Size, parameters

PATIENCE = 300  # seconds for the probe: it takes a few, but imports from a cold disk take many

MODEL, VOCABULARY = Size(12, 768), 50_265  # what memory and disk are compared with
TRAINING_BYTES = 4 * 4  # of a parameter: weight, gradient, Adam's two averages
CHECKPOINT_BYTES = 3 * 4  # weight and averages
CHECKPOINTS = 3  # checkpoint_last.pt, checkpoint_best.pt, and the one that is being written

DISTRIBUTION = "train-large"
STANDS_FOR = {"fairseq-fixed": "fairseq"}  # one of the two is wanted, by the version of Python
NEEDED_FOR = {
    "fairseq": "training, time-steps and prepare-text",
    "t2t": "translation in Tensor2Tensor (in an environment of its own: make env-t2t)",
    "xla": "TPUs (in an environment of its own: make env-xla)",
    "pack": "quantize, pack, unpack, inspect and predict",
    "hf": "export-hf",
    "report": "the report's tables, figures and page, and plan",
    "study": "the workflow of make study",
    "dev": "tests and lint",
}


@dataclass(frozen=True)
class Row:
    """One thing that was looked at. active: None where that could not be told, which is a fault of the installation.
    off_by: the flag that turns it off."""

    what: str
    active: bool | None
    why: str
    off_by: str | None = None


def examine(user_dir: Path | None = None) -> list[Row]:
    """All rows. user_dir: this project's plugin; None looks for fairseq_plugins here, then beside this package."""
    return [*probe(user_dir), *libraries(), memory(), disk()]


def status(rows: Sequence[Row]) -> int:
    """The exit status: 1 where something could not be told."""
    return int(any(row.active is None for row in rows))


def as_json(rows: Sequence[Row]) -> str:
    return json.dumps([asdict(row) for row in rows], indent=2)


def as_table(rows: Sequence[Row], width: int | None = None) -> str:
    """What, whether, and why, in lines of at most `width` characters (those of the terminal)."""
    width = max(60, width or shutil.get_terminal_size((120, 24)).columns)
    margin = max(len(row.what) for row in rows) + 2
    lines = []
    for row in rows:
        word = {True: "yes", False: "no", None: "?"}[row.active]
        off = f" (off by {row.off_by})" if row.off_by and row.active else ""
        first = f"{row.what:<{margin}}{word:<5}"
        lines += textwrap.wrap(
            row.why + off,
            width,
            initial_indent=first,
            subsequent_indent=" " * len(first),
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


# The script is run by its path: as a part of its package it could say nothing where fairseq, which the package imports,
# is missing.
_START = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"


def probe(user_dir: Path | None = None) -> list[Row]:
    """What `fairseq_plugins/doctor.py` finds, in a process of its own by this Python; one row if there is no answer."""
    lost = "nothing can be told of layers, products, Adam, batches, threads, GPUs, TPUs and packed prediction"
    script = _plugin(user_dir) / "doctor.py"
    if not script.is_file():
        return [
            Row("probe", None, f"{script} is not there: give this project's fairseq_plugins as --user-dir; so {lost}")
        ]
    try:
        said = subprocess.run(
            [sys.executable, "-c", _START, str(script)],
            capture_output=True,
            text=True,
            errors="replace",
            env=environment(script.parents[1], Path(__file__).parents[1]),
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return [Row("probe", None, f"{script} gave no answer in {PATIENCE} seconds; so {lost}")]
    try:
        return [Row(**row) for row in json.loads(said.stdout.splitlines()[-1])]
    except (IndexError, ValueError, TypeError):
        return [Row("probe", None, f"{script} ended {_ending(said)}; so {lost}")]


def _plugin(user_dir: Path | None) -> Path:
    if user_dir is not None:
        return user_dir.resolve()
    places = [Path.cwd() / "fairseq_plugins", Path(__file__).resolve().parents[1] / "fairseq_plugins"]
    return next((place for place in places if (place / "doctor.py").is_file()), places[0])


def _ending(said: subprocess.CompletedProcess[str]) -> str:
    if said.returncode < 0:  # an instruction that this CPU has not got, or no memory
        with contextlib.suppress(ValueError):
            return f"by {signal.Signals(-said.returncode).name}"
    last = said.stderr.strip().splitlines()[-1:] or ["no reason given"]
    return f"with status {said.returncode} ({last[0]})"


def libraries() -> list[Row]:
    """A row for each extra of the package: whether what it wants is installed, and what it is for."""
    try:
        wanted = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        why = f"{DISTRIBUTION} is not installed (pip install --editable .), so what its extras want is not known here"
        return [Row("extras", False, why)]
    packages: dict[str, set[str]] = defaultdict(set)
    for line in wanted:
        name, of = re.match(r"[\w.-]+", line), re.search(r"""extra *== *["']([^"']+)""", line)
        if name and of:
            packages[of[1]].add(STANDS_FOR.get(name[0], name[0]))
    rows = []
    for extra, names in packages.items():
        missing = sorted(name for name in names if not _installed(name))
        why = f"for {NEEDED_FOR[extra]}" if extra in NEEDED_FOR else "installed"
        if missing:
            why = f"{', '.join(missing)} not installed: install this package with its extra {extra}, {why}"
        rows.append(Row(f"extra {extra}", not missing, why))
    return rows


def _installed(package: str) -> bool:
    """By its name as it is installed: what is imported may have another (`xdist` of `pytest-xdist`)."""
    for name in (package, *(other for other, of in STANDS_FOR.items() if of == package)):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(name)
            return True
    return False


def memory(root: Path = Path("/")) -> Row:
    """What a new process could take now. root: where /proc and /sys are."""
    needed = TRAINING_BYTES * parameters(MODEL, VOCABULARY)
    wants = (
        f"weights, gradients and Adam's averages of {MODEL.name} take {format_bytes(needed)}, activations come on top"
    )
    free = machine.free_memory(root)
    if free is None:
        return Row("memory", True, f"this system does not tell what is free; {wants}")
    limits = list(machine.left_by_cgroups(root))
    room = min([free, *limits])
    limit = f"the cgroup's limit leaves {format_bytes(min(limits))}" if limits else "no limit by a cgroup"
    return Row("memory", room >= needed, f"{format_bytes(free)} free, {limit}; {wants}")


def disk(folder: Path | None = None) -> Row:
    """Room where a run that starts here puts its checkpoints."""
    folder = folder or Path.cwd()
    free = shutil.disk_usage(folder).free
    each = CHECKPOINT_BYTES * parameters(MODEL, VOCABULARY)
    why = f"{format_bytes(free)} free in {folder}; a checkpoint of {MODEL.name} takes {format_bytes(each)}"
    return Row("disk", free >= CHECKPOINTS * each, why)
