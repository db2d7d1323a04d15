"""Steps chosen by rate and distortion: the fewest bytes at a weight error, or the smallest error at a file size.

With entropy coding a weight costs the information in its index, not the width of the index, and so a large weight may
lie far out on a fine grid: no range need be clipped. One number per tensor remains to be chosen, the step of a uniform
grid of which zero is a point (a mid-tread quantizer: pruned weights need no mask on a coarse grid):

    weights              0.31   0    -0.07   0.12   -0.48         step 0.1
    round(w / step)      3      0    -1      1      -5            what the entropy coder is to code
    index, from 0        8      5     4      6       0            minimum = -5 x 0.1
    w' = step refitted   0.293  0    -0.098  0.098  -0.489        step 0.0978: the least squares for these indices

For each tensor the entropy R and the squared error D of a ladder of steps are read from a histogram; the points on the
lower convex hull of D against R are the steps worth having. Then bytes are spent where they take away the most error,
edge by edge over the hulls of all tensors, until the target is met. What this comes to at high rate is one common step
for all tensors, and 6.02 dB for each bit (Gish and Pierce, Asymptotically efficient quantizing, 1968); at low rate and
for pruned tensors, whose weights leave a gap about zero, tensors differ.

With a trellis (trellis.py) large matrices have half the step, as much information, and three quarters of the squared
error. It is for those of at least TRELLIS_BITS bits a weight: at fewer it costs more than it wins that half of the
indices cannot be zero.

The error is that of the whole model, ||w - w'|| / ||w|| over all parameters, tied ones once. It does not see biases and
norms, a thousandth of the weights, on which a model depends more than on as many entries of a matrix. So in choosing
steps, not in the error reported, squared errors of vectors count VECTOR_WEIGHT-fold: their steps are about an eighth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from train_large.compression.inspection import entropy, entropy_bound
from train_large.compression.packed import CHUNK, SMALL
from train_large.compression.quantization import MAX_BITS, Quantized, Quantizer, dequantize
from train_large.compression.storage import RANGE_BYTES, tied_to
from train_large.compression.trellis import SUBSETS, nearest_indices
from train_large.errors import UserError

VECTOR_WEIGHT = 64
TRELLIS_BITS = 2.0

_CHUNK = 1 << 18  # weights at a time: bounds the temporaries
_BINS = 1 << 17  # of a histogram, on each side of zero
_FINEST = 16000  # steps from zero to the largest magnitude: indices from -16000 to 16000 have 15 bits
_PER_OCTAVE = 32  # steps on the ladder between one and its double
_LEAST_ERROR = 1e-3  # relative, of a matrix: finer steps are not looked at
_SPIKE = 10  # zeros are a mask where they are one in so many, and twice as many as the points on both sides of zero
_TRELLIS_ERROR = 0.87  # over that of rounding
_GUESSES = 6
_CLOSE = 2e-4  # of the target: a search ends when no better choice can gain more

Size = Callable[[Quantizer], int]


def quantize_to_step(w: Tensor, step: float) -> Quantized:
    """`w`, of any shape and floating type, rounded to multiples of `step`: one range, zero exactly zero.

    Zeros are indices like all others, but where they stand out among indices of more than 8 bits, as in a pruned
    tensor: those are coded in two parts, to which a peak of zeros would be lost, and so they are kept by a mask.

    `bits` is the width of the indices, 2 to 15. The `step` of the result is the one with the least squared error for
    these indices. It has so few digits that index times step is exact in float32: `dequantize` gives exactly 0 for
    zero on every machine, with fused multiply-add too.

    Raises UserError for weights that are not finite or need more than 15 bits, ValueError unless step > 0.
    """
    if not 0 < step < math.inf:
        raise ValueError(f"a step is a number above 0, not {step}")
    flat = w.detach().reshape(-1)
    low, high = (float(bound) for bound in flat.aminmax()) if flat.numel() else (0.0, 0.0)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError("weights that are not finite cannot be quantized.")
    low, high = min(low, 0.0), max(high, 0.0)
    if (high - low) / step >= 2**MAX_BITS - 2:
        raise UserError(
            f"steps of {step:g} from {low:g} to {high:g}, zero among them, make indices of more than {MAX_BITS} bits: "
            "give a larger step."
        )
    digits = 23 - _width(low, high, step)  # one to spare, since a shortened step may need one bit more
    grid = _shortened(step, digits)
    codes = np.empty(flat.numel(), dtype=np.int16)
    ends = []
    inner = norm = 0.0  # <w, n> and <n, n> for n = round(w / step)
    for start, part in _chunks(flat):
        n = np.rint(part / grid)
        ends += [int(n.min()), int(n.max())]
        codes[start : start + len(n)] = n
        inner += float(np.multiply(part, n, dtype=np.float64).sum())
        norm += float(np.square(n, dtype=np.float64).sum())
    best = _fitted(inner, norm, grid, digits)
    lowest, highest = min(ends, default=0), max(ends, default=0)
    # The shortened step is a bit finer, so there can be more than were foreseen, and more than int16 holds.
    if highest - lowest >= 2**MAX_BITS or not -(2**15) <= lowest <= highest < 2**15:
        raise UserError(
            f"steps of {grid:g} from {low:g} to {high:g}, zero among them, make indices of more than {MAX_BITS} bits: "
            "give a larger step."
        )
    bits = max(2, (highest - lowest).bit_length())
    mask = codes != 0
    zeros, beside = codes.size - np.count_nonzero(mask), np.count_nonzero(np.abs(codes) == 1)
    if bits <= 8 or _SPIKE * zeros < codes.size or zeros < 2 * beside:
        mask[:] = True
    codes[mask] -= np.int16(lowest)
    return replace(_quantized(codes, lowest, best, w.shape, bits), mask=_mask(mask, w.shape))


def quantize_by_trellis(w: Tensor, step: float) -> Quantized:
    """`w` in the information of `quantize_to_step`, with a smaller error: indices on a grid of half the step, as a
    trellis allows them. Zeros are kept by a mask.

    Where that does not pay or cannot be, it is `quantize_to_step`: for vectors and small matrices, indices of little
    information, and such as would have more than 15 bits. Raises UserError and ValueError as that does.
    """
    rounded = quantize_to_step(w, step)
    if w.dim() < 2 or w.numel() <= SMALL or rounded.bits + 2 > MAX_BITS:
        return rounded
    flat = w.detach().reshape(-1)
    mask = (flat != 0).numpy()
    indices = rounded.indices if rounded.mask is None else rounded.indices.int().masked_fill(~rounded.mask, -1) + 1
    counts = np.bincount(indices.reshape(-1).numpy()[mask])
    if entropy(counts) <= TRELLIS_BITS * counts.sum():
        return rounded
    digits = 23 - (rounded.bits + 2)  # twice as many indices; the nearest allowed one may lie outside their range
    grid = _shortened(step / 2, digits)
    codes = np.zeros(flat.numel(), dtype=np.int16)
    ends = []
    inner = norm = 0.0
    for start, part in _chunks(flat, CHUNK):  # in a packed file the register begins anew in each
        kept = mask[start : start + CHUNK]
        n = nearest_indices(part[kept] / grid)
        ends += [int(n.min(initial=0)), int(n.max(initial=0))]
        codes[start : start + CHUNK][kept] = n
        inner += float(np.multiply(part[kept], n, dtype=np.float64).sum())
        norm += float(np.square(n, dtype=np.float64).sum())
    best = _fitted(inner, norm, grid, digits)
    lowest = min(ends) // SUBSETS * SUBSETS  # which leaves an index the lowest two bits that the trellis goes by
    bits = (max(ends) - lowest).bit_length()
    codes[mask] -= np.int16(lowest)
    return replace(
        _quantized(codes, lowest, best, w.shape, bits),
        mask=_mask(mask, w.shape),
        trellis=True,
    )


def _mask(kept: np.ndarray, shape: torch.Size) -> Tensor | None:
    """The mask of a tensor, bool; None where all weights are kept."""
    return None if kept.all() else torch.from_numpy(kept).view(shape)


def _quantized(codes: np.ndarray, lowest: int, step: np.float32, shape: torch.Size, bits: int) -> Quantized:
    """Indices from 0 on (int16) on one grid, whose first point is `lowest` steps."""
    ranges = min(1, codes.size)  # of no weights there are none
    return Quantized(
        indices=torch.from_numpy(codes if bits > 8 else codes.astype(np.uint8)).view(shape),
        minimum=torch.from_numpy(np.array([lowest] * ranges, dtype=np.float32) * step),
        step=torch.from_numpy(np.array([step] * ranges)),
        mask=None,
        granularity="tensor",
        bits=bits,
    )


def _fitted(inner: float, norm: float, grid: np.float32, digits: int) -> np.float32:
    """The step with the least squared error for the indices n of weights w, of so many digits; `grid` is what n was
    rounded by, inner and norm are <w, n> and <n, n>."""
    fitted = _shortened(inner / norm, digits) if norm else grid
    # The error less ||w||^2 is step^2 <n, n> - 2 step <w, n>.
    return min((grid, fitted), key=lambda s: float(s) * (float(s) * norm - 2 * inner))


def relative_error(model_state: Mapping[str, Tensor], quantizer: Quantizer) -> float:
    """||w - w'|| / ||w|| over all parameters of a state dict together, tied ones once; 0 where all weights are 0."""
    error = norm = 0.0
    for name, tensor in _once(model_state).items():
        flat = tensor.detach().reshape(-1)
        made = quantizer(name, tensor)
        other = (made if isinstance(made, Tensor) else dequantize(made)).reshape(-1)
        for start, part in _chunks(flat):
            norm += float(np.square(part, dtype=np.float64).sum())
            part -= other[start : start + len(part)].numpy()
            error += float(np.square(part, dtype=np.float64).sum())
    return math.sqrt(error / norm) if norm else 0.0


