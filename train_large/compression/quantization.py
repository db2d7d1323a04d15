"""Uniform quantization, section 4.2 of the paper, with pruned weights left alone.

    Delta = (max - min) / (2^k - 1)        index = round((w - min) / Delta)        w' = Delta * index + min

all in float32 and in this order of operations, round half to even. The grid spans exactly the weights it is for, so the
paper's Clamp changes none of them.

The trap is zero, which is not a point of that grid:

    weights             0.9   0    -0.6   0    0.3       k = 2, grid over all five: -0.6  -0.1  0.4  0.9
    formula alone       0.9  -0.1  -0.6  -0.1  0.4       every pruned weight has become -0.1
    here                0.9   0    -0.6   0    0.4       zeros are kept by a mask; the grid spans the rest
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Union

import torch
from torch import Tensor

from train_large.compression.clipping import clipped_range
from train_large.compression.levels import FULL_BITS, GRID_BITS, check_bits
from train_large.compression.mapped import forget
from train_large.compression.parallel import on_all_cores
from train_large.compression.storage import block_size, is_parameter, tied_to
from train_large.errors import UserError

MAX_BITS = 15  # of an index: more than the paper's 8 only where steps are chosen by rate and distortion
PIECE = 1 << 18


@dataclass(frozen=True)
class Quantized:
    """A tensor as indices into G uniform grids.

    indices: of the tensor's shape, 0 where the weight is zero; uint8, or int16 where `bits` is more than 8.
    minimum, step: float32 of shape (G,), one per range, in the order of the weights (see `block_size`).
    mask: bool, of the tensor's shape, False where the weight is exactly zero; None if none is.
    trellis: whether the indices of the weights that are not zero are as a trellis allows (trellis.py).
    """

    indices: Tensor
    minimum: Tensor
    step: Tensor
    mask: Tensor | None
    granularity: str
    bits: int
    trellis: bool = False

    @property
    def coded_bits(self) -> int:
        """Of an index as a packed file codes it: a trellis makes the lowest."""
        return self.bits - self.trellis


# What to make of the parameter of that name: at 32 bits a tensor, the weights as they are.
Quantizer = Callable[[str, Tensor], Union[Quantized, Tensor]]


def quantize_tensor(w: Tensor, bits: int, granularity: str = "tensor", clip: bool = False) -> Quantized:
    """Section 4.2's indices for `w`, any shape and floating type, at 2 to 8 bits (32 bits are the weights themselves).

    The range is [min, max] of the weights that are not zero; with `clip` the one inside it that has the smallest mean
    squared error (clipping.py), and weights outside are clamped to it. A constant range has step 0 and stays as it is.
    Raises ValueError for other bits, UserError for weights that are not finite or span more than float32.
    """
    if bits not in GRID_BITS:
        raise ValueError(f"a grid has {GRID_BITS[0]} to {GRID_BITS[-1]} bits, not {bits}")
    if w.dtype == torch.float64:
        w = w.float()  # first of all: what is zero in float32, which indices are made in, is zero
    w_GxN = _in_blocks(w.detach(), block_size(tuple(w.shape), granularity))
    has_zeros = int(torch.count_nonzero(w)) < w.numel()
    if clip:
        padded = has_zeros or w_GxN.numel() > w.numel()  # with zeros, which are no weights either
        low_Gx1, high_Gx1 = clipped_range(w_GxN, w_GxN == 0 if padded else None, bits)
    else:
        low_Gx1, high_Gx1 = _range(w_GxN)
    last = 2**bits - 1
    # A tensor and not the number: on a GPU, PyTorch multiplies by a number's reciprocal instead of dividing.
    step_Gx1 = (high_Gx1 - low_Gx1) / torch.tensor(float(last), device=w.device)
    if not step_Gx1.isfinite().all():
        raise UserError("weights that are not finite, or that span more than float32 can hold, cannot be quantized.")
    divisor_Gx1 = step_Gx1.masked_fill(step_Gx1 == 0, 1)
    indices_GxN = torch.empty(w_GxN.shape, dtype=torch.uint8, device=w.device)

    def index(piece: tuple[slice, slice]) -> None:
        rows, _ = piece
        part = w_GxN[piece].float()
        position = (part - low_Gx1[rows]).div_(divisor_Gx1[rows]).round_()
        # Steps near the smallest float32 are themselves rounded and may carry an index past the last.
        position.clamp_(0, last)
        indices_GxN[piece] = position.masked_fill_(part == 0, 0) if has_zeros else position

    on_all_cores(index, _pieces(w_GxN))
    return Quantized(
        indices=_in_shape(indices_GxN, w.shape),
        minimum=low_Gx1.flatten(),
        step=step_Gx1.flatten(),
        mask=w.detach() != 0 if has_zeros else None,
        granularity=granularity,
        bits=bits,
    )


def dequantize(q: Quantized) -> Tensor:
    """The float32 weights that `q` stands for, in its shape; what was zero is zero."""
    shape = q.indices.shape
    index_GxN = _in_blocks(q.indices, block_size(tuple(shape), q.granularity))
    w_GxN = torch.empty(index_GxN.shape, dtype=torch.float32, device=q.indices.device)

    def value(piece: tuple[slice, slice]) -> None:
        rows, _ = piece
        # Two roundings, as written: a fused multiply-add would have one.
        w_GxN[piece].copy_(index_GxN[piece]).mul_(q.step[rows, None]).add_(q.minimum[rows, None])

    on_all_cores(value, _pieces(index_GxN))
    w = _in_shape(w_GxN, shape)
    return w if q.mask is None else w.masked_fill_(~q.mask, 0)


def uniform(bits: int, granularity: str = "tensor", clip: bool = False) -> Quantizer:
    """The quantizer of section 4.2; at 32 bits it leaves every weight as it is, in float32."""
    check_bits(bits)
    block_size((1,), granularity)  # refuse a bad one before reading gigabytes

    def quantizer(name: str, w: Tensor) -> Quantized | Tensor:
        if bits == FULL_BITS:
            return w.detach().to(torch.float32, copy=True).contiguous()
        return quantize_tensor(w, bits, granularity, clip)

    return quantizer


def quantized(
    model_state: Mapping[str, Tensor], quantizer: Quantizer
) -> Iterator[tuple[str, Quantized | Tensor | str]]:
    """Every entry of a state dict with what `quantizer` makes of it, one at a time.

    Embeddings, biases and norms too; a buffer comes as a copy, a parameter that is tied to an earlier one as that one's
    name. Raises UserError as the quantizer does, and names the parameter.
    """
    first = tied_to(model_state)
    for name, tensor in model_state.items():
        if not is_parameter(name, tensor):
            yield name, tensor.detach().clone()
        elif first[name] != name:
            yield name, first[name]
        else:
            try:
                yield name, quantizer(name, tensor)
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
            forget(tensor)


def dequantized(tensors: Iterable[tuple[str, Quantized | Tensor | str]]) -> dict[str, Tensor]:
    """The state dict that quantized entries stand for: float32 values of their grid points, and what is no parameter.

    Tied parameters share their memory, so that `torch.save` stores them once.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if isinstance(tensor, str):
            result[name] = result[tensor]
        else:
            result[name] = dequantize(tensor) if isinstance(tensor, Quantized) else tensor
    return result


