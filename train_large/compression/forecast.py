"""The bytes of a model that has not been trained yet, by the count of train_large.compression.storage."""

from __future__ import annotations

import functools
import math

import torch

from train_large.compression.levels import check_bits
from train_large.compression.storage import RANGE_BYTES, tensor_storage
from train_large.sizes import Size

_SAMPLE = 100_000


def forecast_bytes(size: Size, parameters: int, vocabulary: int, bits: int, sparsity: float = 0.0) -> int:
    """What the `parameters` weights of an encoder of this size take at `bits` bits, with matrices and embeddings pruned
    to `sparsity` alike.

    `storage` counts a real checkpoint, whose tensors one threshold prunes unevenly; this is within a few percent of it.
    Raises UserError for bits that there are not.
    """
    check_bits(bits)
    hidden, ffn = size.hidden, size.ffn
    vectors = size.layers * (9 * hidden + ffn) + 7 * hidden + vocabulary  # biases and norms; 3 norms, the head's bias
    vectors = min(vectors, parameters)
    tensors = 16 * size.layers + 11
    stored = _bytes(parameters - vectors, sparsity, bits) + _bytes(vectors, 0.0, bits)
    return stored + (0 if bits == 32 else tensors * RANGE_BYTES)


@functools.lru_cache(maxsize=4096)
def _bytes(parameters: int, sparsity: float, bits: int) -> int:
    """Without the ranges: a sample as sparse is counted."""
    count = max(1, min(parameters, _SAMPLE))
    weights = torch.ones(count, dtype=torch.uint8)
    weights[: round(sparsity * count)] = 0
    stored = tensor_storage("", weights, bits).bytes - (0 if bits == 32 else RANGE_BYTES)
    return math.ceil(stored * parameters / count)
