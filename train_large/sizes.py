"""Every model size of the paper, once: names, shapes, parameter counts, learning rates."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Iterable

from train_large import flops
from train_large.errors import UserError

SHARING = ("none", "all", "attention")
"""Which weights all layers have in common (Appendix C): nothing, the whole layer, or its attention."""

LEARNING_RATES = {256: 0.0002, 2048: 0.001, 4096: 0.00125, 8192: 0.0015, 16384: 0.001875}
"""Table 1 of the paper (Appendix A.2): the peak learning rate by batch size in sequences."""

HEAD_WIDTH = 64  # RoBERTa and Tensor2Tensor give every attention head 64 dimensions, at every size
PAPER_LENGTH = 128  # the paper pretrains on sequences of 128 tokens (section 2.1)


def default_ffn(hidden: int) -> int:
    """The inner size of the feed-forward layers: four times the hidden size."""
    return 4 * hidden


def default_heads(hidden: int, width: int = HEAD_WIDTH) -> int:
    """One attention head for every `width` dimensions, at least one."""
    return max(1, hidden // width)


@dataclass(frozen=True)
class Size:
    """The shape of a Transformer: so many layers of this hidden size.

    `ffn` is the inner size of the feed-forward layers and `heads` the number of attention heads; `default_ffn` and
    `default_heads` give them unless they are given. Raises UserError for a shape that cannot be built.
    """

    layers: int
    hidden: int
    ffn: int = None  # type: ignore[assignment]  # an int after __post_init__, which knows `hidden`
    heads: int = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.ffn is None:
            object.__setattr__(self, "ffn", default_ffn(self.hidden))
        if self.heads is None:
            object.__setattr__(self, "heads", default_heads(self.hidden))
        for what in ("layers", "hidden", "ffn", "heads"):
            if getattr(self, what) < 1:
                raise UserError(f"A size needs at least one of each, but {what} is {getattr(self, what)}.")
        if self.hidden % self.heads:
            raise UserError(
                f"A hidden size of {self.hidden} does not divide into {self.heads} attention heads; "
                "choose another number of either."
            )

    @property
    def name(self) -> str:
        """As in the names of the architectures, `12l_768h`. The feed-forward size and the heads are not part of it."""
        return f"{self.layers}l_{self.hidden}h"

    @classmethod
    def parse(cls, name: str, head_width: int = HEAD_WIDTH) -> Size:
        """The size called `name`, such as `12l_768h`, with heads of `head_width`; UserError if it is no such name."""
        match = re.fullmatch(r"([0-9]+)l_([0-9]+)h", name)
        if match is None:
            raise UserError(f"'{name}' is not a size; write layers and hidden size as in 12l_768h.")
        layers, hidden = map(int, match.groups())
        return cls(layers, hidden, heads=default_heads(hidden, head_width))


def split_names(text: str) -> tuple[str, ...]:
    """The names in a list such as `2l_64h,3l_128h`, each once. UserError where there is none."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise UserError("--sizes: give at least one size, such as 2l_64h.")
    return names


ROBERTA = tuple(Size(layers, hidden) for layers in (3, 6, 12, 18, 24) for hidden in (256, 512, 768, 1024, 1536))
"""The grid for masked language modeling (section 2.1)."""

TRANSLATION = tuple(Size(layers, hidden) for layers in (2, 6, 8) for hidden in (128, 256, 512, 1024, 2048))
"""The grid for machine translation (section 2.1): so many layers in the encoder and again in the decoder."""


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _norm(hidden: int) -> int:
    return 2 * hidden


def _attention(size: Size) -> int:
    """Query, key, value and output projections, each with a bias."""
    return 4 * _linear(size.hidden, size.hidden)


def _feed_forward(size: Size) -> int:
    return _linear(size.hidden, size.ffn) + _linear(size.ffn, size.hidden)


def parameters(
    size: Size,
    vocabulary: int,
    max_positions: int = PAPER_LENGTH,
    embedding_norm: bool = True,
    share: str = "none",
) -> int:
    """How many parameters `--arch prenorm_roberta` has at this size, exactly.

    The masked-LM head is included, and weights that layers share count once. `vocabulary` is the length of the
    dictionary with its special symbols. `max_positions` is fairseq's `--max-positions`, which is `--tokens-per-sample`
    unless given. Classification heads, which a task adds, are not counted.
    """
    embeddings = vocabulary * size.hidden + (max_positions + 2) * size.hidden  # fairseq counts positions from 2 on
    return embeddings + parameters_without_embeddings(size, vocabulary, embedding_norm, share)


