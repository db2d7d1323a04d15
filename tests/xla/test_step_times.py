"""`train-large time-steps --device xla` times the launcher, on all devices at once."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from launching import environment

ROOT = Path(__file__).resolve().parents[2]


def time_steps(
    *words: object, devices: int = 2, more: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "train_large.cli", "time-steps", *map(str, words), "--device", "xla"]
    env = environment(devices, more)
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=300)


@pytest.mark.slow
def test_a_size_is_timed_on_all_devices(text, tmp_path):
    table = tmp_path / "steps.csv"
    done = time_steps(
        text, "1l_64h", "--batch", 8, "--length", 16, "--updates", 5, "--max-micro-batch", 4, "--out", table
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with open(table) as lines:
        [row] = csv.DictReader(lines)
    assert row["device"] == "XLA CPU x 2"
    assert "torch_xla" in row["torch"]
    assert int(row["micro_batch"]) == 4
    assert int(row["update_freq"]) == 2
    assert "a micro-batch of 1 " not in done.stdout  # two devices cannot share one sequence
    assert 0 < float(row["seconds_per_update"]) < 60


def test_a_batch_that_the_devices_cannot_share(text, tmp_path):
    done = time_steps(text, "1l_64h", "--batch", 3, "--length", 16, "--out", tmp_path / "steps.csv")
    assert done.returncode == 2
    assert "--batch 3 does not divide by the 2 devices" in done.stderr
    assert "Traceback" not in done.stderr


def test_one_host_of_a_pod(text, tmp_path):
    """A pod cannot be had: the probe is told that there are four hosts, by a module that Python imports first."""
    (tmp_path / "sitecustomize.py").write_text("from xla import device\ndevice.hosts = lambda which: 4\n")
    table = tmp_path / "steps.csv"
    paths = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = time_steps(text, "1l_64h", "--batch", 8, "--length", 16, "--out", table, more=paths)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()[-1:]
    assert "--device xla: this is one of 4 hosts of a pod" in line
    assert "run it on a TPU of one host, or give the run on the pod a number" in line
    assert "Traceback" not in done.stderr
    assert not table.exists()
