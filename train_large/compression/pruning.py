"""Magnitude pruning (section 4.3 of the paper): which weights may go, which are the smallest, and how many are zero.

"We first find the 15% of weights with the smallest magnitude and set them to zero." Weights are matrices and
embeddings, every shared tensor once; biases and layer norms stay, and a classification head stays unless it is asked
for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

SCOPES = ("global", "layer")

_CHUNK = 1 << 19  # weights looked at in one go: a few MB of temporaries, whatever the size of a tensor
_HEAD = "classification_heads."  # part of the name of every weight of a fairseq classification head


def prunable(weights: Mapping[str, Tensor], head: bool = False) -> dict[str, Tensor]:
    """The weights of a model that pruning may set to zero, out of its named parameters or its state dict.

    Floating-point tensors of two or more dimensions, in the order given; a tensor that several names share (tied
    embeddings, shared layers) under its first name only; classification heads only with `head`.
    """
    chosen: dict[str, Tensor] = {}
    seen = set()
    for name, weight in weights.items():
        # Names that share a parameter give the same object, those of a state dict different objects on the same memory.
        # A device without addresses gives 0.
        identity = (weight.data_ptr() or id(weight), weight.shape)
        if weight.dim() < 2 or not weight.is_floating_point() or identity in seen or (_HEAD in name and not head):
            continue
        seen.add(identity)
        chosen[name] = weight
    return chosen


def smallest(weights: Mapping[str, Tensor], sparsity: float, scope: str = "global") -> dict[str, Tensor]:
    """Masks, True at the weights to prune: exactly round(sparsity * N) of the smallest magnitude.

    N counts all of `weights`, or those of each tensor by itself in scope "layer". Of equal magnitudes those that come
    first go first, so the count is exact; zeros are the smallest there is, so pruning again keeps what is pruned. A NaN
    counts as the largest. Masks have the shapes and devices of their weights. Needs a byte per weight for them and a
    few MB.
    Raises ValueError for another scope, a sparsity outside [0, 1] and tensors in double precision.
    """
    if scope not in SCOPES:
        raise ValueError(f"the scope of pruning is one of {', '.join(SCOPES)}, not {scope!r}")
    if not 0 <= sparsity <= 1:
        raise ValueError(f"a sparsity lies between 0 and 1, not at {sparsity}")
    for name, weight in weights.items():
        if weight.dtype == torch.float64:
            raise ValueError(f"{name} is in double precision; pruning knows single precision and less")
    if scope == "global":
        return _smallest(weights, sparsity)
    return {name: _smallest({name: weight}, sparsity)[name] for name, weight in weights.items()}


def sparsity_of(weights: Mapping[str, Tensor]) -> tuple[int, int]:
    """How many of `weights` are exactly zero, and how many there are."""
    zeros = sum(weight.numel() - int(torch.count_nonzero(weight)) for weight in weights.values())
    return zeros, sum(weight.numel() for weight in weights.values())


def _smallest(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """`smallest` over all of `weights` together."""
    count = round(sparsity * sum(weight.numel() for weight in weights.values()))
    threshold, equals = _select(weights, count) if count else (0, 0)
    masks = {}
    for name, weight in weights.items():
        mask = np.empty(weight.numel(), dtype=bool)
        for start, keys in _keys(weight):
            part = mask[start : start + len(keys)]
            np.less(keys, threshold, out=part)
            if equals:
                first = np.flatnonzero(keys == threshold)[:equals]
                part[first] = True
                equals -= len(first)
        masks[name] = torch.from_numpy(mask).view(weight.shape).to(weight.device)
    return masks


def _select(weights: Mapping[str, Tensor], count: int) -> tuple[int, int]:
    """The key of the `count`-th smallest magnitude (from 1), and how many weights of that key are among the `count`
    smallest.

    Radix selection: a histogram over the leading 16 bits of all keys finds the bin that holds it, a second one over the
    other 15 bits of the keys in that bin finds the key.

         30            15 14             0
        +----------------+----------------+
        | exponent, 8 of |  the other 15  |     key: a single-precision number without its sign
        |  the mantissa  |  mantissa bits |
        +----------------+----------------+
    """
    leading, trailing = np.zeros(1 << 16, dtype=np.int64), np.zeros(1 << 15, dtype=np.int64)
    for weight in weights.values():
        for _, keys in _keys(weight):
            leading += np.bincount(keys >> 15, minlength=len(leading))
    high, count = _bin_of(leading, count)
    for weight in weights.values():
        for _, keys in _keys(weight):
            trailing += np.bincount(keys[keys >> 15 == high] & 0x7FFF, minlength=len(trailing))
    low, count = _bin_of(trailing, count)
    return high << 15 | low, count


def _keys(weight: Tensor) -> Iterator[tuple[int, np.ndarray]]:
    """Chunks of `weight`, flattened: where each starts, and its magnitudes as integers of the same order (int32, 1-D).

    Without the sign bit the bits of a floating-point number order like its magnitude. In NumPy, because every device
    can be read into it, and because passes this short lose more by waiting for a second thread than they gain from it.
    """
    flat = weight.detach().reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        yield start, flat[start : start + _CHUNK].cpu().float().numpy().view(np.int32) & 0x7FFF_FFFF


def _bin_of(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """The bin that holds the element of that rank (from 1) in sorted order, and its rank within the bin."""
    up_to = counts.cumsum()
    found = int(np.searchsorted(up_to, rank))
    return found, rank - int(up_to[found] - counts[found])
