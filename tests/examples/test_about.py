"""What is told of how the experiments were measured."""

import about
import experiments


def test_what_was_measured_otherwise_is_told_apart(tmp_path):
    settings = experiments.load(None, ["step_times=0.02"])
    told = about.facts(settings, [about.here()], finished=0.0)
    assert told["date"] == "1970-01-01"
    assert told["seeds"] == "1, 2, 3"
    for name, machine in (("depth", "old, 2 cores"), ("flops", "new, 4 cores"), ("width", "old, 2 cores")):
        (tmp_path / name).mkdir()
        about.write({**told, "machine": machine}, tmp_path / name)
    merged = about.read(tmp_path)
    assert merged == {**told, "machine": "old, 2 cores (depth, width); new, 4 cores (flops)"}


def test_the_machines_are_those_that_the_jobs_ran_on(monkeypatch):
    """Not the one that gathers, which may be a cluster's login node."""
    ran = [about.here()]
    monkeypatch.setattr(about, "processor", lambda: "another")
    ran.append(about.here())
    monkeypatch.setattr(about, "processor", lambda: "login node")
    machine = about.facts(experiments.load(None, ["step_times=0.02"]), [*ran, {}], finished=0.0)["machine"]
    assert machine.count("cores") == 2
    assert "another" in machine
    assert "not noted" in machine
    assert "login node" not in machine


def test_nothing_is_told_where_nothing_was_noted(tmp_path):
    assert about.read(tmp_path) == {}
