from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from train_large.compression import onednn

pytestmark = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="not on this CPU")


def codes_of(bits: int, shape: tuple[int, int], seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=draw, dtype=torch.int8)
    return codes << (8 - bits)


def a_room(rows: int, columns: int) -> onednn.Room:
    found = onednn.room(rows, columns)
    if found is None and torch.cpu._is_amx_tile_supported():
        pytest.skip("tiles for AMX are not known to be in memory like this")
    assert found is not None
    return found


def folded(codes: Tensor, bits: int, room: onednn.Room) -> onednn.Folded:
    return onednn.fold(codes, bits, codes.sum(0, dtype=torch.int32), room)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("shape", [(64, 128), (512, 64), (192, 64), (2048, 512)])
def test_folded_weights_take_turns_in_a_room(bits: int, shape: tuple[int, int]) -> None:
    columns, rows = shape
    room = a_room(rows, columns)
    one, other = (codes_of(bits, shape, seed) for seed in (1, 2))
    weights = [folded(codes, bits, room) for codes in (one, other)]
    gc.collect()
    torch.full((4 * rows * columns,), 7, dtype=torch.uint8)  # memory that is free is taken by something else
    x = torch.randint(-128, 128, (5, columns), dtype=torch.int32)
    for weight, codes in zip(2 * weights, 2 * [one, other]):
        assert sum(plane.numel() for plane in weight.planes) == rows * columns * bits // 8
        found = onednn.times_tiles((x + 128).to(torch.uint8), weight.unfold(), torch.ones(1))
        assert torch.equal(found, (x @ codes.int()).float())
        assert torch.equal(weight.to_dense(), codes)
    assert room.nbytes == onednn.nbytes(rows, columns) == torch.ops.mkldnn._nbytes(room.tiles)


def test_a_room_is_memory_of_its_weight_alone() -> None:
    """Written from outside, it is another weight; what else is allocated does not reach it."""
    one, other = codes_of(8, (64, 96), 1), codes_of(8, (64, 96), 2)
    weight = onednn.tiles(one)
    memory = onednn._memory(weight)
    memory.copy_(onednn._memory(onednn.tiles(other)))
    assert torch.equal(weight.to_dense(), other)
    del weight
    before = memory.clone()
    for _ in range(20):
        onednn.tiles(codes_of(8, (64, 96), 3))
    assert torch.equal(memory, before)


@pytest.mark.parametrize("wrong", ["missing", "longer", "order"])
def test_no_room_where_memory_is_not_as_it_is_known(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = onednn._memory

    def missing(weight: Tensor) -> Tensor:
        raise AttributeError

    def longer(weight: Tensor) -> Tensor:
        return torch.nn.functional.pad(memory(weight), (0, 64))

    def order(weight: Tensor) -> Tensor:
        return memory(weight).roll(4)

    monkeypatch.setattr(onednn, "_memory", locals()[wrong])
    assert onednn.room(128, 64) is None


@pytest.mark.parametrize("shape", [(3, 5), (96, 64), (64, 80)])
def test_no_room_for_tiles_that_are_not_full(shape: tuple[int, int]) -> None:
    rows, columns = shape
    filled_up = onednn.nbytes(rows, columns) - rows * (columns + 4)
    assert filled_up > 0 or torch.cpu._is_amx_tile_supported()
    assert onednn.room(rows, columns) is None or not filled_up


def test_sums_are_needed() -> None:
    """The products are of unsigned codes, and the sums take the difference away."""
    room = a_room(128, 64)
    codes = codes_of(6, (64, 128))
    weight = folded(codes, 6, room)
    x = torch.full((1, 64), 128, dtype=torch.uint8)
    assert not onednn.times_tiles(x, weight.unfold(), torch.ones(1)).any()
    assert onednn.times_tiles(x, replace(weight, sums=weight.sums + 1).unfold(), torch.ones(1)).all()
