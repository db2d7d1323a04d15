"""When a lazy run reads its clock: seldom in the middle of a budget, at every update in the end."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fairseq_plugins.execution_clock import ExecutionClock
from fairseq_plugins.lazy_run import LazyRun


class Device:
    """Takes the next of `durations` for each update."""

    def __init__(self, durations: list[float]) -> None:
        self.durations = durations
        self.now = 0.0
        self.spans: list[tuple[float, float]] = []
        self.waits = 0

    def update(self) -> None:
        duration = self.durations.pop(0)
        self.spans.append((self.now, self.now + duration))
        self.now += duration

    def wait(self) -> None:
        self.waits += 1

    def executions(self) -> list[tuple[float, float]]:
        spans, self.spans = self.spans, []
        return spans


def train(durations: list[float], budget: float, alone: bool = True) -> tuple[LazyRun, Device]:
    """A run of these updates, or of as many as the budget lets it have."""
    section = OmegaConf.create(
        {"budget": f"{budget}s", "budget_clock": "train", "seconds_per_update": None, "target_ppl": None}
    )
    run = LazyRun(section, "loss")
    one = SimpleNamespace(distributed_world_size=1, distributed_rank=0)
    run.root = SimpleNamespace(optimization=SimpleNamespace(max_update=0), distributed_training=one)
    device = Device(list(durations))
    run._prepare()
    run.has_begun = True
    run.clock = ExecutionClock(0.0, device, now=lambda: device.now)
    run._wall = SimpleNamespace(seconds=0.0)
    run._log_interval, run._max_update = 10**9, 0
    run._first_reading, run._reading = (0.0, 0.0), (0.0, 0.0, 0.0)
    run._is_alone = lambda: alone
    run._over_workers = lambda used, terminated: (used, terminated)
    run._log = lambda *args, **kwargs: None
    run._log_training = lambda: None
    run._keep = lambda: None
    run.finish_validation = lambda: None
    while device.durations and run._stop_reason is None:
        run.begin_update()
        device.update()
        run.issued()
    return run, device


def test_a_long_budget_is_looked_at_a_few_dozen_times():
    run, device = train([0.1] * 110_000, 10_000.0)
    assert run._stop_reason == "budget"
    assert run.counters["updates"] == pytest.approx(100_000, abs=1)
    assert device.waits < 60


@pytest.mark.parametrize(("alone", "most"), [(True, 200), (False, 6)])
def test_several_processes_look_often_enough_to_heed_a_signal(alone, most):
    run, _ = train([10.0] * 200, 10_000.0, alone)
    ahead = run._next_reading - run._reading[0]
    assert ahead <= most
    assert ahead > most / 2


@settings(deadline=None)
@given(st.lists(st.floats(0.5, 1.5), min_size=300, max_size=300), st.floats(1, 100))
def test_a_budget_is_overshot_by_one_update_at_most_where_updates_are_even(durations, budget):
    run, _ = train(durations, budget)
    assert run._stop_reason == "budget"
    updates = int(run.counters["updates"])
    assert sum(durations[: updates - 1]) < budget + 1e-6
    assert sum(durations[:updates]) >= budget - 1e-6


@pytest.mark.parametrize("quick", range(90, 100))
def test_one_quick_update_does_not_make_it_look_away(quick):
    durations = [1.0] * 300
    durations[quick] = 1e-6
    run, _ = train(durations, 100.0)
    assert run.clock.seconds < 101


def test_between_two_readings_the_budget_goes_on_at_the_rate_of_the_last():
    run, device = train([1.0] * 60, 100.0)
    assert run._reading[0] < 60  # the last updates were not looked at
    assert run.fraction() == pytest.approx(0.6)


def test_one_process_alone_heeds_a_signal_at_once():
    run, device = train([1.0] * 20, 10_000.0)
    run.root.dataset = SimpleNamespace(disable_validation=False)
    assert run._next_reading > 25
    run._terminated_at = 1.0
    device.durations = [1.0]
    run.begin_update()
    device.update()
    run.issued()
    assert run._stop_reason == "SIGTERM"
    assert run.root.dataset.disable_validation