def steps_for(
    model_state: Mapping[str, Tensor],
    *,
    target_error: float | None = None,
    target_bytes: int | None = None,
    size: Size | None = None,
    plans: Plans | None = None,
    trellis: bool = False,
) -> dict[str, float]:
    """A step for every parameter: the fewest bytes with a `relative_error` of at most `target_error`, or the smallest
    error with at most `target_bytes` bytes by `size`.

    `size` is the bytes of the model as a quantizer makes it, by default the sum of `entropy_bound`. It is called some
    five times. `plans` are those of the same weights, where several targets are wanted. No tensor's step is larger than
    its largest weight, so that none becomes zero altogether. With `trellis` they are those of `quantize_by_trellis`.

    Raises UserError unless exactly one target is given, for a target that no choice of steps meets (it says the
    smallest that one does), and for weights that are not finite.
    """
    if (target_error is None) == (target_bytes is None):
        raise UserError("give --target-error or --target-bytes, not both.")
    if target_error is not None and not 0 < target_error < 1:
        raise UserError(f"--target-error {target_error:g}: give a number between 0 and 1, such as 0.01.")
    if target_bytes is not None and target_bytes < 1:
        raise UserError(f"--target-bytes {target_bytes}: give a number of bytes above 0.")
    weights = _once(model_state)
    plans = plans or Plans(model_state)
    tied = tied_to(model_state)

    def steps(plan: int) -> dict[str, float]:
        chosen = plans.steps(plan)
        return {name: chosen[first] for name, first in tied.items()}

    def quantizer(plan: int) -> Quantizer:
        return _quantizer(steps(plan), trellis)

    def bound(plan: int) -> float:
        make = quantizer(plan)
        return sum(entropy_bound(make(name, tensor)) for name, tensor in weights.items())

    if target_error is not None:
        last = len(plans.errors) - 1
        estimates = plans.errors[::-1] * (_TRELLIS_ERROR if trellis else 1)
        found, reached = _largest(estimates, lambda i: relative_error(model_state, quantizer(last - i)), target_error)
        if found is None:
            digit = 10.0 ** (math.floor(math.log10(reached)) - 1)
            least = math.ceil(1.01 * reached / digit) * digit  # in two digits, and not below what is reached
            raise UserError(f"--target-error {target_error:g}: the finest steps leave {least:.2g}: give at least that.")
        return steps(last - found)
    assert target_bytes is not None
    measure = bound if size is None else lambda plan: size(quantizer(plan))
    found, reached = _largest(plans.bytes, measure, target_bytes)
    if found is None:
        raise UserError(
            f"--target-bytes {target_bytes}: the smallest that these weights become is {math.ceil(reached)} bytes: "
            "give at least that, or prune the model further."
        )
    return steps(found)


