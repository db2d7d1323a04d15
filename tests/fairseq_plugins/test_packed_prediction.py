"""train_large.compression.runtime against fairseq's own model on the unpacked weights."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.data.encoders.gpt2_bpe import GPT2BPE, GPT2BPEConfig
from fairseq.models.roberta.model import RobertaModel, base_architecture
from torch import Tensor

from fairseq_plugins.models.prenorm_roberta import PrenormRobertaModel
from train_large.compression import kernels, network, onednn, runtime
from train_large.compression.checkpoint import stock_form
from train_large.compression.kernels import BFLOAT16, FLOAT32, INT8, INT16, INT24, PRECISIONS, finer, supported
from train_large.compression.packed import write_packed
from train_large.compression.quantization import Quantized, dequantize, quantize_tensor
from train_large.compression.runtime import Model, load_model, predict_lines
from train_large.compression.storage import tied_to
from train_large.data.bpe import train_bpe
from train_large.errors import UserError

TASK = {"init_token": 0, "separator_token": 2}
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "it",
    "was",
    "good",
    "but",
    "not",
    "very",
    "bad",
    "so",
    "we",
    "went",
]


class Task:
    def __init__(self, entries: int = 60) -> None:
        self.source_dictionary = Dictionary()
        for i in range(entries - 5):
            self.source_dictionary.add_symbol(str(i))
        self.source_dictionary.add_symbol("<mask>")


WIDE = {"encoder_embed_dim": 64}  # fills the tiles of a CPU's kernels


def build(stock: bool = False, heads: Sequence[str] = ("head",), classes: int = 3, **args: Any) -> RobertaModel:
    """A model with weights large enough that its labels differ from sentence to sentence."""
    defaults = {"encoder_layers": 3, "encoder_embed_dim": 32, "encoder_attention_heads": 4, "max_positions": 20}
    torch.manual_seed(1)
    namespace = argparse.Namespace(**{**defaults, **args})
    if stock:
        base_architecture(namespace)
    model = (RobertaModel if stock else PrenormRobertaModel).build_model(namespace, Task())
    for head in heads:
        model.register_classification_head(head, num_classes=classes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
        model.encoder.sentence_encoder.embed_tokens.weight[1] = 0  # as training keeps it
    return model.eval()


def pack(model: RobertaModel, bits: int, granularity: str = "tensor") -> dict[str, Quantized | Tensor]:
    """The model's tensors as a packed file has them; the model itself gets the weights that they stand for."""
    state = model.state_dict()
    first = tied_to(state)
    tensors: dict[str, Quantized | Tensor] = {}
    for name, weight in state.items():
        if name not in first or bits == 32:
            tensors[name] = weight.clone()
        elif first[name] == name:
            tensors[name] = quantize_tensor(weight, bits, granularity)
    tensors = {name: tensors[first.get(name, name)] for name in state}
    model.load_state_dict({n: dequantize(t) if isinstance(t, Quantized) else t for n, t in tensors.items()})
    return tensors


def checkpoint(model: RobertaModel) -> dict[str, Any]:
    cfg = {"model": {**vars(model.args), "arch": "prenorm_roberta", "_name": "prenorm_roberta"}, "task": TASK}
    if not isinstance(model, PrenormRobertaModel):
        cfg["model"].update(arch="roberta", _name="roberta")
    return {
        key: value for key, value in stock_form({"cfg": cfg, "model": model.state_dict()}).items() if key != "model"
    }


def load(model: RobertaModel, bits: int, activations: str = FLOAT32, granularity: str = "tensor", **more: Any) -> Model:
    return Model.from_tensors(pack(model, bits, granularity), checkpoint(model), {}, activations, **more)


def sentences(count: int, longest: int = 20) -> list[list[int]]:
    draw = torch.Generator().manual_seed(7)
    lengths = torch.randint(1, longest + 1, (count,), generator=draw).tolist()
    return [[0, *torch.randint(4, 60, (length - 1,), generator=draw).tolist()] for length in lengths]


@torch.no_grad()
def by_fairseq(model: RobertaModel, ids: Sequence[Sequence[int]], head: str = "head") -> Tensor:
    """In one padded batch."""
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(s) for s in ids], batch_first=True, padding_value=1)
    return model(padded, classification_head_name=head)[0]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 32])
@pytest.mark.parametrize("granularity", ["tensor", "row", "group:16"])
def test_float32_gives_the_logits_of_the_unpacked_model(bits: int, granularity: str) -> None:
    model = build()
    packed = load(model, bits, granularity=granularity)
    ids = sentences(40)
    logits, again = packed.logits(ids)
    torch.testing.assert_close(logits, by_fairseq(model, ids), rtol=1e-5, atol=1e-5)
    assert not again.any()


