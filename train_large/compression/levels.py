"""How far to compress, as it is asked for: bits of a weight, and levels of sparsity. Without torch, which takes seconds
to import: every job of a study reads its settings.
"""

from __future__ import annotations

import re

from train_large.errors import UserError

FULL_BITS = 32
GRID_BITS = (2, 3, 4, 5, 6, 7, 8)  # the paper uses 4, 6 and 8; below 4 it saw severe loss of accuracy


def check_bits(bits: int) -> None:
    """Raise UserError unless weights can be stored in `bits` bits."""
    if bits not in (*GRID_BITS, FULL_BITS):
        raise UserError(
            f"--bits {bits}: give a whole number from {GRID_BITS[0]} to {GRID_BITS[-1]} (the paper uses 4, 6 and 8), "
            f"or {FULL_BITS} to leave the weights as they are."
        )


def parse_bits(text: str) -> int:
    """`--bits` as typed, to a number of bits. Raises UserError for what is not 2 to 8, or 32."""
    bits = int(text) if re.fullmatch(r"[0-9]{1,4}", text) else text
    check_bits(bits)  # type: ignore[arg-type]
    return int(bits)


def parse_levels(text: str) -> tuple[float, ...]:
    """The levels of a pruning ladder, as "0.15,0.30,0.45": rising shares of the weights, each between 0 and 1.

    Raises UserError for anything else.
    """

    def wrong(why: str) -> UserError:
        return UserError(
            f"--sparsity-levels {text!r}: {why}; give rising shares between 0 and 1, such as 0.15,0.30,0.45."
        )

    if not text.strip():
        raise wrong("no level at all")
    levels: list[float] = []
    for word in text.split(","):
        try:
            level = float(word)
        except ValueError:
            raise wrong(f"{word.strip()!r} is not a number") from None
        if not 0 < level < 1:
            raise wrong(f"{word.strip()} is not between 0 and 1")
        if levels and level == levels[-1]:
            raise wrong(f"{word.strip()} comes twice")
        if levels and level < levels[-1]:
            raise wrong(f"{word.strip()} comes after {levels[-1]:g}")
        levels.append(level)
    return tuple(levels)


def level_name(sparsity: float) -> str:
    """A level in per cent, as it stands in the names of files: 15 for 0.15, 12.5 for 0.125."""
    return f"{100 * sparsity:.10g}"
