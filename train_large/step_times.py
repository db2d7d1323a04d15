"""Seconds per update of every size, measured as section 2.2 of the paper says; the calibrated clock reads the table.

For each size: find the largest micro-batch that fits in memory, accumulate micro-batches up to the batch, wait until
the time per update settles, and take the mean of the next 100 updates. All sizes are timed by the same fairseq-train on
the same machine under the same memory limit.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import itertools
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from train_large import machine, runlog
from train_large.data.dictionary import read_dictionary
from train_large.errors import UserError
from train_large.processes import end, ended_by_signals, environment
from train_large.sizes import Size

UPDATES = 100  # the paper: "the average time over 100 steps"

WINDOW = 10
TOLERANCE = 0.05
PATIENCE = 100

TRIAL_UPDATES = 3  # enough to see whether a micro-batch fits: after the first, the optimizer's state is there too
MEMORY_SHARE = 0.8
POLL_SECONDS = 0.2  # looking more often would slow down what is measured

# CUDA; fairseq, which catches that and goes on (fairseq/trainer.py:862, 0.12.3.1); torch on a CPU; Linux; Python; XLA.
OUT_OF_MEMORY = re.compile(
    r"out of memory|recover from OOM|can't allocate memory|Cannot allocate memory|MemoryError|RESOURCE_EXHAUSTED",
    re.IGNORECASE,
)

# What trains: fairseq-train itself, or this project's launcher of it on torch-xla.
TRAINERS = {"torch": "fairseq_cli.train", "xla": "xla.pretrain"}


@dataclass(frozen=True)
class StepTime:
    """One row of the table; the fields are its columns."""

    size: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    vocabulary: int  # entries of the dictionary, special symbols included
    length: int  # tokens per sequence
    batch: int  # sequences per update
    micro_batch: int  # sequences at a time
    update_freq: int  # micro-batches per update
    seconds_per_update: float
    standard_deviation: float  # of one update, in seconds
    updates: int  # how many were measured
    settled_after: int  # how many were done before these
    peak_memory_bytes: int  # resident memory of the run with its data loaders, or memory of the GPU
    device: str
    machine: str
    torch: str
    flags: str  # those given to fairseq-train besides

    @property
    def shape(self) -> Size:
        return Size(self.layers, self.hidden, self.ffn, self.heads)


@dataclass(frozen=True)
class Trial:
    """What came of one run of fairseq-train: the seconds of each whole update, and whether it stayed within memory."""

    durations: tuple[float, ...]
    peak_memory_bytes: int
    fits: bool


Runner = Callable[[Size, int, int, int, Callable[[Sequence[float]], bool]], Trial]
"""run(size, micro_batch, update_freq, max_updates, enough): train until `enough(durations)`, or out of memory."""


def settled_at(
    durations: Sequence[float], window: int = WINDOW, tolerance: float = TOLERANCE, patience: int = PATIENCE
) -> int | None:
    """After how many updates the time per update has settled; None if that cannot be said yet.

    It has settled when the medians of two successive windows of updates differ by less than `tolerance` of the first.
    Medians, because a single slow update (an allocation, another process) says nothing of the trend. After `patience`
    updates it counts as settled whatever they say: some machines never come to rest, and the mean of 100 evens that
    out.
    """
    for done in range(2 * window, min(len(durations), patience) + 1):
        before = statistics.median(durations[done - 2 * window : done - window])
        after = statistics.median(durations[done - window : done])
        if abs(after - before) < tolerance * before:
            return done
    return patience if len(durations) >= patience else None


def fitting_micro_batches(
    batch: int, fits: Callable[[int], bool], limit: int | None = None, multiple: int = 1
) -> list[int]:
    """The micro-batches that were seen to fit, ascending, the last being the largest that does; empty if none fits.

    Candidates are the divisors of `batch` up to `limit` that are a `multiple` of something (the devices that share a
    micro-batch), so that every update has exactly `batch` sequences. The search
    doubles (as nearly as the divisors allow) up to the first that does not fit, and then halves what lies between.
    """
    divisors = [d for d in range(1, min(batch, limit or batch) + 1) if batch % d == 0 and d % multiple == 0]
    seen: list[int] = []
    low, high = -1, len(divisors)  # positions of the largest that fits and of the smallest that does not
    while low + 1 < high:
        if high == len(divisors):
            doubled = 2 * divisors[low] if low >= 0 else multiple
            within = [i for i in range(low + 1, high) if divisors[i] <= doubled]
            trying = within[-1] if within else low + 1
        else:
            trying = (low + high) // 2
        if fits(divisors[trying]):
            seen.append(divisors[trying])
            low = trying
        else:
            high = trying
    return seen


def time_steps(
    data: Path,
    sizes: Sequence[Size],
    out: Path,
    *,
    batch: int,
    length: int,
    user_dir: Path,
    memory_limit: int | None = None,
    updates: int = UPDATES,
    extra: Sequence[str] = (),
    max_micro_batch: int | None = None,
    force: bool = False,
    device: str = "torch",
    say: Callable[[str], object] = print,
    run: Runner | None = None,
) -> list[StepTime]:
    """Time `updates` updates of `batch` sequences of `length` tokens for each of `sizes`; their rows, in order.

    `data` is a folder made by fairseq-preprocess; `user_dir` is fairseq_plugins; `extra` are flags for fairseq-train
    (`--fp16`, `--cpu`, `--dropout 0`). `device` is torch (fairseq-train itself) or xla (`python -m xla.pretrain`, on
    the device that PJRT_DEVICE names; all devices of this host share a micro-batch). `memory_limit` is in bytes of
    resident memory, for every size alike (default: 80 % of what is available now); on a GPU or a TPU, of its own memory
    (default: all that it has). Each row is added to the table `out` as soon as it is measured, and what the table holds
    already is not measured again unless `force`.

    Raises UserError if the data, the flags or the table are unusable, if a size does not fit with one sequence at a
    time, if the table is of another machine, or if this machine is one host of a pod.
    """
    for flag, value in (("--batch", batch), ("--length", length), ("--updates", updates)):
        if value < 1:
            raise UserError(f"{flag} {value}: give at least 1.")
    if max_micro_batch is not None and max_micro_batch < 1:
        raise UserError(f"--max-micro-batch {max_micro_batch}: give at least 1.")
    if memory_limit is not None and memory_limit < 1:
        raise UserError(f"--memory-limit {memory_limit}: give a number of bytes above zero.")
    vocabulary = _vocabulary(data)
    if not user_dir.is_dir():
        raise UserError(f"{user_dir}: no such folder; give the folder fairseq_plugins as --user-dir.")
    table = read_step_times(out) if out.exists() else []
    _check_writable(out)
    where = _machine("cpu" if device == "torch" and "--cpu" in extra else device, user_dir)
    if where["hosts"] > 1:
        # What is started here alone would wait for the other hosts for ever.
        raise UserError(
            f"--device {device}: this is one of {where['hosts']} hosts of a pod, and a table holds the times of one "
            "host: run it on a TPU of one host, or give the run on the pod a number, as in --seconds-per-update 0.5."
        )
    if batch % where["devices"]:
        raise UserError(f"--batch {batch} does not divide by the {where['devices']} devices that share it.")
    for row in table:
        if (row.machine, row.device) != (where["machine"], where["device"]):
            raise UserError(
                f"{out}: this table is of another machine ({row.machine}, {row.device}); times of two machines do not "
                "compare, so write to another file."
            )

    if run is None:
        most = sys.maxsize if where["own_memory"] else int(MEMORY_SHARE * _available_memory())
        limit = most if memory_limit is None else memory_limit
        run = FairseqTrain(data, user_dir, length, limit, tuple(extra), where["own_memory"], device)
    results = []
    for size in sizes:
        blank = StepTime(
            **dict.fromkeys(COLUMNS, 0)
            | dataclasses.asdict(size)
            | {"size": size.name, "vocabulary": vocabulary, "length": length, "batch": batch}
            | {"device": where["device"], "machine": where["machine"], "torch": where["torch"]}
            | {"flags": shlex.join(extra)}
        )
        known = [row for row in table if _key(row) == _key(blank)]
        if known and not force:
            say(f"{size.name}: {known[0].seconds_per_update:.4g} s per update, from {out}")
            results.append(known[0])
            continue
        row = _time_size(size, blank, updates, max_micro_batch, where["devices"], run, say)
        table = [other for other in table if _key(other) != _key(row)] + [row]
        _write(out, table)
        results.append(row)
    return results


def _time_size(
    size: Size,
    blank: StepTime,
    updates: int,
    limit: int | None,
    devices: int,
    run: Runner,
    say: Callable[[str], object],
) -> StepTime:
    """The row of one size, `blank` filled in; `devices` share a micro-batch."""

    def fits(micro_batch: int) -> bool:
        # Two micro-batches, if there are two: the gradients of the first stay while the second goes through the model.
        update_freq = min(2, blank.batch // micro_batch)
        trial = run(size, micro_batch, update_freq, TRIAL_UPDATES, lambda durations: len(durations) >= TRIAL_UPDATES)
        said = "fits" if trial.fits else "does not fit"
        say(f"{size.name}: a micro-batch of {micro_batch} {said} ({trial.peak_memory_bytes / 2**20:,.0f} MiB)")
        return trial.fits

    def enough(durations: Sequence[float]) -> bool:
        settled = settled_at(durations)
        return settled is not None and len(durations) >= settled + updates

    for micro_batch in reversed(fitting_micro_batches(blank.batch, fits, limit, devices)):
        update_freq = blank.batch // micro_batch
        trial = run(size, micro_batch, update_freq, PATIENCE + updates, enough)
        if not trial.fits:  # the search saw only a few updates
            say(f"{size.name}: a micro-batch of {micro_batch} does not fit after all")
            continue
        settled = settled_at(trial.durations)
        assert settled is not None
        measured = trial.durations[settled : settled + updates]
        row = dataclasses.replace(
            blank,
            micro_batch=micro_batch,
            update_freq=update_freq,
            seconds_per_update=statistics.fmean(measured),
            standard_deviation=statistics.stdev(measured) if len(measured) > 1 else 0.0,
            updates=len(measured),
            settled_after=settled,
            peak_memory_bytes=trial.peak_memory_bytes,
        )
        say(
            f"{size.name}: {row.seconds_per_update:.4g} s per update of {update_freq} x {micro_batch} sequences "
            f"(standard deviation {row.standard_deviation:.2g})"
        )
        return row
    raise UserError(
        f"{size.name} does not fit in memory with one sequence at a time; leave it out, raise --memory-limit or "
        "shorten --length."
    )


@dataclass(frozen=True)
class FairseqTrain:
    """Runs fairseq-train in a process of its own and watches it from outside; a `Runner`."""

    data: Path
    user_dir: Path
    length: int
    memory_limit: int  # bytes of resident memory, or of the device's own
    extra: tuple[str, ...] = ()
    own_memory: bool = False  # the device has memory of its own, a GPU or a TPU
    device: str = "torch"

    def command(self, size: Size, micro_batch: int, update_freq: int, max_updates: int, save_dir: str) -> list[str]:
        """The learning rate changes no time; it is small so that nothing runs to infinity on the way."""
        flags = f"""
            --task masked_lm --criterion budgeted_masked_lm --arch prenorm_roberta --encoder-layers {size.layers}
            --encoder-embed-dim {size.hidden} --encoder-ffn-embed-dim {size.ffn} --encoder-attention-heads {size.heads}
            --tokens-per-sample {self.length} --sample-break-mode none --batch-size {micro_batch}
            --required-batch-size-multiple 1 --update-freq {update_freq} --max-update {max_updates}
            --optimizer adam --lr 1e-5 --no-save --disable-validation --log-format json --log-interval 1
        """.split()
        start = [sys.executable, "-m", TRAINERS[self.device], str(self.data), "--user-dir", str(self.user_dir)]
        # fairseq takes every GPU that it sees, each with a batch of its own; the launcher on XLA shares one out.
        alone = ["--distributed-world-size", "1"] if self.device == "torch" else []
        return start + flags + alone + ["--save-dir", save_dir, *self.extra]

    def __call__(
        self,
        size: Size,
        micro_batch: int,
        update_freq: int,
        max_updates: int,
        enough: Callable[[Sequence[float]], bool],
    ) -> Trial:
        """Raises UserError if the process fails for another reason than memory, ends before it was `enough`, or makes
        updates of more than was asked."""
        tokens = micro_batch * update_freq * self.length
        with ended_by_signals(), tempfile.TemporaryDirectory(prefix="train-large-") as folder:
            output = Path(folder) / "output.txt"
            # Twice as many as asked: the last update of an epoch may be a smaller one, which is left out.
            command = self.command(size, micro_batch, update_freq, 2 * max_updates, folder)
            with open(output, "wb") as stream:
                process = subprocess.Popen(
                    command, stdout=stream, stderr=stream, start_new_session=True, env=_where_xla_is(self.user_dir)
                )
            peak, fits = 0, True
            durations: tuple[float, ...] = ()
            try:
                while True:
                    running = process.poll() is None
                    peak = max(peak, _resident_memory(process.pid) if running else 0)
                    updates = _updates(Path(folder) / runlog.NAME)
                    largest = max((update.tokens for update in updates), default=0)
                    if largest >= tokens + self.length:
                        raise UserError(
                            f"an update on {self.data} has {largest:,} tokens, and {tokens:,} were asked for: leave "
                            "out flags after -- that change the batch (--distributed-world-size, --update-freq)."
                        )
                    # The last one of a text may be a short one.
                    durations = tuple(update.seconds for update in updates if update.tokens > tokens - self.length)
                    printed = output.read_text(errors="replace")
                    used = (_device_memory(printed) or 0) if self.own_memory else peak
                    fits = (
                        used <= self.memory_limit
                        and OUT_OF_MEMORY.search(printed) is None
                        and process.returncode != -signal.SIGKILL  # the kernel's way
                    )
                    if not running or not fits or enough(durations):
                        break
                    time.sleep(POLL_SECONDS)
            finally:
                end([process], 0, ask=False)
        if fits and not enough(durations):
            raise UserError(self._why(size, process.returncode, printed, len(durations)))
        if self.own_memory:
            peak = _device_memory(printed) or peak
        return Trial(durations, peak, fits)

    def _why(self, size: Size, status: int, printed: str, whole_updates: int) -> str:
        if status == 0:
            return (
                f"{self.data} gave only {whole_updates} whole updates of the asked batch; give more text or a smaller "
                "--batch or --length."
            )
        last = next((line.strip() for line in reversed(printed.splitlines()) if line.strip()), "it printed nothing")
        return f"fairseq-train on {self.data} failed for {size.name} with status {status}: {last[:300]}"


class _Update(NamedTuple):
    seconds: float
    tokens: int


def _updates(log: Path) -> list[_Update]:
    """What every update of the run log took and had, of those that have a line of their own."""
    if not log.exists():
        return []
    lines = [line for line in runlog.read(log) if line["kind"] in ("start", "train")]
    return [
        _Update(line["train_seconds"] - before["train_seconds"], line["tokens"] - before["tokens"])
        for before, line in itertools.pairwise(lines)
        if line["updates"] == before["updates"] + 1
    ]


def _resident_memory(pid: int) -> int:
    """Bytes of the process and its children. Pages that they share count more than once, which is on the safe side."""
    import psutil

    total = 0
    try:
        process = psutil.Process(pid)
        for member in (process, *process.children(recursive=True)):
            total += member.memory_info().rss
    except psutil.Error:  # ended meanwhile
        pass
    return total


def _available_memory() -> int:
    """Bytes that a new process could take now, within the container's limit if there is one."""
    available = machine.available_memory()
    if available is not None:
        return available
    import psutil

    return int(psutil.virtual_memory().available)


