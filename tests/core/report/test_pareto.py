from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train_large.report.pareto import best_within, frontier_of, measurements, pareto_frontier

# Few distinct numbers, so that ties of every kind come up.
POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=25)


def dominated(point, others):
    cost, value = point
    return any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in others)


@given(POINTS)
def test_frontier_is_what_brute_force_says(points):
    expected = {i for i, point in enumerate(points) if not dominated(point, points)}
    found = pareto_frontier(points)
    assert len(found) == len(set(found))
    assert set(found) == expected


@given(POINTS)
def test_frontier_rises(points):
    chosen = [points[i] for i in pareto_frontier(points)]
    assert chosen == sorted(chosen)
    assert [value for _, value in chosen] == sorted(value for _, value in chosen)


@pytest.mark.parametrize("digits", [1, 2, 9])
def test_best_within_is_what_brute_force_says(results, digits):
    """With accuracies rounded so that some, or most, are the same."""
    models = [
        replace(m, compressed=tuple(replace(e, accuracy=round(e.accuracy, digits)) for e in m.compressed))
        for m in results.models
    ]
    everything = measurements(models)
    assert len(everything) == 4 * 7 * 4
    for limit in sorted({entry.bytes + step for _, entry in everything for step in (-1, 0)}):
        found = best_within(models, limit)
        fitting = [entry for _, entry in everything if entry.bytes <= limit]
        if not fitting:
            assert found is None
            continue
        model, entry = found
        assert entry in model.compressed
        assert entry.bytes <= limit
        assert entry.accuracy == max(other.accuracy for other in fitting)
        assert entry.bytes == min(other.bytes for other in fitting if other.accuracy == entry.accuracy)


def test_the_frontier_is_the_best_within_each_of_its_sizes(results):
    frontier = frontier_of(results)
    assert len({model.name for model, _ in frontier}) > 1
    for model, entry in frontier:
        assert best_within(results.models, entry.bytes) == (model, entry)


def test_the_frontier_is_that_of_the_files(results, new_results):
    frontier = frontier_of(new_results)
    files = [entry.file_bytes for _, entry in frontier]
    assert files == sorted(files)
    for _, entry in frontier:
        assert not any(
            e.accuracy >= entry.accuracy and e.file_bytes < entry.file_bytes
            for _, e in measurements(new_results.models)
        )
    places = [[(m.name, e.sparsity, e.bits) for m, e in frontier_of(either)] for either in (results, new_results)]
    assert places[0] != places[1]


def test_guessing_costs_nothing(results):
    dear = replace(results, task=replace(results.task, majority=0.7))
    assert all(entry.accuracy > 0.7 for _, entry in frontier_of(dear))
    assert len(frontier_of(dear)) < len(frontier_of(results))
    assert frontier_of(replace(results, task=replace(results.task, majority=0.99))) == []