def parameters_without_embeddings(size: Size, vocabulary: int, embedding_norm: bool = True, share: str = "none") -> int:
    """`parameters` less the token and position embeddings: layers, layer norms, and the head's own weights.

    The head's output matrix is the token embedding again (tied), so it is not counted here either.
    """
    if share not in SHARING:
        raise UserError(f"'{share}' is not a way to share layers; choose one of {', '.join(SHARING)}.")
    attentions = size.layers if share == "none" else 1
    others = 1 if share == "all" else size.layers
    layers = attentions * _attention(size) + others * (_feed_forward(size) + 2 * _norm(size.hidden))
    head = _linear(size.hidden, size.hidden) + _norm(size.hidden) + vocabulary
    return layers + _norm(size.hidden) * (2 if embedding_norm else 1) + head


def translation_parameters(size: Size, vocabulary: int) -> int:
    """How many parameters fairseq's `--arch transformer` has at this size, exactly.

    The convention: `size.layers` layers in the encoder and as many in the decoder, one embedding for source, target and
    output (`--share-all-embeddings`), sinusoidal positions (no parameters), layer norm after every sub-layer (fairseq's
    default, no final norm). `tensor2tensor_parameters` is the same for Tensor2Tensor's Transformer.
    """
    encoder_layer = _attention(size) + _feed_forward(size) + 2 * _norm(size.hidden)
    decoder_layer = 2 * _attention(size) + _feed_forward(size) + 3 * _norm(size.hidden)
    return vocabulary * size.hidden + size.layers * (encoder_layer + decoder_layer)


def tensor2tensor_parameters(size: Size, vocabulary: int) -> int:
    """How many parameters Tensor2Tensor's Transformer has at this size, exactly (transformer_base, 1.15.7).

    As `translation_parameters`, but for attention without biases, a final layer norm on both sides, and an embedding
    of 32 tasks (`target_space_embedding`, tensor2tensor/layers/transformer_layers.py:96), of which a model for
    translation reads one.
    """
    attention = 4 * size.hidden * size.hidden
    encoder_layer = attention + _feed_forward(size) + 2 * _norm(size.hidden)
    decoder_layer = 2 * attention + _feed_forward(size) + 3 * _norm(size.hidden)
    embeddings = (vocabulary + 32) * size.hidden
    return embeddings + size.layers * (encoder_layer + decoder_layer) + 2 * _norm(size.hidden)


def learning_rate(batch: int) -> float:
    """The peak learning rate for a batch of so many sequences, from Table 1.

    Between its rows: straight lines in log-log scale. Outside the table the line through the two nearest rows goes on.
    That is the table's own trend, which is neither linear nor the square root: the rate grows as batch^0.77 up to 2048
    and as about batch^0.3 from there. Raises UserError for an empty batch.
    """
    if batch < 1:
        raise UserError(f"A batch needs at least one sequence, not {batch}.")
    if batch in LEARNING_RATES:
        return LEARNING_RATES[batch]
    rows = sorted(LEARNING_RATES.items())
    right = next((i for i, (rows_batch, _) in enumerate(rows) if i > 0 and batch <= rows_batch), len(rows) - 1)
    (left_batch, left_rate), (right_batch, right_rate) = rows[right - 1], rows[right]
    slope = math.log(right_rate / left_rate) / math.log(right_batch / left_batch)
    return left_rate * (batch / left_batch) ** slope


@dataclass(frozen=True)
class SizeRow:
    """One line of `train-large sizes`."""

    name: str
    parameters: int
    parameters_without_embeddings: int
    flops_per_update: float
    learning_rate: float


def size_rows(sizes: Iterable[Size], vocabulary: int, length: int, batch: int) -> list[SizeRow]:
    """What `train-large sizes` prints, one row per size, for updates of `batch` sequences of `length` tokens.

    The models have as many positions as the sequences have tokens, as fairseq gives them by default. Raises UserError.
    """
    for what, value in (("vocabulary", vocabulary), ("length", length)):
        if value < 1:
            raise UserError(f"The {what} must be at least 1, not {value}.")
    return [
        SizeRow(
            name=size.name,
            parameters=parameters(size, vocabulary, max_positions=length),
            parameters_without_embeddings=parameters_without_embeddings(size, vocabulary),
            flops_per_update=flops.train_flops(size, vocabulary, length, batch),
            learning_rate=learning_rate(batch),
        )
        for size in sizes
    ]
