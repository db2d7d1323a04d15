from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train_large.compression.storage import block_size, is_parameter, storage, tensor_storage, tied_to
from train_large.errors import UserError


def test_dense_weights_take_bits_each_and_eight_bytes_a_range():
    state = {"a.weight": torch.arange(1.0, 1001.0).view(10, 100)}
    assert storage(state, 8).bytes == 1000 + 8
    assert storage(state, 4).bytes == 500 + 8
    assert storage(state, 6).bytes == 750 + 8
    assert storage(state, 32).bytes == 4000
    assert storage(state, 8, "row").bytes == 1000 + 10 * 8
    assert storage(state, 8, "group:300").bytes == 1000 + 4 * 8  # 300, 300, 300, 100


@pytest.mark.parametrize(
    ("zeros", "bits", "layout", "stored_bits"),
    [
        (0, 4, "dense", 4 * 1000),
        (1, 4, "positions", 32 + 4 * 999),
        (31, 4, "positions", 31 * 32 + 4 * 969),
        (32, 4, "mask", 1000 + 4 * 968),
        (900, 4, "mask", 1000 + 4 * 100),
        (1000, 8, "mask", 1000),
        (0, 32, "dense", 32 * 1000),
        (1, 32, "dense", 32 * 1000),  # zero is a float32; its place costs as much as it saves
        (31, 32, "dense", 32 * 1000),
        (32, 32, "mask", 1000 + 32 * 968),
    ],
)
def test_zeros_are_stored_in_the_cheapest_layout(zeros, bits, layout, stored_bits):
    weights = torch.arange(1.0, 1001.0)
    weights[:zeros] = 0
    stored = tensor_storage("w", weights, bits)
    assert stored.layout == layout
    assert stored.bytes == math.ceil(stored_bits / 8) + (8 if bits < 32 else 0)
    assert (stored.parameters, stored.nonzero) == (1000, 1000 - zeros)


def test_the_papers_own_count_is_nonzero_weights_times_bits():
    state = {"w": torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 5.0]]), "b": torch.tensor([1.0, 2.0, 3.0])}
    summary = storage(state, 4)
    assert (summary.parameters, summary.nonzero) == (9, 7)
    assert summary.bytes_paper == 4  # 28 bits
    assert summary.bytes == sum(tensor.bytes for tensor in summary.tensors)
    assert [tensor.name for tensor in summary.tensors] == ["w", "b"]


@given(st.integers(1, 8), st.integers(1, 40), st.floats(0, 1), st.sampled_from([2, 5, 8, 32]), st.integers(1, 50))
def test_storage_agrees_with_counting_by_hand(rows, columns, sparsity, bits, group):
    rng = np.random.default_rng(rows * 100 + columns)
    weights = np.where(rng.random((rows, columns)) < sparsity, 0, rng.uniform(1, 2, (rows, columns))).astype(np.float32)
    zeros = int((weights == 0).sum())
    ways = [weights.size + bits * (weights.size - zeros), 32 * zeros + bits * (weights.size - zeros)]
    if bits == 32 or zeros == 0:
        ways.append(bits * weights.size)
    ranges = len(range(0, weights.size, group)) if bits < 32 else 0
    expected = math.ceil(min(ways) / 8) + 8 * ranges
    assert storage({"w": torch.from_numpy(weights)}, bits, f"group:{group}").bytes == expected


def test_tied_weights_are_one_whether_they_share_memory_or_are_copies():
    embedding = torch.randn(10, 4)
    state = {"embed.weight": embedding, "head.weight": embedding, "copy.weight": embedding.clone()}
    assert tied_to(state) == dict.fromkeys(state, "embed.weight")
    assert storage(state, 8).parameters == 40
    assert storage(state, 8).bytes == 48


def test_alike_is_not_tied():
    memory = torch.randn(8, 8)
    state = {
        "top": memory[:4],
        "bottom": memory[4:],  # the same memory, other weights
        "turned": memory[:4].t(),
        "norm1.weight": torch.ones(64),  # equal because no update has moved them yet
        "norm2.weight": torch.ones(64),
        "head1.bias": torch.tensor([0.5, -0.5]),  # equal by chance
        "head2.bias": torch.tensor([0.5, -0.5]),
        "half": memory[:4].to(torch.float16),
    }
    assert all(name == first for name, first in tied_to(state).items())


def test_buffers_are_not_parameters():
    state = {
        "encoder.sentence_encoder.version": torch.tensor([3.0]),
        "decoder.embed_positions._float_tensor": torch.tensor([1.0]),
        "bn.num_batches_tracked": torch.tensor(7),
        "ids": torch.arange(5),
        "version.weight": torch.randn(3),
        "scale": torch.tensor(2.0),
    }
    assert [name for name, tensor in state.items() if is_parameter(name, tensor)] == ["version.weight", "scale"]
    assert storage(state, 8).parameters == 4


def test_parameters_are_those_that_the_model_itself_counts():
    pytest.importorskip("fairseq")
    from argparse import Namespace

    from fairseq.data import Dictionary
    from fairseq.models.roberta.model import RobertaEncoder, RobertaModel, roberta_prenorm_architecture

    args = Namespace(encoder_layers=3, encoder_embed_dim=16, encoder_ffn_embed_dim=32, encoder_attention_heads=2)
    args.max_positions = 20
    roberta_prenorm_architecture(args)
    model = RobertaModel(args, RobertaEncoder(args, Dictionary()))
    layers = model.encoder.sentence_encoder.layers
    unshared = sum(p.numel() for p in model.parameters())
    assert storage(model.state_dict(), 32).parameters == unshared
    layers[2] = layers[1]
    shared = sum(p.numel() for p in model.parameters())
    assert shared < unshared
    assert storage(model.state_dict(), 32).parameters == shared


def test_granularity_says_how_many_weights_share_a_range():
    assert block_size((6, 5), "tensor") == 30
    assert block_size((6, 5), "row") == 5
    assert block_size((6, 5, 2), "row") == 10
    assert block_size((6,), "row") == 6
    assert block_size((6, 5), "group:8") == 8
    assert block_size((), "row") == 1


@pytest.mark.parametrize("granularity", ["column", "group", "group:", "group:0", "group:-4", "group:1.5", "rows", ""])
def test_other_granularities_are_refused(granularity):
    with pytest.raises(UserError, match="--granularity"):
        block_size((6, 5), granularity)


def test_a_transposed_view_of_a_square_matrix_is_not_tied():
    w = torch.randn(8, 8)
    state = {"w": w, "turned": w.t()}
    assert tied_to(state) == {"w": "w", "turned": "turned"}
    assert storage(state, 8).parameters == 128
