"""Padded batches hold what the batches held, and nothing else that counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xla.batches import NO_LABEL, Shape, hollow, longest, masked_positions, most_masked, pad_batch

PAD = 1


@st.composite
def masked_lm_batches(draw):
    rows, length = draw(st.integers(1, 5)), draw(st.integers(2, 9))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    tokens = torch.from_numpy(rng.integers(2, 50, (rows, length)))
    lengths = torch.from_numpy(rng.integers(1, length + 1, rows))
    padding = torch.arange(length) >= lengths[:, None]
    tokens[padding] = PAD
    target = tokens.clone()
    target[torch.from_numpy(rng.random((rows, length)) < 0.6)] = PAD
    return {
        "id": torch.arange(rows),
        "net_input": {"src_tokens": tokens, "src_lengths": lengths},
        "target": target,
        "nsentences": rows,
        "ntokens": int(lengths.sum()),
    }


@settings(deadline=None)
@given(masked_lm_batches(), st.integers(0, 3), st.integers(0, 4), st.integers(1, 4))
def test_masked_lm(batch, more_rows, more_columns, masked):
    tokens = batch["net_input"]["src_tokens"]
    rows, length = tokens.size(0) + more_rows, tokens.size(1) + more_columns
    padded = pad_batch(batch, Shape(rows, length, length, PAD, masked))
    count = tokens.size(0)
    assert padded["net_input"]["src_tokens"].shape == padded["target"].shape == (rows, length)
    assert torch.equal(padded["net_input"]["src_tokens"][:count, : tokens.size(1)], tokens)
    assert padded["net_input"]["src_tokens"][:, tokens.size(1) :].eq(PAD).all()
    assert torch.equal(padded["target"][:count, : tokens.size(1)], batch["target"])
    assert padded["target"][count:].eq(PAD).all()
    assert padded["real"].tolist() == [True] * count + [False] * more_rows
    # No row is all padding: attention over nothing is not a number.
    assert padded["net_input"]["src_tokens"].ne(PAD).any(dim=1).all()
    # The projected positions are the targets, each once.
    found = [
        (row, position, target)
        for row in range(rows)
        for position, target in zip(
            padded["projected"][row].tolist(), padded["projected_target"][row].tolist(), strict=True
        )
        if target != PAD
    ]
    expected = [
        (row, position, int(batch["target"][row, position]))
        for row, position in batch["target"].ne(PAD).nonzero().tolist()
    ]
    assert found == expected


def test_the_number_of_projected_positions_stays_where_it_is_enough_and_grows_by_whole_multiples():
    target = torch.full((2, 12), PAD)
    target[0, [3, 5]] = 7
    assert masked_positions(target, 4, PAD)[0].shape == (2, 4)
    target[1, :5] = 8
    assert masked_positions(target, 4, PAD)[0].shape == (2, 8)
    target[1] = 8
    assert masked_positions(target, 5, PAD)[0].shape == (2, 12)  # no more than there are
    assert masked_positions(target, 5, PAD)[1][1].tolist() == [8] * 12


@settings(deadline=None)
@given(st.integers(2, 200), st.floats(0.01, 0.9), st.integers(1, 4), st.integers(0, 99))
def test_fairseq_never_masks_more(length, probability, run, seed):
    """`MaskTokensDataset` draws int(probability * length / run + random) runs."""
    drawn = int(probability * length / run + np.random.default_rng(seed).random())
    assert min(drawn * run, length) <= most_masked(length, probability, run)


@pytest.mark.parametrize("labels", [torch.tensor([[2], [0]]), torch.tensor([2, 0])])
def test_classes(labels):
    batch = {
        "net_input": {"src_tokens": torch.tensor([[5, 6], [7, PAD]]), "src_lengths": torch.tensor([2, 1])},
        "target": labels,
        "nsentences": 2,
        "ntokens": 3,
    }
    padded = pad_batch(batch, Shape(4, 3, 3, PAD))
    assert padded["target"].tolist() == [2, 0, NO_LABEL, NO_LABEL]
    assert padded["real"].tolist() == [True, True, False, False]
    assert padded["net_input"]["src_lengths"].tolist() == [2, 1, 2, 2]
    assert "projected" not in padded


def test_numbers_to_predict():
    batch = {
        "net_input": {"src_tokens": torch.tensor([[5, 6]]), "src_lengths": torch.tensor([2])},
        "target": torch.tensor([0.5]),
    }
    assert pad_batch(batch, Shape(2, 2, 2, PAD))["target"].tolist() == [0.5, 0.0]


def test_translation():
    batch = {
        "net_input": {
            "src_tokens": torch.tensor([[PAD, 5, 2]]),  # padded on the left, as fairseq does with sources
            "src_lengths": torch.tensor([2]),
            "prev_output_tokens": torch.tensor([[2, 8, 9]]),
        },
        "target": torch.tensor([[8, 9, 2]]),
        "ntokens": 3,
    }
    padded = pad_batch(batch, Shape(2, 4, 5, PAD))
    assert padded["net_input"]["src_tokens"].tolist() == [[PAD, 5, 2, PAD]] * 2
    assert padded["net_input"]["prev_output_tokens"].tolist() == [[2, 8, 9, PAD, PAD]] * 2
    assert padded["target"].tolist() == [[8, 9, 2, PAD, PAD], [PAD] * 5]
    assert padded["ntokens"] == 3


def test_a_hollow_batch_counts_nothing():
    batch = {
        "net_input": {"src_tokens": torch.tensor([[5, 6]]), "src_lengths": torch.tensor([2])},
        "target": torch.tensor([[PAD, 6]]),
    }
    full = pad_batch(batch, Shape(2, 2, 2, PAD, 1))
    empty = hollow(full)
    assert not empty["real"].any()
    assert empty["target"].eq(PAD).all()
    assert empty["projected_target"].eq(PAD).all()
    for name in ("projected", "projected_target", "target", "real"):
        assert empty[name].shape == full[name].shape
        assert empty[name].dtype == full[name].dtype
    classes = {**batch, "target": torch.tensor([3])}
    assert hollow(pad_batch(classes, Shape(2, 2, 2, PAD)))["target"].tolist() == [NO_LABEL] * 2


def test_longest():
    assert longest(np.array([3, 9, 4])) == (9, 9)
    assert longest([np.array([3, 9, 4])]) == (9, 9)
    assert longest(np.array([[3, 9], [8, 4]])) == (8, 9)
    assert longest(np.array([3, 9, 4]), 6) == (6, 6)
    assert longest(np.array([[3, 9], [8, 4]]), (5, 100)) == (5, 9)
    assert longest(np.array([3, 9, 4]), None) == (9, 9)
