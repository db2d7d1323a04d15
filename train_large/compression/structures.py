"""Structured pruning (footnote 6 of the paper): whole attention heads, and whole rows of feed-forward networks.

A structure is everything that can be cut out of a Transformer at one place without changing the shape of the rest:

    head      its rows of q_proj, k_proj and v_proj, biases included, and its columns of out_proj
    FFN row   a row of fc1 with its bias, and the column of fc2 that it feeds

    q_proj, k_proj, v_proj      out_proj                fc1                fc2
    +---------------+           +---+---+---+---+       +-----------+      +-+-+-+-+-+-+
    |    head 0     |           |   |   |   |   |       |   row 0   |      | | | | | | |
    +---------------+           | 0 | 1 | 2 | 3 |       +-----------+      |0|1|2|3|4|5|
    |    head 1     |           |   |   |   |   |       |   row 1   |      | | | | | | |
    +---------------+           +---+---+---+---+       +-----------+      +-+-+-+-+-+-+

A block is one attention or one feed-forward network: structures of one size side by side. Biases of out_proj and fc2
belong to no structure. Each block keeps at least one, so that a layer stays a layer, with the same modules.

The magnitude of a structure is the root mean square of its weights: the change that pruning it makes to the model, per
weight that it saves. So a head of 100,000 weights and an FFN row of 1,000 compare, and what is zero comes first.

Sparsity is the share of the weights in structures (of the kind that is pruned) that are in pruned ones; embeddings,
norms and the other biases do not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from train_large.compression.pruning import SCOPES
from train_large.errors import UserError

KINDS = ("heads", "ffn")
STRUCTURES = ("weights", *KINDS, "heads+ffn")  # what can be pruned; "weights" is train_large.compression.pruning


@dataclass(frozen=True)
class Block:
    """One attention (kind "heads") or feed-forward network ("ffn") of `count` structures, by its module's name.

    `rows` are the tensors that structures divide along the first dimension, `columns` along the last, by their names.
    """

    name: str
    kind: str
    count: int
    rows: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]

    @property
    def size(self) -> int:
        """Weights of one structure, biases included."""
        return sum(tensor.numel() for tensor in (*self.rows.values(), *self.columns.values())) // self.count


def blocks(weights: Mapping[str, Tensor], heads: Mapping[str, int], kinds: str = "heads+ffn") -> list[Block]:
    """The blocks of a model, out of its named parameters (shared layers once) or its state dict (under every name).

    heads: the number of heads by the name of each attention; others are left alone. kinds: "heads", "ffn" or both with
    a plus. Names are fairseq's. Raises UserError, which names the tensor, when one does not divide into its heads.
    """
    found = []
    for name in weights:
        if "heads" in kinds.split("+") and name.endswith(".q_proj.weight"):
            module = name.removesuffix(".q_proj.weight")
            if module in heads:
                projections = [f"{module}.{part}_proj" for part in "qkv"]
                found.append(_block(weights, module, "heads", heads[module], projections, f"{module}.out_proj"))
        if "ffn" in kinds.split("+") and name.endswith(".fc1.weight"):
            module = name.removesuffix(".fc1.weight")
            rows = weights[name].shape[0]
            found.append(_block(weights, module, "ffn", rows, [f"{module}.fc1"], f"{module}.fc2"))
    return found


def magnitudes(block: Block) -> Tensor:
    """The root mean square of each structure's weights: (count,), double precision, on the CPU; 0 only if all are 0."""
    squares = torch.zeros(block.count, dtype=torch.float64)
    # In double precision the square of the smallest single-precision number is not zero.
    for tensor in block.rows.values():
        squares += tensor.detach().cpu().double().square_().reshape(block.count, -1).sum(1)
    for tensor in block.columns.values():
        squares += tensor.detach().cpu().double().square_().reshape(-1, block.count, _width(block, tensor)).sum((0, 2))
    return (squares / block.size).sqrt_()


def smallest_structures(blocks: Iterable[Block], sparsity: float, scope: str = "global") -> dict[str, Tensor]:
    """Masks by block, (count,), True at the structures to prune, which have at most round(sparsity * N) weights.

    N counts the structures' weights in all of `blocks`, or, in scope "layer", in each by itself. Structures go in the
    order of their magnitude, each that still fits and is not the last of its block; of equal magnitudes those that
    come first. So none that may go would still fit at the end. Zeros are the smallest there is: pruning again to the
    same sparsity keeps what is pruned and adds nothing, whatever has become of the others. A NaN counts as the largest.
    Raises ValueError for another scope and a sparsity outside [0, 1].
    """
    if scope not in SCOPES:
        raise ValueError(f"the scope of pruning is one of {', '.join(SCOPES)}, not {scope!r}")
    if not 0 <= sparsity <= 1:
        raise ValueError(f"a sparsity lies between 0 and 1, not at {sparsity}")
    together = list(blocks)
    chosen: dict[str, Tensor] = {}
    for group in [together] if scope == "global" else [[block] for block in together]:
        chosen |= _smallest(group, sparsity)
    return chosen


