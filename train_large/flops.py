"""Training FLOPs by the rules of Clark et al. (2020, ELECTRA), with which the paper draws its Figure 10 (Appendix A.1).

The rules, as their published script `flops_computation.py` applies them:
- an operation is a mathematical one: an addition, a multiplication and an exponential are one each, a product of
  matrices 2mnk;
- the backward pass costs as much as the forward pass;
- looking up embeddings costs what multiplying by one-hot vectors would: for the tokens, the positions and two token
  types;
- the masked-LM head runs at 0.15625 of the positions: BERT's 80 of 512;
- attention is counted over the full square of positions, also where half of it is masked.

The script counts the layer norm after the attention once per position where it should be once per position and hidden
dimension. That is kept, so that figures compare to the digit with published ones; it is less than 0.1 % at every size
of the paper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Sequence

from train_large.errors import UserError

if TYPE_CHECKING:
    from train_large.sizes import Size

# Operations per element.
DROPOUT = 4  # random number, comparison, multiplication by the mask, multiplication by 1 / (1 - p)
LAYER_NORM = 5  # mean, variance (square, sum), bias, scale
ACTIVATION = 8  # GELU by its tanh formula
SOFTMAX = 5  # maximum, subtraction, exp, sum, division

TOKEN_TYPES = 2  # BERT's sentence A and sentence B; counted for every model, as Clark et al. do for RoBERTa
MASKED_FRACTION = 0.15625
FORWARD_AND_BACKWARD = 2


def train_flops(
    size: Size,
    vocabulary: int,
    length: int,
    sequences: int,
    *,
    head: str = "mlm",
    masked_fraction: float = MASKED_FRACTION,
    classes: int = 2,
    layers: Sequence[tuple[int, int]] | None = None,
) -> float:
    """FLOPs of training an encoder on `sequences` sequences of `length` tokens, forward and backward.

    `head` is what stands on the encoder: `mlm` (applied to `masked_fraction` of the positions), `classification`
    (RoBERTa's, into `classes`, applied to the first position) or `none`. BERT-base, 10^6 steps of 256 x 512 tokens,
    comes out at 6.43e19. The optimizer's own work is not counted. Sharing weights between layers changes nothing.
    `layers` has the heads, each as wide as those of `size`, and the feed-forward size of each layer where they are not
    those of `size`, as after structured pruning. Raises UserError for a head that does not exist.
    """
    heads = {
        "mlm": masked_fraction * length * _vocabulary_head(size, vocabulary),
        "classification": _classification_head(size, classes),
        "none": 0,
    }
    if head not in heads:
        raise UserError(f"'{head}' is not a head; choose one of {', '.join(heads)}.")

    def layer(heads: int, ffn: int) -> int:
        return _attention(size, length, length, heads) + _feed_forward(size, length, ffn)

    encoder = sum(layer(*shape) for shape in layers) if layers else size.layers * layer(size.heads, size.ffn)
    forward = _embedding(size, vocabulary, length) + encoder + heads[head]
    return float(FORWARD_AND_BACKWARD * sequences * forward)


def translation_train_flops(
    size: Size,
    vocabulary: int,
    source_length: int,
    target_length: int,
    sequences: int,
    decoder: Size | None = None,
) -> float:
    """FLOPs of training an encoder-decoder on `sequences` pairs of sentences, forward and backward.

    Lengths are in tokens. `size.layers` layers in the encoder and again in the decoder, or those of `decoder`, whose
    layers also attend to the source. The head runs at every target position. As Clark et al. count T5, it has a hidden
    layer like BERT's, which translation models lack: 2 hidden^2 too many per target token. With `source_length ==
    target_length` the figure is theirs.
    """
    encoder_layer = _attention(size, source_length, source_length) + _feed_forward(size, source_length)
    other = decoder or size
    decoder_layer = (
        _attention(other, target_length, target_length)
        + _attention(other, target_length, source_length)
        + _feed_forward(other, target_length)
    )
    forward = (
        _embedding(size, vocabulary, source_length)
        + _embedding(other, vocabulary, target_length)
        + size.layers * encoder_layer
        + other.layers * decoder_layer
        + target_length * _vocabulary_head(other, vocabulary)
    )
    return float(FORWARD_AND_BACKWARD * sequences * forward)


def _linear(inputs: int, outputs: int) -> int:
    """One position through a matrix, and its bias."""
    return 2 * inputs * outputs + outputs


def _attention(size: Size, queries: int, keys: int, heads: int | None = None) -> int:
    """`queries` positions attending to `keys` positions: projections, weights, dropout, residual, layer norm.

    `heads` is how many of the heads of `size` there are, all of them if None.
    """
    hidden = size.hidden
    heads = heads or size.heads
    inner = hidden // size.heads * heads
    projections = (queries + 2 * keys) * _linear(hidden, inner)
    scores_and_average = 2 * (2 * inner * queries * keys)
    weights = (SOFTMAX + DROPOUT + 1) * heads * queries * keys  # + 1: the scaling by the root of the head's width
    output = queries * (_linear(inner, hidden) + (DROPOUT + 1) * hidden + LAYER_NORM)  # + 1: the residual
    return projections + scores_and_average + weights + output


def _feed_forward(size: Size, positions: int, ffn: int | None = None) -> int:
    """`ffn` is the inner size, that of `size` if None."""
    ffn = ffn or size.ffn
    inner = _linear(size.hidden, ffn) + ACTIVATION * ffn
    outer = _linear(ffn, size.hidden) + (DROPOUT + 1 + LAYER_NORM) * size.hidden  # + 1: the residual
    return positions * (inner + outer)


def _embedding(size: Size, vocabulary: int, positions: int) -> int:
    """One-hot products for token, type and position, the two additions, layer norm, dropout."""
    rows = vocabulary + positions + TOKEN_TYPES
    return positions * size.hidden * (2 * rows + 2 + LAYER_NORM + DROPOUT)


def _vocabulary_head(size: Size, vocabulary: int) -> int:
    """One position through the hidden layer, its layer norm, and the softmax over the vocabulary, with the loss."""
    hidden = _linear(size.hidden, size.hidden) + (ACTIVATION + LAYER_NORM) * size.hidden
    return hidden + (2 * size.hidden + SOFTMAX + 2) * vocabulary


def _classification_head(size: Size, classes: int) -> int:
    """One position through the hidden layer and on to the classes."""
    return _linear(size.hidden, size.hidden) + ACTIVATION * size.hidden + 2 * size.hidden * classes
