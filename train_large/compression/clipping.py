"""Ranges for the paper's grid that leave out a few large weights: the least squared error in place of min and max.

Section 4.2 spans the grid from the smallest to the largest weight and clamps the weights to it, so that one large
weight makes every step wide. A narrower range clamps that weight, which costs an error, and makes the others' smaller:

    weights                  -0.5  -0.4  -0.3  -0.1   0.1   0.2   0.3   0.4   1.4      k = 2 (four points)
    min-max    -0.5 .. 1.4   -0.5  -0.5  -0.5   0.13  0.13  0.13  0.13  0.13  1.4      squared error 0.21
    clipped   -0.32 .. 1.4   -0.32 -0.32 -0.32 -0.32  0.25  0.25  0.25  0.25  1.4                    0.14

The search shrinks both ends towards the mean together, then moves each end by itself. The error has several local
minima and the search finds one of them, never a range that is worse than min-max.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import sqrt

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 17  # weights at a time: bounds the temporaries
_LONG = 1 << 16  # weights of a range from which on a histogram is the faster way
_BINS = 1 << 17

_SHRINK = 0.85  # from one width of the first search to the next
_PATIENCE = 5  # widths without any improvement that end it
_REFINE = (0.7, 0.93, 0.98)  # factors by which each end is then moved, in and out
_MOVES_LONG, _MOVES_SHORT = 10, 1  # how often at most, for as long as it helps


def clipped_range(w_GxN: Tensor, zero_GxN: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """The lowest and highest grid point (float32, Gx1) of each of G ranges for the least squared error at `bits` bits.

    Both lie within the weights' own minimum and maximum. Where `zero_GxN` (bool) is True the weight does not count; a
    range without any weight is 0 to 0. The squared error, sum((w - w')^2) for the w' of section 4.2, is at most that of
    the range from minimum to maximum. Weights that are not finite give ranges that are not finite.
    """
    w_GxN = w_GxN.detach()
    low_Gx1, high_Gx1 = (torch.empty(len(w_GxN), 1, dtype=torch.float32) for _ in range(2))
    if w_GxN.shape[1] >= _LONG:
        for g in range(len(w_GxN)):
            zero = None if zero_GxN is None else zero_GxN[g]
            low_Gx1[g], high_Gx1[g] = _of_long(w_GxN[g], zero, bits)
    else:
        rows = max(1, _CHUNK // max(1, w_GxN.shape[1]))
        for start in range(0, len(w_GxN), rows):
            part = slice(start, start + rows)
            zero_RxN = None if zero_GxN is None else zero_GxN[part].cpu()
            low_Gx1[part], high_Gx1[part] = _of_short(w_GxN[part].cpu().float(), zero_RxN, bits)
    return low_Gx1.to(w_GxN.device), high_Gx1.to(w_GxN.device)


def squared_error(w_GxN: Tensor, zero_GxN: Tensor | None, low_Gx1: Tensor, high_Gx1: Tensor, bits: int) -> Tensor:
    """The squared error (float64, Gx1) of section 4.2's formula in float32 with the ranges given."""
    last = 2**bits - 1
    step_Gx1 = (high_Gx1 - low_Gx1) / last
    clamped_GxN = torch.minimum(torch.maximum(w_GxN, low_Gx1), high_Gx1)
    index_GxN = clamped_GxN.sub_(low_Gx1).div_(step_Gx1.masked_fill(step_Gx1 == 0, 1)).round_().clamp_(0, last)
    error_GxN = index_GxN.mul_(step_Gx1).add_(low_Gx1).sub_(w_GxN)
    if zero_GxN is not None:
        error_GxN.masked_fill_(zero_GxN, 0)
    return error_GxN.square_().sum(dim=1, keepdim=True, dtype=torch.float64)


def _of_short(w_RxN: Tensor, zero_RxN: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """`clipped_range` of ranges with few weights each, all at once."""
    if w_RxN.shape[1] == 0:
        return torch.zeros(len(w_RxN), 1), torch.zeros(len(w_RxN), 1)
    if zero_RxN is None:
        low_Rx1, high_Rx1 = w_RxN.aminmax(dim=1, keepdim=True)
        mean_Rx1 = w_RxN.mean(dim=1, keepdim=True)
    else:
        empty_Rx1 = zero_RxN.all(dim=1, keepdim=True)
        low_Rx1 = w_RxN.masked_fill(zero_RxN, torch.inf).amin(dim=1, keepdim=True).masked_fill_(empty_Rx1, 0)
        high_Rx1 = w_RxN.masked_fill(zero_RxN, -torch.inf).amax(dim=1, keepdim=True).masked_fill_(empty_Rx1, 0)
        count_Rx1 = (~zero_RxN).sum(dim=1, keepdim=True).clamp_(min=1)
        mean_Rx1 = w_RxN.masked_fill(zero_RxN, 0).sum(dim=1, keepdim=True) / count_Rx1

    def error(low: Tensor, high: Tensor) -> Tensor:
        return squared_error(w_RxN, zero_RxN, low, high, bits)

    return _search(error, low_Rx1, high_Rx1, mean_Rx1, _MOVES_SHORT)


def _of_long(w_N: Tensor, zero_N: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """`clipped_range` of one range with many weights: searched on a histogram, accepted on the weights themselves."""
    extremes = [part.aminmax() for part in _parts(w_N, zero_N) if part.numel()]
    if not extremes:
        return torch.zeros(()), torch.zeros(())
    low, high = torch.stack([part.min for part in extremes]).amin(), torch.stack([part.max for part in extremes]).amax()
    whole = torch.stack([low, high])
    width = float(high) - float(low)
    if not 0 < width < torch.inf or np.float32(width / _BINS) == 0:
        return whole[0], whole[1]

    counts = np.zeros(_BINS, dtype=np.int64)
    for part in _parts(w_N, zero_N):
        bins = part.sub_(low).mul_(_BINS / width).to(torch.int64).clamp_(max=_BINS - 1)
        counts += np.bincount(bins.numpy(), minlength=_BINS)
    middles = (np.arange(_BINS) + 0.5) / _BINS  # positions are from 0 to 1 within the range
    count_before, sum_before = (np.concatenate([[0.0], np.cumsum(values)]) for values in (counts, counts * middles))
    squares = float(counts @ np.square(middles))
    last = 2**bits - 1

    def error(low_1x1: Tensor, high_1x1: Tensor) -> Tensor:
        points = np.linspace(float(low_1x1), float(high_1x1), last + 1)
        borders = np.rint((points[1:] + points[:-1]) * (0.5 * _BINS)).astype(np.int64)
        borders = np.concatenate([[0], borders, [_BINS]])
        count, total = np.diff(count_before[borders]), np.diff(sum_before[borders])
        return torch.tensor([[squares + float(points @ (points * count - 2 * total))]], dtype=torch.float64)

    unit = torch.tensor([[0.0], [1.0], [sum_before[-1] / count_before[-1]]], dtype=torch.float64)
    found = _search(error, unit[:1], unit[1:2], unit[2:], _MOVES_LONG)
    clipped = torch.tensor([float(low) + float(at) * width for at in found], dtype=torch.float32).clamp_(low, high)
    before, after = (sqrt(max(0.0, float(error(*ends))) / count_before[-1]) for ends in ((unit[:1], unit[1:2]), found))
    # The histogram moves a weight, and so its distance from the grid, by half a bin at most: 1 / _BINS is proof, but
    # for the rounding of float32 where all weights lie close together, far from zero.
    if before - after > 2 / _BINS and width > 0.1 * max(abs(float(low)), abs(float(high))):
        return clipped[0], clipped[1]
    exact = [
        sum(
            float(squared_error(part[None], None, low[None, None], high[None, None], bits))
            for part in _parts(w_N, zero_N)
        )
        for low, high in (whole, clipped)
    ]
    low, high = clipped if exact[1] < exact[0] else whole
    return low, high


def _search(
    error: Callable[[Tensor, Tensor], Tensor], low_Rx1: Tensor, high_Rx1: Tensor, mean_Rx1: Tensor, moves: int
) -> tuple[Tensor, Tensor]:
    """Ends within `low` and `high`, each range's own, that are no worse than these by `error` (low, high -> Rx1)."""
    whole = [low_Rx1, high_Rx1]
    ends = list(whole)
    best_Rx1 = error(*ends)

    def attempt(low: Tensor, high: Tensor) -> bool:
        nonlocal best_Rx1
        new = [torch.minimum(torch.maximum(end, low_Rx1), high_Rx1) for end in (low, high)]
        new_Rx1 = error(*new)
        better_Rx1 = new_Rx1 < best_Rx1
        if not better_Rx1.any():
            return False
        best_Rx1 = torch.where(better_Rx1, new_Rx1, best_Rx1)
        ends[:] = [torch.where(better_Rx1, end, old) for end, old in zip(new, ends)]
        return True

    factor, misses = 1.0, 0
    while misses < _PATIENCE and factor > 1e-3:
        factor *= _SHRINK
        found = attempt(*(mean_Rx1 + (end - mean_Rx1) * factor for end in whole))
        misses = 0 if found else misses + 1
    for shrink in _REFINE:
        for side in (0, 1):
            for factor in (shrink, 1 / shrink):
                for _ in range(moves):
                    moved = list(ends)
                    moved[side] = mean_Rx1 + (ends[side] - mean_Rx1) * factor
                    if not attempt(*moved):
                        break
    return ends[0], ends[1]


def _parts(w_N: Tensor, zero_N: Tensor | None) -> Iterator[Tensor]:
    """Chunks of the weights that count, as new float32 tensors on the CPU."""
    for start in range(0, len(w_N), _CHUNK):
        part = w_N[start : start + _CHUNK].cpu()
        if zero_N is None:
            yield part.to(torch.float32, copy=True)
        else:
            yield part[~zero_N[start : start + _CHUNK].cpu()].to(torch.float32, copy=True)