SHAPES: dict[str, dict[str, Any]] = {
    "shared": {"share_layers": "all"},
    "shared attention": {"share_layers": "attention"},
    "no embedding norm": {"no_embedding_norm": True},
    "shrunk": {"layer_heads": "4,1,2", "layer_ffn": "128,17,30"},
    "one layer": {"encoder_layers": 1},
    "stock, norms after": {"stock": True},
    "untied": {"untie_weights_roberta": True},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", [0, 0.6])
def test_shapes(shape: str, sparsity: float) -> None:
    model = build(**SHAPES[shape])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter[torch.rand_like(parameter) < sparsity] = 0
    packed = load(model, 5)
    ids = sentences(20)
    torch.testing.assert_close(packed.logits(ids)[0], by_fairseq(model, ids), rtol=1e-5, atol=1e-5)
    state = model.state_dict()
    distinct = sum(state[name].numel() for name, first in tied_to(state).items() if name == first)
    assert packed.network.nbytes < 4 * distinct * (0.6 if shape != "untied" else 0.7)


def test_the_same_weights_are_in_memory_once() -> None:
    built = load(build(share_layers="all"), 4).network
    assert built.layers[0].fc1.weight is built.layers[2].fc1.weight
    assert built.word_head is not None
    assert built.word_head.words is built.tokens
    assert built.nbytes == sum({id(weight): weight.nbytes for weight in built.resident}.values())
    apart = load(build(share_layers="attention"), 4).network
    assert apart.layers[0].inputs[0].weight is apart.layers[2].inputs[0].weight
    assert apart.layers[0].fc1.weight is not apart.layers[2].fc1.weight


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_in_all_shapes(shape: str) -> None:
    if not supported(INT8):
        pytest.skip("not on this CPU")
    model = build(**SHAPES[shape])
    packed = load(model, 6, INT8)
    ids = sentences(20)
    expected = by_fairseq(model, ids)
    raw = packed._logits([torch.tensor(one) for one in ids], INT8)
    assert 1e-6 < (raw - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("activations", [INT8, INT16, BFLOAT16])
@pytest.mark.parametrize("bits", [8, 6, 4])
def test_labels_are_those_of_the_unpacked_model(activations: str, bits: int) -> None:
    if not supported(activations):
        pytest.skip("not on this CPU")
    model = build()
    packed = load(model, bits, activations)
    ids = sentences(400)
    logits, again = packed.logits(ids)
    expected = by_fairseq(model, ids)
    assert len(expected.argmax(1).unique()) > 1
    assert torch.equal(logits.argmax(1), expected.argmax(1))
    # Close calls go to the next finer numbers, and no others.
    tensors, chosen, expected_again = [torch.tensor(s) for s in ids], torch.arange(400), torch.zeros(400, dtype=bool)
    for doubt, precision in zip(packed.doubts, (activations, *finer(activations))):
        raw = packed._logits([tensors[i] for i in chosen], precision)
        best = raw.topk(2).values
        close = best[:, 0] - best[:, 1] < doubt
        assert torch.equal(logits[chosen[~close]], raw[~close])
        assert (raw - expected[chosen]).abs().max() < doubt
        chosen = chosen[close]
        expected_again[chosen] = True
    assert torch.equal(again, expected_again)
    assert len(packed.doubts) == len(finer(activations))
    assert 0 < again.sum() < 400 or activations == INT16
    if len(chosen):
        torch.testing.assert_close(logits[chosen], expected[chosen], rtol=1e-5, atol=1e-5)
    assert (logits - expected)[~again].abs().max() > (1e-5 if activations != INT16 else 1e-7)


@pytest.mark.parametrize("activations", [INT8, INT16, INT24])
def test_labels_of_a_model_with_a_few_pruned_weights(activations: str) -> None:
    if not supported(activations):
        pytest.skip("not on this CPU")
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter[torch.rand_like(parameter) < 0.02] = 0
    packed = load(model, 3, activations)
    assert not packed.network.is_exact_in_codes
    assert packed.deciding == (activations, FLOAT32)
    ids = sentences(400)
    logits, again = packed.logits(ids)
    expected = by_fairseq(model, ids)
    assert torch.equal(logits.argmax(1), expected.argmax(1))
    torch.testing.assert_close(logits[again], expected[again], rtol=1e-5, atol=1e-5)
    assert again.sum() > 0


LAYER = "encoder.sentence_encoder.layers.1."


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("encoder.sentence_encoder.embed_tokens.weight", (60, 31)),
        ("encoder.sentence_encoder.embed_positions.weight", (22, 31)),
        ("encoder.sentence_encoder.layer_norm.weight", (31,)),
        (f"{LAYER}self_attn.out_proj.weight", (31, 32)),
        (f"{LAYER}self_attn.q_proj.bias", (31,)),
        (f"{LAYER}final_layer_norm.bias", (33,)),
        (f"{LAYER}fc1.weight", (128, 31)),
        (f"{LAYER}fc2.weight", (32, 127)),
        (f"{LAYER}fc2.weight", (31, 128)),
        ("classification_heads.head.dense.weight", (32, 31)),
        ("classification_heads.head.out_proj.weight", (3, 31)),
        ("encoder.lm_head.dense.weight", (32, 31)),
        ("encoder.lm_head.bias", (59,)),
    ],
)
def test_tensors_that_do_not_fit_each_other(name: str, shape: tuple[int, ...]) -> None:
    model = build()
    tensors = pack(model, 32)
    assert Model.from_tensors(tensors, checkpoint(model), {}, FLOAT32).classes == 3
    tensors[name] = torch.zeros(shape)
    with pytest.raises(UserError, match=name.rsplit(".", 1)[0].removesuffix(".out_proj").replace(".", r"\.")):
        Model.from_tensors(tensors, checkpoint(model), {}, FLOAT32)


