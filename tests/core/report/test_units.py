import pytest
from hypothesis import given
from hypothesis import strategies as st

from train_large.errors import UserError
from train_large.report import units


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2MB", 2_000_000),
        ("2 mb", 2_000_000),
        ("2MiB", 2_097_152),
        ("300k", 300_000),
        ("1.5GB", 1_500_000_000),
        ("4096", 4096),
        ("512B", 512),
        (" .5 kB ", 500),
    ],
)
def test_parse_bytes(text, size):
    assert units.parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "MB", "two MB", "2 fortnights", "-1MB", "0", "0.4B", "1e6", "2MBB", "nan", "2iB", "٣MB"]
)
def test_nonsense_is_refused_by_its_name(text):
    with pytest.raises(UserError, match="not a number of bytes") as caught:
        units.parse_bytes(text)
    assert repr(text) in str(caught.value)


@given(st.integers(1, 10**14))
def test_bytes_printed_are_read_back_to_three_digits(size):
    for form in (units.format_bytes, units.format_limit):
        assert units.parse_bytes(form(size)) == pytest.approx(size, rel=0.00501)


@pytest.mark.parametrize(
    ("size", "text"),
    [(1, "1 B"), (999, "999 B"), (1000, "1.00 kB"), (43_100, "43.1 kB"), (999_499, "999 kB"), (999_500, "1.00 MB")],
)
def test_format_bytes(size, text):
    assert units.format_bytes(size) == text


def test_other_forms():
    assert units.format_limit(10_000_000) == "10 MB"
    assert units.without_zeros("1.50k") == "1.5k"
    assert units.without_zeros("100 kB") == "100 kB"
    assert units.without_zeros("1.05 MB") == "1.05 MB"
    assert units.format_count(1_034_496) == "1.03M"
    assert units.format_flops(1.21e14) == "121 TFLOP"
    assert units.flops_unit(1.21e14) == ("TFLOP", 1e12)
    assert units.flops_unit(0) == ("FLOP", 1)
    assert [units.format_seconds(s) for s in (20, 90, 600, 7200, 11.5 * 86400)] == [
        "20 s",
        "90 s",
        "10 min",
        "2 h",
        "11.5 d",
    ]
    assert [units.format_error(e) for e in (0.123, 0.09, 0.0003, 2.14e-5, 0.0, None)] == [
        "0.12",
        "0.090",
        "0.00030",
        "2.1e-05",
        "0",
        "–",
    ]
    assert units.seconds_unit(600) == ("minutes", 60)
    assert [units.format_perplexity(p) for p in (4.313, 23.84, 137.4, 8120.0)] == ["4.31", "23.8", "137", "8,120"]
