"""The layer of `fast_layer` for a GPU: PyTorch's scaled_dot_product_attention, dropout and autograd.

Compared with fairseq's layer on a CPU by the tests; its speed on a GPU has not been measured.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_plugins.models.fast_layer import Queries, Setting, Tokens


def encoder_layer(
    x_TxH: Tensor, tokens: Tokens, setting: Setting, parameters: list[Tensor], queries: Queries | None = None
) -> Tensor:
    """(T, H) in fp32 of (T, H) in fp32; with `queries`, only theirs: (B * Q, H)."""
    wq, bq, wk, bk, wv, bv, wo, bo, w1, b1, w2, b2 = (parameter.to(setting.dtype) for parameter in parameters[:12])
    norm1, shift1, norm2, shift2 = parameters[12:]
    n = F.layer_norm(x_TxH, x_TxH.shape[1:], norm1, shift1, setting.eps[0]).to(setting.dtype)
    if queries is None:
        q, k, v = F.linear(n, torch.cat([wq, wk, wv]), torch.cat([bq, bk, bv])).chunk(3, dim=1)
        q = tokens.spread(q)
    else:
        q = F.linear(n[queries.rows], wq, bq)
        k, v = F.linear(n, torch.cat([wk, wv]), torch.cat([bk, bv])).chunk(2, dim=1)
        x_TxH = x_TxH[queries.rows]
    mixed_BxAxQxD = F.scaled_dot_product_attention(
        *(_by_heads(each, tokens.batch, setting.heads) for each in (q, tokens.spread(k), tokens.spread(v))),
        attn_mask=None if tokens.bias is None else tokens.bias.to(setting.dtype),
        dropout_p=setting.attention_dropout,
    )
    mixed = mixed_BxAxQxD.transpose(1, 2).flatten(2).flatten(0, 1)
    if queries is None:
        mixed = tokens.gather(mixed)
    y = x_TxH + F.dropout(F.linear(mixed, wo, bo), setting.dropout)
    n = F.layer_norm(y, y.shape[1:], norm2, shift2, setting.eps[1]).to(setting.dtype)
    return y + F.dropout(F.linear(F.gelu(F.linear(n, w1, b1)), w2, b2), setting.dropout)


def _by_heads(x_PxH: Tensor, batch: int, heads: int) -> Tensor:
    """(B * L, A * D) to (B, A, L, D)."""
    return x_PxH.view(batch, -1, heads, x_PxH.size(1) // heads).transpose(1, 2)
