"""The probe of `train-large doctor`: it tries things, so it notices when they stop working, and says why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fairseq.models.roberta import RobertaModel

from fairseq_plugins import doctor, masking
from fairseq_plugins.models import fast_encoder, prenorm_roberta
from fairseq_plugins.optim import fused_adam
from train_large import doctor as core
from train_large.compression import products

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(doctor, "SECONDS", 0.05)
    monkeypatch.setattr(doctor, "SIDE", 128)


def ask(what: str) -> core.Row:
    return doctor._row(what, *{**doctor.OF_FAIRSEQ, **doctor.OF_TORCH}[what])


@pytest.mark.skipif(torch.cuda.is_available(), reason="training goes to the GPU, and the quick layers are for CPUs")
@pytest.mark.parametrize("what", ["fast layers", "masked LM head", "fused Adam kernel", "whole masked batches"])
def test_on_a_cpu_the_quick_ways_are_taken(what):
    """Fails where one of them silently falls back on the machine of the tests."""
    row = ask(what)
    assert row.active is True, row.why


def test_bf16_is_taken_exactly_where_the_cpu_has_instructions_for_it():
    row = ask("bf16 matrix products")
    amx, avx = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    assert row.active is bool(amx or avx), row.why
    assert ("AMX" in row.why, "AVX512-BF16" in row.why) == (amx, avx)
    assert "GFLOP/s in fp32" in row.why


def test_a_cpu_without_instructions_is_told(monkeypatch):
    monkeypatch.setattr(fast_encoder, "has_bf16_instructions", lambda: False)
    row = ask("bf16 matrix products")
    assert row.active is False
    assert "no instructions for bf16" in row.why


@pytest.mark.parametrize(("bf16", "advice"), [(90.0, True), (250.0, False)])
def test_instructions_that_are_not_quicker_are_told(monkeypatch, bf16, advice):
    monkeypatch.setattr(fast_encoder, "has_bf16_instructions", lambda: True)
    monkeypatch.setattr(doctor, "_rates", lambda *dtypes, ways: [100.0, bf16])
    row = ask("bf16 matrix products")
    assert row.active is True
    assert ("not quicker here: give --matmul-precision fp32" in row.why) is advice


def test_whose_float32_products_are_is_told(monkeypatch):
    row = ask("fp32 products by oneDNN")
    assert row.active is products.is_quick_by_onednn()
    assert ("GFLOP/s" in row.why) is row.active
    monkeypatch.setattr(products, "left_to_torch", lambda: "of the weather")
    row = ask("fp32 products by oneDNN")
    assert (row.active, row.why) == (False, "left to torch: of the weather")
    monkeypatch.setattr(products, "left_to_torch", lambda: None)
    monkeypatch.setattr(doctor, "maker", lambda: "AuthenticAMD")
    monkeypatch.setattr(doctor, "_rates", lambda *dtypes, ways: [200.0 if way is torch.mm else 400.0 for way in ways])
    row = ask("fp32 products by oneDNN")
    assert row.active is True
    assert "CPUs of AuthenticAMD: large products run at 400 GFLOP/s, and by MKL at 200" in row.why


def test_the_reason_of_layers_is_told(monkeypatch):
    monkeypatch.setattr(fast_encoder, "unsupported", lambda encoder: "of the weather")
    layers, head = ask("fast layers"), ask("masked LM head")
    assert (layers.active, head.active) == (False, False)
    assert "because of the weather" in layers.why


def test_layers_that_are_called_fast_and_are_not_are_found_out(monkeypatch):
    """The forward pass is fairseq's, and `is_fast()` says otherwise."""
    model = prenorm_roberta.PrenormRobertaModel

    def forward(self, src_tokens, masked_targets=None, masked_tokens=None, **unused):
        logits, extra = RobertaModel.forward(self, src_tokens, masked_tokens=masked_tokens)
        return torch.nn.functional.cross_entropy(logits, masked_targets, reduction="sum"), extra

    monkeypatch.setattr(model, "forward", forward)
    layers, head = ask("fast layers"), ask("masked LM head")
    assert (layers.active, head.active) == (False, False)
    assert "went by fairseq's" in layers.why


def test_a_weight_without_a_gradient_is_a_failure(monkeypatch):
    features = fast_encoder.features
    monkeypatch.setattr(fast_encoder, "features", lambda *args, **kwargs: features(*args, **kwargs).detach())
    row = ask("fast layers")
    assert row.active is None
    assert "has no gradient" in row.why


