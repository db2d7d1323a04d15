"""Gradient checkpointing: keep of every layer only what goes in, and compute the rest again in the backward pass."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase, TransformerEncoderLayerBase
from torch import nn

LAYERS = (TransformerEncoderLayerBase, TransformerDecoderLayerBase)


def recompute_layers(model: nn.Module) -> int:
    """Let every layer of the encoder and of the decoder of `model` be computed again; how many there are.

    Names of weights stay as they are. fairseq's own `checkpoint_wrapper` is of no use here: XLA sees that the second
    computation is the first, and keeps that. torch-xla's puts a barrier between them.
    """
    layers = [module for module in model.modules() if isinstance(module, LAYERS)]
    for layer in layers:
        layer.forward = functools.partial(_recomputed, layer.forward)  # type: ignore[method-assign]
    return len(layers)


def _recomputed(forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What a layer's `forward` returns: x, (length, rows, hidden), or a tuple of it with attention weights and None."""
    call = inspect.signature(forward).bind(*arguments, **named)
    if not torch.is_grad_enabled() or call.arguments.get("incremental_state") is not None:
        # Nothing is kept; and a decoder that generates writes what it keeps into incremental_state, which is to be
        # done once.
        return forward(*arguments, **named)
    from torch_xla.utils.checkpoint import checkpoint

    # The checkpoint finds tensors (encoder_out, which the gradient goes into, and the masks) where they are positional
    # arguments, and the layer's weights where `forward` is a method of it.
    call.apply_defaults()
    return checkpoint(forward, *call.args, use_reentrant=True)
