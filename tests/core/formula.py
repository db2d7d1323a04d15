"""Section 4.2 of the paper once more, for tests to compare with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BITS = (2, 3, 4, 5, 6, 7, 8)


def paper(weights: np.ndarray, bits: int) -> np.ndarray:
    """Section 4.2 in NumPy, over what is not zero: the independent implementation that ours must equal bit by bit."""
    result = weights.astype(np.float32)
    kept = result[result != 0]
    if kept.size and kept.min() < kept.max():
        low, high = kept.min(), kept.max()
        delta = (high - low) / np.float32(2**bits - 1)
        clamped = np.minimum(np.maximum(kept, low), high)
        index = np.rint((clamped - low) / delta)
        result[result != 0] = delta * index + low
    return result


def same_bits(ours: Tensor, expected: np.ndarray) -> bool:
    return ours.dtype == torch.float32 and np.array_equal(ours.numpy().view(np.int32), expected.view(np.int32))
