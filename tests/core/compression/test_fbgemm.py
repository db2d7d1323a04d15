from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train_large.compression import fbgemm

# Not by `available`, which is False where the code is wrong.
pytestmark = pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="the CPU has no AVX2")

SHAPES = st.tuples(st.integers(1, 40), st.sampled_from([1, 7, 64, 256, 512, 768, 1024, 1280]), st.integers(1, 40))


@given(SHAPES, st.integers(2, 8), st.integers(0, 2**31))
def test_products_are_exact(shape: tuple[int, int, int], bits: int, seed: int) -> None:
    count, columns, rows = shape
    draw = torch.Generator().manual_seed(seed)
    # The largest numbers often, since it is their sums that would saturate.
    weight = torch.randint(-(2**bits), 2**bits, (columns, rows), generator=draw).clamp_(
        -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    )
    weight <<= 8 - bits
    highest = fbgemm.highest_code(bits)
    codes = torch.randint(-highest, 2 * highest, (count, columns), generator=draw).clamp_(0, highest)
    codes[:, 0], codes[0, -1] = 0, highest if columns > 1 else 0
    packed = fbgemm.pack(weight.to(torch.int8), bits)
    assert torch.equal(fbgemm.times(codes.float(), packed, highest), (codes @ weight).float())
    assert torch.equal(packed.to_dense(), weight.to(torch.int8))


def test_it_is_available_with_avx2() -> None:
    assert fbgemm.available()


def test_weights_of_8_bits_and_activations_of_8_would_saturate() -> None:
    """Why the activations have 7 bits; once this fails, all CPUs in use have better instructions, or FBGEMM has."""
    if torch.cpu._is_vnni_supported():
        pytest.skip("with VNNI nothing saturates")
    packed = fbgemm.pack(torch.full((64, 8), 127, dtype=torch.int8), 8)
    codes = torch.full((1, 64), 255)
    codes[0, 0] = 0
    assert not torch.equal(fbgemm.times(codes.float(), packed, 255), torch.full((1, 8), 63.0 * 255 * 127))


@pytest.mark.parametrize(("rows", "columns"), [(768, 768), (512, 512), (1024, 256)])
def test_memory_is_what_is_counted(rows: int, columns: int) -> None:
    program = f"""
import ctypes, torch
from pathlib import Path
from train_large.compression import fbgemm

def resident():
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

codes = torch.zeros({columns}, {rows}, dtype=torch.int8)
held = [fbgemm.pack(codes, 8) for _ in range(4)]
before = resident()
held += [fbgemm.pack(codes, 8) for _ in range(64)]
print((resident() - before) / 64)
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    counted = fbgemm.nbytes(rows, columns)
    if torch.cpu._is_avx512_supported():  # its kernels have narrower blocks, so that the last one may take less
        assert float(run.stdout) <= 1.05 * counted
    else:
        assert float(run.stdout) == pytest.approx(counted, rel=0.03)


def test_other_engines_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine:
        engine = "qnnpack"

    fbgemm.available.cache_clear()
    monkeypatch.setattr(torch.backends, "quantized", Engine)
    assert not fbgemm.available()
    monkeypatch.undo()
    fbgemm.available.cache_clear()


def test_no_warning_is_shown() -> None:
    fbgemm.available.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fbgemm.available()
