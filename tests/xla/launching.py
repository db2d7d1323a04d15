"""Runs of `python -m xla.pretrain` and `python -m xla.finetune` on the CPU, and of plain fairseq-train beside them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import forked

from train_large import runlog

ROOT = Path(__file__).resolve().parent.parent.parent

QUICK_TO_COMPILE = "--xla_backend_optimization_level=0"  # most of such a short run's time is LLVM's

SIZE = ["--encoder-layers", "2", "--encoder-embed-dim", "64", "--encoder-ffn-embed-dim", "256"]
SIZE += ["--encoder-attention-heads", "4", "--max-positions", "16"]
COMMON = ["--optimizer", "adam", "--lr", "0.001", "--clip-norm", "1", "--dropout", "0", "--attention-dropout", "0"]
COMMON += ["--num-workers", "0", "--no-progress-bar", "--log-format", "simple", "--log-interval", "1", "--seed", "1"]
COMMON += ["--no-epoch-checkpoints"]
MLM = ["--task", "masked_lm", "--criterion", "budgeted_masked_lm", "--arch", "prenorm_roberta", *SIZE]
MLM += ["--tokens-per-sample", "16", "--sample-break-mode", "complete"]
MLM += ["--lr-scheduler", "inverse_sqrt", "--warmup-updates", "10", *COMMON]


def environment(devices: int = 1, more: Mapping[str, str] | None = None) -> dict[str, str]:
    own = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(devices), "OMP_NUM_THREADS": "1"}
    own |= {"XLA_FLAGS": QUICK_TO_COMPILE, "PYTHONPATH": str(ROOT)}
    return {**os.environ, **own, **(more or {})}


def launch(
    kind: str,
    data: Path,
    *flags: str,
    save_dir: Path,
    devices: int = 1,
    check: bool = True,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """`python -m xla.KIND DATA FLAGS --save-dir SAVE_DIR` on `devices` virtual devices of the CPU.

    With `check`, a status that is not 0 fails the test, with all that was printed.
    """
    command = [sys.executable, "-m", f"xla.{kind}", str(data), *flags, "--save-dir", str(save_dir)]
    return run(command, environment(devices, env), check)


def plain(data: Path, *flags: str, save_dir: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """The same by fairseq-train on the CPU, without torch-xla, and by fairseq's own layers."""
    command = [sys.executable, "-m", "fairseq_cli.train", str(data), *flags, "--save-dir", str(save_dir)]
    command += ["--cpu", "--user-dir", "fairseq_plugins", "--required-batch-size-multiple", "1"]
    if "prenorm_roberta" in flags:
        command += ["--no-fast-layers"]
    return run(command, environment(), check)


def two_processes(
    data: Path, *flags: str, save_dir: Path, check: bool = True, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`launch("pretrain", ...)` by two processes, see `two_processes.py`; what they have seen is in `save_dir`."""
    return run(starting_two(data, *flags, save_dir=save_dir), environment(more=env), check)


def starting_two(data: Path, *flags: str, save_dir: Path) -> list[str]:
    save_dir.mkdir(exist_ok=True)
    script = Path(__file__).with_name("two_processes.py")
    return [sys.executable, str(script), str(save_dir), str(data), *flags, "--save-dir", str(save_dir)]


def observing(kind: str, data: Path, *flags: str, save_dir: Path) -> list[str]:
    save_dir.mkdir(exist_ok=True)
    script = Path(__file__).with_name("observe.py")
    return [sys.executable, str(script), str(save_dir / "record"), kind, str(data), *flags, "--save-dir", str(save_dir)]


def observe(kind: str, data: Path, *flags: str, save_dir: Path, devices: int = 1) -> list[dict[str, Any]]:
    """A run that is watched from inside: what `observe.py` tells of it, a line for each update and one for its end."""
    result = run(observing(kind, data, *flags, save_dir=save_dir), environment(devices), check=True)
    (save_dir / "output").write_text(result.stdout + result.stderr)
    return record(save_dir)


def record(save_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (save_dir / "record").read_text().splitlines()]


def run(command: Sequence[str], env: Mapping[str, str], check: bool) -> subprocess.CompletedProcess[str]:
    result = forked.run(command, cwd=ROOT, env=env)
    if check:
        assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result


def lines(save_dir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of the run log in `save_dir`, of one kind or all."""
    return [line for line in runlog.read_all(str(save_dir / runlog.NAME)) if kind in (None, line["kind"])]


def losses(save_dir: Path, kind: str = "train") -> list[float]:
    """The loss of every update (or validation, with kind="valid"), in nats, of a run with --log-interval 1."""
    return [line["loss"] for line in lines(save_dir, kind)]
