"""Dropout for a CPU: the rates of PyTorch's, at a fraction of its time, on the bits of numbers.

PyTorch draws one number of its Mersenne Twister for each element, on one thread. Here one draw of SFC64 is for four,
and what follows is done by integer instructions on the numbers as they lie in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

STEPS = 1 << 15  # a rate is rounded to a multiple of 1 / STEPS
INTEGERS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


def dropped(shape: Sequence[int], rate: float) -> Tensor:
    """int16 of `shape`, below zero with probability `rate`, independently. Follows the seed of PyTorch."""
    number = int(np.prod(shape))
    seed = int(torch.randint(1 << 62, ()))
    drawn = np.random.SFC64(seed).random_raw((number + 3) // 4)
    bits = torch.from_numpy(drawn.view(np.int16))[:number].view(*shape)
    return bits.bitwise_and_(STEPS - 1).sub_(round(rate * STEPS))


def keep_mask(shape: Sequence[int], rate: float) -> Tensor:
    """int16 of `shape`: no bit set where `dropped`, with probability `rate`, else all of them."""
    return dropped(shape, rate).clamp_(-1, 0).bitwise_not_()


def keep_(x: Tensor, mask: Tensor) -> Tensor:
    """`x` with zeros where `mask`, of `keep_mask`, has no bits; in place."""
    integers = INTEGERS[x.dtype]
    x.view(integers).bitwise_and_(mask.to(integers))
    return x


def mark_(x: Tensor, rate: float) -> Tensor:
    """`x`, which has no negative numbers, with those that are dropped made negative; in place.

    So one tensor tells both what was there (`abs`) and what is left of it (`clamp(min=0)`).
    """
    integers = INTEGERS[x.dtype]
    signs = dropped(x.shape, rate).bitwise_and_(-STEPS).to(integers)
    if integers == torch.int32:
        signs.bitwise_left_shift_(16)
    x.view(integers).bitwise_or_(signs)
    return x


def marked_mask(marked: Tensor) -> Tensor:
    """Of what `mark_` has left: all bits set where it is kept, none where it is dropped, in integers of its width."""
    return marked.view(INTEGERS[marked.dtype]).clamp(-1, 0).bitwise_not_()


class Dropout(torch.autograd.Function):
    """`rate` of the elements of x become 0, the others are divided by what is left."""

    @staticmethod
    def forward(ctx, x: Tensor, rate: float) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.rate = rate
        ctx.mask = keep_mask(x.shape, rate)
        return keep_(x.detach() / (1 - rate), ctx.mask)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        return keep_(grad / (1 - ctx.rate), ctx.mask), None


def dropout(x: Tensor, rate: float) -> Tensor:
    return Dropout.apply(x, rate) if rate else x
