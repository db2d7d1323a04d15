"""The quick way through a pre-norm RoBERTa in training: what can take it, the layers, the loss of its head."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from fairseq.models.roberta.model import RobertaLMHead
from fairseq.modules.checkpoint_activations import _checkpointed_forward
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fairseq_plugins.models import sdpa_layer
from fairseq_plugins.models.cheap_dropout import dropout
from fairseq_plugins.models.fast_layer import (
    NAMES,
    SAME_ROWS,
    Setting,
    encoder_layer,
    parameters_of,
    queries_of,
    rounded_up,
    tokens_of,
)
from train_large.compression.products import linear, product, product_of_columns

PRECISIONS = ("auto", "bf16", "fp32")
ROWS = 1024  # of the vocabulary's logits at a time: 200 MB for the largest vocabulary


def has_bf16_instructions() -> bool:
    """Whether this CPU multiplies bf16 itself; else bf16 is slower than fp32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def products_dtype(precision: str, device: str = "cpu") -> torch.dtype:
    """The type of matrix products in training for --matmul-precision: `auto` is bf16 where the device multiplies it."""
    if precision == "auto":
        has = torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else has_bf16_instructions()
        return torch.bfloat16 if has else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def unsupported(roberta: nn.Module) -> str | None:
    """Because of what `roberta`, a RobertaEncoder of fairseq's, cannot go the quick way; None if it can."""
    encoder, head = roberta.sentence_encoder, getattr(roberta, "lm_head", None)  # which finetuning does not keep
    weight = encoder.embed_tokens.weight
    device = weight.device.type
    if device not in ("cpu", "cuda"):
        return f"the model is on {device}, and the fast ones are for CPUs and GPUs"
    if weight.dtype != torch.float32:
        return f"the weights are {str(weight.dtype).removeprefix('torch.')}, not float32"
    if torch.is_autocast_enabled(device):
        return "autocast is on"
    if encoder.quant_noise is not None or encoder.encoder_layerdrop or encoder.layer_norm is None:
        return "of quantization noise, layers that are dropped, or layers that norm their output"
    if not encoder.training:
        return "the encoder is not in training, the model is"
    if head is not None and type(head) is not RobertaLMHead:
        return "of a masked LM's head of another kind"
    if any(_hooks(module) for module in roberta.modules()):
        return "of hooks, which would not be called"
    for layer in encoder.layers:
        reason = _unsupported_layer(layer)
        if reason:
            return reason
    return None


def _unsupported_layer(layer: Any) -> str | None:
    attention = layer.self_attn
    if ("forward" in vars(layer) and not _is_checkpointed(layer)) or "forward" in vars(attention):
        return "layers are wrapped by something else"
    if any(type(layer.get_submodule(name)) is not nn.Linear for name in NAMES):
        return "of quantization noise, or linear layers of another kind"
    if layer.activation_fn is not F.gelu and getattr(layer.activation_fn, "__name__", "") != "gelu":
        return "of an activation that is not gelu"
    if layer.activation_dropout_module.p or not layer.normalize_before or layer.return_fc:
        return "of dropout of activations, or a layer that norms its output"
    if 1 in (layer.dropout_module.p, attention.dropout_module.p):
        return "of dropout of everything"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "of attention to keys that are no tokens"
    return None


def _hooks(module: nn.Module) -> bool:
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def _is_checkpointed(layer: nn.Module) -> bool:
    """Whether --checkpoint-activations has put its wrapper around `forward` (`checkpoint_wrapper`,
    fairseq/modules/checkpoint_activations.py:19, 0.12.3.1), and keeps nothing elsewhere."""
    forward = vars(layer).get("forward")
    return isinstance(forward, partial) and forward.func is _checkpointed_forward and forward.args[1:] == (False,)


