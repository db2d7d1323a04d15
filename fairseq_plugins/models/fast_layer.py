"""A pre-norm encoder layer with its backward pass written out, for a CPU.

It computes what `TransformerEncoderLayerBase.forward` (fairseq/modules/transformer_layer.py:174, 0.12.3.1) does, in
fp32 or with matrix products in bf16: the residual stream, the layer norms, the parameters and their gradients are fp32
in both. Quicker than autograd's because q, k and v are one product, dropout is cheap, and nothing is cast or copied
that need not be; smaller because only one tensor of the size of the attention weights is kept.

Letters of shapes: T tokens, B sequences, L their length, A heads, D the width of a head, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_plugins.models.cheap_dropout import keep_, keep_mask, mark_, marked_mask

NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")
NORMS = ("self_attn_layer_norm", "final_layer_norm")


@dataclass(frozen=True)
class Tokens:
    """Where the T tokens of a batch are: a row each, sequence after sequence, without padding.

    `places` (T,) says where each is among the B * L positions, None where there is no padding; `bias` (B, 1, 1, L) is
    minus infinity at keys that are padding.
    """

    batch: int
    length: int
    places: Tensor | None = None
    bias: Tensor | None = None

    def spread(self, x_TxH: Tensor) -> Tensor:
        """(B * L, H), 0 where there is no token."""
        if self.places is None:
            return x_TxH
        return x_TxH.new_zeros(self.batch * self.length, x_TxH.size(1)).index_copy_(0, self.places, x_TxH)

    def gather(self, x_PxH: Tensor) -> Tensor:
        """(T, H) of (B * L, H)."""
        return x_PxH if self.places is None else x_PxH.index_select(0, self.places)


def tokens_of(padding_BxL: Tensor | None, batch: int, length: int) -> Tokens:
    """`padding_BxL` is True at padding; None where there is none."""
    if padding_BxL is None:
        return Tokens(batch, length)
    places = padding_BxL.logical_not().flatten().nonzero().flatten()
    bias = torch.zeros(batch, 1, 1, length).masked_fill_(padding_BxL[:, None, None], -torch.inf)
    return Tokens(batch, length, places, bias)


@dataclass(frozen=True)
class Setting:
    """How a layer computes: its heads, the rates at which it drops, and the type of its matrix products."""

    heads: int
    dropout: float
    attention_dropout: float
    dtype: torch.dtype
    eps: tuple[float, float]


def parameters_of(layer: nn.Module) -> list[Tensor]:
    """The weights and biases of the layer in the order of `EncoderLayer.forward`."""
    modules = [layer.get_submodule(name) for name in (*NAMES, *NORMS)]
    return [parameter for module in modules for parameter in (module.weight, module.bias)]


def encoder_layer(x_TxH: Tensor, tokens: Tokens, setting: Setting, parameters: list[Tensor]) -> Tensor:
    """(T, H) in fp32 of (T, H) in fp32."""
    return EncoderLayer.apply(x_TxH, tokens, setting, *parameters)


class EncoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tokens, setting: Setting, *parameters: Tensor) -> Tensor:  # type: ignore[override]
        wq, bq, wk, bk, wv, bv, wo, bo, w1, b1, w2, b2, norm1, shift1, norm2, shift2 = parameters
        dtype, kept = setting.dtype, 1 / (1 - setting.dropout)
        wo, bo, w1, b1, w2, b2 = (parameter.to(dtype) for parameter in (wo, bo, w1, b1, w2, b2))
        wqkv = torch.cat([weight.to(dtype) for weight in (wq, wk, wv)])
        bqkv = torch.cat([bias.to(dtype) for bias in (bq, bk, bv)])

        n1, mean1, rstd1 = torch.native_layer_norm(x, x.shape[1:], norm1, shift1, setting.eps[0])
        n1 = n1.to(dtype)
        qkv = _by_heads(tokens.spread(F.linear(n1, wqkv, bqkv)), 3, tokens, setting.heads)
        marked = _attention_weights(qkv, tokens, setting)
        mixed_BAxLxD = torch.bmm(marked.clamp(min=0) if setting.attention_dropout else marked, qkv[2])
        mixed = tokens.gather(_by_tokens(mixed_BAxLxD[None], tokens, setting.heads))
        if setting.attention_dropout:
            mixed.mul_(1 / (1 - setting.attention_dropout))
        branch = F.linear(mixed, wo, bo)
        keep1 = keep_mask(branch.shape, setting.dropout) if setting.dropout else None
        y = torch.add(x, branch if keep1 is None else keep_(branch, keep1), alpha=kept)

        n2, mean2, rstd2 = torch.native_layer_norm(y, y.shape[1:], norm2, shift2, setting.eps[1])
        n2 = n2.to(dtype)
        inner = F.linear(n2, w1, b1)
        active = F.gelu(inner)
        branch = F.linear(active, w2, b2)
        keep2 = keep_mask(branch.shape, setting.dropout) if setting.dropout else None
        z = torch.add(y, branch if keep2 is None else keep_(branch, keep2), alpha=kept)

        ctx.tokens, ctx.setting = tokens, setting
        ctx.save_for_backward(
            *(x, n1, mean1, rstd1, qkv, marked, mixed, keep1, y, n2, mean2, rstd2, inner, active, keep2),
            *(wqkv, wo, w1, w2, norm1, shift1, norm2, shift2),
        )
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, n1, mean1, rstd1, qkv, marked, mixed, keep1, y, n2, mean2, rstd2, inner, active, keep2 = ctx.saved_tensors[
            :15
        ]
        wqkv, wo, w1, w2, norm1, shift1, norm2, shift2 = ctx.saved_tensors[15:]
        tokens, setting = ctx.tokens, ctx.setting
        dtype, kept = setting.dtype, 1 / (1 - setting.dropout)
        hidden = x.shape[1:]

        dbranch = _dropped(dz, kept, keep2, dtype)
        dw2, db2 = dbranch.t() @ active, _sum(dbranch)
        dinner = torch.ops.aten.gelu_backward(dbranch @ w2, inner)
        dw1, db1 = dinner.t() @ n2, _sum(dinner)
        dn2 = (dinner @ w1).float()
        dy, dnorm2, dshift2 = torch.ops.aten.native_layer_norm_backward(
            dn2, y, hidden, mean2, rstd2, norm2, shift2, [True] * 3
        )
        dy.add_(dz)

        dbranch = _dropped(dy, kept, keep1, dtype)
        dwo, dbo = dbranch.t() @ mixed, _sum(dbranch)
        dmixed_BAxLxD = _by_heads(tokens.spread(dbranch @ wo), 1, tokens, setting.heads)[0]
        dqkv = _attention_backward(dmixed_BAxLxD, qkv, marked, setting)
        dqkv = tokens.gather(_by_tokens(dqkv, tokens, setting.heads))
        dwqkv, dbqkv = dqkv.t() @ n1, _sum(dqkv)
        dn1 = (dqkv @ wqkv).float()
        dx, dnorm1, dshift1 = torch.ops.aten.native_layer_norm_backward(
            dn1, x, hidden, mean1, rstd1, norm1, shift1, [True] * 3
        )
        dx.add_(dy)

        (dwq, dwk, dwv), (dbq, dbk, dbv) = dwqkv.float().chunk(3), dbqkv.chunk(3)
        dwo, dw1, dw2 = dwo.float(), dw1.float(), dw2.float()
        return (
            *(dx, None, None),
            *(dwq, dbq, dwk, dbk, dwv, dbv, dwo, dbo, dw1, db1, dw2, db2, dnorm1, dshift1, dnorm2, dshift2),
        )


def _by_heads(x_Px: Tensor, parts: int, tokens: Tokens, heads: int) -> Tensor:
    """(B * L, parts * A * D) to (parts, B * A, L, D)."""
    split = x_Px.view(tokens.batch, tokens.length, parts, heads, -1).permute(2, 0, 3, 1, 4)
    return split.reshape(parts, tokens.batch * heads, tokens.length, -1)


def _by_tokens(x_: Tensor, tokens: Tokens, heads: int) -> Tensor:
    """(parts, B * A, L, D) to (B * L, parts * A * D)."""
    parts, _, length, width = x_.shape
    split = x_.view(parts, tokens.batch, heads, length, width).permute(1, 3, 0, 2, 4)
    return split.reshape(tokens.batch * length, parts * heads * width)


def _attention_weights(qkv: Tensor, tokens: Tokens, setting: Setting) -> Tensor:
    """(B * A, L, L), those that are dropped made negative."""
    q, k, _ = qkv
    scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=q.size(-1) ** -0.5)
    if tokens.bias is not None:
        scores.view(tokens.batch, -1, tokens.length, tokens.length).add_(tokens.bias.to(scores.dtype))
    weights = torch.softmax(scores, dim=-1)
    return mark_(weights, setting.attention_dropout) if setting.attention_dropout else weights


def _attention_backward(dmixed: Tensor, qkv: Tensor, marked: Tensor, setting: Setting) -> Tensor:
    """(3, B * A, L, D)."""
    q, k, v = qkv
    rate, scale = setting.attention_dropout, q.size(-1) ** -0.5
    result = torch.empty_like(qkv)
    if rate:
        dmixed = dmixed * (1 / (1 - rate))
    torch.bmm((marked.clamp(min=0) if rate else marked).transpose(1, 2), dmixed, out=result[2])
    dweights = torch.bmm(dmixed, v.transpose(1, 2))
    if rate:
        mask = marked_mask(marked)
        dweights.view(mask.dtype).bitwise_and_(mask)
        marked = marked.abs()
    dscores = torch.ops.aten._softmax_backward_data(dweights, marked, -1, marked.dtype)
    empty = q.new_empty(1, 1, 1)
    torch.baddbmm(empty, dscores, k, beta=0, alpha=scale, out=result[0])
    torch.baddbmm(empty, dscores.transpose(1, 2), q, beta=0, alpha=scale, out=result[1])
    return result


def _dropped(grad: Tensor, kept: float, keep: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The gradient of a branch that was added to the residual stream."""
    return grad.to(dtype) if keep is None else keep_((grad * kept).to(dtype), keep)


def _sum(x: Tensor) -> Tensor:
    """(H,) in fp32 of (T, H)."""
    return x.sum(0).float()  # summed in fp32
