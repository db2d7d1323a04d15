"""The clock of a lazy device, on a device that is told what to execute when."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_plugins.execution_clock import ExecutionClock, Union

spans = st.tuples(st.integers(0, 200), st.integers(0, 30)).map(lambda span: (span[0], span[0] + span[1]))


@settings(deadline=None)
@given(st.lists(spans, max_size=40))
def test_a_union_counts_every_second_once(spans):
    union = Union(5.0)
    for start, end in sorted(spans, key=lambda span: span[1]):
        union.add(start, end)
    seconds = {second for start, end in spans for second in range(start, end)}
    assert union.seconds == pytest.approx(5 + len(seconds))


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 3), min_size=200, max_size=400), st.floats(0, 4))
def test_a_long_union_is_exact_while_spans_reach_back_over_a_few(gaps, back):
    """Only the latest spans are kept; what comes does not reach back further."""
    union, now, covered, horizon = Union(), 0.0, 0.0, 0.0
    for gap in gaps:
        now += 2 * gap
        start = max(now - gap - min(back, gap), 0.0)
        union.add(start, now)
        covered += now - max(start, horizon)
        horizon = now
        assert len(union._spans) <= Union.KEPT
    assert union.seconds == pytest.approx(covered)


class Device:
    """Executes one thing after the other, each when it was issued or the one before is done, on the test's time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.queue: list[tuple[float, float]] = []
        self.told = 0
        self.waits = 0

    def issue(self, seconds: float) -> None:
        start = max(self.now, self.queue[-1][1] if self.queue else 0.0)
        # torch-xla times an execution from when it was issued, waiting for the one before it included.
        self.queue.append((self.now, start + seconds))

    def wait(self) -> None:
        self.waits += 1
        if self.queue:
            self.now = max(self.now, self.queue[-1][1])

    def executions(self) -> list[tuple[float, float]]:
        done = [span for span in self.queue[self.told :] if span[1] <= self.now]
        self.told += len(done)
        return done


@pytest.fixture
def device():
    return Device()


@pytest.fixture
def clock(device):
    return ExecutionClock(100.0, device, now=lambda: device.now)


def update(clock, device, tracing: float, executing: float, waiting: float = 0.0) -> None:
    clock.begin_update()
    device.now += tracing
    device.issue(executing)
    clock.end_update()
    device.now += waiting


def test_tracing_and_compiling_are_not_charged(clock, device):
    for _ in range(3):
        update(clock, device, tracing=10, executing=2)
        device.now += 2  # done, and the host is busy with something that is no waiting for data
        clock.catch_up()
    clock.interrupt()
    assert clock.seconds == 106


def test_a_host_that_runs_ahead_is_charged_what_the_device_took(clock, device):
    for _ in range(5):
        update(clock, device, tracing=0.25, executing=2)
    assert clock.seconds == 100  # nothing is done yet, and nothing was waited for
    assert device.waits == 1  # at the start
    clock.catch_up()
    assert clock.seconds == 110
    clock.catch_up()
    assert clock.seconds == 110


def test_waiting_for_data_is_charged_once_while_the_device_executes(clock, device):
    update(clock, device, tracing=1, executing=2, waiting=5)
    update(clock, device, tracing=1, executing=2)
    clock.catch_up()
    assert clock.seconds == 100 + 5 + 2


def test_what_is_not_training_is_not_charged(clock, device):
    update(clock, device, tracing=1, executing=2)
    clock.interrupt()
    device.issue(50)  # validation
    device.now += 60
    update(clock, device, tracing=1, executing=3)
    clock.interrupt()
    clock.interrupt()
    assert clock.seconds == 105


def test_what_the_device_still_had_to_do_before_training_is_not_charged(clock, device):
    device.issue(50)
    update(clock, device, tracing=1, executing=2)
    clock.catch_up()
    assert clock.seconds == 102


def test_what_reaches_back_behind_what_is_kept_is_not_counted_twice():
    union = Union()
    for number in range(200):
        union.add(2 * number, 2 * number + 1)
    union.add(0, 400)
    assert 200 < union.seconds <= 400


def test_the_wait_for_a_reading_is_no_waiting_for_data():
    now = [0.0]
    spans: list[tuple[float, float]] = []
    lazy = SimpleNamespace(wait=lambda: None, executions=lambda: [spans.pop()] if spans else [])
    clock = ExecutionClock(0.0, lazy, now=lambda: now[0])
    clock.begin_update()
    spans.append((0.0, 2.0))
    clock.end_update()
    now[0] = 7.0  # the host has waited, and written a log
    clock.catch_up()
    clock.begin_update()
    assert clock.seconds == 2
