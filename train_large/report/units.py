"""Numbers as people write them: bytes, counts, durations, percentages."""

from __future__ import annotations

import re

from train_large.errors import UserError

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_FLOP = (" FLOP", " kFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP", " EFLOP", " ZFLOP")
_BYTES = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(?:([kmgt])(i?)b?|b)?\s*", re.IGNORECASE | re.ASCII)


def parse_bytes(text: str) -> int:
    """`2MB` to 2,000,000 bytes; `2MiB` to 2,097,152; `300k`, `1.5 GB` and plain `4096` too.

    Raises UserError for anything else, and for less than one byte."""
    found = _BYTES.fullmatch(text)
    size = 0
    if found:
        number, prefix, binary = found.groups()
        size = int(float(number) * (1024 if binary else 1000) ** _POWERS[(prefix or "").lower()])
    if size < 1:
        raise UserError(f"{text!r} is not a number of bytes: write it as 500kB, 2MB, 1.5GB or 2MiB.")
    return size


def _scaled(number: float, units: tuple[str, ...]) -> str:
    """Three significant digits in the largest of the units (each 1000 times the one before) that keeps them above 1."""
    power = 0
    # 999.5 and above would be rounded to 1000: that is 1.00 of the next unit.
    while power < len(units) - 1 and number >= (1000 if power == 0 else 999.5):
        number /= 1000
        power += 1
    digits = 0 if power == 0 or number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:.{digits}f}{units[power]}"


def format_bytes(size: float) -> str:
    """412,300 to `412 kB`: SI units, as parse_bytes reads them."""
    return _scaled(size, (" B", " kB", " MB", " GB", " TB"))


def format_limit(size: int) -> str:
    """2,000,000 to `2 MB`: as format_bytes, without zeros at the end, for limits that people chose."""
    return without_zeros(format_bytes(size))


def without_zeros(text: str) -> str:
    """`10.0 MB` to `10 MB`, `1.50k` to `1.5k`."""
    return re.sub(r"\.(\d*?)0+(?!\d)", lambda found: f".{found[1]}" if found[1] else "", text)


def format_count(number: float) -> str:
    """1,034,496 to `1.03M`."""
    return _scaled(number, ("", "k", "M", "G"))


def format_flops(flops: float) -> str:
    """1.21e14 to `121 TFLOP`: operations done, not a rate."""
    return _scaled(flops, _FLOP)


def flops_unit(flops: float) -> tuple[str, float]:
    """The unit for an axis that goes so far, and how many FLOP it is: (TFLOP, 1e12) for 1.21e14."""
    power = next((power for power in range(len(_FLOP) - 1, 0, -1) if flops >= 3 * 1000.0**power), 0)
    return _FLOP[power].strip(), 1000.0**power


def seconds_unit(seconds: float) -> tuple[str, float]:
    """The unit for an axis that goes so far, and how many seconds it is: (minutes, 60) for 600."""
    units = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0))
    return next(((name, length) for name, length in units if seconds >= 3 * length), ("seconds", 1.0))


def format_seconds(seconds: float) -> str:
    """90 to `90 s`, 600 to `10 min`, 7,200 to `2 h`, 993,600 to `11.5 d`: the largest unit of which there are two."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.4g} {unit}"
    return f"{seconds:.3g} s"


def format_percent(share: float, digits: int = 1) -> str:
    """0.782 to `78.2%`."""
    return f"{100 * share:.{digits}f}%"


def format_perplexity(perplexity: float) -> str:
    """Three significant digits, whole from 100 on: 4.31, 23.8, 137, 8,120."""
    digits = 0 if perplexity >= 99.95 else 1 if perplexity >= 9.995 else 2
    return f"{perplexity:,.{digits}f}"


def format_bleu(bleu: float) -> str:
    """Two decimals, as the tools print it: 27.34."""
    return f"{bleu:.2f}"


def format_error(error: float | None) -> str:
    """Two significant digits: 0.14, 0.0030, 2.1e-05; 0 where there is none, and a dash for what has no value."""
    if error is None:
        return "–"
    return "0" if error == 0 else f"{error:#.2g}"
