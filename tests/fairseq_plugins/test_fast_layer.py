"""The quick layers, of a CPU and of a GPU, compute what fairseq's does, forwards and backwards; both on a CPU here."""

from __future__ import annotations

import pytest
import torch
from fairseq.models.transformer import TransformerConfig
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fairseq_plugins.models import fast_layer, sdpa_layer
from fairseq_plugins.models.fast_layer import SAME_QUERIES, SAME_ROWS, Setting, queries_of, tokens_of
from fairseq_plugins.models.narrow_attention import NarrowAttention

WIDTH = 4  # of a head


def stock_layer(heads: int, narrow: int | None = None) -> TransformerEncoderLayerBase:
    """fairseq's, without dropout, with all of its parameters random; `narrow` heads of them if given."""
    cfg = TransformerConfig()
    hidden = cfg.encoder.embed_dim = WIDTH * heads
    cfg.encoder.ffn_embed_dim, cfg.encoder.attention_heads, cfg.encoder.normalize_before = 3 * hidden, heads, True
    cfg.dropout, cfg.attention_dropout, cfg.activation_fn = 0.0, 0.0, "gelu"
    layer = TransformerEncoderLayerBase(cfg)
    if narrow:
        layer.self_attn = NarrowAttention(hidden, narrow, WIDTH)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return layer


def setting(layer: TransformerEncoderLayerBase, rate: float = 0.0, dtype: torch.dtype = torch.float32) -> Setting:
    return Setting(layer.self_attn.num_heads, rate, rate, dtype, (1e-5, 1e-5))


def gradients(outputs_TxH: Tensor, weights_TxH: Tensor, x: Tensor, layer: TransformerEncoderLayerBase) -> list[Tensor]:
    """Of the weighted sum of the outputs: with respect to x and to the parameters."""
    return list(torch.autograd.grad((outputs_TxH * weights_TxH).sum(), [x, *fast_layer.parameters_of(layer)]))


def assert_near(mine: list[Tensor], theirs: list[Tensor], bound: float) -> None:
    for one, other in zip(mine, theirs, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        # By the size of what it is a sum of: some gradients, as that of the keys' bias, are 0 but for rounding.
        largest = [float(each.detach().abs().max()) if len(each) else 0.0 for each in (one - other, other)]
        assert largest[0] <= bound * max(1.0, largest[1])


@pytest.mark.parametrize("quick", [fast_layer, sdpa_layer])
@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 3),
    st.none() | st.integers(1, 4),
    st.lists(st.integers(1, 7), min_size=1, max_size=4),
    st.none() | st.floats(0, 1),
    st.integers(0, 99),
)
def test_outputs_and_gradients_are_fairseqs_with_padding_and_without(quick, heads, narrow, lengths, share, seed):
    """And where only a `share` of the tokens is wanted."""
    torch.manual_seed(seed)
    layer = stock_layer(heads, narrow)
    batch, length, hidden = len(lengths), max(lengths), WIDTH * heads
    padding_BxL = torch.arange(length) >= torch.tensor(lengths)[:, None]
    real = padding_BxL.logical_not()
    wanted = real if share is None else real & (torch.rand(real.shape) < share)
    x_BxLxH = torch.randn(batch, length, hidden)
    weights_TxH = torch.randn(int(wanted.sum()), hidden)

    theirs_x = x_BxLxH.clone().requires_grad_()
    theirs = layer(theirs_x.transpose(0, 1), padding_BxL).transpose(0, 1)[wanted]
    d_theirs = gradients(theirs, weights_TxH, theirs_x, layer)

    tokens = tokens_of(padding_BxL if bool(padding_BxL.any()) else None, batch, length)
    d_theirs[0] = tokens.gather(d_theirs[0].view(-1, hidden))
    mine_x = tokens.gather(x_BxLxH.view(-1, hidden)).clone().requires_grad_()
    queries = None if share is None else queries_of(wanted, tokens)
    mine = quick.encoder_layer(mine_x, tokens, setting(layer), fast_layer.parameters_of(layer), queries)
    mine = mine[tokens.gather(real.view(-1, 1)).flatten() if queries is None else queries.wanted]
    assert_near([mine], [theirs], 1e-5)
    assert_near(gradients(mine, weights_TxH, mine_x, layer), d_theirs, 2e-5)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any))
