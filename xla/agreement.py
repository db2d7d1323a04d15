"""What the hosts of a pod do not agree on, in sentences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def disagreements(facts: Sequence[dict[str, Any]], save_dir: str, install: str) -> list[str]:
    """A sentence for each thing that is not the same on all hosts, with the way out.

    `facts` are what each host told (`xla.host`), worker 0's first; `install` is a command for PACKAGE==VERSION on all.
    """
    wrong = []
    for name in _differing(facts, "versions"):
        version = facts[0]["versions"][name] or "VERSION"
        way_out = f"install the same on all, such as by: {install.replace('PACKAGE==VERSION', f'{name}=={version}')}"
        if name == "python":
            way_out = "give --python one that is the same on all."
        wrong.append(f"{_who_has(facts, 'versions', name, of=f'{name} ')}: {way_out}")
    source = _differing(facts, "source")
    if source:
        wrong.append(f"{_files(facts, 'source', source)}: put the same commit of this project on all hosts.")
    missing = [worker for worker, told in enumerate(facts) if told["missing"]]
    data = _differing(facts, "data")
    if missing:
        folder = facts[missing[0]]["missing"][0]
        wrong.append(f"there is no folder {folder} on {names(missing)}: copy DATA there, or give one that all share.")
    elif data:
        wrong.append(f"{_files(facts, 'data', data)}: copy DATA from one host to all, or give one that all share.")
    apart = [worker for worker, told in enumerate(facts) if told.get("token") != facts[0].get("token")]
    if apart:
        wrong.append(
            f"--save-dir {save_dir} is one folder on worker 0 and another on {names(apart)}: worker 0 saves and all "
            "load, so give a folder on a file system that all hosts share, such as NFS."
        )
    return wrong


def _differing(facts: Sequence[dict[str, Any]], what: str) -> list[str]:
    """The names among the `what` of all that some have otherwise, or not at all."""
    every = sorted({name for told in facts for name in told[what]})
    return [name for name in every if len({told[what].get(name) for told in facts}) > 1]


def _who_has(facts: Sequence[dict[str, Any]], what: str, name: str, of: str = "") -> str:
    """Such as "workers 0-2 have torch 2.9.0, worker 3 has torch 2.8.0"."""
    holders: dict[str | None, list[int]] = {}
    for worker, told in enumerate(facts):
        holders.setdefault(told[what].get(name), []).append(worker)
    return ", ".join(
        f"{names(workers)} {'has' if len(workers) == 1 else 'have'} {of if value else 'no ' + of}{value or ''}".rstrip()
        for value, workers in holders.items()
    )


def _files(facts: Sequence[dict[str, Any]], what: str, different: Sequence[str]) -> str:
    more = f" (and {len(different) - 1} other files differ)" if len(different) > 1 else ""
    return f"of {different[0]} {_who_has(facts, what, different[0])}{more}"


def names(workers: Iterable[int]) -> str:
    """For people: "worker 3", or "workers 0-2, 5"."""
    runs: list[list[int]] = []
    for worker in workers:
        if runs and worker == runs[-1][-1] + 1:
            runs[-1].append(worker)
        else:
            runs.append([worker])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return ("worker " if sum(map(len, runs)) == 1 else "workers ") + text
