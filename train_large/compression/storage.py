"""The bytes that a model's parameters take at k bits each.

A tensor without zeros is k bits a weight. One with zeros (a pruned one) keeps its zeros exactly, outside the k-bit
grid, in the cheaper of two ways:

    mask        one bit per weight says whether it is kept, then k bits per weight kept
    positions   32 bits for the place of each zero, then k bits per weight kept

    weights      0.5  0   -0.25  0.5          k = 4
    mask          1   0     1     1           4 bits + 3 x 4 bits = 16 bits
    positions    [1]                          32 bits + 3 x 4 bits = 44 bits

Below 32 bits every range adds its minimum and its step, two float32. The paper's own count (section 4.1, figure 7) is
simpler, nonzero parameters times k bits; `StorageSummary.bytes_paper` is that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from train_large.compression.levels import FULL_BITS, check_bits
from train_large.compression.mapped import forget
from train_large.errors import UserError

RANGE_BYTES = 8  # minimum and step, both float32
POSITION_BITS = 32

# The last part of the name of what PyTorch and fairseq modules keep in a state dict although it is not trained
# (`register_buffer`): quantizing fairseq's format version 3 would make the model unreadable.
BUFFERS = frozenset(
    ["version", "_float_tensor", "weights", "inv_freq", "weight_u", "weight_v"]
    + ["running_mean", "running_var", "num_batches_tracked"]
)
# Fewer equal values than this may be chance (a two-class head's bias in fp16), as many are the same weights twice.
TIED_FROM = 16


@dataclass(frozen=True)
class TensorStorage:
    """One stored tensor: `layout` is dense, mask or positions (see the module), `bytes` with its ranges."""

    name: str
    shape: tuple[int, ...]
    parameters: int
    nonzero: int
    layout: str
    bytes: int


@dataclass(frozen=True)
class StorageSummary:
    """A whole model: counts and bytes, tied tensors once; `bytes_paper` is nonzero parameters times bits / 8."""

    parameters: int
    nonzero: int
    bytes: int
    bytes_paper: int
    tensors: tuple[TensorStorage, ...] = ()


def is_parameter(name: str, tensor: Tensor) -> bool:
    """Whether a state dict's entry is a trained weight: of floating point, and not a buffer by its name."""
    return tensor.is_floating_point() and not is_buffer(name)


def is_buffer(name: str) -> bool:
    """Whether a state dict's entry is by its name what a module keeps beside its weights."""
    return name.rpartition(".")[2] in BUFFERS


def tied_to(state: Mapping[str, Tensor]) -> dict[str, str]:
    """For every parameter of a state dict the name of the first one that holds the same weights (mostly: itself).

    Tensors are the same when they share their memory, as fairseq's embedding and LM head do in a checkpoint written on
    a CPU, or when they are equal and not constant: fairseq copies each entry by itself from a GPU and from half
    precision (`move_to_cpu`, fairseq/utils.py, 0.12.3.1), and so loses the sharing.
    """
    first: dict[str, str] = {}
    by_memory: dict[tuple, str] = {}
    by_content: dict[tuple, list[str]] = {}
    for name, tensor in state.items():
        if not is_parameter(name, tensor):
            continue
        first[name] = name
        if tensor.numel() == 0:
            continue
        kind = (tensor.dtype, tuple(tensor.shape))
        memory = (*kind, tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.stride())
        if memory in by_memory:
            first[name] = by_memory[memory]
            continue
        if tensor.numel() >= TIED_FROM:
            low, high = (bound.item() for bound in tensor.detach().aminmax())
            forget(tensor)
            alike = by_content.setdefault((*kind, low, high), [])
            twin = next((other for other in alike if low < high and torch.equal(state[other], tensor)), name)
            first[name] = twin
            if twin == name:
                alike.append(name)
        by_memory[memory] = first[name]
    return first


def block_size(shape: tuple[int, ...], granularity: str) -> int:
    """How many consecutive weights of a tensor of `shape` share one range: all (`tensor`), a `row`, or N (`group:N`).

    A row is all that one index of the first dimension holds; a vector is one row. A tensor's last group may be shorter.
    Raises UserError for any other granularity.
    """
    if granularity == "tensor":
        return max(1, prod(shape))
    if granularity == "row":
        return max(1, prod(shape[1:] if len(shape) > 1 else shape))
    group = re.fullmatch(r"group:([1-9][0-9]*)", granularity)
    if group is None:
        raise UserError(
            f"--granularity {granularity}: give tensor, row, or group:N with N weights a group, as in group:128."
        )
    return max(1, min(int(group[1]), prod(shape)))


def storage(model_state: Mapping[str, Tensor], bits: int, granularity: str = "tensor") -> StorageSummary:
    """The bytes of all parameters of a state dict at `bits` bits each, tied tensors once, buffers not at all."""
    check_bits(bits)
    tensors = tuple(
        tensor_storage(name, model_state[name], bits, granularity)
        for name, first in tied_to(model_state).items()
        if name == first
    )
    nonzero = sum(tensor.nonzero for tensor in tensors)
    return StorageSummary(
        parameters=sum(tensor.parameters for tensor in tensors),
        nonzero=nonzero,
        bytes=sum(tensor.bytes for tensor in tensors),
        bytes_paper=_to_bytes(nonzero * bits),
        tensors=tensors,
    )


def tensor_storage(name: str, tensor: Tensor, bits: int, granularity: str = "tensor") -> TensorStorage:
    """The bytes of one tensor in its cheapest layout."""
    parameters = tensor.numel()
    nonzero = int(torch.count_nonzero(tensor))
    forget(tensor)
    costs = {
        "mask": parameters + bits * nonzero,
        "positions": POSITION_BITS * (parameters - nonzero) + bits * nonzero,
    }
    if nonzero == parameters or bits == FULL_BITS:  # zero is not on a grid of k bits, but it is a float32
        costs["dense"] = bits * parameters
    layout = min(costs, key=lambda name: (costs[name], name))
    ranges = 0 if bits == FULL_BITS else -(-parameters // block_size(tuple(tensor.shape), granularity))
    return TensorStorage(
        name, tuple(tensor.shape), parameters, nonzero, layout, _to_bytes(costs[layout]) + RANGE_BYTES * ranges
    )


def _to_bytes(bits: int) -> int:
    return -(-bits // 8)