def test_listening_leaves_classes_as_they_were():
    class Base:
        def forward(self):
            return "base"

    class Own(Base):
        def forward(self):
            return "own"

    class Inherits(Base):
        pass

    before = dict(vars(Own)), dict(vars(Inherits))
    with doctor._calls({"own": Own, "inherits": Inherits}) as called:
        assert not called
        assert Inherits().forward() == "base"
        assert called == {"inherits"}
    assert (dict(vars(Own)), dict(vars(Inherits))) == before


def test_the_reason_of_adam_is_told(monkeypatch):
    monkeypatch.setattr(fused_adam, "_fault_of_kernel", lambda device: "this torch is too old")
    row = ask("fused Adam kernel")
    assert row.active is False
    assert "this torch is too old" in row.why


def test_an_adam_that_is_not_fused_is_found_out(monkeypatch):
    answers = iter([None, "of the weather"])  # the doctor's question, the optimizer's own
    monkeypatch.setattr(fused_adam, "unsupported", lambda parameters: next(answers))
    row = ask("fused Adam kernel")
    assert row.active is False
    assert "does not tell" in row.why


def test_the_reason_of_batches_is_told(monkeypatch):
    monkeypatch.setattr(masking, "_draws_are_known", lambda: False)
    row = ask("whole masked batches")
    assert row.active is False
    assert "draws random numbers in another way" in row.why


def test_batches_that_nothing_makes_whole_are_found_out(monkeypatch):
    monkeypatch.setattr(masking, "whole", lambda dataset: dataset)
    assert ask("whole masked batches").active is False


@pytest.mark.parametrize(
    ("count", "cores", "variable", "active", "said"),
    [
        (4, 4, None, True, "4 threads of torch for 4 cores"),
        (1, 4, "1", False, "OMP_NUM_THREADS=1 says so: unset it"),
        (1, 4, None, False, "set OMP_NUM_THREADS=4"),
        (8, 4, "8", False, "OMP_NUM_THREADS=8 says so: set it to 4"),
        (8, 1, None, False, "8 threads of torch for 1 core that"),
    ],
)
def test_threads_are_held_against_the_cores(monkeypatch, count, cores, variable, active, said):
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    monkeypatch.setattr(doctor, "usable_cores", lambda: cores)
    row = ask("threads")
    assert row.active is active
    assert said in row.why


def test_a_thread_for_a_core_is_enough_where_each_looks_like_two(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"num_physical_cores": 16}, raising=False)
    monkeypatch.setattr(doctor, "usable_cores", lambda: 32)
    assert ask("threads").active is True


def test_what_competes_for_few_cores_is_told(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (3.5, 0.0, 0.0))
    assert "--num-workers 1" in doctor._competitors(2)
    assert "3.5 running" in doctor._competitors(2)
    assert doctor._competitors(64) == ""


def test_packed_prediction_says_what_it_computes_in(monkeypatch):
    from train_large.compression import kernels, onednn, runtime

    row = ask("packed prediction")
    assert row.active is (runtime.choose_precision("auto", 1024) != kernels.FLOAT32)
    if kernels.supported(kernels.INT8):
        assert row.why.startswith("int8, by torch's kernels" if onednn.available() else "int8, by FBGEMM")
    for has, active, said in (("bfloat16", True, "bfloat16"), ("float32", False, "float32")):
        only = {has, kernels.FLOAT32}
        monkeypatch.setattr(runtime, "supported", lambda precision, only=only: precision in only)
        row = ask("packed prediction")
        assert row.active is active
        assert row.why.startswith(said)


def test_a_missing_fairseq_costs_its_own_rows_only(tmp_path):
    (tmp_path / "fairseq.py").write_text("raise ModuleNotFoundError(\"No module named 'fairseq'\")\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    script = [sys.executable, "-c", core._START, str(ROOT / "fairseq_plugins" / "doctor.py")]
    said = subprocess.run(script, capture_output=True, text=True, env=environment, check=True)
    rows = {row["what"]: row for row in json.loads(said.stdout)}
    assert list(rows) == ["fairseq", *doctor.OF_TORCH]
    assert rows["fairseq"]["active"] is None
    assert "No module named 'fairseq'" in rows["fairseq"]["why"]
    assert "extra fairseq" in rows["fairseq"]["why"]
    assert "whole masked batches" in rows["fairseq"]["why"]
    assert all(rows[what]["active"] is not None for what in doctor.OF_TORCH)


@pytest.mark.slow
def test_the_whole_of_it_on_this_machine():
    """By the command's own way, in another process, with nothing shortened."""
    rows = {row.what: row for row in core.examine()}
    assert set(doctor.OF_FAIRSEQ) | set(doctor.OF_TORCH) <= set(rows)
    assert [what for what, row in rows.items() if row.active is None] == []
    if not torch.cuda.is_available():
        assert rows["fast layers"].active, rows["fast layers"].why
        has = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        assert rows["bf16 matrix products"].active is bool(has)
