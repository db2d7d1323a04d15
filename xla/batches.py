"""Batches of one shape: XLA compiles a program for every shape that it meets.

Everything here is done where batches are made, in fairseq's data loaders, on tensors of the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

NO_LABEL = -100  # what `torch.nn.functional.nll_loss` ignores


@dataclass(frozen=True)
class Shape:
    """The shape of every batch of one split.

    `masked` is the number of positions per sequence that the masked LM head is to project, None for all of them or for
    another task.
    """

    rows: int
    source: int
    target: int
    pad: int
    masked: int | None = None


def longest(sizes: Any, limits: Any = None) -> tuple[int, int]:
    """The longest source and target of a fairseq dataset's `sizes`: (n,), [(n,)] or (n, 2).

    What is above `limits` (a number, one for each of the two, or None) fairseq leaves out.
    """
    sizes = np.asarray(sizes)
    if sizes.ndim == 2 and sizes.shape[0] == 1:
        sizes = sizes[0]
    columns = [sizes, sizes] if sizes.ndim == 1 else [sizes[:, 0], sizes[:, 1]]
    if not isinstance(limits, (tuple, list)) or len(limits) != 2:
        limits = [limits, limits]
    source, target = (
        int(column.max() if limit is None else min(column.max(), limit))
        for column, limit in zip(columns, limits, strict=True)
    )
    return source, target


def most_masked(length: int, probability: float, run: int = 1) -> int:
    """The most tokens of a sequence that fairseq masks when it masks single tokens, or runs of `run`.

    `MaskTokensDataset.__getitem__` (fairseq/data/mask_tokens_dataset.py:122, 0.12.3.1) rounds up or down at random.

    >>> most_masked(128, 0.15)
    20
    """
    return min(length, math.ceil(probability * length / run) * run)


def padded_collater(
    collate: Callable[[Sequence[Any]], Any], shape: Shape, stand_in: dict[str, Any] | None, items: Sequence[Any]
) -> Any:
    """What fairseq's `collate` makes of `items`, in `shape`; of none, with which a worker is told that it has run out
    of batches, `stand_in`. For functools.partial: data loaders pickle it."""
    batch = collate(items)
    return pad_batch(batch, shape) if batch else stand_in or batch


def pad_batch(batch: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """`batch` with tokens of (rows, source) and (rows, target), and `real`, (rows,), False for rows that only fill up.

    Such a row repeats the first one, since a row of nothing but padding has no attention weights, and has no targets.
    Where `shape.masked` says so, `projected` (rows, masked) holds the masked positions of each row and
    `projected_target` what stood there, padded; they are wider where a sequence has more.
    """
    tokens = batch["net_input"]["src_tokens"]
    count = tokens.size(0)
    result = {name: value for name, value in batch.items() if not isinstance(value, (Tensor, dict))}
    result["net_input"] = {
        "src_tokens": _rows(_columns(tokens, shape.source, shape.pad), shape.rows),
        "src_lengths": _rows(batch["net_input"]["src_lengths"].reshape(count), shape.rows),
    }
    previous = batch["net_input"].get("prev_output_tokens")
    if previous is not None:
        result["net_input"]["prev_output_tokens"] = _rows(_columns(previous, shape.target, shape.pad), shape.rows)
    result["target"] = _target(batch["target"], shape, like_tokens=previous is not None or _is_text(batch))
    result["real"] = torch.arange(shape.rows) < count
    result["pad"] = shape.pad
    if shape.masked is not None:
        result["projected"], result["projected_target"] = masked_positions(result["target"], shape.masked, shape.pad)
    return result


def masked_positions(target: Tensor, number: int, pad: int) -> tuple[Tensor, Tensor]:
    """The positions of (rows, length) `target` that are not `pad`, and what is there: twice (rows, number).

    What is left over points at position 0 with `pad` for a target. A row that has more than `number` makes both wider,
    by whole multiples of it, so that few shapes come of it.
    """
    masked = target.ne(pad)
    most = int(masked.sum(dim=1).max())
    number = min(number * max(1, math.ceil(most / number)), target.size(1))
    # A stable sort by "is not masked" brings the masked positions to the front, in their order.
    positions = masked.int().argsort(dim=1, descending=True, stable=True)[:, :number]
    chosen = masked.gather(1, positions)
    return positions * chosen, target.gather(1, positions).masked_fill(~chosen, pad)


def _is_text(batch: dict[str, Any]) -> bool:
    """Whether the target is as long as the source: a masked LM's, not a class."""
    return bool(batch["target"].dim() == 2 and batch["target"].shape == batch["net_input"]["src_tokens"].shape)


def _target(target: Tensor, shape: Shape, like_tokens: bool) -> Tensor:
    count = target.size(0)
    if like_tokens:
        target = _rows(_columns(target, shape.target, shape.pad), shape.rows)
        target[count:] = shape.pad
        return target
    target = _rows(target.reshape(count), shape.rows)
    target[count:] = 0 if target.is_floating_point() else NO_LABEL
    return target


def _columns(tokens: Tensor, length: int, pad: int) -> Tensor:
    if tokens.size(1) > length:
        raise ValueError(f"a batch has {tokens.size(1)} columns, more than the {length} of the longest sequence")
    return torch.nn.functional.pad(tokens, (0, length - tokens.size(1)), value=pad)


def _rows(tensor: Tensor, rows: int) -> Tensor:
    """`tensor` with its first row repeated at the end until there are `rows`; a copy."""
    return torch.cat([tensor, tensor[:1].expand(rows - tensor.size(0), *tensor.shape[1:])])


def hollow(batch: dict[str, Any]) -> dict[str, Any]:
    """A padded `batch` without its rows: same shapes, nothing in it counts. For a worker that has no batch left."""
    counted = [name for name in ("ntokens", "nsentences") if name in batch]
    result = batch | dict.fromkeys(counted, 0)
    result["real"] = torch.zeros_like(batch["real"])
    target, pad = batch["target"], batch["pad"]
    nothing = pad if target.dim() == 2 else 0 if target.is_floating_point() else NO_LABEL
    result["target"] = torch.full_like(target, nothing)
    if "projected_target" in batch:
        result["projected_target"] = torch.full_like(batch["projected_target"], pad)
    return result
