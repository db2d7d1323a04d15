from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from train_large.compression.checkpoint import read_checkpoint
from train_large.compression.quantization import (
    dequantize,
    parse_bits,
    quantize_checkpoint,
    quantize_state,
    quantize_tensor,
)
from train_large.errors import UserError

PLUGIN = Path(__file__).parents[3] / "fairseq_plugins"
BITS = (2, 3, 4, 5, 6, 7, 8)


def paper(weights: np.ndarray, bits: int) -> np.ndarray:
    """Section 4.2 in NumPy, over what is not zero: the independent implementation that ours must equal bit by bit."""
    result = weights.astype(np.float32)
    kept = result[result != 0]
    if kept.size and kept.min() < kept.max():
        low, high = kept.min(), kept.max()
        delta = (high - low) / np.float32(2**bits - 1)
        clamped = np.minimum(np.maximum(kept, low), high)
        index = np.rint((clamped - low) / delta)
        result[result != 0] = delta * index + low
    return result


def same_bits(ours: Tensor, expected: np.ndarray) -> bool:
    return ours.dtype == torch.float32 and np.array_equal(ours.numpy().view(np.int32), expected.view(np.int32))


@st.composite
def heavy_tails(draw, most=2000):
    """Weights as trained models have them: many small, few very large, some pruned, any offset and scale."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weights = rng.standard_t(draw(st.sampled_from([1.5, 3, 30])), draw(st.integers(1, most)))
    weights = (weights + draw(st.sampled_from([0, 0, 5]))) * 10.0 ** draw(st.integers(-8, 3))
    weights[rng.random(weights.size) < draw(st.sampled_from([0, 0, 0.5, 0.95, 1]))] = 0
    return weights.astype(np.float32)


@settings(deadline=None, max_examples=300)
@given(heavy_tails(), st.sampled_from(BITS))
def test_agrees_with_the_formula_to_the_last_bit(weights, bits):
    assert same_bits(dequantize(quantize_tensor(torch.from_numpy(weights), bits)), paper(weights, bits))


@settings(deadline=None)
@given(heavy_tails(), st.sampled_from(BITS), st.integers(1, 40), st.sampled_from(["row", "group"]))
def test_every_row_and_group_has_its_own_grid(weights, bits, size, kind):
    if kind == "row":
        weights = np.resize(weights, (max(1, weights.size // size), size))
    q = quantize_tensor(torch.from_numpy(weights), bits, "row" if kind == "row" else f"group:{size}")
    flat = weights.reshape(-1)
    parts = [paper(flat[start : start + size], bits) for start in range(0, flat.size, size)]
    assert len(q.minimum) == len(q.step) == len(parts)
    assert same_bits(dequantize(q).reshape(-1), np.concatenate(parts))


@settings(deadline=None)
@given(heavy_tails(), st.sampled_from(BITS))
def test_indices_fit_and_errors_are_at_most_half_a_step(weights, bits):
    q = quantize_tensor(torch.from_numpy(weights), bits)
    assert q.indices.dtype == torch.uint8
    assert int(q.indices.max()) <= 2**bits - 1
    error = np.abs(dequantize(q).numpy().astype(np.float64) - weights)
    assert error.max() <= float(q.step[0]) * 0.5 + 1e-6 * np.abs(weights).max()


def test_a_pruned_weight_stays_zero_and_the_grid_spans_the_rest():
    q = quantize_tensor(torch.tensor([0.9, 0.0, -0.6, 0.0, 0.3]), 2)  # the picture in the module
    assert q.mask is not None
    assert q.mask.tolist() == [True, False, True, False, True]
    assert q.indices.tolist() == [3, 0, 0, 0, 2]
    assert dequantize(q).tolist() == pytest.approx([0.9, 0, -0.6, 0, 0.4])
    assert dequantize(q)[1].item() == 0
    only_large = dequantize(quantize_tensor(torch.tensor([0.0, 5.0, 6.0, 8.0]), 2)).tolist()
    assert only_large == [0, 5, 6, 8]  # a grid from 0 to 8 would have no 5


def test_half_a_step_rounds_to_the_even_index():
    q = quantize_tensor(torch.tensor([1.0, 1.5, 2.5, 3.5, 4.0]), 2)
    assert q.indices.tolist() == [0, 0, 2, 2, 3]


@pytest.mark.parametrize(
    "weights",
    [
        torch.full((3, 4), 0.1),
        torch.zeros(5),
        torch.empty(0),
        torch.tensor(0.7),
        torch.tensor([0.0, 0.3, 0.3]),
        -torch.ones(1),
    ],
)
@pytest.mark.parametrize("granularity", ["tensor", "row", "group:2"])
def test_constants_are_unchanged(weights, granularity):
    assert torch.equal(dequantize(quantize_tensor(weights, 4, granularity)), weights)


def test_the_smallest_numbers_stay_in_range():
    weights = torch.arange(1, 12) * 2.0**-149
    q = quantize_tensor(weights, 3)
    assert int(q.indices.max()) <= 7
    assert (dequantize(q) - weights).abs().max() < 1e-44
    underflow = quantize_tensor(torch.tensor([1.0, 2.0]) * 2.0**-149, 8)  # a 255th of this range is no float32
    assert underflow.step.tolist() == [0]
    assert underflow.indices.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_is_quantized_and_kept_in_float32(dtype):
    weights = torch.randn(50, 20).to(dtype)
    state = quantize_state({"w": weights}, 8)
    assert same_bits(state["w"], paper(weights.to(torch.float32).numpy(), 8))
    assert torch.equal(quantize_state({"w": weights}, 32)["w"], weights.to(torch.float32))


def test_a_transposed_view_is_quantized_in_its_own_order():
    weights = torch.randn(6, 9).t()
    assert same_bits(dequantize(quantize_tensor(weights, 4, "row"))[2], paper(weights[2].numpy(), 4))


def test_every_parameter_but_no_buffer_is_quantized_and_ties_stay(tmp_path):
    shared = torch.randn(200, 50)
    state = {
        "encoder.version": torch.tensor([3.0]),
        "encoder.embed_tokens.weight": shared,
        "encoder.layer_norm.weight": torch.randn(50),
        "encoder.fc.bias": torch.randn(50),
        "encoder.lm_head.weight": shared,
        "encoder.from_gpu.weight": shared.clone(),
    }
    before = {name: tensor.clone() for name, tensor in state.items()}
    result = quantize_state(state, 4)
    assert list(result) == list(state)
    for name in state:
        expected = before[name].numpy() if name.endswith("version") else paper(before[name].numpy(), 4)
        assert same_bits(result[name], expected), name
        assert torch.equal(state[name], before[name]), f"{name}: the input was changed"
    addresses = {result[name].data_ptr() for name in state if state[name].shape == shared.shape}
    assert len(addresses) == 1
    torch.save(result, tmp_path / "state.pt")
    assert (tmp_path / "state.pt").stat().st_size < 1.2 * shared.nbytes + 4096


def test_32_bits_change_nothing_and_copy():
    state = {"w": torch.randn(4, 4), "pruned": torch.tensor([0.0, -0.0, 1.0])}
    result = quantize_state(state, 32)
    assert all(same_bits(result[name], state[name].numpy()) for name in state)
    result["w"].zero_()
    assert state["w"].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_without_a_range_are_refused(bad):
    with pytest.raises(UserError, match=r"layer\.weight.*not finite"):
        quantize_state({"layer.weight": torch.tensor([1.0, bad, 2.0])}, 4)
    with pytest.raises(UserError, match="more than float32"):
        quantize_tensor(torch.tensor([-3e38, 3e38]), 4)


@pytest.mark.parametrize("text", ["2", "4", "6", "8", "32"])
def test_bits_as_typed(text):
    assert parse_bits(text) == int(text)


@pytest.mark.parametrize("text", ["5.5", "0", "1", "9", "16", "64", "-4", "eight", "", "8 bits", "1e1", "8" * 5000])
def test_other_bits_are_refused_with_the_way_out(text):
    with pytest.raises(UserError, match=r"^--bits .*2 to 8.*32"):
        parse_bits(text)


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint in fairseq's form, with a tie, a pruned weight and an optimizer's state."""
    embedding = torch.randn(30, 8)
    embedding[5] = 0
    state = {
        "args": None,
        "cfg": {
            "model": Namespace(arch="roberta_base", _name="roberta_base", lr=[0.1]),
            "task": {"_name": "masked_lm", "data": "somewhere"},
            "criterion": {"_name": "masked_lm", "tpu": False},
        },
        "model": {
            "encoder.version": torch.tensor([3.0]),
            "embed_tokens.weight": embedding,
            "fc.weight": torch.randn(8, 8),
            "lm_head.weight": embedding,
        },
        "optimizer_history": [
            {"criterion_name": "MaskedLmLoss", "num_updates": 3, "lr_scheduler_state": {"best": 1.5}}
        ],
        "extra_state": {"train_iterator": {"epoch": 2}, "metrics": []},
        "last_optimizer_state": {"state": {0: {"exp_avg": torch.randn(1000)}}},
    }
    torch.save(state, tmp_path / "in.pt")
    return tmp_path / "in.pt"


