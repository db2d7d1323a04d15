"""Compilations are counted, and told of when they come late."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import pytest
import torch

from xla.compilations import WARM_UP, Watch, compilations, shapes


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[torch.device]:
    """A device of the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PJRT_DEVICE", "CPU")
        import torch_xla

        yield torch_xla.device()


@pytest.fixture(autouse=True)
def nothing_pending(device: torch.device) -> None:
    """What tests before left undone would be computed with the first program here, and make it another one."""
    import torch_xla

    gc.collect()
    torch_xla.sync(wait=True)


def update(device: torch.device, rows: int, length: int = 3) -> list[dict[str, dict[str, torch.Tensor]]]:
    """What stands for an update: a program of its own for every shape. Returns its micro-batches."""
    import torch_xla

    tokens = torch.ones(rows, length, device=device)
    torch_xla.sync()
    return [{"net_input": {"src_tokens": tokens}}]


def run(watch: Watch, device: torch.device, *rows: int) -> None:
    for number in rows:
        watch.begin_update()
        watch.end_update(update(device, number))


def test_programs_are_counted_once(device):
    before = compilations()
    update(device, 101)
    assert compilations() == before + 1
    update(device, 101)
    assert compilations() == before + 1


def test_a_late_program_is_told_of_with_the_shape_that_made_it(device, caplog):
    with caplog.at_level(logging.WARNING):
        watch = Watch()
        run(watch, device, *[102] * (WARM_UP + 2))
        assert not caplog.records
        run(watch, device, 103, 102, 103)
    [record] = caplog.records
    assert record.message.startswith(f"update {WARM_UP + 3} of this process was compiled anew (1 programs; ")
    assert "new in it: src_tokens 103x3" in record.message
    assert "102x3" not in record.message


def test_the_first_updates_may_be_compiled(device, caplog):
    run(Watch(), device, *range(104, 104 + WARM_UP))
    assert not caplog.records


def test_a_program_for_old_shapes_is_told_of_too(device, caplog):
    import torch_xla

    watch = Watch()
    run(watch, device, *[120] * (WARM_UP + 1))
    watch.begin_update()
    samples = update(device, 120)
    other = torch.ones(7, 7, device=device).cos()
    torch_xla.sync()
    watch.end_update(samples)
    assert other.shape == (7, 7)
    assert "its shapes are not new" in caplog.records[0].message


def test_what_is_compiled_between_updates_is_not_training_s(device, caplog):
    watch = Watch()
    run(watch, device, *[130] * (WARM_UP + 1))
    update(device, 131)  # validation
    run(watch, device, 130)
    assert not caplog.records


def test_shapes_of_accumulated_batches_are_listed_once():
    batch = {"net_input": {"src_tokens": torch.zeros(2, 3)}, "target": torch.zeros(2), "id": [1, 2]}
    assert shapes([batch, batch]) == ("src_tokens 2x3", "target 2", "2 micro-batches")
