"""Removing what structured pruning has set to zero, so that a model is smaller and faster on any hardware.

What may go is what changes no output:

    an attention head, if its columns of out_proj are zero, or its rows of v_proj with their bias (what it mixes is
    then zero; what q_proj and k_proj are does not matter)
    an FFN row, if its column of fc2 is zero, or its row of fc1 with its bias (every activation of fairseq's maps zero
    to zero)

One head and one FFN row stay in each layer, be they zero. The outputs are the same up to the order in which a matrix
product adds: sums lose terms that are zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train_large.compression.checkpoint import (
    OUR_MODELS,
    configuration,
    flags_beyond_stock,
    read_checkpoint,
    stock_form,
    write_checkpoint,
)
from train_large.compression.storage import tied_to
from train_large.compression.structures import Block, blocks, parse_per_layer
from train_large.errors import UserError

RECORD_VERSION = 1
ENCODER = "encoder.sentence_encoder"  # of fairseq's RoBERTa


@dataclass(frozen=True)
class Shrunk:
    """What removing has done. Heads and FFN rows of each layer, before and after; parameters and their bytes as they
    are stored, tied tensors once."""

    heads_before: tuple[int, ...]
    heads: tuple[int, ...]
    ffn_before: tuple[int, ...]
    ffn: tuple[int, ...]
    parameters_before: int
    parameters: int
    bytes_before: int
    bytes: int
    flags: str
    """The flags of the model that have changed, as typed: "--layer-heads 4,3 --layer-ffn 200,190"."""
    stock: bool
    """Whether stock fairseq can build that shape, without --user-dir."""


def removable(block: Block) -> Tensor:
    """True at the structures that change no output: (count,), bool."""
    [columns] = block.columns.values()
    silent = (columns == 0).reshape(-1, block.count, columns.shape[-1] // block.count).all(2).all(0)
    dead = torch.ones_like(silent)
    for name, tensor in block.rows.items():
        if block.kind == "ffn" or ".v_proj." in name:
            dead &= (tensor == 0).reshape(block.count, -1).all(1)
    return silent | dead


def shrink_state(state: Mapping[str, Tensor], heads: Mapping[str, int]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """A RoBERTa's state dict without what can be removed, and how many structures each block has then.

    heads: the number of heads by the name of each attention. Tensors are new where something is removed, and tied ones
    stay tied. Raises UserError, which names the tensor, when one does not divide into its heads.
    """
    result, counts = dict(state), {}
    first = tied_to(state)
    cut: dict[tuple[str, tuple[int, ...]], Tensor] = {}
    for block in blocks(state, heads):
        gone = removable(block)
        if gone.all():
            gone[0] = False
        counts[block.name] = int((~gone).sum())
        if not gone.any():
            continue
        for dim, tensors in ((0, block.rows), (-1, block.columns)):
            for name, tensor in tensors.items():
                kept = (~gone).repeat_interleave(tensor.shape[dim] // block.count).nonzero().flatten()
                key = first.get(name, name), tuple(kept.tolist())
                if key not in cut:
                    cut[key] = tensor.index_select(dim, kept).contiguous()
                result[name] = cut[key]
    return result, counts


def shrink_checkpoint(source: Path, target: Path) -> Shrunk:
    """Write the checkpoint `source` without the heads and FFN rows that do nothing to `target` (it may be the same).

    The result has plain values and stock names and no optimizer state (`stock_form`). Stock fairseq loads it where all
    layers have kept all heads and the same number of FFN rows; else it is a prenorm_roberta, for --user-dir
    fairseq_plugins, which the flags of the summary build on a command line. With nothing to remove, the model is
    written as it is. The list `compression` in the file has a record of every conversion.

    Raises UserError for a bad checkpoint, a model that is no RoBERTa, shapes that no model here can have, and when
    `target` cannot be written.
    """
    checkpoint = read_checkpoint(source)
    try:
        result, summary = _shrunk(checkpoint)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    result["compression"] = [
        *result.get("compression", []),
        {
            "version": RECORD_VERSION,
            "method": "structures",
            "heads": list(summary.heads),
            "ffn": list(summary.ffn),
            "parameters": summary.parameters,
        },
    ]
    write_checkpoint(result, target)
    return summary


def describe(summary: Shrunk) -> str:
    """The summary in a few lines, for a terminal."""

    def change(what: str, before: int, after: int) -> str:
        return f"{what:<12}{before:>14,} -> {after:>14,}  ({after / before:.1%})"

    lines = [
        change("heads", sum(summary.heads_before), sum(summary.heads)),
        change("FFN rows", sum(summary.ffn_before), sum(summary.ffn)),
        change("parameters", summary.parameters_before, summary.parameters),
        change("bytes", summary.bytes_before, summary.bytes),
    ]
    if summary.parameters == summary.parameters_before:
        lines.append(
            "Nothing to remove: no head and no FFN row is wholly zero. Prune with --prune-structure heads+ffn first."
        )
    lines.append("Loads in stock fairseq." if summary.stock else "Loads with --user-dir fairseq_plugins.")
    if summary.flags:
        lines.append(f"To train it further, add to the flags of its size: {summary.flags}")
    return "\n".join(lines)


def _shrunk(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], Shrunk]:
    """The new checkpoint and what has been done."""
    cfg = configuration(checkpoint)
    model, state = cfg.get("model") or {}, checkpoint["model"]
    layers, heads_before = _layers(model, state)
    attentions = [f"{ENCODER}.layers.{i}.self_attn" for i in range(layers)]
    smaller, counts = shrink_state(state, dict(zip(attentions, heads_before, strict=True)))
    heads = tuple(counts[name] for name in attentions)
    ffn = tuple(counts[f"{ENCODER}.layers.{i}"] for i in range(layers))
    ffn_before = tuple(state[f"{ENCODER}.layers.{i}.fc1.weight"].shape[0] for i in range(layers))
    shape = _shape(model, heads, ffn)
    new = {**model, **shape}
    result = stock_form({**checkpoint, "args": None, "cfg": {**cfg, "model": new}, "model": smaller})
    rows, beyond = new.get("encoder_ffn_embed_dim"), flags_beyond_stock(new)
    changed = f"--encoder-ffn-embed-dim {rows} " if rows != model.get("encoder_ffn_embed_dim") else ""
    (parameters_before, bytes_before), (parameters, size) = _extent(state), _extent(smaller)
    return result, Shrunk(
        *(heads_before, heads, ffn_before, ffn, parameters_before, parameters, bytes_before, size),
        flags=(changed + beyond).strip(),
        stock=not beyond,
    )


def _layers(model: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[int, tuple[int, ...]]:
    """Layers of a RoBERTa and the heads of each. Raises UserError for another model."""
    if f"{ENCODER}.layers.0.self_attn.q_proj.weight" not in state or any(name.startswith("decoder.") for name in state):
        raise UserError(
            f"the model is {model.get('arch') or model.get('_name')}, and only the layers of a RoBERTa can be made "
            "smaller: its zeros take few bytes once packed, but they stay."
        )
    layers, hidden, heads = (model.get(f"encoder_{name}") for name in ("layers", "embed_dim", "attention_heads"))
    if not (layers and hidden and heads):
        raise UserError("the configuration lacks encoder_layers, encoder_embed_dim or encoder_attention_heads.")
    given = model.get("layer_heads")
    per_layer = parse_per_layer(str(given), "--layer-heads", layers) if given is not None else (heads,) * layers
    for layer, count in enumerate(per_layer):
        query, fc1 = f"{ENCODER}.layers.{layer}.self_attn.q_proj.weight", f"{ENCODER}.layers.{layer}.fc1.weight"
        for name in (query, fc1):
            if name not in state:
                raise UserError(f"there is no {name}, though the configuration has {layers} layers.")
        if state[query].shape[0] != count * (hidden // heads):
            raise UserError(
                f"{query} of shape {tuple(state[query].shape)} is not {count} heads of {hidden // heads} as the "
                "configuration has them."
            )
    return layers, per_layer


def _shape(model: Mapping[str, Any], heads: tuple[int, ...], ffn: tuple[int, ...]) -> dict[str, Any]:
    """The options that have changed, of the whole model where all its layers are alike, else of each layer."""
    shape: dict[str, Any] = {"layer_heads": None, "layer_ffn": None}
    if set(heads) != {model["encoder_attention_heads"]}:
        shape["layer_heads"] = ",".join(map(str, heads))
    if len(set(ffn)) == 1:
        shape["encoder_ffn_embed_dim"] = ffn[0]
    else:
        shape["layer_ffn"] = ",".join(map(str, ffn))
    if not flags_beyond_stock(shape) or str(model.get("_name") or model.get("arch")).startswith(OUR_MODELS):
        return shape
    if not model.get("encoder_normalize_before"):
        raise UserError(
            f"its layers would differ ({flags_beyond_stock(shape)}), which only a prenorm_roberta can, and this model "
            "has its norms after the layers: prune with --prune-structure ffn --prune-scope layer instead."
        )
    return {**shape, "_name": OUR_MODELS, "arch": OUR_MODELS}


def _extent(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Parameters of a state dict, and their bytes as they are; tied tensors once, buffers not at all."""
    distinct = [state[name] for name, first in tied_to(state).items() if name == first]
    return sum(t.numel() for t in distinct), sum(t.numel() * t.element_size() for t in distinct)
