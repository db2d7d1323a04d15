"""The budget: durations, clocks and the schedule."""

from __future__ import annotations

import importlib.util
import itertools
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train_large import budget
from train_large.budget import (
    Budget,
    HostTimer,
    TrainClock,
    WallClock,
    parse_duration,
    process_start_time,
    seconds_used,
    warmup_then_linear,
)
from train_large.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("2h", 7200), ("11.5d", 993_600), ("1000000", 1e6), ("10m", 600), (" 1.5 H ", 5400), (".5s", 0.5)],
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["2 fortnights", "", "0", "0s", "-5s", "inf", "nan", "1h30m", "s", "1e3"])
def test_no_durations(text):
    with pytest.raises(UserError, match="--budget"):
        parse_duration(text)


class Device:
    """A device that works behind the host: marks come to pass when what was issued before them is done."""

    def __init__(self):
        self.host = 0.0
        self.busy_until = 0.0
        self.waits = 0

    def now(self):
        return self.host

    def issue(self, seconds):
        self.busy_until = max(self.busy_until, self.host) + seconds

    def mark(self):
        return max(self.host, self.busy_until)

    def between(self, start, end):
        self.waits += 1
        self.host = max(self.host, end)
        return end - start


def test_clock_counts_updates_and_the_waiting_between_them_but_not_validation():
    device = Device()
    clock = TrainClock(timer=device, now=device.now)
    for _ in range(3):
        device.host += 0.5  # waiting for data; before the first update it is loading, and not charged
        clock.begin_update()
        device.host += 2.0
        clock.end_update()
    assert clock.seconds == pytest.approx(3 * 2 + 2 * 0.5)
    device.host += 7  # on the way to validation
    clock.interrupt()
    device.host += 100
    clock.begin_update()
    device.host += 1
    clock.end_update()
    assert clock.seconds == pytest.approx(8)


def test_clock_is_charged_what_an_asynchronous_device_took_without_waiting_for_it_in_every_update():
    device = Device()
    clock = TrainClock(timer=device, now=device.now)
    for _ in range(100):
        clock.begin_update()
        device.host += 0.001  # the host issues the work and goes on
        device.issue(0.1)
        clock.end_update()
    assert device.waits == 0
    clock.interrupt()
    assert device.waits == 1
    assert clock.seconds == pytest.approx(10.0, abs=0.01)


def test_interrupting_within_an_update_charges_its_part():
    device = Device()
    clock = TrainClock(seconds=5, timer=device, now=device.now)
    clock.begin_update()
    device.host += 2
    clock.interrupt()  # a pruning task measures after the optimizer step
    device.host += 50
    clock.begin_update()
    device.host += 1
    clock.end_update()
    assert clock.seconds == pytest.approx(8)


def test_clock_now_is_ahead_of_the_end_of_the_latest_update():
    device = Device()
    clock = TrainClock(timer=device, now=device.now)
    assert clock.seconds_now() == 0
    clock.begin_update()
    device.host += 3
    assert clock.seconds == 0
    assert clock.seconds_now() == 3


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10), st.booleans()), max_size=30))
def test_clock_is_the_sum_of_updates_and_of_gaps_that_nothing_interrupted(updates):
    device = Device()
    clock = TrainClock(timer=device, now=device.now)
    expected, gap_counts = 0.0, False
    for gap, work, interrupted in updates:
        device.host += gap
        expected += gap if gap_counts else 0
        clock.begin_update()
        device.host += work
        clock.end_update()
        expected += work
        if interrupted:
            clock.interrupt()
        gap_counts = not interrupted
    assert clock.seconds == pytest.approx(expected, abs=1e-6)


def test_host_timer_is_monotonic():
    timer = HostTimer()
    start = timer.mark()
    assert timer.between(start, timer.mark()) >= 0


def test_wall_clock_adds_up_processes():
    assert WallClock(seconds=100, started=50, now=lambda: 57.5).seconds == 107.5


def test_process_start_lies_in_the_past():
    import time

    assert 0 <= time.time() - process_start_time() < 24 * 3600


@given(st.floats(0, 1), st.floats(0, 1))
def test_schedule_is_a_share_of_the_peak(fraction, warmup):
    assert 0 <= warmup_then_linear(fraction, warmup) <= 1


