"""Under SPMD a batch is split by rows, and a sum over hosts is a sum within a program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from launching import environment

ROOT = Path(__file__).resolve().parents[2]

SPLIT = """
import torch, torch_xla
from xla import spmd
spmd.start()
sample = {"net_input": {"src_tokens": torch.arange(32).view(8, 4)}, "real": torch.ones(8).bool(), "ntokens": 32}
[moved] = spmd.to_device([sample])
for tensor in (moved["net_input"]["src_tokens"], moved["real"]):
    print(torch_xla._XLAC._get_xla_sharding_spec(tensor))
assert moved["ntokens"] == 32
assert moved["net_input"]["src_tokens"].cpu().equal(sample["net_input"]["src_tokens"])
total = (moved["net_input"]["src_tokens"] * 2).sum()
print("sharding={devices=[4,1]" in torch_xla._XLAC._get_xla_tensors_hlo([total]), total.item())
"""

SUM = """
import torch
from xla import spmd
spmd.start()
from fairseq_plugins.lazy_run import _sum_over_hosts
print(_sum_over_hosts(torch.tensor([993_600.123, 1.0, 0.0], dtype=torch.float64)).tolist())
"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment(4), cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_batch_is_split_by_rows():
    tokens, real, last = run(SPLIT).splitlines()[-3:]
    assert "devices=[4,1]" in tokens
    assert "devices=[4]" in real
    assert last == f"True {2 * sum(range(32))}"


def test_seconds_are_summed_without_losing_any():
    """The paper's 11.5 days to a millisecond; in single precision alone they would be rounded to sixteenths."""
    [seconds, one, zero] = eval(run(SUM).splitlines()[-1])
    assert abs(seconds - 993_600.123) < 1e-3
    assert (one, zero) == (1.0, 0.0)