def test_quantize_checkpoint_writes_the_grid_the_record_and_no_optimizer(checkpoint):
    target = checkpoint.with_name("out.pt")
    before = read_checkpoint(checkpoint)["model"]
    summary = quantize_checkpoint(checkpoint, target, 4, "row")
    written = torch.load(target, weights_only=True)
    for name in ("embed_tokens.weight", "fc.weight", "lm_head.weight"):
        rows = np.stack([paper(row, 4) for row in before[name].numpy()])
        assert same_bits(written["model"][name], rows), name
    assert written["model"]["embed_tokens.weight"].data_ptr() == written["model"]["lm_head.weight"].data_ptr()
    assert written["model"]["encoder.version"].tolist() == [3.0]
    assert "last_optimizer_state" not in written
    # 64 weights, and 30 x 8 of which 8 are zero: their mask is 240 bits, their positions 256
    assert (summary.parameters, summary.nonzero) == (304, 296)
    assert summary.bytes == (64 * 4 // 8 + 8 * 8) + ((240 + 232 * 4) // 8 + 30 * 8)
    assert summary.bytes_paper == 296 * 4 // 8
    [record] = written["compression"]
    assert (record["bits"], record["granularity"], record["bytes"]) == (4, "row", summary.bytes)
    assert sorted(os.listdir(target.parent)) == ["in.pt", "out.pt"]


def test_the_output_may_replace_the_input(checkpoint):
    other = checkpoint.with_name("other.pt")
    quantize_checkpoint(checkpoint, other, 6)
    quantize_checkpoint(checkpoint, checkpoint, 6)
    here, there = read_checkpoint(checkpoint), read_checkpoint(other)
    assert all(torch.equal(here["model"][name], there["model"][name]) for name in there["model"])
    quantize_checkpoint(checkpoint, checkpoint, 4)
    assert [record["bits"] for record in read_checkpoint(checkpoint)["compression"]] == [6, 4]


@pytest.mark.parametrize(("bits", "granularity"), [(5.5, "tensor"), (9, "tensor"), (4, "column")])
def test_bad_flags_write_nothing(checkpoint, bits, granularity):
    with pytest.raises(UserError, match="--bits|--granularity"):
        quantize_checkpoint(checkpoint, checkpoint.with_name("out.pt"), bits, granularity)
    assert os.listdir(checkpoint.parent) == ["in.pt"]


def run_fairseq(module: str, folder: Path, arguments: str) -> str:
    """The output of one of fairseq's programs, run in `folder`, where nothing of this checkout is found by chance."""
    command = [sys.executable, "-m", f"fairseq_cli.{module}", *arguments.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


QUIET = "--cpu --no-progress-bar --log-format json --num-workers 0 --required-batch-size-multiple 1"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a text whose lines repeat one word, in `data`, and this project's model trained on it, in `run`."""
    pytest.importorskip("fairseq")
    folder = tmp_path_factory.mktemp("trained")
    rng = random.Random(0)
    for split, lines in (("train", 300), ("valid", 60)):
        starts = [rng.randrange(40) for _ in range(lines)]
        text = "".join(" ".join([f"w{start}"] * 12) + "\n" for start in starts)
        (folder / f"{split}.txt").write_text(text)
    texts = "--only-source --trainpref train.txt --validpref valid.txt"
    run_fairseq("preprocess", folder, f"{texts} --destdir data --workers 1")
    size = "--encoder-layers 2 --encoder-embed-dim 32 --encoder-ffn-embed-dim 64 --encoder-attention-heads 2"
    model = f"--user-dir {PLUGIN} --arch prenorm_roberta --max-positions 40 {size}"
    task = "--task masked_lm --tokens-per-sample 32 --save-dir run --disable-validation --no-epoch-checkpoints"
    budget = "--criterion budgeted_masked_lm --budget 1h --lr-scheduler budget_linear --warmup-fraction 0"
    steps = "--optimizer adam --lr 5e-3 --batch-size 16 --max-update 150"
    run_fairseq("train", folder, f"data {task} {model} {budget} {steps} {QUIET}")
    return folder


def stock_loss(folder: Path, checkpoint: Path) -> float:
    """What `fairseq-validate`, without any --user-dir, prints (bits per token, three decimals)."""
    output = run_fairseq("validate", folder, f"data --task masked_lm --path {checkpoint} --batch-size 8 {QUIET}")
    [line] = [line for line in output.splitlines() if "valid_loss" in line]
    return float(json.loads(line[line.index("{") :])["valid_loss"])


def loss_in_process(checkpoint: dict, model_state: dict[str, Tensor], data: Path) -> float:
    """The same loss, of these weights in a stock model built here by hand from the checkpoint's own sizes."""
    from fairseq.criterions.masked_lm import MaskedLmConfig, MaskedLmLoss
    from fairseq.models.roberta.model import RobertaModel
    from fairseq.tasks.masked_lm import MaskedLMConfig, MaskedLMTask

    task = MaskedLMTask.setup_task(MaskedLMConfig(data=str(data), tokens_per_sample=32, seed=1))
    model = RobertaModel.build_model(checkpoint["cfg"]["model"], task).eval()
    model.load_state_dict(model_state)
    criterion = MaskedLmLoss(MaskedLmConfig(tpu=False), task)
    task.load_dataset("valid", epoch=1)
    batches = task.get_batch_iterator(task.dataset("valid"), max_sentences=8).next_epoch_itr(shuffle=False)
    with torch.no_grad():
        outputs = [criterion(model, sample)[2] for sample in batches]
    total = sum(float(output["loss"]) for output in outputs)
    return total / sum(int(output["sample_size"]) for output in outputs) / math.log(2)


@pytest.mark.slow
def test_stock_fairseq_validates_what_the_converter_writes(trained):
    source, data = trained / "run" / "checkpoint_last.pt", trained / "data"
    checkpoint = read_checkpoint(source)
    assert checkpoint["cfg"]["model"]._name.startswith("prenorm_roberta")
    for name, tensor in checkpoint["model"].items():
        for bits in BITS:
            assert same_bits(dequantize(quantize_tensor(tensor, bits)), paper(tensor.numpy(), bits)), (name, bits)
    losses = {}
    for bits in (32, 3):
        target = source.with_name(f"out{bits}.pt")
        quantize_checkpoint(source, target, bits)
        losses[bits] = stock_loss(trained, target)
        ours = loss_in_process(checkpoint, quantize_state(checkpoint["model"], bits), data)
        assert losses[bits] == pytest.approx(ours, abs=6e-4)  # stock prints three decimals
    assert losses[32] == pytest.approx(loss_in_process(checkpoint, dict(checkpoint["model"]), data), abs=6e-4)
    assert losses[3] > losses[32] + 0.01