def quantize_state(model_state: Mapping[str, Tensor], bits: int, granularity: str = "tensor") -> dict[str, Tensor]:
    """A model's state dict with every parameter on its grid, in new float32 tensors; 32 bits change no value."""
    return dequantized(quantized(model_state, uniform(bits, granularity)))


def _range(w_GxN: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest weight of each block that are not zero, float32 (G, 1); 0 where all are zero."""
    # Two passes take a sixth of the time of `aminmax` with a dimension (torch 2.13.0, CPU).
    low_Gx1, high_Gx1 = w_GxN.amin(1, keepdim=True).float(), w_GxN.amax(1, keepdim=True).float()
    if not bool(((low_Gx1 == 0) | (high_Gx1 == 0)).any()):
        return low_Gx1, high_Gx1  # zeros are then between the others, or there are none
    low_Gx1 = torch.full((len(w_GxN), 1), torch.inf, device=w_GxN.device)
    high_Gx1 = -low_Gx1
    for rows, columns in _pieces(w_GxN):
        part = w_GxN[rows, columns].float()
        zero = part == 0  # also what fills up the last group
        low = part.masked_fill(zero, torch.inf).amin(dim=1, keepdim=True)
        high = part.masked_fill(zero, -torch.inf).amax(dim=1, keepdim=True)
        low_Gx1[rows] = torch.minimum(low_Gx1[rows], low)
        high_Gx1[rows] = torch.maximum(high_Gx1[rows], high)
    all_zero_Gx1 = low_Gx1 > high_Gx1
    return low_Gx1.masked_fill(all_zero_Gx1, 0), high_Gx1.masked_fill(all_zero_Gx1, 0)


def _pieces(w_GxN: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of pieces of about 2^18 weights: what is made on the way stays in the processor's cache."""
    blocks, size = w_GxN.shape
    columns = min(size, PIECE)
    rows = max(1, PIECE // columns)
    for row in range(0, blocks, rows):
        for column in range(0, size, columns):
            yield slice(row, row + rows), slice(column, column + columns)


def _in_blocks(w: Tensor, size: int) -> Tensor:
    """`w` as (G, size), row after row; zeros fill up the last block."""
    flat = w.reshape(-1)
    missing = -flat.numel() % size
    if missing:
        flat = torch.nn.functional.pad(flat, (0, missing))
    return flat.view(-1, size)


def _in_shape(w_GxN: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_in_blocks`."""
    return w_GxN.reshape(-1)[: shape.numel()].view(shape)