def _vocabulary(data: Path) -> int:
    """Entries of the dictionary in `data`, with fairseq's four special symbols and the mask."""
    if not (data / "train.bin").exists():
        raise UserError(f"{data}: no train.bin there; give a folder made by fairseq-preprocess.")
    return len(read_dictionary(data / "dict.txt"))


def _where_xla_is(user_dir: Path) -> dict[str, str]:
    """An environment in which `xla` can be imported: it lies beside fairseq_plugins."""
    return environment(user_dir.resolve().parent)


def _device_memory(printed: str) -> int | None:
    """The most of a device's own memory that was in use, in bytes, by what fairseq printed of it.

    Of a GPU it prints only what was free at least (fairseq/trainer.py:1104, 0.12.3.1), of an XLA device both.
    """
    free = [float(gigabytes) for gigabytes in re.findall(r'"gb_free": "?([0-9.]+)', printed)]
    total = re.findall(r'"gb_total": "?([0-9.]+)', printed) or re.findall(r"total memory = ([0-9.]+) +GB", printed)
    return int((float(total[-1]) - min(free)) * 2**30) if free and total else None


_PROBE = """
import json, sys, torch
gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() and sys.argv[1] != "cpu" else None
found = {"torch": torch.__version__, "threads": torch.get_num_threads()}
print(json.dumps({**found, "device": gpu or "cpu", "devices": 1, "hosts": 1, "own_memory": gpu is not None}))
"""


