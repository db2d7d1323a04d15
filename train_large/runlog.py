"""The one log format: JSON lines, written by every adapter, read by the report and the planner.

Every line has ``kind`` (start, train, valid, checkpoint, stop, resume), ``updates``, ``train_seconds``,
``wall_seconds``, ``tokens`` and ``flops``, all counted from the very beginning of the run, over all its processes.
Losses are in nats, perplexities are exp of them.

Runs on Python 3.7 too: Tensor2Tensor's TF 1.15 environment imports it.
"""

import errno
import json
import os

from train_large.errors import UserError

NAME = "run.jsonl"
KINDS = ("start", "train", "valid", "checkpoint", "stop", "resume")
FORMAT = 1  # said at every start; a log without it is of this one
UNFINISHED = ("SIGTERM", "interrupted", "failed")  # reasons of a stop that is not the run's end
COUNTERS = ("updates", "train_seconds", "wall_seconds", "tokens", "flops")


def append(path, kind, counters, **fields):
    """Add one line to the log at `path`. `counters` maps each of COUNTERS to its value.

    Raises UserError where it cannot be written.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is none of {KINDS}")
    line = {"kind": kind}
    line.update((name, counters[name]) for name in COUNTERS)
    if kind in ("start", "resume"):
        line["format"] = FORMAT
    line.update(fields)
    data = (json.dumps(line, allow_nan=False, default=float) + "\n").encode()
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        # One write for one line: a reader, or a second process after a kill, never meets two lines run into one.
        with open(path, "ab", buffering=0) as log:
            if log.tell() > 0 and not _ends_with_newline(path):
                data = b"\n" + data
            if log.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise UserError(
            f"{path}: the run log could not be written ({error.strerror}): make room, or give another folder, and run "
            "the same command again."
        ) from None


def read(path):
    """The lines of the log, as dictionaries, without those that a resume or a new start has overtaken.

    A run that was killed goes back to its last checkpoint, or to the start where it had none: the lines after that tell
    of work that was lost. A line torn by the kill is skipped. Raises UserError where there is no log, or where it holds
    something else.
    """
    lines = []  # type: list
    for line in read_all(path):
        if line["kind"] == "start":
            lines = []
        elif line["kind"] == "resume":
            lines = [earlier for earlier in lines if earlier["updates"] <= line["updates"]]
        lines.append(line)
    return lines


def facts(lines):
    """What the log says of the run itself. A run that was resumed may have been given another budget: what was said
    last counts."""
    said = {}
    for line in lines:
        if line["kind"] in ("start", "resume"):
            said.update(line)
    return said


def is_finished(lines):
    """Whether a run whose log has these lines came to its end: was not killed, stopped from outside, or failed."""
    return bool(lines) and lines[-1]["kind"] == "stop" and lines[-1].get("reason") not in UNFINISHED


def is_used_up(lines):
    """Whether the budget of a run whose log has these lines ended it. What was stopped from outside is to go on."""
    turns = [line for line in lines if line["kind"] in ("start", "resume", "stop")]
    return bool(turns) and turns[-1]["kind"] == "stop" and turns[-1].get("reason") == "budget"


def read_all(path):
    """Every whole line of the log, overtaken ones too."""
    try:
        with open(path, encoding="utf-8") as log:
            raw = log.readlines()
    except OSError as error:
        raise UserError(
            f"{path}: no run log can be read there ({error.strerror}); give the --save-dir of a budgeted run."
        ) from error
    lines = []
    for number, text in enumerate(raw, 1):
        try:
            line = json.loads(text)
        except ValueError:
            text = text.replace("\0", "")  # which a loss of power can leave at the end of a file
            if text.strip() and text.endswith("\n") and number < len(raw) and not text.lstrip().startswith("{"):
                raise UserError(
                    f"{path}, line {number}: not a line of a run log; it should be a JSON object."
                ) from None
            continue  # torn by a kill
        if not isinstance(line, dict) or line.get("kind") not in KINDS or not all(name in line for name in COUNTERS):
            raise UserError(
                f"{path}, line {number}: not a line of a run log; it should have kind, {', '.join(COUNTERS)}."
            )
        if line.get("format", FORMAT) != FORMAT:
            raise UserError(
                f"{path}, line {number}: a run log of format {line['format']}, and this version reads format {FORMAT}; "
                "read it with the version that wrote it."
            )
        wrong = [name for name in COUNTERS if not _is_count(line[name])]
        if wrong:
            raise UserError(
                f"{path}, line {number}: {wrong[0]} is {line[wrong[0]]!r}, not a number from 0 on; the log is damaged."
            )
        lines.append(line)
    return lines


def _is_count(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")


def _ends_with_newline(path):
    with open(path, "rb") as log:
        log.seek(-1, os.SEEK_END)
        return log.read(1) == b"\n"
