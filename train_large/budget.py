"""The budget of a run: durations, the clock that says what is spent, and the schedule over it.

What counts (shared by all adapters):

- ``train``: from the start of an update to the end of its optimizer step, waiting for data included; validation,
  saving, loading, graph building and compilation excluded.
- ``wall``: everything since the process started, all restarts added up.
- ``calibrated``: updates times the seconds per update that ``train-large time-steps`` measured (paper, section 2.2).

Runs on Python 3.7 too: Tensor2Tensor's TF 1.15 environment imports it.
"""

import math
import os
import re
import time

from train_large.errors import UserError

CLOCKS = ("train", "wall", "calibrated")

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([smhd]?)\Z")


def parse_duration(text, flag="--budget"):
    """Seconds of ``90s``, ``10m``, ``2h``, ``11.5d`` or a bare number of seconds.

    >>> parse_duration("11.5d")
    993600.0

    Raises UserError for anything else, and for zero.
    """
    match = _DURATION.match(str(text).strip().lower())
    if match is None:
        raise UserError(
            f"{flag} {text!r} is not a duration: give seconds, or a number with s, m, h or d, such as 90s, 2h or 11.5d."
        )
    seconds = float(match.group(1)) * _UNITS[match.group(2) or "s"]
    if seconds <= 0:
        raise UserError(f"{flag} {text!r} leaves no time to train: give more than zero seconds.")
    return seconds


class HostTimer:
    """Marks taken from the host's monotonic clock: right wherever work is done by the time a call returns."""

    def mark(self):
        return time.perf_counter()

    def between(self, start, end):
        """Seconds from one mark to another."""
        return end - start


class TrainClock:
    """Seconds of training, in stretches: a stretch runs over updates until something else (validation, saving)
    interrupts it.

    On an asynchronous device the host runs ahead of the work. So a running stretch is read off the host's clock, which
    costs no synchronisation, and once it has been interrupted it is charged at what the device says: from the mark
    made before its first update to the one made after its last, by `timer.between`, which may wait for the device.

    `timer` has `mark()` and `between(start, end)`; `now` is the host's monotonic clock in seconds.
    """

    def __init__(self, seconds=0.0, timer=None, now=time.perf_counter):
        self._charged = float(seconds)
        self._timer = timer or HostTimer()
        self._now = now
        self._start = None  # (host time, mark) at the start of the stretch in hand
        self._end = None  # the same at the end of its latest update
        self._in_update = False

    def begin_update(self):
        """An update begins. Does nothing within a stretch, so that waiting for data between two updates is charged."""
        self._in_update = True
        if self._start is None:
            self._start = (self._now(), self._timer.mark())

    def end_update(self):
        """The update's optimizer step has been issued."""
        self._in_update = False
        self._end = (self._now(), self._timer.mark())

    def interrupt(self):
        """Something that is not training begins: charge what was trained so far, and nothing after the end of the
        latest update.

        In the middle of an update (a pruning task measures there) it is charged up to this moment; `begin_update`
        takes it up again.
        """
        if self._in_update:
            self.end_update()
        if self._start is not None and self._end is not None:
            self._charged += self._timer.between(self._start[1], self._end[1])
        self._start = self._end = None

    @property
    def seconds(self):
        """Seconds up to the end of the latest update."""
        if self._start is None or self._end is None:
            return self._charged
        return self._charged + self._end[0] - self._start[0]

    def seconds_now(self):
        """Seconds up to this moment, in the middle of an update too."""
        if self._start is None:
            return self._charged
        return self._charged + self._now() - self._start[0]


class WallClock:
    """Seconds since the process started, on top of those of the processes before it."""

    def __init__(self, seconds=0.0, started=None, now=time.time):
        self._now = now
        self._before = float(seconds)
        self._started = process_start_time() if started is None else started

    @property
    def seconds(self):
        return self._before + max(0.0, self._now() - self._started)


def process_start_time():
    """When this process started, in seconds since the epoch; the moment of the call where the system does not tell."""
    try:
        with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
            # Field 22 is the start in clock ticks since boot; the name in field 2 may hold blanks, so count from its
            # bracket.
            ticks = float(stat.read().rpartition(")")[2].split()[19])
            since_boot = float(uptime.read().split()[0])
        return time.time() - (since_boot - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return time.time()


def warmup_then_linear(fraction, warmup):
    """The learning rate as a share of its peak when `fraction` of the budget is spent: up over `warmup` of it, then
    down to zero.

    >>> warmup_then_linear(0.03, 0.06), warmup_then_linear(0.06, 0.06), warmup_then_linear(1.0, 0.06)
    (0.5, 1.0, 0.0)
    """
    fraction = min(max(fraction, 0.0), 1.0)
    if fraction < warmup:
        return fraction / warmup
    if warmup >= 1.0:
        return 1.0
    return (1.0 - fraction) / (1.0 - warmup)


class Budget:
    """A limit on one of the three clocks.

    `seconds` is None for a run without a limit (only logged); `seconds_per_update` is needed by the calibrated clock.
    """

    def __init__(self, seconds, clock="train", seconds_per_update=None):
        if clock not in CLOCKS:
            raise UserError(f"--budget-clock {clock!r} is none of {', '.join(CLOCKS)}.")
        if clock == "calibrated" and not (
            seconds_per_update and seconds_per_update > 0 and math.isfinite(seconds_per_update)
        ):
            told = "" if seconds_per_update is None else f", and {seconds_per_update} is none"
            raise UserError(
                "--budget-clock calibrated needs --seconds-per-update: a number above 0, or the table of time-steps"
                f"{told}."
            )
        self.seconds = seconds
        self.clock = clock
        self.seconds_per_update = seconds_per_update

    def used(self, updates, train_seconds, wall_seconds):
        """Seconds used on the clock that the budget is counted on."""
        if self.clock == "calibrated":
            return updates * self.seconds_per_update
        return train_seconds if self.clock == "train" else wall_seconds

    def is_over(self, used):
        return self.seconds is not None and used >= self.seconds

    def fraction(self, used):
        """Share of the budget used, 0 to 1. Raises UserError where there is no limit to take a share of."""
        if self.seconds is None:
            raise UserError("--lr-scheduler budget_linear needs a --budget to be linear over, such as --budget 2h.")
        return min(1.0, used / self.seconds)


def seconds_used(facts, line):
    """Seconds used, at a line of a run log, on the clock that the run's budget is counted on.

    `facts` are those of the log's start and resume lines (`runlog.facts`). None where they do not say enough: the
    calibrated clock needs `seconds_per_update`.
    """
    try:
        budget = Budget(None, facts.get("budget_clock") or "train", facts.get("seconds_per_update"))
        return float(budget.used(*(line[name] for name in ("updates", "train_seconds", "wall_seconds"))))
    except (UserError, TypeError, ValueError):
        return None
