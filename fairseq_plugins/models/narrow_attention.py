"""Layers with fewer attention heads, or another feed-forward size, than the rest of their model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from fairseq.modules import MultiheadAttention
from fairseq.modules.quant_noise import quant_noise
from fairseq.modules.transformer_sentence_encoder import init_bert_params
from torch import Tensor, nn
from torch.nn import functional as F


class NarrowAttention(MultiheadAttention):
    """Self-attention whose `heads` heads of `width` need not add up to the `hidden` size that goes in and comes out.

    fairseq's own takes its hidden size for both. Names in the state dict are the same, with q_proj, k_proj and v_proj
    of (heads * width, hidden) and out_proj of (hidden, heads * width).
    """

    def __init__(
        self, hidden: int, heads: int, width: int, dropout: float = 0.0, q_noise: float = 0.0, qn_block_size: int = 8
    ) -> None:
        super().__init__(heads * width, heads, dropout=dropout, self_attention=True)
        self.hidden = hidden
        linear = partial(quant_noise, p=q_noise, block_size=qn_block_size)
        self.k_proj = linear(nn.Linear(hidden, self.embed_dim))
        self.v_proj = linear(nn.Linear(hidden, self.embed_dim))
        self.q_proj = linear(nn.Linear(hidden, self.embed_dim))
        self.out_proj = linear(nn.Linear(self.embed_dim, hidden))
        self.skip_embed_dim_check = True  # upstream's forward then computes by these shapes, not by PyTorch's function

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None = None,
        incremental_state: Any = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Tensor | None = None,
        before_softmax: bool = False,
        need_head_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As upstream's; where only the output is asked for, by PyTorch's fused kernel, as upstream's of full width.

        query: (length, batch, hidden); key_padding_mask: (batch, length), True at padding; attn_mask: (length, length),
        added to the scores.
        """
        unfused = need_weights or need_head_weights or before_softmax or static_kv or self.onnx_trace
        if unfused or incremental_state is not None or query.device.type == "xla":
            return super().forward(
                *(query, key, value, key_padding_mask, incremental_state),
                *(need_weights, static_kv, attn_mask, before_softmax, need_head_weights),
            )
        length, batch, _ = query.shape
        q_BxAxLxD, k_BxAxLxD, v_BxAxLxD = (
            projection(query).view(length, batch, self.num_heads, self.head_dim).permute(1, 2, 0, 3)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mask = attn_mask.to(query.dtype) if attn_mask is not None else None
        if key_padding_mask is not None:
            padding = torch.zeros(batch, 1, 1, length, dtype=query.dtype, device=query.device)
            padding.masked_fill_(key_padding_mask.bool()[:, None, None], -torch.inf)
            mask = padding if mask is None else mask + padding
        drops = self.training or self.dropout_module.apply_during_inference
        mixed_BxAxLxD = F.scaled_dot_product_attention(
            q_BxAxLxD, k_BxAxLxD, v_BxAxLxD, mask, self.dropout_module.p if drops else 0.0
        )
        return self.out_proj(mixed_BxAxLxD.permute(2, 0, 1, 3).reshape(length, batch, self.embed_dim)), None


def reshape_layers(
    layers: Sequence[Any], heads: Sequence[int] | None, ffn: Sequence[int] | None, width: int, dropout: float
) -> None:
    """Give each of fairseq's encoder `layers` its number of heads, of `width` each, and of FFN rows, in place.

    Layers that have it already stay as they are; what is new starts as BERT does. None: all stay.
    """
    for layer, count in zip(layers, heads or (), strict=heads is not None):
        if count != layer.self_attn.num_heads:
            noise = layer.quant_noise, layer.quant_noise_block_size
            layer.self_attn = NarrowAttention(layer.embed_dim, count, width, dropout, *noise).apply(init_bert_params)
    for layer, rows in zip(layers, ffn or (), strict=ffn is not None):
        if rows != layer.fc1.out_features:
            noise = layer.quant_noise, layer.quant_noise_block_size
            layer.fc1 = layer.build_fc1(layer.embed_dim, rows, *noise).apply(init_bert_params)
            layer.fc2 = layer.build_fc2(rows, layer.embed_dim, *noise).apply(init_bert_params)
