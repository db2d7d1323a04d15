"""Gradient checkpointing: keep of every layer only what goes in, and compute the rest again in the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase
from torch import Tensor, nn


def recompute_layers(model: nn.Module) -> int:
    """Let every encoder layer of `model` be computed again; how many there are. Names of weights stay as they are.

    fairseq's own `checkpoint_wrapper` is of no use here: XLA sees that the second computation is the first, and keeps
    that. torch-xla's puts a barrier between them.
    """
    layers = [module for module in model.modules() if isinstance(module, TransformerEncoderLayerBase)]
    for layer in layers:
        layer.forward = functools.partial(_recomputed, layer.forward)  # type: ignore[method-assign]
    return len(layers)


def _recomputed(
    forward: Callable[..., Tensor], x: Tensor, encoder_padding_mask: Tensor | None, attn_mask: Any = None
) -> Tensor:
    """x: (length, rows, hidden); encoder_padding_mask: (rows, length)."""
    if not torch.is_grad_enabled():
        return forward(x, encoder_padding_mask, attn_mask)
    from torch_xla.utils.checkpoint import checkpoint

    return checkpoint(forward, x, encoder_padding_mask, attn_mask, use_reentrant=True)
