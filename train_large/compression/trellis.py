"""Trellis-coded quantization: many weights rounded together, at a fifth of a bit less for each at the same error.

Rounding every weight to the nearest point of a grid, and coding the indices at their entropy, takes 0.25 bits a weight
more than any quantizer must at that error: cubes fill space worse than balls do. A trellis wins most of it back. The
grid is twice as fine, but which half of it a weight may use, the even indices or the odd ones, is told by the indices
before it. So the lowest bit of an index is never stored, and the information is that of the coarser grid:

    index               6     2     7     4     2     3        of the fine grid
    stored              3     1     3     2     1     1        index >> 1
    lowest bit          0     0     1     0     0     1        made by a shift register from the stored ones before

The register has 6 bits and is 0 at first. With s what it holds, s & 1 is the lowest bit of the next index. Then the
lowest bit b of what is stored for that index moves it on:

    s = (s >> 1) ^ (s & 1) * FEEDBACK ^ b * FORWARD

Among all the sequences of indices that a register allows, Viterbi's algorithm finds the nearest to the weights. The
code is Ungerboeck's of 64 states for amplitude modulation (Channel coding with multilevel/phase signals, 1982, table
I), used for sources by Marcellin and Fischer (Trellis coded quantization of memoryless and Gauss-Markov sources, 1990)
and with entropy coding by Fischer and Wang (1992).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from train_large.compression.parallel import on_all_cores

STATES = 64
FEEDBACK, FORWARD = 0o103 >> 1, 0o24 >> 1  # of the parity checks h0 and h1, without their lowest coefficients
LENGTH = 1024  # weights to a chain: the register is back at 0 behind each, so that chains can be searched side by side
SUBSETS = 4  # of the indices, alike in their lowest two bits

_CHAINS = 256  # side by side: their costs stay in the processor's cache


def nearest_indices(x: np.ndarray) -> np.ndarray:
    """The indices (int32) nearest to `x` (float32, 1-D, in steps of the fine grid) that the register allows, which
    ends at 0. On all cores; not to be called by what runs in their pool."""
    chains = max(1, len(x) // LENGTH)
    length, longer = divmod(len(x), chains)  # the first `longer` chains have one more
    border = longer * (length + 1)
    groups = [*_groups(x[:border], length + 1), *_groups(x[border:], length)]
    return np.concatenate([np.empty(0, np.int32), *on_all_cores(_search, groups)])


def lowest_bits(stored: np.ndarray) -> np.ndarray:
    """The lowest bits (uint8, 0 or 1) of the indices of which `stored` (integers, 1-D) are the rest.

    Over GF(2), and with D for a delay, h0 times the sequence of lowest bits is h1 times that of b. To divide by h0,
    multiply by it and by its squares' squares: h0 h0^2 h0^4 ... h0^(N/2) = h0^N / h0, and squaring a polynomial over
    GF(2) only spreads its terms, so that h0^N is 1 but for terms of D^N and more. All N at once, in a long integer.
    """
    count = len(stored)
    bits = np.packbits((stored & 1).astype(np.uint8), bitorder="little")
    everything = (1 << count) - 1
    series = _times(int.from_bytes(bits.tobytes(), "little"), _delays(FORWARD), 1)
    spread = 1
    while spread < count:
        series = (series ^ _times(series, _delays(FEEDBACK), spread)) & everything
        spread *= 2
    packed = np.frombuffer((series & everything).to_bytes(len(bits), "little"), dtype=np.uint8)
    return np.unpackbits(packed, count=count, bitorder="little")


def _delays(polynomial: int) -> list[int]:
    return [i + 1 for i in range(polynomial.bit_length()) if polynomial >> i & 1]


def _times(series: int, delays: list[int], spread: int) -> int:
    result = 0
    for delay in delays:
        result ^= series << delay * spread
    return result


def _groups(x: np.ndarray, length: int) -> Iterator[np.ndarray]:
    """The chains of `length` in x, some at a time: (length, chains)."""
    chains = x.reshape(-1, length) if length else x.reshape(0, 1)
    for start in range(0, len(chains), _CHAINS):
        yield np.ascontiguousarray(chains[start : start + _CHAINS].T)


def _into() -> tuple[np.ndarray, np.ndarray]:
    """The two ways into each state: the states that they come from, and the subsets of the indices on them, (2, 64)."""
    ways: list[list[tuple[int, int]]] = [[] for _ in range(STATES)]
    for state in range(STATES):
        lowest = state & 1
        for b in (0, 1):
            ways[state >> 1 ^ lowest * FEEDBACK ^ b * FORWARD].append((state, 2 * b + lowest))
    both = np.array(ways).T
    return both[0], both[1]


_FROM, _SUBSET = _into()


def _search(x: np.ndarray) -> np.ndarray:
    """The nearest indices to the chains x (T, C): int32, one chain after the other."""
    length, chains = x.shape
    subsets = np.arange(SUBSETS, dtype=np.float32)[:, None]
    costs = np.full((STATES, chains), np.inf, dtype=np.float32)
    costs[0] = 0
    second = np.empty((length, STATES // 8, chains), dtype=np.uint8)  # whether the second way is the shorter, in bits
    for t in range(length):
        place = (x[t] - subsets) * np.float32(1 / SUBSETS)
        errors = np.square(place - np.rint(place))
        one, other = (costs[_FROM[way]] + errors[_SUBSET[way]] for way in (0, 1))
        second[t] = np.packbits(other < one, axis=0)
        costs = np.minimum(one, other)
    state, each = np.zeros(chains, dtype=np.int64), np.arange(chains)
    found = np.empty((chains, length), dtype=np.int32)
    for t in range(length - 1, -1, -1):
        way = second[t, state >> 3, each] >> (7 - (state & 7)) & 1
        subset = _SUBSET[way, state]
        found[:, t] = subset + SUBSETS * np.rint((x[t] - subset) * np.float32(1 / SUBSETS)).astype(np.int32)
        state = _FROM[way, state]
    return found.reshape(-1)