def quantizer_for(
    model_state: Mapping[str, Tensor],
    *,
    target_error: float | None = None,
    target_bytes: int | None = None,
    size: Size | None = None,
    plans: Plans | None = None,
    trellis: bool = False,
) -> Quantizer:
    """The quantizer with the steps of `steps_for`."""
    steps = steps_for(
        model_state, target_error=target_error, target_bytes=target_bytes, size=size, plans=plans, trellis=trellis
    )
    return _quantizer(steps, trellis)


def _quantizer(steps: Mapping[str, float], trellis: bool) -> Quantizer:
    quantize = quantize_by_trellis if trellis else quantize_to_step
    return lambda name, w: quantize(w, steps[name])


@dataclass(frozen=True)
class _Ladder:
    """The steps of one tensor that are worth having, from the coarsest: bits, and squared error, at each.

    gains: for each step but the last, the error, weighted, that every further bit takes away; falling. It is the slope
    of the lower convex hull, so the steps on it come before those that lie above it.
    """

    steps: np.ndarray
    bits: np.ndarray
    errors: np.ndarray
    gains: np.ndarray


class Plans:
    """Choices of one step for each tensor, from the coarsest (plan 0) to the finest: each refines one tensor more.

    bytes, errors: what each plan comes to by the histograms, rising and falling.
    """

    def __init__(self, model_state: Mapping[str, Tensor]):
        weights = _once(model_state)
        self._ladders = {name: _ladder(name, tensor) for name, tensor in weights.items()}
        ladders = list(self._ladders.values())
        gains = np.concatenate([np.empty(0), *(ladder.gains for ladder in ladders)])
        owner = np.repeat(np.arange(len(ladders)), [len(ladder.steps) - 1 for ladder in ladders])
        # A stable sort: of one tensor, the coarser comes first.
        order = np.argsort(-gains, kind="stable")
        self._owner = owner[order]

        def running(values: list[np.ndarray]) -> np.ndarray:
            changes = np.concatenate([np.empty(0), *(np.diff(each) for each in values)])[order]
            return np.cumsum(np.concatenate([[sum(float(each[0]) for each in values)], changes]))

        norm = sum(_square(tensor) for tensor in weights.values())
        self.bytes = running([ladder.bits for ladder in ladders]) / 8 + RANGE_BYTES * len(ladders)
        self.errors = np.sqrt(np.maximum(running([ladder.errors for ladder in ladders]), 0) / (norm or 1.0))

    def steps(self, plan: int) -> dict[str, float]:
        refined = np.bincount(self._owner[:plan], minlength=len(self._ladders))
        return {name: float(ladder.steps[i]) for (name, ladder), i in zip(self._ladders.items(), refined)}