@given(st.floats(0.01, 0.99))
def test_schedule_rises_to_the_end_of_the_warm_up_and_falls_to_zero(warmup):
    assert warmup_then_linear(0, warmup) == 0
    assert warmup_then_linear(warmup, warmup) == pytest.approx(1)
    assert warmup_then_linear((1 + warmup) / 2, warmup) == pytest.approx(0.5)
    assert warmup_then_linear(1, warmup) == 0


def test_schedule_without_warm_up_begins_at_the_peak():
    assert warmup_then_linear(0, 0) == 1


def test_budget_is_counted_on_its_clock():
    assert Budget(10, "train").used(updates=7, train_seconds=3, wall_seconds=5) == 3
    assert Budget(10, "wall").used(updates=7, train_seconds=3, wall_seconds=5) == 5
    assert Budget(10, "calibrated", 0.5).used(updates=7, train_seconds=3, wall_seconds=5) == 3.5


def test_the_clock_of_a_log_is_read_as_it_was_counted():
    line = {"updates": 7, "train_seconds": 3.0, "wall_seconds": 5.0}
    assert seconds_used({}, line) == 3
    assert seconds_used({"budget_clock": "train", "seconds_per_update": 0.5}, line) == 3
    assert seconds_used({"budget_clock": "wall"}, line) == 5
    assert seconds_used({"budget_clock": "calibrated", "seconds_per_update": 0.5}, line) == 3.5
    for each in (None, 0, "fast"):
        assert seconds_used({"budget_clock": "calibrated", "seconds_per_update": each}, line) is None
    assert seconds_used({"budget_clock": "moon"}, line) is None
    assert not Budget(10).is_over(9.99)
    assert Budget(10).is_over(10)
    assert not Budget(None).is_over(math.inf)
    assert Budget(10).fraction(5) == 0.5
    assert Budget(10).fraction(15) == 1


@pytest.mark.parametrize("seconds", [None, 0, -1, math.nan, math.inf])
def test_the_calibrated_clock_needs_seconds_per_update(seconds):
    with pytest.raises(UserError, match="--seconds-per-update"):
        Budget(10, "calibrated", seconds)


def test_unknown_clock_and_missing_limit():
    with pytest.raises(UserError, match="--budget-clock"):
        Budget(10, "lunar")
    with pytest.raises(UserError, match="--budget"):
        Budget(None).fraction(1)


def test_the_host_s_time_goes_on_while_nothing_is_computed_and_whoever_sets_the_clock(monkeypatch):
    """Waiting for data is charged; and on a machine whose clock is set back all the time, no less."""
    back = itertools.count(0, -1000)
    monkeypatch.setattr(time, "time", lambda: float(next(back)))
    spec = importlib.util.spec_from_file_location("budget_of_a_wrong_clock", budget.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    timer, clock = module.HostTimer(), module.TrainClock()
    before = time.monotonic()
    start = timer.mark()
    clock.begin_update()
    time.sleep(0.1)
    clock.end_update()
    passed, most = timer.between(start, timer.mark()), time.monotonic() - before
    assert 0.1 <= passed <= most + 1e-3
    assert 0.1 <= clock.seconds <= most + 1e-3
    clock.interrupt()
    assert 0.1 <= clock.seconds <= most + 1e-3


def test_a_process_knows_when_it_was_started_and_not_when_it_asks():
    code = "import time; time.sleep(2); from train_large.budget import process_start_time as p; print(p())"
    before = time.time()
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    after = time.time()
    told = float(child.communicate()[0])
    # The kernel tells hundredths, and on a busy machine some time passes between one look at a clock and the next.
    assert before - 0.4 <= told <= after + 0.4


def test_a_name_with_brackets_and_blanks_is_no_field(monkeypatch):
    """Field 2 of /proc/self/stat is the name of the program, which may hold anything."""
    expected = process_start_time()
    with open("/proc/self/comm") as comm:
        name = comm.read().strip()
    try:
        Path("/proc/self/comm").write_text(") 1 2 (3")
        assert abs(process_start_time() - expected) < 10
    finally:
        Path("/proc/self/comm").write_text(name)


def test_the_fraction_of_a_budget_below_zero_is_its_beginning():
    assert budget.warmup_then_linear(-0.5, 0.2) == 0


def test_the_wall_clock_goes_from_the_start_of_the_process_and_never_back():
    assert WallClock(5.0).seconds == pytest.approx(5 + time.time() - process_start_time(), abs=10)
    assert WallClock(5.0).seconds > 5.2  # Python and pytest were imported meanwhile
    assert WallClock(100.0, started=50, now=lambda: 40.0).seconds == 100
