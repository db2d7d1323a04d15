from __future__ import annotations

import pytest

from train_large.errors import UserError
from train_large.flops import train_flops, translation_train_flops
from train_large.sizes import Size

BASE, LARGE = Size(12, 768), Size(24, 1024)


def test_bert_base_costs_what_clark_et_al_say():
    assert train_flops(BASE, 30522, 512, 256 * 10**6) == pytest.approx(6.43e19, rel=1e-3)


@pytest.mark.parametrize(
    ("size", "vocabulary", "sequences", "masked_fraction", "published"),
    [
        (BASE, 30522, 256 * 10**6, 0.15625, 6.428335104e19),  # BERT-base
        (LARGE, 30522, 256 * 10**6, 0.15625, 1.91720905883648e20),  # BERT-large
        (LARGE, 50265, 8000 * 500000, 0.15625, 3.187221435776e21),  # RoBERTa
        (BASE, 40000, 128 * 960800, 1.0, 3.968752230785352e19),  # GPT
    ],
)
def test_figures_are_those_of_their_script(size, vocabulary, sequences, masked_fraction, published):
    """`python flops_computation.py` of google-research/electra prints these for the published models."""
    assert train_flops(size, vocabulary, 512, sequences, masked_fraction=masked_fraction) == pytest.approx(
        published, rel=1e-12
    )


def test_training_is_linear_in_sequences_and_layers():
    one, two, three = (train_flops(Size(layers, 512), 8000, 128, 7) for layers in (1, 2, 3))
    assert three - two == two - one > 0
    assert train_flops(BASE, 8000, 128, 7) == 7 * train_flops(BASE, 8000, 128, 1)


def test_feed_forward_size_counts():
    """Each inner unit has 2 x 2 x 512 FLOPs of products, 8 of activation and 1 of bias, forward and again backward."""
    assert train_flops(Size(1, 512, 2049), 8000, 128, 1) - train_flops(Size(1, 512, 2048), 8000, 128, 1) == (
        2 * 128 * (4 * 512 + 9)
    )


def test_layers_of_their_own_shapes_cost_what_they_compute():
    """Of 8 heads of 64 and 2048 rows, (8, 2048), (3, 2048) and (8, 5) are left in the three layers."""
    size, length = Size(3, 512), 128
    whole = train_flops(size, 8000, length, 2)
    assert train_flops(size, 8000, length, 2, layers=[(8, 2048)] * 3) == whole
    shrunk = train_flops(size, 8000, length, 2, layers=[(8, 2048), (3, 2048), (8, 5)])
    # A token that goes through a head: q, k and v (with bias), then the output projection; scores and average over all
    # tokens, and softmax, dropout and scaling of the scores.
    head = 3 * (2 * 512 * 64 + 64) + 2 * 64 * 512 + length * (2 * 2 * 64 + 10)
    row = 2 * 512 + 1 + 8 + 2 * 512
    assert whole - shrunk == 2 * 2 * length * (5 * head + 2043 * row)


def test_heads_on_the_encoder():
    size, vocabulary = Size(3, 256), 8000
    none, mlm, classification = (
        train_flops(size, vocabulary, 128, 1, head=head) for head in ("none", "mlm", "classification")
    )
    # 20 of 128 positions: hidden layer (2hh; 14h for bias, GELU, norm), product with the embedding, softmax and loss
    assert mlm - none == 2 * 20 * (2 * 256**2 + 14 * 256 + (2 * 256 + 7) * vocabulary)
    # one position, whatever the length: hidden layer with bias and activation, two classes
    assert classification - none == 2 * (2 * 256**2 + 9 * 256 + 2 * 256 * 2)
    assert train_flops(size, vocabulary, 128, 1, masked_fraction=0) == none
    with pytest.raises(UserError, match="mlm"):
        train_flops(size, vocabulary, 128, 1, head="lm")


def test_translation_is_what_their_script_says_at_equal_lengths():
    """The script's encoder (no output) plus decoder (all outputs), 6 x 512, 32,000 entries, 3 pairs of 64 tokens."""
    assert translation_train_flops(Size(6, 512), 32000, 64, 64, 3) == 73002059520


def test_a_decoder_of_its_own_size_costs_what_it_computes():
    size = Size(6, 512)

    def cost(layers: int, ffn: int = 2048) -> float:
        return translation_train_flops(size, 32000, 30, 20, 1, Size(layers, 512, ffn))

    assert cost(6) == translation_train_flops(size, 32000, 30, 20, 1)
    assert cost(6) - cost(5) == cost(2) - cost(1) > 0
    # A row of the FFN: into it with bias and activation, out of it, for 20 positions, forward and backward.
    assert cost(1, 2049) - cost(1) == 2 * 20 * (2 * 512 + 1 + 8 + 2 * 512)


def test_only_cross_attention_couples_source_and_target():
    size = Size(6, 512)

    def cost(source: int, target: int) -> float:
        return translation_train_flops(size, 32000, source, target, 1)

    mixed = cost(31, 21) - cost(31, 20) - cost(30, 21) + cost(30, 20)
    assert mixed == 2 * 6 * (4 * 512 + 10 * 8)  # scores and average; softmax, dropout, scale of eight heads
    # A token more of source costs what it costs the encoder alone and, in each decoder layer, its key and its value
    # (2hh + h each) and the attention of all 20 target positions to it.
    alone = train_flops(size, 32000, 31, 1, head="none") - train_flops(size, 32000, 30, 1, head="none")
    assert cost(31, 20) - cost(30, 20) - alone == 2 * 6 * (2 * (2 * 512**2 + 512) + 20 * (4 * 512 + 10 * 8))
