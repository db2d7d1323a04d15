"""What is told of how the experiments were measured."""

import about
import experiments


def test_what_was_measured_otherwise_is_told_apart(tmp_path):
    settings = experiments.load(None, ["step_times=0.02"])
    told = about.facts(settings, finished=0.0)
    assert told["date"] == "1970-01-01"
    assert told["seeds"] == "1, 2, 3"
    for name, machine in (("depth", "old, 2 cores"), ("flops", "new, 4 cores"), ("width", "old, 2 cores")):
        (tmp_path / name).mkdir()
        about.write({**told, "machine": machine}, tmp_path / name)
    merged = about.read(tmp_path)
    assert merged == {**told, "machine": "old, 2 cores (depth, width); new, 4 cores (flops)"}


def test_nothing_is_told_where_nothing_was_noted(tmp_path):
    assert about.read(tmp_path) == {}
