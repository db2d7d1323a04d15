"""The XLA device of this host: which there is, how many, and whether it can be used as asked, before it is touched.

Nothing here starts torch-xla's runtime: after that its processes can no longer be spawned, nor SPMD be chosen freely.
"""

from __future__ import annotations

import importlib.metadata
import os

from train_large.errors import UserError

DEVICES = ("TPU", "CPU")
MODES = ("single", "spmd", "spawn")
TORCH_XLA = "2.9"  # what `patches` was written for

# When imported, torch-xla takes the CPU where PJRT_DEVICE is not set and there is no TPU (torch_xla/runtime.py:57,
# 2.9): a run meant for a TPU would go on there for days.
os.environ["PJRT_SELECT_DEFAULT_DEVICE"] = "0"


def choose_device() -> str:
    """TPU or CPU, by PJRT_DEVICE where it is set, and see to it that torch-xla takes the same.

    Raises UserError where there is none, or another one.
    """
    _check_versions()
    asked = os.environ.get("PJRT_DEVICE")
    if asked is None:
        if not tpu_chips():
            raise UserError(
                "no TPU was found on this machine; run this on a TPU VM, or set PJRT_DEVICE=CPU to run on the CPU."
            )
        asked = os.environ["PJRT_DEVICE"] = "TPU"
    if asked not in DEVICES:
        raise UserError(f"PJRT_DEVICE={asked}: give TPU, or CPU to run without one.")
    if asked == "TPU" and not tpu_chips():
        raise UserError("PJRT_DEVICE=TPU, but no TPU was found on this machine; set PJRT_DEVICE=CPU to run on the CPU.")
    return asked


def tpu_chips() -> int:
    from torch_xla._internal import tpu

    return tpu.num_available_chips()


def kind(device: str) -> str:
    """What the device is called: CPU, or the type of the TPU slice, such as v3-8."""
    if device == "CPU":
        return "CPU"
    from torch_xla._internal import tpu

    return tpu.get_tpu_type()


def local_devices(device: str) -> int:
    """How many devices this host has: cores of a TPU, or CPU_NUM_DEVICES. Raises UserError if that is no number."""
    if device == "CPU":
        asked = os.environ.get("CPU_NUM_DEVICES", "1")
        if not asked.isdigit() or int(asked) < 1:
            raise UserError(f"CPU_NUM_DEVICES={asked}: give a number of virtual devices, at least 1.")
        return int(asked)
    from torch_xla._internal import tpu

    return tpu.num_available_devices()


def hosts(device: str) -> int:
    """How many hosts the slice has that this one belongs to."""
    if device == "CPU":
        return 1
    from torch_xla._internal import tpu

    return tpu.num_tpu_workers()


def choose_mode(asked: str | None, device: str) -> str:
    """How to use the devices: as asked, else spmd where there are several. Raises UserError where that cannot be."""
    count = local_devices(device) * hosts(device)
    mode = asked or ("spmd" if count > 1 else "single")
    if mode == "single" and hosts(device) > 1:
        raise UserError(f"--mode single would use one of {count} devices, on one of {hosts(device)} hosts: take spmd.")
    if mode != "spawn" or count == 1:
        return "single" if mode == "spawn" else mode
    if device == "CPU":
        raise UserError("--mode spawn: torch-xla's CPU devices have no collectives; take --mode spmd.")
    from torch_xla._internal import tpu

    if tpu.version() <= 3:
        raise UserError(
            f"--mode spawn: a TPU v{tpu.version()} runs two threads in every process, which fairseq cannot; take spmd."
        )
    return mode


def _check_versions() -> None:
    try:
        version = importlib.metadata.version("torch_xla")
        import torch_xla  # noqa: F401
    except ImportError as error:
        raise UserError(f"torch_xla cannot be imported ({error}); install torch 2.9.0 with torch_xla 2.9.0.") from None
    if not version.startswith(TORCH_XLA + "."):
        raise UserError(f"torch_xla {version} is not {TORCH_XLA}: its patches are for {TORCH_XLA}; install that.")
