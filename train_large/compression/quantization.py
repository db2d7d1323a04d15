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

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from train_large.compression.checkpoint import read_checkpoint, stock_form, write_checkpoint
from train_large.compression.storage import (
    FULL_BITS,
    GRID_BITS,
    StorageSummary,
    block_size,
    check_bits,
    is_parameter,
    storage,
    tied_to,
)
from train_large.errors import UserError

RECORD_VERSION = 1


@dataclass(frozen=True)
class Quantized:
    """A tensor as indices into G uniform grids.

    indices: uint8, of the tensor's shape, 0 where the weight is zero.
    minimum, step: float32 of shape (G,), one per range, in the order of the weights (see `block_size`).
    mask: bool, of the tensor's shape, False where the weight is exactly zero; None if none is.
    """

    indices: Tensor
    minimum: Tensor
    step: Tensor
    mask: Tensor | None
    granularity: str


def parse_bits(text: str) -> int:
    """`--bits` as typed, to a number of bits. Raises UserError for what is not 2 to 8, or 32."""
    bits = int(text) if re.fullmatch(r"[0-9]{1,4}", text) else text
    check_bits(bits)  # type: ignore[arg-type]
    return int(bits)


def quantize_tensor(w: Tensor, bits: int, granularity: str = "tensor") -> Quantized:
    """Section 4.2's indices for `w`, any shape and floating type, at 2 to 8 bits (32 bits are the weights themselves).

    A constant range has step 0 and stays as it is. Raises ValueError for other bits, UserError for weights that are not
    finite or span more than float32.
    """
    if bits not in GRID_BITS:
        raise ValueError(f"a grid has {GRID_BITS[0]} to {GRID_BITS[-1]} bits, not {bits}")
    w = w.detach().to(torch.float32)
    w_GxN = _in_blocks(w, block_size(tuple(w.shape), granularity))
    zero_GxN = w_GxN == 0  # also what fills up the last group
    if zero_GxN.any():
        low_Gx1 = w_GxN.masked_fill(zero_GxN, torch.inf).amin(dim=1, keepdim=True)
        high_Gx1 = w_GxN.masked_fill(zero_GxN, -torch.inf).amax(dim=1, keepdim=True)
        all_zero_Gx1 = zero_GxN.all(dim=1, keepdim=True)
        low_Gx1, high_Gx1 = low_Gx1.masked_fill(all_zero_Gx1, 0), high_Gx1.masked_fill(all_zero_Gx1, 0)
    else:
        low_Gx1, high_Gx1 = w_GxN.aminmax(dim=1, keepdim=True)
    last = 2**bits - 1
    # A tensor and not the number: on a GPU, PyTorch multiplies by a number's reciprocal instead of dividing.
    step_Gx1 = (high_Gx1 - low_Gx1) / torch.tensor(float(last), device=w.device)
    if not step_Gx1.isfinite().all():
        raise UserError("weights that are not finite, or that span more than float32 can hold, cannot be quantized.")
    divisor_Gx1 = step_Gx1.masked_fill(step_Gx1 == 0, 1)
    position_GxN = (w_GxN - low_Gx1).div_(divisor_Gx1).round_()
    # Steps near the smallest float32 are themselves rounded and may carry an index past the last; zeros lie anywhere.
    indices_GxN = position_GxN.clamp_(0, last).masked_fill_(zero_GxN, 0).to(torch.uint8)
    mask = _in_shape(~zero_GxN, w.shape)
    return Quantized(
        indices=_in_shape(indices_GxN, w.shape),
        minimum=low_Gx1.flatten(),
        step=step_Gx1.flatten(),
        mask=None if bool(mask.all()) else mask,
        granularity=granularity,
    )


def dequantize(q: Quantized) -> Tensor:
    """The float32 weights that `q` stands for, in its shape; what was zero is zero."""
    shape = q.indices.shape
    index_GxN = _in_blocks(q.indices.to(torch.float32), block_size(tuple(shape), q.granularity))
    # Two roundings, as written: a fused multiply-add would have one.
    w = _in_shape(index_GxN.mul_(q.step[:, None]).add_(q.minimum[:, None]), shape)
    return w if q.mask is None else w.masked_fill_(~q.mask, 0)


def quantize_state(model_state: Mapping[str, Tensor], bits: int, granularity: str = "tensor") -> dict[str, Tensor]:
    """A model's state dict with every parameter on its grid, in new float32 tensors; 32 bits change no value.

    Embeddings, biases and norms too; buffers are copied. Tied parameters share their memory in the result, so that
    `torch.save` stores them once. Raises UserError as `quantize_tensor` does, and names the parameter.
    """
    check_bits(bits)
    first = tied_to(model_state)
    result: dict[str, Tensor] = {}
    for name, tensor in model_state.items():
        if not is_parameter(name, tensor):
            result[name] = tensor.detach().clone()
        elif first[name] != name:
            result[name] = result[first[name]]
        elif bits == FULL_BITS:
            result[name] = tensor.detach().to(torch.float32, copy=True).contiguous()
        else:
            try:
                result[name] = dequantize(quantize_tensor(tensor, bits, granularity))
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
    return result


def quantize_checkpoint(source: Path, target: Path, bits: int, granularity: str = "tensor") -> StorageSummary:
    """Write the checkpoint `source`, quantized, to `target` (it may be the same) in the form that stock fairseq loads.

    The weights are written as the float32 values of their grid points: the model computes what it would at `bits`
    bits, and the summary says what that takes, but the file itself is not that small. The list `compression` in the
    file has a record of every conversion.

    Raises UserError for a bad checkpoint, bits or granularity, and when `target` cannot be written.
    """
    check_bits(bits)
    block_size((1,), granularity)  # refuse a bad one before reading gigabytes
    checkpoint = read_checkpoint(source)
    summary = storage(checkpoint["model"], bits, granularity)
    result = stock_form(checkpoint)
    try:
        result["model"] = quantize_state(checkpoint["model"], bits, granularity)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    result["compression"] = [
        *result.get("compression", []),
        {
            "version": RECORD_VERSION,
            "method": "uniform",
            "bits": bits,
            "granularity": granularity,
            "parameters": summary.parameters,
            "nonzero": summary.nonzero,
            "bytes": summary.bytes,
            "bytes_paper": summary.bytes_paper,
        },
    ]
    write_checkpoint(result, target)
    return summary


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