def _largest(estimates: np.ndarray, measure: Callable[[int], float], target: float) -> tuple[int | None, float]:
    """The last index whose measure is at most `target`, and its measure; None, and the first one's, if there is none.

    `estimates` rise with the index and are nearly in proportion to the measures, which are dear.
    """
    below, above = -1, len(estimates)
    reached = measured = math.nan
    scale = 1.0
    tries = 0
    while above - below > 1:
        tries += 1
        guess = int(np.searchsorted(estimates, target / scale * (1 - _CLOSE / 2), side="right")) - 1
        if tries > _GUESSES:  # measures that are far from proportional: halve
            guess = (below + above) // 2
        at = min(max(guess, below + 1), above - 1)
        measured = measure(at)
        if measured <= target:
            below, reached = at, measured
        else:
            above = at
        if below >= 0 and (reached >= target * (1 - _CLOSE) or below + 1 < above and _same(estimates, below, above)):
            break
        scale = measured / estimates[at] if measured > 0 and estimates[at] > 0 else 1.0
    return (below, reached) if below >= 0 else (None, measured)


def _same(estimates: np.ndarray, below: int, above: int) -> bool:
    return above < len(estimates) and estimates[above] - estimates[below] <= _CLOSE * estimates[above]


def _ladder(name: str, tensor: Tensor) -> _Ladder:
    """What the steps from the largest magnitude downwards come to, without those that another one beats."""
    largest = float(tensor.detach().abs().max()) if tensor.numel() else 0.0
    if not math.isfinite(largest):
        raise UserError(f"{name}: weights that are not finite cannot be quantized.")
    weight = VECTOR_WEIGHT if tensor.dim() < 2 else 1
    if largest == 0:
        return _Ladder(np.ones(1), np.zeros(1), np.zeros(1), np.zeros(0))
    # The same ladder for all tensors, so that tensors that want a common step can have it.
    first, last = (math.floor(_PER_OCTAVE * math.log2(s)) for s in (largest, largest / _FINEST))
    steps = 2.0 ** (np.arange(first, last, -1) / _PER_OCTAVE)
    points = _rate_distortion(tensor.detach().reshape(-1), largest, steps, _LEAST_ERROR / math.sqrt(weight))
    keep: list[int] = []
    for i in np.lexsort((points[:, 1], points[:, 0])):
        if not keep or points[i, 1] < points[keep[-1], 1]:
            keep.append(int(i))
    points = points[keep]
    hull: list[int] = []
    for j in range(len(points)):
        while len(hull) > 1 and _slope(points, hull[-2], j) <= _slope(points, hull[-2], hull[-1]):
            hull.pop()
        hull.append(j)
    slopes = [_slope(points, i, j) for i, j in zip(hull, hull[1:])]
    gains = -weight * np.repeat(np.array(slopes), np.diff(hull))
    return _Ladder(steps[keep], points[:, 0], points[:, 1], gains)


