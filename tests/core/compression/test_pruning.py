"""Magnitude pruning against NumPy's stable sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from train_large.compression import pruning
from train_large.compression.pruning import prunable, smallest, sparsity_of

SHAPES = hnp.array_shapes(min_dims=1, max_dims=3, max_side=6)
ANY = hnp.arrays(np.float32, SHAPES, elements=st.floats(width=32, allow_nan=False))
# Few values, so that there are ties, zeros of both signs and a subnormal among them.
FEW = hnp.arrays(np.float32, SHAPES, elements=st.sampled_from([0.0, -0.0, 2.0**-140, 0.5, -0.5, 0.25, -3.0]))
WEIGHTS = st.lists(ANY | FEW, min_size=1, max_size=4)
SHARE = st.floats(0, 1)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def by_sorting(arrays: list[np.ndarray], sparsity: float) -> list[np.ndarray]:
    """The masks by sorting everything: a stable sort takes the first of equals first."""
    flat = np.abs(np.concatenate([array.ravel() for array in arrays]))
    mask = np.zeros(len(flat), dtype=bool)
    mask[np.argsort(flat, kind="stable")[: round(sparsity * len(flat))]] = True
    ends = np.cumsum([array.size for array in arrays])[:-1]
    return [part.reshape(array.shape) for part, array in zip(np.split(mask, ends), arrays)]


@pytest.fixture(params=[5, pruning._CHUNK], autouse=True)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "_CHUNK", request.param)


def tensors(arrays: list[np.ndarray], dtype: torch.dtype) -> dict[str, Tensor]:
    return {str(i): torch.from_numpy(array).to(dtype) for i, array in enumerate(arrays)}


@settings(deadline=None, max_examples=60)
@given(WEIGHTS, SHARE, DTYPES)
def test_global_masks_are_those_of_a_stable_sort(arrays, sparsity, dtype):
    weights = tensors(arrays, dtype)
    masks = smallest(weights, sparsity)
    expected = by_sorting([weight.float().numpy() for weight in weights.values()], sparsity)
    assert list(masks) == list(weights)
    for mask, right in zip(masks.values(), expected):
        assert mask.dtype == torch.bool
        np.testing.assert_array_equal(mask.numpy(), right)


@settings(deadline=None, max_examples=60)
@given(WEIGHTS, SHARE, DTYPES)
def test_layer_masks_are_those_of_each_tensor_sorted_by_itself(arrays, sparsity, dtype):
    weights = tensors(arrays, dtype)
    for name, mask in smallest(weights, sparsity, "layer").items():
        np.testing.assert_array_equal(mask.numpy(), by_sorting([weights[name].float().numpy()], sparsity)[0])


@settings(deadline=None, max_examples=60)
@given(WEIGHTS, SHARE, SHARE)
def test_pruning_again_keeps_what_is_pruned(arrays, first, second):
    first, second = sorted((first, second))
    weights = tensors(arrays, torch.float32)
    before = smallest(weights, first)
    zeros, _ = sparsity_of(weights)
    for name, mask in before.items():
        weights[name][mask] = 0
    count = round(first * sum(weight.numel() for weight in weights.values()))
    assert sparsity_of(weights)[0] == max(count, zeros)
    again = smallest(weights, first)
    assert sum(int(mask.sum()) for mask in again.values()) == count
    for name, mask in smallest(weights, second).items():
        assert not (again[name] & ~mask).any()
        if zeros <= count:
            assert torch.equal(again[name], before[name])
            assert not (before[name] & ~mask).any()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), SHARE)
def test_many_weights_of_a_few_tensors(seed, sparsity):
    rng = np.random.default_rng(seed)
    arrays = [
        (rng.standard_normal(shape) * scale).astype(np.float32) for shape, scale in (((70, 30), 1), ((999,), 0.02))
    ]
    masks = smallest(tensors(arrays, torch.float32), sparsity)
    for mask, right in zip(masks.values(), by_sorting(arrays, sparsity)):
        np.testing.assert_array_equal(mask.numpy(), right)


def test_a_nan_counts_as_the_largest_and_a_view_in_another_order_is_understood():
    weight = torch.tensor([[float("nan"), 3.0, float("inf")], [1.0, -2.0, 0.0]]).t()
    assert smallest({"w": weight}, 5 / 6)["w"].tolist() == [[False, True], [True, True], [True, True]]
    assert smallest({"w": weight}, 0.5)["w"].tolist() == [[False, True], [False, True], [False, True]]


def test_no_weights_at_all():
    assert smallest({}, 0.5) == {}
    assert smallest({"w": torch.empty(0, 3)}, 0.5)["w"].shape == (0, 3)
    assert sparsity_of({}) == (0, 0)


@pytest.mark.parametrize(
    ("sparsity", "scope", "dtype"),
    [(1.5, "global", torch.float32), (-0.1, "global", torch.float32), (0.5, "row", torch.float32)]
    + [(0.5, "global", torch.float64)],
)
def test_what_cannot_be_pruned_is_refused(sparsity, scope, dtype):
    with pytest.raises(ValueError, match="sparsity|scope|double"):
        smallest({"w": torch.ones(2, 2, dtype=dtype)}, sparsity, scope)


class Model(nn.Module):
    """A model with all that pruning tells apart: tied embeddings, a shared layer, norms, biases, a head, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        layer = nn.Linear(4, 4)
        self.layers = nn.ModuleList([layer, layer])
        self.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 11)
        self.lm_head.weight = self.embed.weight
        self.classification_heads = nn.ModuleDict({"sentiment": nn.Linear(4, 2)})
        self.register_buffer("positions", torch.arange(6).view(2, 3))


def test_prunable_are_matrices_and_embeddings_once():
    model = Model()
    expected = ["embed.weight", "layers.0.weight"]
    # A state dict names shared tensors as often as they are used, and buffers.
    for weights in (dict(model.named_parameters()), model.state_dict()):
        assert list(prunable(weights)) == expected
        assert list(prunable(weights, head=True)) == [*expected, "classification_heads.sentiment.weight"]


def test_sparsity_of_counts_exact_zeros():
    weights = {"a": torch.tensor([[0.0, -0.0], [1e-45, 2.0]]), "b": torch.zeros(3, 3)}
    assert sparsity_of(weights) == (11, 13)
