"""RoBERTa's Transformer on resident weights: pre-norm or post-norm, any layers, heads and FFN rows, shared or not.

Sentences are never padded: the tokens of a batch stand one after another, every map works on rows of tokens, and only
attention goes sentence by sentence. The last layer computes no more than the places that are asked for (a classifier
reads the first token of each sentence alone), of which attention to all tokens is a part.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, Union

import torch
from torch import Tensor
from torch.nn import functional as F

from train_large.compression import kernels, onednn, products
from train_large.compression.kernels import BFLOAT16, FLOAT32, INT8, Linear
from train_large.compression.parallel import on_all_cores
from train_large.compression.quantization import Quantized, dequantize
from train_large.compression.resident import (
    Dense,
    Matrix,
    Plain,
    Table,
    below_each_other,
    linear_weight,
    table,
)
from train_large.errors import UserError

ENCODER = "encoder.sentence_encoder"
Stored = Union[Quantized, Tensor]
Part = TypeVar("Part")

# What is computed here; any other value of these options computes something else.
COMPUTED: dict[str, tuple[Any, ...]] = {
    "activation_fn": ("gelu",),
    "pooler_activation_fn": ("tanh",),
    "encoder_learned_pos": (True,),
    "no_token_positional_embeddings": (False,),
    "no_scale_embedding": (True,),
    "encoder_layers_to_keep": (None, ""),
    "quant_noise_pq": (0,),
    "spectral_norm_classification_head": (False,),
}

_FIRST_POSITION = 2  # fairseq counts positions from the padding index + 1 (fairseq/utils.py, make_positions)
_FEWEST = 128  # tokens that are worth packing a weight for FBGEMM
# Tokens up to which all cores compute together, and of which a core computes at most so many at once where each has
# sentences of its own: that is a tenth slower for 1,024 tokens and half for 256, since cores that wait fall asleep, but
# no more than twice as slow on cores that have other work, and the other four times.
_TOGETHER, _MOST = 1024, 512
_SHORT = 128  # tokens up to which two cores are quicker at attention in two products than in pieces, and one as quick
# Tokens from which and up to which attention is quicker in bfloat16 by instructions that take pairs of numbers: below,
# calling oneDNN takes longer than the products; above, all weights of attention at once take much memory.
_ROUGHLY = range(64, 513)
_GELU_LOWEST = -0.17  # no value of gelu lies below


@dataclass(frozen=True)
class Norm:
    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias)


@dataclass(frozen=True)
class Layer:
    """`heads` heads of attention and a feed-forward network, each with its norm.

    inputs: to queries, keys and values, each by a map of its own or all three by one.
    """

    heads: int
    inputs: tuple[Linear, ...]
    out: Linear
    attention_norm: Norm
    fc1: Linear
    fc2: Linear
    ffn_norm: Norm

    @property
    def stages(self) -> tuple[tuple[Linear, ...], ...]:
        """The maps that are loaded together."""
        return (*self.inputs, self.out), (self.fc1, self.fc2)

    @property
    def maps(self) -> tuple[Linear, ...]:
        return tuple(m for stage in self.stages for m in stage)


@dataclass(frozen=True)
class Head:
    """A classification head: tanh(dense), then out."""

    dense: Linear
    out: Linear


@dataclass(frozen=True)
class WordHead:
    """The head of masked language modelling: gelu(dense), a norm, then a row of `words` for each word."""

    dense: Linear
    norm: Norm
    words: Table | Plain
    bias: Tensor


@dataclass(frozen=True)
class Network:
    """All weights of a model.

    max_length: tokens of the longest sentence. computing: held while weights are unpacked into rooms that they share.
    """

    tokens: Table | Plain
    positions: Table | Plain
    embedding_norm: Norm | None
    layers: tuple[Layer, ...]
    final_norm: Norm | None
    prenorm: bool
    heads: dict[str, Head]
    word_head: WordHead | None
    max_length: int
    resident: tuple[Matrix | Tensor, ...] = field(repr=False)
    computing: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights in memory, shared ones once."""
        return sum(weight.nbytes for weight in self.resident)

    def in_codes(self, precision: str) -> bool:
        """Whether all linear maps of the layers are computed with int8 codes, a few sentences at a time."""
        maps = [m for layer in self.layers for m in layer.maps]
        return precision in kernels.IN_CODES and all(isinstance(m.weight, Dense) for m in maps)

    @property
    def is_exact_in_codes(self) -> bool:
        """Whether what the layers compute with codes is computed with the weights themselves."""
        dense = [m.weight for layer in self.layers for m in layer.maps if isinstance(m.weight, Dense)]
        return all(map(kernels.is_of_codes, dense))

    def scratch_nbytes(self, precision: str) -> int:
        """Bytes of weights that are unpacked at the same time while the model computes, at most."""
        stages = [[m.weight for m in stage] for layer in self.layers for stage in layer.stages]
        rooms = {id(room): room.nbytes for stage in stages for room in map(kernels.room, stage) if room is not None}
        return sum(rooms.values()) + max(kernels.scratch_nbytes(stage, precision) for stage in stages)