def spread(blocks: Iterable[Block], chosen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks of structures as masks of their weights, by the weights' names, in the weights' shapes and devices."""
    masks = {}
    for block in blocks:
        for name, tensor in block.rows.items():
            rows = chosen[block.name].repeat_interleave(_height(block, tensor)).to(tensor.device)
            masks[name] = rows.view(-1, *[1] * (tensor.dim() - 1)).expand_as(tensor)
        for name, tensor in block.columns.items():
            columns = chosen[block.name].repeat_interleave(_width(block, tensor)).to(tensor.device)
            masks[name] = columns.expand_as(tensor)
    return masks


def structured_sparsity_of(blocks: Iterable[Block]) -> tuple[int, int]:
    """How many weights are in structures that are wholly zero, and how many in all structures."""
    zeros = total = 0
    for block in blocks:
        zeros += block.size * int((magnitudes(block) == 0).sum())
        total += block.size * block.count
    return zeros, total


def highest_sparsity(blocks: Iterable[Block]) -> float:
    """The share of the structures' weights that goes when each block keeps one structure."""
    sizes = [(block.size, block.count) for block in blocks]
    total = sum(size * count for size, count in sizes)
    return sum(size * (count - 1) for size, count in sizes) / total if total else 0.0


def parse_per_layer(text: str, flag: str, layers: int) -> tuple[int, ...]:
    """A size for each layer, as "4,2,3". Raises UserError, which names the flag, for anything else."""
    words = text.split(",")
    if len(words) != layers or not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"{flag} {text}: give {layers} numbers of at least 1 with commas between, one for each layer.")
    return tuple(int(word) for word in words)


def _block(
    weights: Mapping[str, Tensor], name: str, kind: str, count: int, inputs: Iterable[str], output: str
) -> Block:
    """A block out of the names of its linear maps: those whose rows its structures divide, and the one after them."""
    try:
        matrices = {f"{module}.weight": weights[f"{module}.weight"] for module in (*inputs, output)}
    except KeyError as missing:
        raise UserError(f"{name} has no {missing.args[0]}: the checkpoint is not one of this model.") from None
    columns = {f"{output}.weight": matrices.pop(f"{output}.weight")}
    rows: dict[str, Tensor] = {}
    for matrix in matrices:
        bias = matrix.removesuffix("weight") + "bias"
        rows |= {matrix: weights[matrix]} | ({bias: weights[bias]} if bias in weights else {})
    lengths = {tensor: rows[tensor].shape[0] for tensor in rows} | {t: columns[t].shape[-1] for t in columns}
    length = next(iter(lengths.values()))
    for tensor, found in lengths.items():
        if found != length or found % count:
            what = "heads" if kind == "heads" else "FFN rows"
            raise UserError(f"{tensor} of shape {tuple(weights[tensor].shape)} does not divide into {count} {what}.")
    return Block(name, kind, count, rows, columns)


def _height(block: Block, tensor: Tensor) -> int:
    """Rows of one structure in `tensor`."""
    return tensor.shape[0] // block.count


def _width(block: Block, tensor: Tensor) -> int:
    """Columns of one structure in `tensor`."""
    return tensor.shape[-1] // block.count


def _smallest(blocks: list[Block], sparsity: float) -> dict[str, Tensor]:
    """`smallest_structures` over all of `blocks` together."""
    chosen = {block.name: torch.zeros(block.count, dtype=torch.bool) for block in blocks}
    if not blocks:
        return chosen
    room = round(sparsity * sum(block.size * block.count for block in blocks))
    left = [block.count for block in blocks]
    owners = torch.cat([torch.full((block.count,), i) for i, block in enumerate(blocks)]).tolist()
    indices = torch.cat([torch.arange(block.count) for block in blocks]).tolist()
    scores = torch.cat([magnitudes(block) for block in blocks]).nan_to_num_(nan=torch.inf)
    for place in scores.argsort(stable=True).tolist():
        owner = owners[place]
        block = blocks[owner]
        if block.size <= room and left[owner] > 1:
            chosen[block.name][indices[place]] = True
            room -= block.size
            left[owner] -= 1
    return chosen
