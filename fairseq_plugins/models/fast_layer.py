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
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fairseq_plugins.models.cheap_dropout import keep_, keep_mask, mark_, marked_mask
from train_large.compression.products import linear, product, product_of_columns

NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")
NORMS = ("self_attn_layer_norm", "final_layer_norm")

# oneDNN makes a program for every shape of a product that it meets, which takes longer than most products do: with AMX
# 2 to 30 ms. So sizes that change from batch to batch are rounded up to multiples of these.
SAME_ROWS, SAME_QUERIES = 64, 4


@dataclass(frozen=True)
class Tokens:
    """Where the T tokens of a batch are: a row each, sequence after sequence, with next to no padding.

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
    # Some padding is computed too, as tokens that no other looks at; not that of a sentence without any token.
    empty_Bx1 = padding_BxL.all(1, keepdim=True)
    number = rounded_up(padding_BxL.numel() - int(padding_BxL.sum()), SAME_ROWS)
    number = min(number, length * (batch - int(empty_Bx1.sum())))
    last_BxL = padding_BxL.to(torch.int8) + empty_Bx1
    places = last_BxL.flatten().argsort(stable=True)[:number].sort().values
    bias = torch.zeros(batch, 1, 1, length, device=padding_BxL.device).masked_fill_(
        padding_BxL[:, None, None], -torch.inf
    )
    return Tokens(batch, length, places, bias)


def rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class Queries:
    """The positions that a layer is computed for, where not all are wanted: Q of each sequence.

    `rows` (B * Q,) says which of the T tokens they are. `wanted` (B * Q,) is False for what fills up the sequences of
    which fewer are wanted.
    """

    rows: Tensor
    wanted: Tensor


def queries_of(wanted_BxL: Tensor, tokens: Tokens) -> Queries:
    """`wanted_BxL` is True at the tokens that are."""
    numbers_B = wanted_BxL.sum(1)
    most = max(1, int(numbers_B.max()))
    if most > 1:
        most = min(rounded_up(most, SAME_QUERIES), tokens.length)
    places_BxQ = wanted_BxL.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    places = (places_BxQ + torch.arange(tokens.batch, device=places_BxQ.device)[:, None] * tokens.length).flatten()
    wanted = torch.arange(most, device=numbers_B.device) < numbers_B[:, None]
    if tokens.places is not None:
        # The number of tokens up to a place. That of a place without a token, which only fills up, is some token's.
        places = (torch.searchsorted(tokens.places, places, right=True) - 1).clamp_(min=0)
    return Queries(places, wanted.flatten())


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


def encoder_layer(
    x_TxH: Tensor, tokens: Tokens, setting: Setting, parameters: list[Tensor], queries: Queries | None = None
) -> Tensor:
    """(T, H) in fp32 of (T, H) in fp32; with `queries`, only theirs: (B * Q, H)."""
    (attention, norm1), (network, norm2) = (parameters[:8], parameters[12:14]), (parameters[8:12], parameters[14:])
    y = Attention.apply(x_TxH, tokens, queries, setting, *attention, *norm1)
    return FeedForward.apply(y, setting, *network, *norm2)


class Attention(torch.autograd.Function):
    """x + dropout(attention(norm(x))), or only its rows that are `queries`."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, tokens: Tokens, queries: Queries | None, setting: Setting, *parameters: Tensor
    ) -> Tensor:
        wq, bq, wk, bk, wv, bv, wo, bo, scale, shift = parameters
        dtype, batch, heads = setting.dtype, tokens.batch, setting.heads
        n, mean, rstd = torch.native_layer_norm(x, x.shape[1:], scale, shift, setting.eps[0])
        n = n.to(dtype)
        wqkv = torch.cat([weight.to(dtype) for weight in (wq, wk, wv)])
        bqkv = torch.cat([bias.to(dtype) for bias in (bq, bk, bv)])
        if queries is None:
            q, k, v = _by_heads(tokens.spread(linear(n, wqkv, bqkv)), 3, batch, heads)
        else:
            own = len(wq)
            [q] = _by_heads(linear(n[queries.rows], wqkv[:own], bqkv[:own]), 1, batch, heads)
            k, v = _by_heads(tokens.spread(linear(n, wqkv[own:], bqkv[own:])), 2, batch, heads)
        marked = _attention_weights(q, k, tokens, setting)
        dropped = marked.clamp(min=0) if setting.attention_dropout else marked
        mixed = torch.baddbmm(v.new_empty(1, 1, 1), dropped, v, beta=0, alpha=1 / (1 - setting.attention_dropout))
        mixed = _by_tokens(mixed[None], batch)
        if queries is None:
            mixed = tokens.gather(mixed)
        wo = wo.to(dtype)
        y, keep = _added(x if queries is None else x[queries.rows], linear(mixed, wo, bo.to(dtype)), setting.dropout)
        ctx.tokens, ctx.queries, ctx.setting = tokens, queries, setting
        ctx.save_for_backward(x, n, mean, rstd, q, k, v, marked, mixed, keep, wqkv, wo, scale, shift)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, n, mean, rstd, q, k, v, marked, mixed, keep, wqkv, wo, scale, shift = ctx.saved_tensors
        tokens, queries, setting = ctx.tokens, ctx.queries, ctx.setting
        batch = tokens.batch
        # What dropout divides by is left to the products: a pass less over every gradient.
        dbranch, scale_out = _dropped(dy, keep, setting.dtype), 1 / (1 - setting.dropout)
        dwo, dbo = product_of_columns(dbranch, mixed, scale_out), _sum(dbranch).mul_(scale_out)
        dmixed = product(dbranch, wo, scale_out / (1 - setting.attention_dropout))
        if queries is None:
            [dmixed] = _by_heads(tokens.spread(dmixed), 1, batch, setting.heads)
            dqkv = q.new_empty(3, *q.shape)
            _attention_backward(dmixed, (q, k, v), marked, setting, dqkv.unbind())
            dqkv = tokens.gather(_by_tokens(dqkv, batch))
            dwqkv, dbqkv = product_of_columns(dqkv, n).float(), _sum(dqkv)
            dn = product(dqkv, wqkv).float()
        else:
            own = wo.size(1)
            [dmixed] = _by_heads(dmixed, 1, batch, setting.heads)
            dq, dkv = torch.empty_like(q), k.new_empty(2, *k.shape)
            _attention_backward(dmixed, (q, k, v), marked, setting, (dq, *dkv))
            dq, dkv = _by_tokens(dq[None], batch), tokens.gather(_by_tokens(dkv, batch))
            dwqkv = torch.cat([product_of_columns(dq, n[queries.rows]).float(), product_of_columns(dkv, n).float()])
            dbqkv = torch.cat([_sum(dq), _sum(dkv)])
            dn = product(dkv, wqkv[own:]).float().index_add_(0, queries.rows, product(dq, wqkv[:own]).float())
        dx, dscale, dshift = torch.ops.aten.native_layer_norm_backward(
            dn, x, x.shape[1:], mean, rstd, scale, shift, [True] * 3
        )
        if queries is None:
            dx.add_(dy)
        else:
            dx.index_add_(0, queries.rows, dy)
        (dwq, dwk, dwv), (dbq, dbk, dbv) = dwqkv.chunk(3), dbqkv.chunk(3)
        return dx, None, None, None, dwq, dbq, dwk, dbk, dwv, dbv, dwo.float(), dbo, dscale, dshift


