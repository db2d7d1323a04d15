"""Counts on the device, which nothing waits for."""

from __future__ import annotations

import pytest
import torch
import torch_xla
import torch_xla.debug.metrics as met

from xla.criterions import Count, count


def fetches() -> int:
    data = met.metric_data("TransferFromDeviceTime")
    return data[0] if data is not None else 0


@pytest.mark.parametrize("number", [0, 1, 7])
def test_division_as_by_a_number_with_one_for_none(number):
    size = count(torch.tensor(number, device=torch_xla.device()))
    before = fetches()
    result = 0 + size + torch.tensor(0, device=torch_xla.device())  # as `Trainer.train_step` sums micro-batches
    result = 2 / (result.float() or 1.0)
    assert fetches() == before
    assert result.item() == pytest.approx(2 / (number or 1))


def test_a_plain_tensor_would_be_waited_for():
    size = torch.tensor(3, device=torch_xla.device()) * 2
    before = fetches()
    2 / (size or 1.0)
    assert fetches() > before, "no longer needed: xla.criterions.Count"


def test_a_sum_over_micro_batches_is_still_a_count():
    assert isinstance(0 + count(torch.tensor(3)) + count(torch.tensor(4)), Count)
