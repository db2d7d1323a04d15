"""How far compressed weights lie from the original ones: section 5.3 and figure 9 of the paper.

With d = w - w' for a weight w of the original model and the w' that stands for it, over all N weights of a group:

    mean             sum(d) / N                        near zero where errors of either sign cancel
    mean_absolute    sum(|d|) / N
    variance         sum((d - mean)^2) / N
    deviation        standard deviation of w, the original weights, about their mean
    relative         sqrt(sum(d^2) / sum(w^2))

Figure 9 shows the raw difference ("the mean and variance of the weight difference") for each kind of module at 4 bits
and at 60% sparsity; the mean of d itself is near zero for any model, so the mean compared here is that of |d|. A raw
error is in the units of the weights, and the weights of a larger model are often smaller. `normalized`, the mean of
|d| divided by `deviation`, has no units: it says whether weights are easier to approximate for their size.

    w             0.30  -0.10   0.02  -0.50
    w'            0.30   0     0     -0.50    the smaller half pruned
    d             0     -0.10  0.02   0       mean |d| = 0.03; deviation 0.29, so 0.10 of it

Each weight counts once, and so does each of the tensors that a model ties. Groups are pooled over the weights: within a
model, matrices of one kind have one shape, so this is their average too. In float64.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Callable

import torch
from torch import Tensor

from train_large.compression.pruning import prunable, smallest
from train_large.compression.quantization import quantize_state
from train_large.compression.storage import tied_to
from train_large.errors import UserError

# The kinds of modules, in the order of a report, by what their names hold in fairseq's state dicts; the first that
# holds counts. in_proj is what MultiheadAttention had before fairseq 0.9, output_projection the LM head of a decoder.
KINDS = {
    "norms": re.compile(r"layer_?norm"),
    "biases": re.compile(r"bias$"),
    "attention q, k, v": re.compile(r"attn\.(?:[qkv]_proj\.|in_proj_)"),
    "attention out": re.compile(r"attn\.out_proj\."),
    "fc1": re.compile(r"\bfc1\."),
    "fc2": re.compile(r"\bfc2\."),
    "token embeddings": re.compile(r"\bembed_tokens\."),
    "position embeddings": re.compile(r"\bembed_positions\."),
    "LM head": re.compile(r"\b(?:lm_head|output_projection)\."),
    "classification head": re.compile(r"\bclassification_heads\."),
}
OTHER, ALL = "other", "all"
_REPORTED_LAST = ("norms", "biases")


@dataclass(frozen=True)
class WeightError:
    """The error of `parameters` weights; the other fields are in the module's docstring."""

    parameters: int
    mean: float
    mean_absolute: float
    variance: float
    deviation: float
    relative: float

    @property
    def normalized(self) -> float | None:
        """The mean of |w - w'| in standard deviations of the original weights; None where those are all the same."""
        return self.mean_absolute / self.deviation if self.deviation else None


@dataclass(frozen=True)
class WeightErrors:
    """Of one model: by kind of module, by layer (`encoder 0`, the layers in their order), and all weights together."""

    kinds: dict[str, WeightError]
    layers: dict[str, WeightError]
    all: WeightError


def kind_of(name: str) -> str:
    """The kind of module, a key of KINDS, that a parameter of fairseq's state dict belongs to, or `other`."""
    return next((kind for kind, holds in KINDS.items() if holds.search(name)), OTHER)


def layer_of(name: str) -> str | None:
    """`encoder 3` for encoder.sentence_encoder.layers.3.fc1.weight; None for what is in no Transformer layer."""
    found = re.search(r"\b(encoder|decoder)\.(?:.*\.)?layers\.(\d+)\.", name)
    return f"{found[1]} {found[2]}" if found else None