def test_next_to_no_padding_is_computed_and_sizes_come_again(lengths):
    padding_BxL = torch.arange(40) >= torch.tensor(lengths)[:, None]
    tokens = tokens_of(padding_BxL, len(lengths), 40)
    assert tokens.places is not None
    rows = set(tokens.places.tolist())
    assert len(rows) == len(tokens.places)
    assert tokens.places.tolist() == sorted(rows)
    real = set(padding_BxL.logical_not().flatten().nonzero().flatten().tolist())
    assert real <= rows
    room = 40 * sum(length > 0 for length in lengths)
    assert len(rows) == min(room, len(real) + -len(real) % SAME_ROWS)
    assert all(lengths[row // 40] for row in rows)  # a sentence of padding alone has nothing to look at

    wanted_BxL = padding_BxL.logical_not() & (torch.rand(padding_BxL.shape) < 0.5)
    queries = queries_of(wanted_BxL, tokens)
    assert len(queries.rows) % len(lengths) == 0
    most = len(queries.rows) // len(lengths)
    assert most == 1 or most % SAME_QUERIES == 0 or most == 40
    assert torch.equal(tokens.places[queries.rows[queries.wanted]], wanted_BxL.flatten().nonzero().flatten())


def random_input(hidden: int) -> tuple[Tensor, Tensor, fast_layer.Tokens]:
    return torch.randn(2 * 6, hidden, requires_grad=True), torch.randn(2 * 6, hidden), tokens_of(None, 2, 6)


@pytest.mark.parametrize("quick", [fast_layer, sdpa_layer])
def test_bf16_stays_near(quick):
    torch.manual_seed(4)
    layer = stock_layer(3)
    x, weights, tokens = random_input(3 * WIDTH)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        y = quick.encoder_layer(x, tokens, setting(layer, dtype=dtype), fast_layer.parameters_of(layer))
        found.append([y, *gradients(y, weights, x, layer)])
    assert not torch.equal(found[0][0], found[1][0])
    assert_near(found[0], found[1], 0.05)


@pytest.mark.parametrize("which", ["dropout", "attention_dropout"])
def test_the_gradient_is_that_of_what_was_dropped(which):
    """Against differences of the outputs, with the same numbers dropped each time."""
    torch.manual_seed(5)
    layer = stock_layer(2)
    rates = {"dropout": 0.0, "attention_dropout": 0.0} | {which: 0.4}
    own = Setting(2, rates["dropout"], rates["attention_dropout"], torch.float32, (1e-5, 1e-5))
    x, weights, tokens = random_input(2 * WIDTH)
    parameters = fast_layer.parameters_of(layer)

    def loss() -> Tensor:
        torch.manual_seed(6)
        return (fast_layer.encoder_layer(x, tokens, own, parameters) * weights).double().sum()

    things = [x, *parameters]
    dropped_loss = loss()
    slopes = torch.autograd.grad(dropped_loss, things)
    assert float(dropped_loss) != float((layer(x.view(2, 6, -1).transpose(0, 1), None)).sum())
    for thing, slope in zip(things, slopes, strict=True):
        direction, step = torch.randn_like(thing), 1e-2
        with torch.no_grad():
            thing.add_(direction, alpha=step)
            above = float(loss())
            thing.sub_(direction, alpha=2 * step)
            below = float(loss())
            thing.add_(direction, alpha=step)
        expected = (above - below) / (2 * step)
        assert float((slope * direction).sum()) == pytest.approx(expected, rel=0.02, abs=0.02)


@pytest.mark.parametrize("quick", [fast_layer, sdpa_layer])
def test_what_is_dropped_keeps_the_mean(quick):
    """Over many draws the outputs are those without dropout, where the function is linear in what is dropped."""
    torch.manual_seed(7)
    layer = stock_layer(2)
    with torch.no_grad():
        layer.fc2.weight.zero_()  # what comes after the attention is not linear in it
        layer.fc2.bias.zero_()
    x, _, tokens = random_input(2 * WIDTH)
    parameters = fast_layer.parameters_of(layer)
    with torch.no_grad():
        expected = fast_layer.encoder_layer(x, tokens, setting(layer), parameters)
        draws = torch.stack([quick.encoder_layer(x, tokens, setting(layer, 0.3), parameters) for _ in range(3000)])
    error = draws.std(0) / len(draws) ** 0.5
    assert float(((draws.mean(0) - expected).abs() / error).max()) < 6