@pytest.mark.parametrize(("positions", "seen"), [(60, True), (59, False)])
def test_rougher_attention_to_long_sentences_is_in_the_doubts(
    monkeypatch: pytest.MonkeyPatch, positions: int, seen: bool
) -> None:
    """Errors that only sentences have which are longer than those of the first trial."""
    if not supported(INT8):
        pytest.skip("not on this CPU")
    model, mix = build(max_positions=positions), network._mix
    monkeypatch.setattr(network, "rough_lengths", lambda precision: range(0))
    even = load(model, 8, INT8).doubts

    def rougher(q: Tensor, k: Tensor, v: Tensor, heads: int, rough: range = range(0)) -> Tensor:
        found = mix(q, k, v, heads)
        return found + torch.randn(found.shape) if len(k) in rough else found

    monkeypatch.setattr(network, "_mix", rougher)
    monkeypatch.setattr(network, "rough_lengths", lambda precision: range(60, 100) if precision == INT8 else range(0))
    assert (load(model, 8, INT8).doubts[0] > 5 * even[0]) is seen


@pytest.mark.parametrize("bits", [8, 4])
def test_a_chain_of_close_calls_ends_where_it_is_exact(bits: int) -> None:
    """With a doubt that nothing passes, all is decided by the last: as exact as float32."""
    if not supported(INT16):
        pytest.skip("not on this CPU")
    model = build()
    packed = replace(load(model, bits, INT8), doubts=(1e9, 1e9))
    ids = sentences(60)
    logits, again = packed.logits(ids)
    assert again.all()
    torch.testing.assert_close(logits, by_fairseq(model, ids), rtol=1e-5, atol=1e-5)
    tensors = [torch.tensor(one) for one in ids]
    assert torch.equal(replace(packed, doubts=(1e9,)).logits(ids)[0], packed._logits(tensors, INT16))
    assert torch.equal(replace(packed, doubts=()).logits(ids)[0], packed._logits(tensors, INT8))


@pytest.mark.parametrize("activations", PRECISIONS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_sentence_does_not_see_its_batch(activations: str, threads: int, request: pytest.FixtureRequest) -> None:
    if not supported(activations):
        pytest.skip("not on this CPU")
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    torch.set_num_threads(threads)
    model = build(max_positions=200)
    packed = load(model, 6, activations)
    ids = sentences(12, longest=200)
    together, _ = packed.logits(ids)
    alone = torch.cat([packed.logits([one])[0] for one in ids])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6 if activations in kernels.IN_CODES else 1e-5)


