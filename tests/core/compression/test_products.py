from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from train_large.compression import products
from train_large.machine import maker

SIZES = st.integers(0, 70)


@pytest.fixture(params=["oneDNN", "torch"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which one is asked, whatever this processor is."""
    monkeypatch.setattr(products, "is_quick_by_onednn", lambda: request.param == "oneDNN" and products.has_onednn())
    return str(request.param)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shapes of the products that oneDNN was asked for."""
    if not products.has_onednn():
        pytest.skip("this torch has no linear map of oneDNN")
    found, onednn = [], products._onednn

    def watched(*arguments: Tensor) -> Tensor:
        result = onednn(*arguments)
        found.append(f"{len(result)} x {len(result.t())}")
        return result

    monkeypatch.setattr(products, "_onednn", watched)
    return found


def near(found: Tensor, expected: Tensor) -> None:
    bound = {torch.bfloat16: 1e-2, torch.float32: 1e-6, torch.float64: 1e-14}[found.dtype]
    size = float(expected.abs().max()) if expected.numel() else 0.0
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound * max(1.0, size))


@pytest.mark.parametrize("library", ["oneDNN", "torch"])
@given(SIZES, SIZES, SIZES, st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.booleans())
def test_products_of_any_size(library: str, m: int, k: int, n: int, dtype: torch.dtype, in_one: bool) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(products, "is_quick_by_onednn", lambda: library == "oneDNN" and products.has_onednn())
        # Operands are rows of their own, or columns of something wider.
        x, w, g = (
            torch.randn(rows, columns + 5, dtype=dtype)[:, :columns]
            if in_one
            else torch.randn(rows, columns, dtype=dtype)
            for rows, columns in ((m, k), (n, k), (m, n))
        )
        bias = torch.randn(n, dtype=dtype)
        xd, wd, gd = (t.double() for t in (x, w, g))
        near(products.linear(x, w, bias), xd @ wd.t() + bias.double())
        near(products.linear(x, w), xd @ wd.t())
        near(products.product(g, w), gd @ wd)
        near(products.product(g, w, 1.25), gd @ wd * 1.25)
        near(products.product_of_columns(g, x), gd.t() @ xd)
        near(products.product_of_columns(g, x, 1.25), gd.t() @ xd * 1.25)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_a_linear_map_in_bf16_is_rounded_at_its_end(rows: int, width: int, wide: int) -> None:
    torch.manual_seed(rows)
    x, weight, bias = (torch.randn(shape).bfloat16() for shape in ((rows, width), (wide, width), (wide,)))
    expected = x.double() @ weight.double().t() + bias.double()
    torch.testing.assert_close(products.linear(x, weight, bias).double(), expected, rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(products.product(x, weight.t(), 1.25), (1.25 * (expected - bias)).bfloat16())


def test_the_quicker_library_is_taken_here() -> None:
    if not torch.cpu._is_avx512_supported():
        pytest.skip("no AVX512")
    assert products.has_onednn()
    assert products.is_quick_by_onednn() == (maker() in ("AuthenticAMD", "HygonGenuine"))


def test_who_is_asked(library: str, asked: list[str]) -> None:
    x, w, bias = torch.randn(8, 4), torch.randn(6, 4), torch.randn(6)
    products.linear(x, w, bias), products.product(x, w.t()), products.product_of_columns(x, x)
    assert asked == (["8 x 6", "8 x 6", "4 x 4"] if library == "oneDNN" else [])
    asked.clear()
    products.linear(x.double(), w.double(), bias.double()), products.product(x.double(), w.t().double())
    products.linear(x.to("meta"), w.to("meta"))
    assert asked == []
    products.linear(x.bfloat16(), w.bfloat16(), bias.bfloat16())
    assert asked == ["8 x 6"]  # without a second pass for the bias


def test_a_high_gradient_is_made_on_its_side(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In which oneDNN is quicker."""
    monkeypatch.setattr(products, "is_quick_by_onednn", lambda: True)
    narrow, wide = torch.randn(8, 3), torch.randn(8, 5)
    assert products.product_of_columns(narrow, wide).shape == (3, 5)
    assert products.product_of_columns(wide, narrow).shape == (5, 3)
    assert asked == ["3 x 5", "3 x 5"]


def test_operands_stay_as_they_are(library: str) -> None:
    x, w = torch.randn(8, 4), torch.randn(6, 4)
    kept = x.clone(), w.clone()
    products.product(x, w.t(), 2.0), products.product_of_columns(x, x, 2.0), products.linear(x, w)
    assert torch.equal(x, kept[0])
    assert torch.equal(w, kept[1])


@pytest.mark.parametrize(
    ("maker", "avx512", "mkl", "onednn", "reason"),
    [
        ("AuthenticAMD", True, True, True, None),
        ("HygonGenuine", True, True, True, None),
        ("GenuineIntel", True, True, True, "MKL uses AVX512"),
        (None, True, True, True, "MKL uses AVX512"),
        ("AuthenticAMD", False, True, True, "no AVX512"),
        ("AuthenticAMD", True, False, True, "no MKL"),
        ("AuthenticAMD", True, True, False, "_linear_pointwise"),
    ],
)
def test_where_onednn_is_quicker(
    monkeypatch: pytest.MonkeyPatch, maker: str | None, avx512: bool, mkl: bool, onednn: bool, reason: str | None
) -> None:
    monkeypatch.setattr(products, "maker", lambda: maker)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(products, "has_onednn", lambda: onednn)
    found = products.left_to_torch.__wrapped__()
    assert (found is None) == (reason is None)
    assert (reason or "") in (found or "")
    monkeypatch.setenv("TRAIN_LARGE_PRODUCTS", "torch")
    assert products.left_to_torch.__wrapped__() == "TRAIN_LARGE_PRODUCTS=torch says so"


@pytest.mark.parametrize("wrong", [lambda *_: torch.zeros(3, 2), None])
def test_a_torch_without_the_operation(monkeypatch: pytest.MonkeyPatch, wrong: object) -> None:
    def missing(*_: object) -> Tensor:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")

    monkeypatch.setattr(products, "_onednn", wrong or missing)
    assert not products.has_onednn.__wrapped__()