def build(tensors: Mapping[str, Stored], model: Mapping[str, Any]) -> Network:
    """The network of a RoBERTa: `tensors` by fairseq's names, names of the same weights sharing one object, and the
    configuration of the model (`cfg.model` of the checkpoint).

    Raises UserError, which names the flag or the tensor, for a model that is not computed here.
    """
    parts = _Parts(tensors)
    if any(name.startswith("decoder.") for name in tensors) or f"{ENCODER}.embed_tokens.weight" not in tensors:
        raise UserError(
            f"the model is {model.get('arch') or model.get('_name')}: give a RoBERTa, of masked_lm or "
            "sentence_prediction; others can be unpacked and used in fairseq."
        )
    for option, values in COMPUTED.items():
        value = model.get(option)
        if value is not None and value not in values:
            raise UserError(
                f"--{option.replace('_', '-')} {value}: models with it cannot be computed from the packed file; unpack "
                "it and use fairseq."
            )
    count, hidden, heads = (_size(model, f"encoder_{name}") for name in ("layers", "embed_dim", "attention_heads"))
    if hidden % heads:
        raise UserError(f"--encoder-embed-dim {hidden} does not divide into --encoder-attention-heads {heads}.")
    positions = parts.table(f"{ENCODER}.embed_positions.weight", hidden)
    if positions.shape[0] <= _FIRST_POSITION:
        raise UserError(f"the model has {positions.shape[0]} positions, of which fairseq uses none: it reads no token.")
    prefix = "classification_heads."
    names = dict.fromkeys(name.split(".")[1] for name in tensors if name.startswith(prefix))
    prenorm = bool(model.get("encoder_normalize_before"))
    return Network(
        tokens=parts.table(f"{ENCODER}.embed_tokens.weight", hidden),
        positions=positions,
        embedding_norm=parts.norm(f"{ENCODER}.layernorm_embedding", hidden),
        layers=tuple(_layer(parts, f"{ENCODER}.layers.{i}", hidden, hidden // heads) for i in range(count)),
        final_norm=parts.norm(f"{ENCODER}.layer_norm", hidden) if prenorm else None,
        prenorm=prenorm,
        heads={name: _head(parts, prefix + name, hidden) for name in names},
        word_head=_word_head(parts, hidden),
        max_length=positions.shape[0] - _FIRST_POSITION,
        resident=tuple(weight for weight in parts.found.values() if weight is not None),
    )


def keep_ready(network: Network, allowed: int, precisions: Collection[str]) -> Network:
    """The network with weights in tiles (`kernels.in_tiles`), which need not be unpacked for every product: those of 8
    bits, which take no more room so but for sums of their rows, and of the others as many as leave it within `allowed`
    bytes with what is unpacked at a time in any of `precisions`: those with the longest rows first, since their
    products gain most, and of these the largest. The rest is unpacked into the order of tiles, where there is one."""
    network = _folded(network)
    dense = {id(m.weight): m.weight for layer in network.layers for m in layer.maps if isinstance(m.weight, Dense)}
    only_sums = {i: kernels.in_tiles_nbytes(w) - w.codes_nbytes <= 6 * w.shape[0] for i, w in dense.items()}
    in_order = sorted(dense.values(), key=lambda w: (not only_sums[id(w)], -w.shape[1], -w.shape[0]))
    for count in range(len(in_order), sum(only_sums.values()) - 1, -1):
        # As it would be: what is ready takes room, but the more is, the less has to be unpacked.
        found = _exchanged(
            network, {id(w): w.with_tiles(_Reserved(), kernels.in_tiles_nbytes(w)) for w in in_order[:count]}
        )
        if found.nbytes + max(map(found.scratch_nbytes, precisions)) <= allowed:
            break
    return _exchanged(network, {id(w): kernels.in_tiles(w) for w in in_order[:count]})


class _Reserved:
    """Tiles that are not there yet."""

    def to_dense(self) -> Tensor:
        raise NotImplementedError


def _folded(network: Network) -> Network:
    """The network with all weights in the order of tiles at their bits (`kernels.folded`), where there is one."""
    numbers: dict[int, set[int]] = {}
    weights: dict[int, Matrix] = {}
    for stage in (stage for layer in network.layers for stage in layer.stages):
        for number, m in enumerate(stage):
            numbers.setdefault(id(m.weight), set()).add(number)
            weights[id(m.weight)] = m.weight
    # Weights of one stage have different numbers, and so different rooms, if each has the same wherever it is.
    rooms: dict[tuple[int, ...], onednn.Room | None] = {}
    return _exchanged(
        network, {i: kernels.folded(weights[i], rooms, *of_it) for i, of_it in numbers.items() if len(of_it) == 1}
    )


def _exchanged(network: Network, others: Mapping[int, Matrix]) -> Network:
    """The network with `others` in place of the weights of these ids."""

    def exchanged(m: Linear) -> Linear:
        return Linear(others.get(id(m.weight), m.weight), m.bias)

    layers = tuple(
        replace(
            layer,
            inputs=tuple(map(exchanged, layer.inputs)),
            out=exchanged(layer.out),
            fc1=exchanged(layer.fc1),
            fc2=exchanged(layer.fc2),
        )
        for layer in network.layers
    )
    return replace(network, layers=layers, resident=tuple(others.get(id(w), w) for w in network.resident))


def features(network: Network, sentences: Sequence[Tensor], places: Sequence[Tensor], precision: str) -> Tensor:
    """The output of the last layer (R, hidden), float32, at `places` (int64) of each sentence of ids, in order.

    Raises ValueError for an empty or too long sentence.
    """
    lengths = [len(sentence) for sentence in sentences]
    if not lengths or min(lengths) < 1 or max(lengths) > network.max_length:
        raise ValueError(f"sentences have 1 to {network.max_length} tokens")
    positions = torch.cat([torch.arange(length) for length in lengths]) + _FIRST_POSITION
    x = network.tokens.rows(torch.cat(list(sentences))) + network.positions.rows(positions)
    if network.embedding_norm is not None:
        x = network.embedding_norm(x)
    cores = torch.get_num_threads() if sum(lengths) > _TOGETHER and network.in_codes(precision) else 1
    with network.computing, _one_thread_here() if cores > 1 else contextlib.nullcontext():
        for number, layer in enumerate(network.layers, start=1):
            last = number == len(network.layers)
            x = _attend(network, layer, x, lengths, places if last else None, precision, cores)
            x = _feed_forward(network, layer, x, precision, cores)
    return x if network.final_norm is None else network.final_norm(x)


def classify(head: Head, first: Tensor) -> Tensor:
    """Logits (B, classes) from the features of each sentence's first token (B, hidden); in float32."""
    [inner] = kernels.project(first, [kernels.load(head.dense, FLOAT32)], FLOAT32)
    return kernels.project(inner.tanh_(), [kernels.load(head.out, FLOAT32)], FLOAT32)[0]


def word_logits(head: WordHead, masked: Tensor) -> Tensor:
    """Logits (R, words) from features (R, hidden); in float32, a few rows of the table at a time."""
    [inner] = kernels.project(masked, [kernels.load(head.dense, FLOAT32)], FLOAT32)
    inner = head.norm(F.gelu(inner))
    logits = inner.new_empty(len(inner), head.words.shape[0])
    for block, words in head.words.blocks():
        logits[:, block] = products.linear(inner, words, head.bias[block])
    return logits


def _attend(
    network: Network,
    layer: Layer,
    x: Tensor,
    lengths: Sequence[int],
    places: Sequence[Tensor] | None,
    precision: str,
    cores: int,
) -> Tensor:
    """Attention with its residual connection on all tokens (T, hidden), or only for those at `places`."""
    *inputs, out = _load([*layer.inputs, layer.out], precision, len(x))

    def attend(chunk: tuple[int, int, int]) -> Tensor:
        first, last, start = chunk
        sizes = list(lengths[first:last])
        rows = x[start : start + sum(sizes)]
        h = layer.attention_norm(rows) if network.prenorm else rows
        found = [y.to(_mixed_in(precision)) for y in kernels.project(h, inputs, precision)]
        q, k, v = found if len(found) == 3 else found[0].chunk(3, 1)
        wanted = sizes
        if places is not None:
            offsets = [sum(sizes[:i]) for i in range(len(sizes))]
            chosen = torch.cat([place + offset for place, offset in zip(places[first:last], offsets)])
            q, rows = q[chosen], rows[chosen]
            wanted = [len(place) for place in places[first:last]]
        rough = rough_lengths(precision)
        mixed = [_mix(*one, layer.heads, rough) for one in zip(q.split(wanted), k.split(sizes), v.split(sizes))]
        [update] = kernels.project(_cat(mixed), [out], precision)
        return update.add_(rows)

    share = _share(len(x), (*inputs, out), cores)
    x = _cat(_on_cores(attend, list(_chunks(lengths, share)), cores))
    return x if network.prenorm else layer.attention_norm(x)


def rough_lengths(precision: str) -> range:
    """Of sentences, for which attention is in bfloat16 and for others not."""
    wanted = precision in (INT8, BFLOAT16) and kernels.supported(BFLOAT16)
    return _ROUGHLY if wanted and _mixed_in(precision) == torch.float32 else range(0)


def _mix(q: Tensor, k: Tensor, v: Tensor, heads: int, rough: range = range(0)) -> Tensor:
    """Attention of q (R, heads * width) to k and v (T, heads * width) of one sentence; float32. In bfloat16 for T in
    `rough`."""
    by_head = [t.view(len(t), heads, -1).transpose(0, 1) for t in (q, k, v)]
    roughly = len(k) in rough
    if roughly:  # oneDNN would copy what is not side by side anyway, and slower
        by_head = [t.to(torch.bfloat16, memory_format=torch.contiguous_format) for t in by_head]
    q_AxRxD, k_AxTxD, v_AxTxD = by_head
    if roughly or (len(k) <= _SHORT and q.dtype == torch.float32):
        empty, scale = q_AxRxD.new_empty(()), q_AxRxD.shape[2] ** -0.5
        scores_AxRxT = torch.baddbmm(empty, q_AxRxD, k_AxTxD.mT, beta=0, alpha=scale)
        mixed_AxRxD = torch.softmax(scores_AxRxT, 2, out=scores_AxRxT) @ v_AxTxD
    else:
        mixed_AxRxD = F.scaled_dot_product_attention(q_AxRxD[None], k_AxTxD[None], v_AxTxD[None])[0]
    mixed_RxAxD = mixed_AxRxD.transpose(0, 1)
    return torch.empty(mixed_RxAxD.shape).copy_(mixed_RxAxD).view(len(q), -1)


def _mixed_in(precision: str) -> torch.dtype:
    """Of all attention: bfloat16 where the maps around it are no more precise and the CPU has AMX. Without that,
    PyTorch's attention in pieces in bfloat16 takes 1.1 to 1.2 times as long as in float32 (128 tokens, an EPYC with
    AVX512-BF16)."""
    amx = bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
    return torch.bfloat16 if precision in (INT8, BFLOAT16) and amx and kernels.supported(BFLOAT16) else torch.float32


def _feed_forward(network: Network, layer: Layer, x: Tensor, precision: str, cores: int) -> Tensor:
    """The feed-forward network with its residual connection, on rows (R, hidden)."""
    fc1, fc2 = _load([layer.fc1, layer.fc2], precision, len(x))

    def feed(rows: Tensor) -> Tensor:
        [inner] = kernels.project(layer.ffn_norm(rows) if network.prenorm else rows, [fc1], precision)
        [update] = kernels.project(torch.ops.aten.gelu_(inner), [fc2], precision, lowest=_GELU_LOWEST)
        return update.add_(rows)

    x = _cat(_on_cores(feed, list(x.split(_share(len(x), (fc1, fc2), cores))), cores))
    return x if network.prenorm else layer.ffn_norm(x)


def _load(maps: Sequence[Linear], precision: str, tokens: int) -> list[kernels.Loaded]:
    return [kernels.load(m, precision, many=tokens > _FEWEST) for m in maps]


def _share(tokens: int, maps: Sequence[kernels.Loaded], cores: int) -> int:
    """How many of `tokens` to compute at once: all, where weights are made anew for each product; else as many as keep
    their activations in the cache, and the same for all cores."""
    if cores == 1 or any(loaded.codes is None for loaded in maps):
        return tokens
    rounds = -(-tokens // (cores * _MOST))
    return -(-tokens // (cores * rounds))


def _cat(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts; of a single one not a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _on_cores(function: Callable[[Part], Tensor], parts: Sequence[Part], cores: int) -> list[Tensor]:
    """`function` of each part, in order. Cores take one after another: they meet once, and not after each operation."""
    if len(parts) < 2 or cores < 2:
        return [function(part) for part in parts]
    return on_all_cores(function, parts)


@contextlib.contextmanager
def _one_thread_here() -> Iterator[None]:
    """Torch on one thread where sentences are handed out to all cores: its other threads go on waiting, busily, for
    some time after each operation, on the cores that the sentences need."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _chunks(lengths: Sequence[int], share: int) -> Iterator[tuple[int, int, int]]:
    """Runs of sentences of at most `share` tokens (or one sentence): from, to, and the first one's first token."""
    first = start = size = 0
    for i, length in enumerate(lengths):
        if i > first and size + length > share:
            yield first, i, start
            first, start, size = i, start + size, 0
        size += length
    yield first, len(lengths), start


class _Parts:
    """Tensors by name to what stays in memory. The same objects become the same weights once; `found` has them all."""

    def __init__(self, tensors: Mapping[str, Stored]) -> None:
        self.tensors = tensors
        self.found: dict[tuple[Any, ...], Any] = {}

    def linear(self, name: str, columns: int) -> Linear:
        self._check_columns(f"{name}.weight", columns)
        rows, _ = self.shape(f"{name}.weight")
        weight = self._once("linear", linear_weight, f"{name}.weight")
        return Linear(weight, self.vector(f"{name}.bias", rows))

    def linears(self, names: Sequence[str], columns: int) -> tuple[Linear, ...]:
        """These maps, all of the same input, as one where their codes can stand in one matrix; else each of them."""
        for name in names:
            self._check_length(f"{name}.bias", self.shape(f"{name}.weight")[0])
        weight = self._once("joined", _joined, *(f"{name}.weight" for name in names))
        if weight is None:
            return tuple(self.linear(name, columns) for name in names)
        bias = self._once("vector", lambda *parts: torch.cat(list(map(_vector, parts))), *(f"{n}.bias" for n in names))
        return (Linear(weight, bias),)

    def table(self, name: str, columns: int) -> Any:
        self._check_columns(name, columns)
        return self._once("table", table, name)

    def norm(self, name: str, width: int) -> Norm | None:
        if f"{name}.weight" not in self.tensors:
            return None
        return Norm(self.vector(f"{name}.weight", width), self.vector(f"{name}.bias", width))

    def vector(self, name: str, length: int) -> Tensor:
        self._check_length(name, length)
        return self._once("vector", _vector, name)

    def _check_length(self, name: str, length: int) -> None:
        found = tuple(_shape(self._stored(name)))
        if found != (length,):
            raise UserError(f"{name} of shape {found} does not fit the others: it should have {length} numbers.")

    def _check_columns(self, name: str, columns: int) -> None:
        shape = self.shape(name)
        if shape[1] != columns:
            raise UserError(f"{name} of shape {shape} does not fit the others: it should have {columns} columns.")

    def shape(self, name: str) -> tuple[int, int]:
        """Raises UserError unless the tensor is a matrix."""
        shape = tuple(_shape(self._stored(name)))
        if len(shape) != 2 or 0 in shape:
            raise UserError(f"{name} of shape {shape} is not a matrix.")
        return shape

    def _once(self, kind: str, make: Callable[..., Any], *names: str) -> Any:
        stored = [self._stored(name) for name in names]
        key = (kind, *map(id, stored))
        if key not in self.found:
            self.found[key] = make(*stored)
        return self.found[key]

    def _stored(self, name: str) -> Stored:
        if name not in self.tensors:
            raise UserError(f"there is no {name} among the tensors, though the model's configuration asks for it.")
        return self.tensors[name]


def _vector(stored: Stored) -> Tensor:
    return dequantize(stored) if isinstance(stored, Quantized) else stored.detach().float().clone()


def _shape(stored: Stored) -> Sequence[int]:
    return stored.indices.shape if isinstance(stored, Quantized) else stored.shape


def _joined(*parts: Stored) -> Matrix | None:
    """The matrices (N, K) as one, where it can be multiplied by its codes."""
    joined = below_each_other(parts)
    weight = None if joined is None else linear_weight(joined)
    return weight if isinstance(weight, Dense) else None


def _head(parts: _Parts, name: str, hidden: int) -> Head:
    dense = parts.linear(f"{name}.dense", hidden)
    return Head(dense, parts.linear(f"{name}.out_proj", dense.weight.shape[0]))


def _layer(parts: _Parts, name: str, hidden: int, width: int) -> Layer:
    """hidden: numbers in a hidden state. width: of a head."""
    names = [f"{name}.self_attn.{part}_proj" for part in ("q", "k", "v", "out")]
    every = [parts.shape(f"{name}.weight") for name in names]
    inner = every[0][0]
    if inner % width or every != [(inner, hidden)] * 3 + [(hidden, inner)]:
        raise UserError(f"{name}.self_attn: its projections are not of whole heads of {width}, as the flags say.")
    norms = [parts.norm(f"{name}.{norm}", hidden) for norm in ("self_attn_layer_norm", "final_layer_norm")]
    if None in norms:
        raise UserError(f"{name} lacks a norm.")
    inputs = parts.linears(names[:3], hidden)
    out, fc1 = parts.linear(names[3], inner), parts.linear(f"{name}.fc1", hidden)
    fc2 = parts.linear(f"{name}.fc2", fc1.weight.shape[0])
    if fc2.weight.shape[0] != hidden:
        raise UserError(f"{name}.fc2.weight does not fit the others: it should have {hidden} rows.")
    return Layer(inner // width, inputs, out, norms[0], fc1, fc2, norms[1])  # type: ignore[arg-type]


def _word_head(parts: _Parts, hidden: int) -> WordHead | None:
    name = "encoder.lm_head"
    norm = parts.norm(f"{name}.layer_norm", hidden)
    if norm is None or f"{name}.weight" not in parts.tensors:
        return None
    dense, words = parts.linear(f"{name}.dense", hidden), parts.table(f"{name}.weight", hidden)
    return WordHead(dense, norm, words, parts.vector(f"{name}.bias", words.shape[0]))


def _size(model: Mapping[str, Any], name: str) -> int:
    value = model.get(name)
    if type(value) is not int or value < 1:
        raise UserError(f"the configuration has {name} {value!r}: give a file of a model that fairseq trained.")
    return value