def test_masked_words() -> None:
    model = build(heads=())
    packed = load(model, 4)
    ids = [torch.tensor(one + [59] + [5] * 3) for one in sentences(6, longest=15)]
    places = [torch.tensor([len(one) - 4]) for one in ids]
    with torch.inference_mode():
        found = network.features(packed.network, ids, places, FLOAT32)
        logits = network.word_logits(packed.network.word_head, found)
        expected = torch.cat([model(one[None])[0][0, place] for one, place in zip(ids, places)])
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "hidden", "bits", "zeros"),
    [
        *((6, 512, bits, 0) for bits in range(2, 9)),
        *((12, 768, bits, 0) for bits in (4, 6, 8)),
        (6, 512, 4, 0.03),  # a bit that tells, and little that is saved
    ],
)
def test_resident_weights_are_k_bits_and_3_per_cent(layers: int, hidden: int, bits: int, zeros: float) -> None:
    shapes = {
        "embed_tokens": (50265, hidden),
        "embed_positions": (514, hidden),
        "layernorm_embedding": (hidden,),
        "layer_norm": (hidden,),
    }
    for i in range(layers):
        for name, shape in (("fc1", (4 * hidden, hidden)), ("fc2", (hidden, 4 * hidden))):
            shapes[f"layers.{i}.{name}"] = shape
        shapes |= {f"layers.{i}.self_attn.{part}_proj": (hidden, hidden) for part in ("q", "k", "v", "out")}
        shapes |= {f"layers.{i}.{norm}_layer_norm": (hidden,) for norm in ("self_attn", "final")}
    shapes = {f"encoder.sentence_encoder.{name}": shape for name, shape in shapes.items()}
    shapes |= {"classification_heads.head.dense": (hidden, hidden), "classification_heads.head.out_proj": (2, hidden)}
    shapes |= {"encoder.lm_head.dense": (hidden, hidden), "encoder.lm_head.layer_norm": (hidden,)}
    tensors: dict[str, Quantized | Tensor] = {}
    for name, shape in shapes.items():
        indices = torch.randint(2**bits, shape, dtype=torch.uint8)
        mask = torch.rand(shape) >= zeros if zeros else None
        tensors[f"{name}.weight"] = Quantized(indices, torch.tensor([-1.0]), torch.tensor([0.1]), mask, "tensor", bits)
        if "embed_" not in name:
            tensors[f"{name}.bias"] = torch.zeros(shape[0])
    tensors["encoder.lm_head.weight"] = tensors["encoder.sentence_encoder.embed_tokens.weight"]
    tensors["encoder.lm_head.bias"] = torch.zeros(50265)
    cfg = {"encoder_layers": layers, "encoder_embed_dim": hidden, "encoder_attention_heads": hidden // 64}
    distinct = {id(t): t.indices.numel() if isinstance(t, Quantized) else t.numel() for t in tensors.values()}
    fp32 = 4 * sum(distinct.values())
    for precision in filter(supported, (INT8, BFLOAT16, FLOAT32)):
        packed = Model.from_tensors(
            tensors, {"cfg": {"model": {**cfg, "encoder_normalize_before": True}}}, {}, precision
        )
        assert packed.resident_bytes() <= (bits / 32 + 0.03 + (1 / 32 if zeros else 0)) * fp32


@pytest.mark.parametrize("tokens", [1, network._SHORT, network._SHORT + 1])
def test_attention_of_short_and_of_long_sentences(tokens: int) -> None:
    (q, k, v), expected = attention(tokens, heads=3)
    torch.testing.assert_close(network._mix(q, k, v, 3).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "bf16"), [(63, False), (64, True), (100, True), (200, True), (512, True), (513, False)]
)
def test_rough_attention(tokens: int, bf16: bool) -> None:
    (q, k, v), expected = attention(tokens, heads=3)
    found = network._mix(q, k, v, 3, network._ROUGHLY)
    assert found.dtype == torch.float32
    error = float((found.double() - expected).abs().max())
    assert (1e-5 if bf16 else 0) < error < (2e-2 if bf16 else 1e-6)