def weight_errors(original: Mapping[str, Tensor], compressed: Mapping[str, Tensor]) -> WeightErrors:
    """The error of `compressed`, a state dict of the same names and shapes as `original`.

    What is tied in `original` counts once, under the first of its names; buffers do not count.
    Raises UserError where a parameter is missing in `compressed` or has another shape, or there is none.
    """
    moments: dict[str, _Moments] = {}
    for name, first in tied_to(original).items():
        if name != first or not original[name].numel():
            continue
        if name not in compressed or compressed[name].shape != original[name].shape:
            found = f"has shape {tuple(compressed[name].shape)}" if name in compressed else "is missing"
            raise UserError(
                f"{name} {found} in the compressed model, {tuple(original[name].shape)} in the original: "
                "give a model and its own compressed form."
            )
        moments[name] = _moments_of(original[name], compressed[name])
    if not moments:
        raise UserError("the model has no weights to compare: give the state dict of a trained model.")
    kinds = _pooled_by(kind_of, moments)
    order = [kind for kind in (*KINDS, OTHER) if kind not in _REPORTED_LAST] + list(_REPORTED_LAST)
    layers = _pooled_by(layer_of, moments)
    return WeightErrors(
        kinds={kind: kinds[kind] for kind in order if kind in kinds},
        layers={layer: layers[layer] for layer in sorted(layers, key=lambda layer: (layer[:7], int(layer[8:])))},
        all=_pooled(moments.values()),
    )


def quantization_error(state: Mapping[str, Tensor], bits: int, granularity: str = "tensor") -> WeightErrors:
    """The error of every parameter on its own grid of 2^bits points. Raises UserError as `quantize_state` does."""
    return weight_errors(state, quantize_state(state, bits, granularity))


def pruning_error(state: Mapping[str, Tensor], sparsity: float, scope: str = "global") -> WeightErrors:
    """The error of setting the smallest weights to zero, this share of those that pruning may choose from.

    Without training after it: the error of the approximation itself. A model of a pruning ladder has been trained again
    at each level, so that its weights differ from the original ones for another reason too. Biases, norms and the
    classification head are not pruned and have no error. Raises ValueError as `smallest` does.
    """
    pruned = {name: tensor.detach() for name, tensor in state.items()}
    first = tied_to(state)
    # What is tied by its values alone (a checkpoint from a GPU) would else be pruned, and counted, twice.
    weights = prunable({name: tensor for name, tensor in pruned.items() if first.get(name) == name})
    for name, mask in smallest(weights, sparsity, scope).items():
        pruned[name] = pruned[name].masked_fill(mask, 0)
    return weight_errors(state, pruned)


@dataclass(frozen=True)
class _Moments:
    """Sums over one tensor: its weights w and their errors d; those of squares about the tensor's own means."""

    count: int
    mean_error: float
    error_squares: float
    absolute: float
    mean_weight: float
    weight_squares: float


def _moments_of(original: Tensor, compressed: Tensor) -> _Moments:
    w = original.detach().to(torch.float64)
    d = w - compressed.detach().to(torch.float64)
    mean_error, mean_weight = d.mean(), w.mean()
    return _Moments(
        count=w.numel(),
        mean_error=mean_error.item(),
        error_squares=(d - mean_error).square().sum().item(),
        absolute=d.abs().sum().item(),
        mean_weight=mean_weight.item(),
        weight_squares=(w - mean_weight).square().sum().item(),
    )


def _pooled_by(group: Callable[[str], str | None], moments: Mapping[str, _Moments]) -> dict[str, WeightError]:
    members: dict[str, list[_Moments]] = {}
    for name, tensor in moments.items():
        key = group(name)
        if key is not None:
            members.setdefault(key, []).append(tensor)
    return {key: _pooled(tensors) for key, tensors in members.items()}


def _pooled(tensors: Iterable[_Moments]) -> WeightError:
    tensors = list(tensors)
    count = sum(t.count for t in tensors)
    mean_error = sum(t.count * t.mean_error for t in tensors) / count
    mean_weight = sum(t.count * t.mean_weight for t in tensors) / count
    # Squares about the common mean: those about each tensor's own, and the distance of the means. Sums of raw squares
    # would cancel for norms, whose weights lie near one.
    error_squares = sum(t.error_squares + t.count * (t.mean_error - mean_error) ** 2 for t in tensors)
    weight_squares = sum(t.weight_squares + t.count * (t.mean_weight - mean_weight) ** 2 for t in tensors)
    error, weight = error_squares + count * mean_error**2, weight_squares + count * mean_weight**2
    return WeightError(
        parameters=count,
        mean=mean_error,
        mean_absolute=sum(t.absolute for t in tensors) / count,
        variance=error_squares / count,
        deviation=sqrt(weight_squares / count),
        relative=sqrt(error / weight) if weight else 0.0,
    )