def features(encoder: Any, src_tokens: Tensor, dtype: torch.dtype, wanted_BxL: Tensor | None = None) -> Tensor:
    """(B, L, H) in training: `TransformerEncoder.forward` (fairseq/models/transformer/transformer_encoder.py:143,
    0.12.3.1), with matrix products in `dtype`.

    Padding is not computed: its features are those of no token, 0 before the last norm. With `wanted_BxL`, True at N
    tokens, the result is theirs alone, (N, H), and of the last layer nothing else is computed but keys and values.
    """
    batch, length = src_tokens.shape
    padding = src_tokens.eq(encoder.padding_idx)
    tokens = tokens_of(padding if bool(padding.any()) else None, batch, length)
    x_BxLxH = encoder.embed_scale * encoder.embed_tokens(src_tokens)
    if encoder.embed_positions is not None:
        x_BxLxH = x_BxLxH + encoder.embed_positions(src_tokens)
    x = tokens.gather(x_BxLxH.view(batch * length, -1))
    if encoder.layernorm_embedding is not None:
        x = encoder.layernorm_embedding(x)
    on_cpu = x.device.type == "cpu"
    x = (dropout if on_cpu else F.dropout)(x, encoder.dropout_module.p)
    layer_forward = encoder_layer if on_cpu else sdpa_layer.encoder_layer
    queries = None
    for number, layer in enumerate(encoder.layers, 1):
        if wanted_BxL is not None and number == len(encoder.layers):
            queries = queries_of(wanted_BxL, tokens)
        run = partial(checkpoint, layer_forward, use_reentrant=False) if _is_checkpointed(layer) else layer_forward
        x = run(x, tokens, _setting(layer, dtype), parameters_of(layer), queries)
    if queries is not None:
        return encoder.layer_norm(x[queries.wanted])
    return encoder.layer_norm(tokens.spread(x)).view(batch, length, -1)


def _setting(layer: Any, dtype: torch.dtype) -> Setting:
    rates = layer.dropout_module.p, layer.self_attn.dropout_module.p
    norms = layer.self_attn_layer_norm.eps, layer.final_layer_norm.eps
    return Setting(layer.self_attn.num_heads, *rates, dtype, norms)


def masked_lm_loss(head: Any, features_NxH: Tensor, targets_N: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of the cross-entropies that `RobertaLMHead.forward` (fairseq/models/roberta/model.py:484, 0.12.3.1) would
    give for N masked positions, without the logits of all of them in memory. Rows of zeros that count nothing make N a
    number that comes again."""
    rows = rounded_up(len(features_NxH), SAME_ROWS)
    features = F.pad(features_NxH, (0, 0, 0, rows - len(features_NxH))).to(dtype)
    x = F.linear(features, head.dense.weight.to(dtype), head.dense.bias.to(dtype)).float()
    x = head.layer_norm(head.activation_fn(x))
    return VocabularyLoss.apply(x, head.weight, head.bias, targets_N, dtype)


class VocabularyLoss(torch.autograd.Function):
    """Summed cross-entropy of `x` (N, H) times the vocabulary (V, H); rows of `x` beyond the targets count nothing. The
    gradients are made in the forward pass, from the logits of `ROWS` positions at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        w = weight.to(dtype)
        needed = any(ctx.needs_input_grad)
        dx = torch.empty_like(x) if needed else None
        dweight = None  # until the first rows are added: the vocabulary is large
        dbias = torch.zeros_like(bias) if needed else None
        total = x.new_zeros(())
        for start in range(0, len(x), ROWS):
            rows, wanted = x[start : start + ROWS].to(dtype), targets[start : start + ROWS, None]
            log_probabilities = linear(rows, w).float().add_(bias).log_softmax(-1)
            total -= log_probabilities.gather(1, wanted).sum()
            if needed:
                dlogits = log_probabilities.exp_()
                dlogits[: len(wanted)].scatter_add_(1, wanted, dlogits.new_full((), -1).expand(wanted.shape))
                dlogits[len(wanted) :] = 0
                dbias += dlogits.sum(0)
                dlogits = dlogits.to(dtype)
                dx[start : start + ROWS] = product(dlogits, w)
                of_rows = product_of_columns(dlogits, rows).float()
                dweight = of_rows if dweight is None else dweight.add_(of_rows)
        if needed and dweight is None:
            dweight = torch.zeros_like(weight)
        ctx.save_for_backward(dx, dweight, dbias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scale = float(grad)
        grads = ctx.saved_tensors
        return tuple(grads if scale == 1 else [scale * each for each in grads]) + (None, None)