@pytest.mark.parametrize("precision", [INT8, BFLOAT16, INT16, FLOAT32])
@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("amx", [True, False])
def test_where_attention_is_rough(monkeypatch: pytest.MonkeyPatch, precision: str, bf16: bool, amx: bool) -> None:
    """With AMX all of it is in bfloat16, so that no lengths differ."""
    monkeypatch.setattr(kernels, "supported", lambda other: bf16 and other == BFLOAT16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    found = network.rough_lengths(precision)
    wanted = precision in (INT8, BFLOAT16) and bf16 and not amx
    assert [length for length in range(1, 2000) if length in found] == (list(range(64, 513)) if wanted else [])


def attention(tokens: int, heads: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Queries of two places, keys and values of all, and what comes out, in float64."""
    width, asked = 8, 2
    q, k, v = (torch.randn(count, heads * width) for count in (asked, tokens, tokens))
    q_RxAxD, k_TxAxD, v_TxAxD = (x.double().view(len(x), heads, width) for x in (q, k, v))
    scores_AxRxT = torch.einsum("rad,tad->art", q_RxAxD, k_TxAxD) / math.sqrt(width)
    expected_RxAxD = torch.einsum("art,tad->rad", scores_AxRxT.exp() / scores_AxRxT.exp().sum(2, True), v_TxAxD)
    return (q, k, v), expected_RxAxD.flatten(1)


def waiting(model: RobertaModel, tensors: dict[str, Quantized | Tensor], allowed: int = 0) -> network.Network:
    return network.keep_ready(network.build(tensors, checkpoint(model)["cfg"]["model"]), allowed, {INT8})


def used(found: network.Network) -> int:
    return found.nbytes + found.scratch_nbytes(INT8)


def is_ready(weight: Any) -> bool:
    return weight.tiles is not None and not isinstance(weight.tiles, onednn.Folded)


def test_weights_are_kept_ready_as_far_as_there_is_room() -> None:
    model = build(share_layers="attention", encoder_layers=9, **WIDE)
    tensors = pack(model, 6)
    least = used(waiting(model, tensors))
    built = network.build(tensors, checkpoint(model)["cfg"]["model"])
    if not any(is_ready(m.weight) for layer in waiting(model, tensors, 10**9).layers for m in layer.maps):
        pytest.skip("this torch cannot keep codes ready")
    order = [built.layers[0].fc2, built.layers[0].fc1, built.layers[0].inputs[0], built.layers[0].out]
    more = [kernels.in_tiles_nbytes(m.weight) - m.weight.codes_nbytes for m in order]
    counts = []
    for allowed in range(least, least + 9 * sum(more), more[1]):
        found = waiting(model, tensors, allowed)
        assert used(found) <= allowed
        layers = [[is_ready(m.weight) for m in (layer.fc2, layer.fc1, *layer.maps[:2])] for layer in found.layers]
        # The longest rows come first, then the largest weights. The shared attention counts once.
        fc2, fc1, inputs, out = map(sum, zip(*layers))
        assert fc2 == 9 or not fc1
        assert fc1 == 9 or not inputs
        assert inputs == 9 or not out
        assert inputs in (0, 9)
        assert out in (0, 9)
        counts.append(fc2 + fc1 + inputs // 9 + out // 9)
    assert counts[0] == 0
    assert counts == sorted(counts)
    assert len(set(counts)) > 8
    assert max(counts) == 20
    everything = waiting(model, tensors, least + 9 * sum(more))
    assert everything.scratch_nbytes(INT8) == 0
    assert everything.layers[0].out.weight is everything.layers[8].out.weight


def test_those_of_8_bits_are_always_ready() -> None:
    model = build(**WIDE)
    for layer in waiting(model, pack(model, 8)).layers:
        # FBGEMM fills such narrow matrices up.
        assert all((m.weight.tiles is not None) == onednn.available() for m in layer.maps)


@pytest.mark.parametrize("shared", ["none", "all"])
def test_weights_that_wait_are_in_the_order_of_tiles(shared: str) -> None:
    if not onednn.available() or onednn.room(64, 64) is None:
        pytest.skip("not on this CPU")
    model = build(share_layers=shared, **WIDE)
    tensors = pack(model, 4)
    found, built = waiting(model, tensors), network.build(tensors, checkpoint(model)["cfg"]["model"])
    weights = [m.weight for layer in found.layers for m in layer.maps]
    assert all(isinstance(weight.tiles, onednn.Folded) for weight in weights)
    assert found.nbytes == built.nbytes
    assert len({id(weight) for weight in weights}) == (4 if shared == "all" else 12)
    # A room for each shape, for all layers.
    assert found.scratch_nbytes(INT8) == sum({w.shape: kernels.in_tiles_nbytes(w) for w in weights}.values())
    for layer in found.layers:
        for stage in layer.stages:
            assert len({id(kernels.room(m.weight)) for m in stage}) == len(stage)
    ids = [torch.tensor(one) for one in sentences(20)]
    packed, ready = load(model, 4), waiting(model, tensors, 10**9)
    for precision in PRECISIONS:
        assert torch.equal(*(replace(packed, network=each)._logits(ids, precision) for each in (found, ready)))


def test_projections_that_stay_apart_have_rooms_of_their_own() -> None:
    """Queries, keys and values of different bits, which are not one matrix, are multiplied in turn."""
    if not onednn.available() or onednn.room(64, 64) is None:
        pytest.skip("not on this CPU")
    model = build(**WIDE)
    tensors = pack(model, 4)
    for name, tensor in tensors.items():
        if "k_proj.weight" in name:
            tensors[name] = quantize_tensor(dequantize(tensor), 5)
    found, ready = (waiting(model, tensors, allowed) for allowed in (0, 10**9))
    assert len(found.layers[0].inputs) == 3
    assert len({id(kernels.room(m.weight)) for m in found.layers[0].stages[0]}) == 4
    ids = [torch.tensor(one) for one in sentences(20)]
    packed = load(model, 4)
    assert torch.equal(*(replace(packed, network=each)._logits(ids, INT8) for each in (found, ready)))


def test_a_weight_of_two_places_has_no_room() -> None:
    """The values of one layer are the projection behind another's attention: they could be wanted at the same time."""
    if not onednn.available() or onednn.room(64, 64) is None:
        pytest.skip("not on this CPU")
    model = build(**WIDE)
    tensors = pack(model, 4)
    names = [f"encoder.sentence_encoder.layers.{i}.self_attn.{part}_proj.weight" for i, part in ((0, "v"), (1, "out"))]
    tensors["encoder.sentence_encoder.layers.0.self_attn.k_proj.weight"] = quantize_tensor(torch.randn(64, 64), 5)
    tensors[names[0]] = tensors[names[1]]
    found = waiting(model, tensors)
    twice = found.layers[0].inputs[2].weight
    assert twice is found.layers[1].out.weight
    assert kernels.room(twice) is None
    assert kernels.room(found.layers[0].out.weight) is not None


def test_two_threads_may_predict_with_one_model() -> None:
    if not supported(INT8):
        pytest.skip("not on this CPU")
    model = build(max_positions=200, **WIDE)
    packed = load(model, 5, INT8)
    packed = replace(packed, network=waiting(model, pack(model, 5)))
    work = [sentences(3, longest=60), sentences(5, longest=100)]
    expected = [packed.logits(ids)[0] for ids in work]
    with ThreadPoolExecutor(2) as threads:
        for _ in range(20):
            for found, one in zip(threads.map(lambda ids: packed.logits(ids)[0], work), expected):
                torch.testing.assert_close(found, one, rtol=0, atol=2e-6)


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_ready_weights_compute_the_same(bits: int) -> None:
    if not supported(INT8):
        pytest.skip("not on this CPU")
    for model in (build(), build(**WIDE)):
        tensors = pack(model, bits, "row")
        packed = load(model, bits, INT8, "row")
        ids = [torch.tensor(one) for one in sentences(20)]
        few, many = (replace(packed, network=waiting(model, tensors, allowed)) for allowed in (0, 10**9))
        for precision in filter(supported, (INT8, INT24, FLOAT32)):
            torch.testing.assert_close(many._logits(ids, precision), few._logits(ids, precision), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("option", "value"), [("activation_fn", "relu"), ("pooler_activation_fn", "relu"), ("encoder_learned_pos", False)]
)
def test_what_is_not_computed_here_is_refused_by_its_flag(option: str, value: object) -> None:
    model = build()
    setattr(model.args, option, value)
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')} {value}"):
        load(model, 4)


def test_heads_and_activations() -> None:
    model = build(heads=("one", "two"))
    with pytest.raises(UserError, match="one, two"):
        load(model, 4)
    with pytest.raises(UserError, match="--head three"):
        load(model, 4, head="three")
    packed = load(model, 4, head="two")
    torch.testing.assert_close(
        packed.logits([[0, 5, 2]])[0], by_fairseq(model, [[0, 5, 2]], "two"), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(UserError, match="--activations int4"):
        load(model, 4, "int4", head="two")
    tensors = pack(model, 4)
    del tensors["encoder.sentence_encoder.layers.1.fc1.weight"]
    with pytest.raises(UserError, match=r"layers\.1\.fc1\.weight"):
        network.build(tensors, checkpoint(model)["cfg"]["model"])


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """A BPE, and a dictionary in which it has the order of its numbers backwards, two of them missing."""
    files = train_bpe([" ".join(WORDS)] * 3, 300)
    count = files["encoder.json"].count(": ")
    entries = [f"{i} 1\n" for i in reversed(range(count)) if i not in (40, 50)]
    return {**files, "dict.txt": "".join(entries), "labels.txt": "bad 7\nmiddling 6\ngood 5\nmadeupword0000 0\n"}


def write(model: RobertaModel, files: dict[str, str], path: Path, **task: Any) -> Path:
    by_object: dict[int, str] = {}
    tensors = [(name, by_object.setdefault(id(t), name), t) for name, t in pack(model, 6).items()]
    rest = checkpoint(model)
    rest["cfg"]["task"] = {**TASK, **task}
    write_packed(((name, t if name == first else first) for name, first, t in tensors), rest, files, path)
    return path


def encoded(texts: dict[str, str], folder: Path, *parts: str) -> list[int]:
    """By fairseq's BPE and dictionary, joined as its task does."""
    for name in ("encoder.json", "vocab.bpe", "dict.txt"):
        (folder / name).write_text(texts[name])
    bpe = GPT2BPE(
        GPT2BPEConfig(gpt2_encoder_json=str(folder / "encoder.json"), gpt2_vocab_bpe=str(folder / "vocab.bpe"))
    )
    dictionary = Dictionary.load(str(folder / "dict.txt"))
    ids = [0]
    for number, part in enumerate(parts):
        ids += [2] * bool(number)
        ids += dictionary.encode_line(bpe.encode(part), append_eos=True, add_if_not_exist=False).tolist()
    return ids


def text_model(texts: dict[str, str], heads: Sequence[str]) -> RobertaModel:
    entries = len(texts["dict.txt"].splitlines()) + 5
    task = Task(entries)
    torch.manual_seed(3)
    args = argparse.Namespace(encoder_layers=2, encoder_embed_dim=32, encoder_attention_heads=4, max_positions=24)
    model = PrenormRobertaModel.build_model(args, task)
    for head in heads:
        model.register_classification_head(head, num_classes=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


LINES = ["the cat sat on a mat", "  it was good  ", "", "so bad\tnot very good", "x(>y", " ".join(WORDS * 2)]


def test_a_label_behind_a_sentence_is_noticed(
    texts: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(text_model(texts, ["head"]), texts, tmp_path / "model.packed")
    runtime._tell_of_labels.cache_clear()
    pairs = list(predict_lines(path, ["the cat\tgood", "so bad\tnot very good"], batch=1))
    assert capsys.readouterr().err.count("note: ") == 1
    runtime._tell_of_labels.cache_clear()
    assert pairs[1:] == list(predict_lines(path, ["so bad\tnot very good"]))
    assert not capsys.readouterr().err
    list(predict_lines(path, ["the cat\tso bad\tgood"]))
    assert "cut -f 1,2" in capsys.readouterr().err


def test_lines_of_text(texts: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = text_model(texts, ["head"])
    path = write(model, texts, tmp_path / "model.packed")
    ids = [encoded(texts, tmp_path, *(part.strip() for part in line.split("\t"))) for line in LINES]
    assert len(ids[-1]) > 24
    expected = by_fairseq(model, [one[:24] for one in ids]).softmax(1)
    names = ["bad", "middling", "good"]
    printed = list(predict_lines(path, (line + "\n" for line in LINES), FLOAT32, batch=4, top=3))
    assert "cut after 24 tokens" in capsys.readouterr().err
    for line, probabilities in zip(printed, expected, strict=True):
        best = probabilities.argsort(descending=True).tolist()
        words = line.split("\t")
        assert words[::2] == [names[i] for i in best]
        assert [float(word) for word in words[1::2]] == pytest.approx(probabilities[best].tolist(), abs=6e-5)
    auto = list(predict_lines(path, LINES, batch=1))
    assert [line.split("\t")[0] for line in auto] == [names[i] for i in expected.argmax(1).tolist()]


def test_no_lines_have_no_labels(texts: dict[str, str], tmp_path: Path) -> None:
    for heads, name in ((["head"], "classify"), ([], "fill_mask")):
        model = load_model(write(text_model(texts, heads), texts, tmp_path / "model.packed"))
        assert getattr(model, name)([]) == []


def test_lines_are_read_a_batch_at_a_time(texts: dict[str, str], tmp_path: Path) -> None:
    path = write(text_model(texts, ["head"]), texts, tmp_path / "model.packed")
    read: list[str] = []
    printed = predict_lines(path, (read.append(line) or line for line in LINES), FLOAT32, batch=2)
    next(printed)
    assert len(read) == 2


def test_lines_before_one_that_cannot_be_read(texts: dict[str, str], tmp_path: Path) -> None:
    path = write(text_model(texts, ["head"]), texts, tmp_path / "model.packed")

    def lines() -> Iterator[str]:
        yield from LINES[:3]
        raise UserError("line 4 is broken")

    expected = list(predict_lines(path, LINES[:3], FLOAT32))
    for batch in (1, 2, 3, 32):
        found = predict_lines(path, lines(), FLOAT32, batch=batch)
        assert [next(found) for _ in range(3)] == expected
        with pytest.raises(UserError, match="line 4"):
            next(found)


@pytest.mark.parametrize("classes", [1, 3])
def test_scores_of_a_regression_are_no_classes(texts: dict[str, str], tmp_path: Path, classes: int) -> None:
    """All of them are printed, and names of classes that lie beside the data are not asked for."""
    model = text_model(texts, [])
    model.register_classification_head("head", num_classes=classes)
    path = write(model.eval(), texts, tmp_path / "model.packed", regression_target=True)
    ids = [encoded(texts, tmp_path, line.strip()) for line in LINES[:3]]
    expected = by_fairseq(model, ids).tolist()
    for activations, within in ((FLOAT32, 6e-5), ("auto", 0.2)):
        printed = list(predict_lines(path, LINES[:3], activations, top=2))
        words = [line.split("\t") for line in printed]
        assert [[float(word) for word in row[::2]] for row in words] == [pytest.approx(e, abs=within) for e in expected]
        assert {word for row in words for word in row[1::2]} == {"1.0000"}


def test_lines_with_a_mask(texts: dict[str, str], tmp_path: Path) -> None:
    model = text_model(texts, [])
    path = write(model, texts, tmp_path / "model.packed")
    [line] = predict_lines(path, ["the cat <mask> on a mat"], FLOAT32, top=2)
    before, after = encoded(texts, tmp_path, "the cat")[:-1], encoded(texts, tmp_path, " on a mat")[1:]
    mask = len(texts["dict.txt"].splitlines()) + 4
    with torch.no_grad():
        probabilities = model(torch.tensor([[*before, mask, *after]]))[0][0, len(before)].softmax(0)
    best = probabilities.topk(2)
    words = line.split("\t")
    assert [float(word) for word in words[1::2]] == pytest.approx(best.values.tolist(), abs=6e-5)
    assert words[::2] == [load_model(path)._vocabulary.word(i) for i in best.indices.tolist()]
    [everything] = predict_lines(path, ["the cat <mask>"], FLOAT32, top=10**6)
    words = everything.split("\t")
    assert len(words) == 2 * (mask + 1)
    assert "\\n" in words[::2]
    assert "\n" not in everything
    found = predict_lines(path, ["the cat <mask> on a mat", "the cat"], FLOAT32, top=2)
    assert next(found) == line  # what comes before a bad line is printed, whatever the batch
    with pytest.raises(UserError, match="line 2: .* 0 times <mask>"):
        next(found)


@pytest.mark.parametrize(
    ("missing", "message"), [("dict.txt", "no dict.txt"), ("vocab.bpe", "no vocab.bpe"), ("labels.txt", None)]
)
def test_files_that_are_missing(texts: dict[str, str], tmp_path: Path, missing: str, message: str | None) -> None:
    files = {name: text for name, text in texts.items() if name != missing}
    path = write(text_model(texts, ["head"]), files, tmp_path / "model.packed")
    if message is None:
        [line] = predict_lines(path, ["the cat"])
        assert line.split("\t")[0] in ("0", "1", "2")
    else:
        for lines in (["the cat"], []):  # it is the file that lacks it, and no line
            with pytest.raises(UserError, match=f"model.packed: .*{message}"):
                list(predict_lines(path, lines))


@pytest.mark.parametrize("lines", ["999 1\n", -1], ids=["longer", "shorter"])
@pytest.mark.parametrize("heads", [["head"], []])
def test_a_dictionary_of_another_model(
    texts: dict[str, str], tmp_path: Path, heads: list[str], lines: str | int
) -> None:
    words = texts["dict.txt"]
    other = words + lines if isinstance(lines, str) else "".join(words.splitlines(keepends=True)[:lines])
    path = write(text_model(texts, heads), {**texts, "dict.txt": other}, tmp_path / "model.packed")
    with pytest.raises(UserError, match=r"model.packed: dict.txt .* symbols, and the model has"):
        list(predict_lines(path, ["the <mask> cat"]))


@pytest.mark.parametrize("token", [-1, 100_000])
def test_a_first_token_that_is_none(texts: dict[str, str], tmp_path: Path, token: int) -> None:
    path = write(text_model(texts, ["head"]), texts, tmp_path / "model.packed", init_token=token)
    with pytest.raises(UserError, match=f"model.packed: --init-token {token}: .* from 0 to"):
        list(predict_lines(path, ["the cat"]))


def test_a_model_without_positions() -> None:
    tensors = pack(build(), 8)
    tensors["encoder.sentence_encoder.embed_positions.weight"] = torch.zeros(2, 32)
    with pytest.raises(UserError, match="2 positions"):
        Model.from_tensors(tensors, checkpoint(build()), {}, FLOAT32)


def test_auto_is_what_is_quick_for_the_width_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "supported", lambda precision: precision in (INT8, FLOAT32))
    monkeypatch.setattr(runtime, "is_quick", lambda precision, width: precision != INT8 or width >= 200)
    assert [runtime.choose_precision("auto", width) for width in (199, 200)] == [FLOAT32, INT8]
    assert runtime.choose_precision(INT8, 199) == INT8
    assert load(build(), 8, "auto").precision == FLOAT32  # is narrower