@functools.lru_cache(maxsize=None)
def _machine(kind: str, user_dir: Path) -> dict[str, Any]:
    """What runs the updates (torch, xla, or cpu): torch's version, device, machine.

    Asked of another process: the core imports neither torch nor an adapter.
    """
    words = ["-m", "xla.probe"] if kind == "xla" else ["-c", _PROBE, kind]
    probe = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=_where_xla_is(user_dir))
    if probe.returncode:
        last = probe.stderr.strip().splitlines()[-1:] or ["no reason given"]
        if kind == "xla":
            raise UserError(f"--device xla: {last[0]}")
        raise UserError(
            f"{sys.executable} cannot import torch ({last[0]}); install this package with its extra 'fairseq'."
        )
    found: dict[str, Any] = json.loads(probe.stdout.splitlines()[-1])
    return found | {"machine": machine.describe(found["threads"])}


COLUMNS = tuple(field.name for field in dataclasses.fields(StepTime))
_TYPES = get_type_hints(StepTime)


def _key(row: StepTime) -> tuple[Any, ...]:
    """What one row of a table is of: there is one row for each."""
    return row.shape, row.vocabulary, row.length, row.batch, row.flags


def _check_writable(path: Path) -> None:
    """Better to fail before the first size is timed than after it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); give another --out.") from error


def _write(path: Path, rows: Sequence[StepTime]) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(dataclasses.asdict(row) for row in rows)
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); give another --out or make room.") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def read_step_times(path: Path) -> list[StepTime]:
    """The rows of the table at `path`. Raises UserError if there is none, or if it is no such table."""
    way_out = "give a table that `train-large time-steps` wrote"
    try:
        with open(path, newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"no column {missing[0]}")
            rows = []
            for line in reader:
                row = StepTime(**{name: _TYPES[name](line[name]) for name in COLUMNS})
                if not (row.shape and 0 < row.seconds_per_update < float("inf")):  # an impossible shape raises
                    raise ValueError(f"{row.seconds_per_update} seconds per update")
                rows.append(row)
            return rows
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); {way_out}.") from error
    except (ValueError, TypeError, UserError) as error:
        raise UserError(f"{path}, line {reader.line_num}: {str(error).rstrip('.')}; {way_out}.") from error


def seconds_per_update(
    path: Path, size: Size | str, batch: int, length: int, vocabulary: int | None = None, flags: str | None = None
) -> float:
    """What the calibrated clock charges for an update of `batch` sequences of `length` tokens, from a table.

    `size` may be a name, which is the shape with the usual feed-forward size and heads. `vocabulary` and `flags` choose
    between rows that differ in nothing else. Raises UserError if the table has no such row, or several.
    """
    shape = Size.parse(size) if isinstance(size, str) else size
    table = read_step_times(path)
    rows = [
        row
        for row in table
        if (row.shape, row.batch, row.length) == (shape, batch, length)
        and vocabulary in (None, row.vocabulary)
        and flags in (None, row.flags)
    ]
    if len(rows) == 1:
        return rows[0].seconds_per_update
    if rows:
        differ = "; ".join(f"{row.vocabulary} entries, flags '{row.flags}'" for row in rows)
        raise UserError(
            f"{path} has several rows for {shape.name}, batch {batch}, length {length} ({differ}): keep one."
        )
    known = (f"{row.size} batch {row.batch} length {row.length} entries {row.vocabulary}" for row in table)
    has = "; ".join(known) or "nothing"
    entries = "" if vocabulary is None else f", {vocabulary} entries"
    raise UserError(
        f"{path} has no row for {shape.name} (FFN {shape.ffn}, {shape.heads} heads), batch {batch}, length {length}"
        f"{entries}; "
        f"it has {has}: add it by `train-large time-steps DATA {shape.name} --batch {batch} --length {length} "
        f"--out {path}`."
    )
