from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from train_large.compression.quantization import Quantized, dequantize, quantize_tensor
from train_large.compression.resident import Dense, Matrix, Plain, Table, below_each_other, linear_weight, table

BITS = (2, 3, 4, 5, 6, 7, 8)
GRANULARITIES = ("tensor", "row", "group:16", "group:7", "group:100000")


def weights(shape: tuple[int, int], sparsity: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator) * 0.1 + 0.03
    w[torch.rand(shape, generator=generator) < sparsity] = 0
    return w


def whole(matrix: Matrix) -> Tensor:
    blocks = list(matrix.blocks())
    assert [block.start for block, _ in blocks] == [0, *(block.stop for block, _ in blocks[:-1])]
    return torch.cat([part for _, part in blocks])


@given(
    st.sampled_from(BITS),
    st.sampled_from(GRANULARITIES),
    st.sampled_from([(1, 1), (30, 17), (64, 128), (1500, 400)]),
    st.sampled_from([0, 0.003, 0.4, 1]),
    st.integers(0, 100),
)
def test_weights_are_bit_for_bit_those_of_dequantize(
    bits: int, granularity: str, shape: tuple[int, int], sparsity: float, seed: int
) -> None:
    w = weights(shape, sparsity, seed)
    w[-1] = 0  # as the row of an embedding that stands for padding
    q = quantize_tensor(w, bits, granularity)
    expected = dequantize(q)
    for matrix in (linear_weight(q), table(q)):
        assert torch.equal(whole(matrix), expected)
    rows = torch.randint(shape[0], (9,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(table(q).rows(rows), expected[rows])


@pytest.mark.parametrize("bits", [9, 12, 15])
@pytest.mark.parametrize("sparsity", [0, 0.5])
def test_more_than_8_bits(bits: int, sparsity: float) -> None:
    generator = torch.Generator().manual_seed(bits)
    indices = torch.randint(2**bits, (40, 33), generator=generator)
    mask = torch.rand(40, 33, generator=generator) >= sparsity
    indices = (indices * mask).to(torch.int16)
    q = Quantized(
        indices, torch.tensor([-1.5]), torch.tensor([3 / 2**bits]), mask if sparsity else None, "tensor", bits
    )
    for matrix in (linear_weight(q), table(q)):
        assert isinstance(matrix, Table)
        assert torch.equal(whole(matrix), dequantize(q))
        assert torch.equal(matrix.rows(torch.tensor([3, 0, 39])), dequantize(q)[[3, 0, 39]])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_int8_codes_are_the_weights_on_a_grid_of_their_own(bits: int, granularity: str) -> None:
    q = quantize_tensor(weights((48, 80), 0), bits, granularity)
    dense = linear_weight(q)
    assert isinstance(dense, Dense)
    codes = dense.codes()
    assert (codes.dtype, codes.shape) == (torch.int8, (80, 48))
    w = dense.centre.double() + dense.code_step.double() * codes.double()
    torch.testing.assert_close(w.t(), dequantize(q).double(), rtol=0, atol=1e-7)
    assert torch.equal(dense.sums, codes.sum(0, dtype=torch.int32))


@given(st.sampled_from(BITS), st.lists(st.sampled_from([("tensor", 0), ("row", 0), ("tensor", 0.003)]), min_size=1))
def test_matrices_below_each_other(bits: int, kinds: list[tuple[str, float]]) -> None:
    parts = [
        quantize_tensor(weights((9 + i, 80), sparsity, i) * (i + 1), bits, kind)
        for i, (kind, sparsity) in enumerate(kinds)
    ]
    joined = below_each_other(parts)
    assert joined is not None
    assert torch.equal(whole(linear_weight(joined)), torch.cat([dequantize(part) for part in parts]))


def test_what_has_no_grids_in_common_stays_apart() -> None:
    one = quantize_tensor(weights((8, 80), 0), 4)
    for other in (
        weights((8, 80), 0),
        quantize_tensor(weights((8, 80), 0), 6),
        quantize_tensor(weights((8, 80), 0), 4, "group:16"),
        quantize_tensor(weights((8, 64), 0), 4),
    ):
        assert below_each_other([one, other]) is None


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sparsity", [0, 0.002, 0.3, 0.9])
def test_bytes(bits: int, sparsity: float) -> None:
    w = weights((512, 512), sparsity)
    zeros = int((w == 0).sum())
    for matrix in (linear_weight(quantize_tensor(w, bits)), table(quantize_tensor(w, bits))):
        as_mask = (w.numel() + bits * (w.numel() - zeros)) / 8 if zeros else torch.inf
        as_places = (bits * w.numel() + 32 * zeros) / 8
        # Of each row a sum of codes, or where it starts.
        assert matrix.nbytes <= min(as_mask, as_places) + 4 * 513 + 8 + 64
        assert matrix.nbytes >= min(as_mask, as_places)


def test_a_constant_matrix_and_one_in_float32() -> None:
    q = quantize_tensor(torch.full((8, 8), 0.7), 4)
    assert torch.equal(whole(linear_weight(q)), torch.full((8, 8), 0.7))
    w = weights((9, 5), 0)
    plain = linear_weight(w)
    assert isinstance(plain, Plain)
    assert torch.equal(whole(plain), w)
    assert plain.nbytes == 4 * 45
    assert torch.equal(table(w).rows(torch.tensor([4, 4])), w[[4, 4]])