def _slope(points: np.ndarray, i: int, j: int) -> float:
    return (points[j, 1] - points[i, 1]) / (points[j, 0] - points[i, 0])


def _rate_distortion(flat: Tensor, largest: float, steps: np.ndarray, least_error: float) -> np.ndarray:
    """Bits and squared error of the weights at each of the falling steps, refitted: (steps, 2).

    It stops early at a relative error of `least_error`.
    """
    counts = np.zeros(2 * _BINS + 1, dtype=np.int64)
    unit = largest / _BINS  # a weight is taken for the nearest multiple of it
    for _, part in _chunks(flat):
        part = np.rint(np.divide(part, np.float32(unit), out=part) if unit > 1e-37 else part / unit)
        counts += np.bincount(np.clip(part, -_BINS, _BINS).astype(np.int64) + _BINS, minlength=len(counts))
    at = np.arange(-_BINS, _BINS + 1)
    squares = float(counts @ np.square(at, dtype=np.float64))
    count_before, sum_before = (np.concatenate([[0], np.cumsum(values)]) for values in (counts, counts * at))
    occupied = np.flatnonzero(counts)
    low, high = (float(at[end]) for end in (occupied[0], occupied[-1]))
    points = np.empty((len(steps), 2))
    for i, step in enumerate(steps / unit):
        n = np.arange(round(low / step), round(high / step) + 1)
        borders = np.ceil((n[1:] - 0.5) * step).astype(np.int64) + _BINS
        borders = np.concatenate([[0], borders, [len(counts)]])
        count, total = np.diff(count_before[borders]), np.diff(sum_before[borders])
        inner, norm = float(n @ total), float(np.square(n) @ count)
        error = max(0.0, squares - (inner * inner / norm if norm else 0.0))
        points[i] = entropy(count), error * unit**2
        if error < least_error**2 * squares:
            return points[: i + 1]
    return points


def _once(model_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a state dict, tied ones by the first name only."""
    return {name: model_state[name] for name, first in tied_to(model_state).items() if name == first}


def _square(tensor: Tensor) -> float:
    return sum(float(np.square(part, dtype=np.float64).sum()) for _, part in _chunks(tensor.detach().reshape(-1)))


def _chunks(flat: Tensor, size: int = _CHUNK) -> Iterator[tuple[int, np.ndarray]]:
    """Where each chunk starts, and its weights as a new float32 array."""
    for start in range(0, flat.numel(), size):
        yield start, flat[start : start + size].cpu().to(torch.float32, copy=True).numpy()


def _width(low: float, high: float, step: float) -> int:
    """The bits of the indices from round(low / step) to round(high / step), zero among them; at least 2."""
    return max(2, (max(0, round(high / step)) - min(0, round(low / step))).bit_length())


def _shortened(step: float, digits: int) -> np.float32:
    """`step` rounded to so many binary digits, as float32; never 0."""
    fraction, exponent = math.frexp(step)
    short = np.float32(math.ldexp(round(math.ldexp(fraction, digits)), exponent - digits))
    return short if short > 0 else np.float32(2.0**-149)
