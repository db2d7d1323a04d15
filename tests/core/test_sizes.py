from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train_large.errors import UserError
from train_large.sizes import (
    LEARNING_RATES,
    ROBERTA,
    TRANSLATION,
    Size,
    learning_rate,
    parameters,
    parameters_without_embeddings,
    size_rows,
    split_names,
    translation_parameters,
)


def test_grids_are_the_papers():
    assert len(set(ROBERTA)) == 25
    assert len(set(TRANSLATION)) == 15
    assert {size.layers for size in ROBERTA} == {3, 6, 12, 18, 24}
    assert {size.hidden for size in ROBERTA} == {256, 512, 768, 1024, 1536}
    assert {size.layers for size in TRANSLATION} == {2, 6, 8}
    assert {size.hidden for size in TRANSLATION} == {128, 256, 512, 1024, 2048}


@pytest.mark.parametrize(
    ("hidden", "ffn", "heads"), [(768, 3072, 12), (1536, 6144, 24), (256, 1024, 4), (64, 256, 1), (16, 64, 1)]
)
def test_the_rest_of_a_shape_follows_from_the_hidden_size(hidden, ffn, heads):
    assert Size(3, hidden) == Size(3, hidden, ffn, heads)


@given(st.integers(1, 99), st.integers(1, 32).map(lambda heads: 64 * heads))
def test_a_name_says_the_size(layers, hidden):
    assert Size.parse(Size(layers, hidden).name) == Size(layers, hidden)


@pytest.mark.parametrize("name", ["", "12l768h", "12l_768", "l_h", "12L_768H", "-3l_256h", "3l_256h ", "3.5l_256h"])
def test_what_is_not_a_name_is_refused(name):
    with pytest.raises(UserError, match="12l_768h"):
        Size.parse(name)


@pytest.mark.parametrize(
    "shape", [(0, 256), (3, 0), (3, 256, 0), (3, 256, 1024, 0), (3, 256, 1024, -4), (3, 200), (3, 256, 1024, 3)]
)
def test_what_cannot_be_built_is_refused(shape):
    with pytest.raises(UserError):
        Size(*shape)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("3l_768h", 60.6), ("12l_768h", 124.4), ("24l_768h", 209.5), ("12l_256h", 22.5), ("12l_1536h", 419.8)],
)
def test_parameters_of_known_models(name, millions):
    assert round(parameters(Size.parse(name), 50265) / 1e6, 1) == millions


def test_sharing_saves_all_layers_but_one():
    """A layer of 12 x 768 has 7,087,872 parameters (BERT-base's), its attention 2,362,368."""
    size = Size(12, 768)
    whole = parameters(size, 50265)
    assert whole - parameters(size, 50265, share="all") == 11 * 7_087_872
    assert whole - parameters(size, 50265, share="attention") == 11 * 2_362_368
    assert whole - parameters(size, 50265, embedding_norm=False) == 2 * 768
    with pytest.raises(UserError, match="none, all, attention"):
        parameters(size, 50265, share="some")


def test_parameters_without_embeddings_do_not_know_positions():
    size = Size(3, 256)
    for positions in (1, 128, 512):
        rest = parameters(size, 1000, positions) - parameters_without_embeddings(size, 1000)
        assert rest == (1000 + positions + 2) * 256


def test_translation_parameters_of_the_base_transformer():
    """6 layers x 512 and 37,000 entries: about 65M in Table 3 of Vaswani et al. (2017), who add norms and round up."""
    assert round(translation_parameters(Size(6, 512, heads=8), 37000) / 1e6) == 63
    assert translation_parameters(Size(6, 512), 0) == 44_138_496


@pytest.mark.parametrize(("batch", "rate"), LEARNING_RATES.items())
def test_learning_rate_is_table_1(batch, rate):
    assert learning_rate(batch) == rate
    assert learning_rate(batch - 1) == pytest.approx(rate, rel=0.01)  # and so are the lines to both sides of a row
    assert learning_rate(batch + 1) == pytest.approx(rate, rel=0.01)


def test_learning_rate_between_and_beyond_the_rows():
    # Half-way in log scale between two rows lies the geometric mean of their rates; beyond them the same lines go on.
    assert learning_rate(2**12 * 2) == pytest.approx(0.0015)
    assert learning_rate(round((256 * 2048) ** 0.5)) == pytest.approx((0.0002 * 0.001) ** 0.5, rel=1e-3)
    assert learning_rate(32) == pytest.approx(0.0002 / 5, rel=1e-12)
    assert learning_rate(32768) == pytest.approx(0.001875 * 1.25, rel=1e-12)


@given(st.integers(1, 10**6))
def test_a_larger_batch_has_a_larger_rate(batch):
    assert 0 < learning_rate(batch) < learning_rate(batch + 1)


def test_an_empty_batch_has_no_rate():
    with pytest.raises(UserError, match="0"):
        learning_rate(0)


def test_rows_put_it_together():
    small, large = size_rows([Size(3, 768), Size(24, 768)], vocabulary=50265, length=128, batch=8192)
    assert (small.name, large.name) == ("3l_768h", "24l_768h")
    assert large.parameters - small.parameters == 21 * 7_087_872
    assert large.parameters_without_embeddings == large.parameters - (50265 + 130) * 768
    assert large.learning_rate == pytest.approx(0.0015)
    # twice the forward pass is about 0.7 of 6ND at this size
    assert 0.69 < large.flops_per_update / (6 * large.parameters * 128 * 8192) < 0.76
    with pytest.raises(UserError, match="vocabulary"):
        size_rows([Size(3, 768)], vocabulary=0, length=128, batch=8192)


def test_names_are_split_and_each_is_there_once():
    assert split_names("2l_64h, 3l_128h,2l_64h,") == ("2l_64h", "3l_128h")
    with pytest.raises(UserError, match="--sizes: give at least one size"):
        split_names(" , ")


def test_heads_are_as_wide_as_they_are_asked_for():
    assert Size.parse("2l_208h", 16).heads == 13
    assert Size.parse("2l_8h", 16).heads == 1
    with pytest.raises(UserError, match="208 does not divide into 3"):
        Size.parse("2l_208h")