class FeedForward(torch.autograd.Function):
    """y + dropout(fc2(gelu(fc1(norm(y)))))."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, setting: Setting, *parameters: Tensor) -> Tensor:  # type: ignore[override]
        w1, b1, w2, b2 = (parameter.to(setting.dtype) for parameter in parameters[:4])
        scale, shift = parameters[4:]
        n, mean, rstd = torch.native_layer_norm(y, y.shape[1:], scale, shift, setting.eps[1])
        n = n.to(setting.dtype)
        inner = linear(n, w1, b1)
        active = F.gelu(inner)
        z, keep = _added(y, linear(active, w2, b2), setting.dropout)
        ctx.setting = setting
        ctx.save_for_backward(y, n, mean, rstd, inner, active, keep, w1, w2, scale, shift)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, n, mean, rstd, inner, active, keep, w1, w2, scale, shift = ctx.saved_tensors
        dbranch, scale_out = _dropped(dz, keep, ctx.setting.dtype), 1 / (1 - ctx.setting.dropout)
        dw2, db2 = product_of_columns(dbranch, active, scale_out), _sum(dbranch).mul_(scale_out)
        dinner = torch.ops.aten.gelu_backward(product(dbranch, w2, scale_out), inner)
        dw1, db1 = product_of_columns(dinner, n), _sum(dinner)
        dn = product(dinner, w1).float()
        dy, dscale, dshift = torch.ops.aten.native_layer_norm_backward(
            dn, y, y.shape[1:], mean, rstd, scale, shift, [True] * 3
        )
        return dy.add_(dz), None, dw1.float(), db1, dw2.float(), db2, dscale, dshift


def _by_heads(x_Px: Tensor, parts: int, batch: int, heads: int) -> Tensor:
    """(B * L, parts * A * D) to (parts, B * A, L, D)."""
    split = x_Px.view(batch, -1, parts, heads, x_Px.size(1) // (parts * heads)).permute(2, 0, 3, 1, 4)
    return split.reshape(parts, batch * heads, split.size(3), -1)


def _by_tokens(x_: Tensor, batch: int) -> Tensor:
    """(parts, B * A, L, D) to (B * L, parts * A * D)."""
    parts, rows, length, width = x_.shape
    split = x_.view(parts, batch, rows // batch, length, width).permute(1, 3, 0, 2, 4)
    return split.reshape(batch * length, parts * rows // batch * width)


def _attention_weights(q: Tensor, k: Tensor, tokens: Tokens, setting: Setting) -> Tensor:
    """(B * A, Q, L), those that are dropped made negative."""
    scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=q.size(-1) ** -0.5)
    if tokens.bias is not None:
        scores.view(tokens.batch, -1, *scores.shape[1:]).add_(tokens.bias.to(scores.dtype))
    weights = torch.softmax(scores, dim=-1)
    return mark_(weights, setting.attention_dropout) if setting.attention_dropout else weights


def _attention_backward(
    dmixed: Tensor, qkv: tuple[Tensor, ...], marked: Tensor, setting: Setting, dqkv: tuple[Tensor, ...]
) -> None:
    """Fills `dqkv`, the gradients of queries (B * A, Q, D), keys and values (B * A, L, D). `dmixed` is divided by the
    share that dropout keeps."""
    (q, k, v), (dq, dk, dv) = qkv, dqkv
    rate, scale = setting.attention_dropout, q.size(-1) ** -0.5
    torch.bmm((marked.clamp(min=0) if rate else marked).transpose(1, 2), dmixed, out=dv)
    dweights = torch.bmm(dmixed, v.transpose(1, 2))
    if rate:
        mask = marked_mask(marked)
        dweights.view(mask.dtype).bitwise_and_(mask)
        marked = marked.abs()
    dscores = torch.ops.aten._softmax_backward_data(dweights, marked, -1, marked.dtype)
    empty = q.new_empty(1, 1, 1)
    torch.baddbmm(empty, dscores, k, beta=0, alpha=scale, out=dq)
    torch.baddbmm(empty, dscores.transpose(1, 2), q, beta=0, alpha=scale, out=dk)


def _added(x: Tensor, branch: Tensor, rate: float) -> tuple[Tensor, Tensor | None]:
    """x + dropout(branch), and the mask of what is kept. `branch` is used up."""
    if not rate:
        return x + branch, None
    keep = keep_mask(branch.shape, rate)
    return torch.add(x, keep_(branch, keep), alpha=1 / (1 - rate)), keep


def _dropped(grad: Tensor, keep: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The gradient of a branch that was added to the residual stream, not yet divided by the share that is kept."""
    if keep is None:
        return grad.to(dtype)
    return keep_(grad.to(dtype) if dtype != grad.dtype else grad.clone(), keep)


def _sum(x: Tensor) -> Tensor:
    """(H,) in fp32 of (T, H)."""
    return x.sum(0).float()  # summed in fp32
