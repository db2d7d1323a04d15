"""What is in a packed file: counts, bits and bytes of every tensor, and how near to its entropy each is."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from train_large.compression.packed import Part, read_tensors
from train_large.compression.quantization import Quantized, dequantize
from train_large.compression.storage import RANGE_BYTES, is_buffer
from train_large.errors import UserError
from train_large.files import whole

_AT_A_TIME = 1 << 20  # weights, as float64


@dataclass(frozen=True)
class Inspected:
    """One tensor of a packed file, or the sum of all.

    bits: of a code; 32 where weights are stored as they are; None in a sum over different ones.
    bytes_paper: nonzero parameters times bits / 8 (section 4.1). bytes_file: what it takes in the file; of tensors that
    are coded together, a share as large as its entropy.
    bytes_bound: the entropy of its codes, and of where the zeros are, each by itself, and its ranges as they are; for
    plain float32 values, the entropy of each of their four bytes.
    error_mean, error_variance: of the original weight minus the packed one (section 5.3); relative_error: the norm of
    that difference over the norm of the weights. None without an original.
    """

    name: str
    parameters: int
    nonzero: int
    bits: int | None
    bytes_paper: int
    bytes_file: int
    bytes_bound: float
    error_mean: float | None = None
    error_variance: float | None = None
    relative_error: float | None = None


@dataclass(frozen=True)
class Inspection:
    """tensors, each once (a tied one under its first name); their total; and the bytes that are not weights."""

    tensors: tuple[Inspected, ...]
    total: Inspected
    bytes_beside: int
    bytes_whole: int


def inspect(path: Path, original: Mapping[str, Tensor] | None = None) -> Inspection:
    """Look into the packed file at `path`; `original` is the state dict that it was made of, for the errors.

    Raises UserError where the file is damaged, and where `original` has other tensors than the file.
    """
    index, tensors = read_tensors(path)
    rows, sums = [], np.zeros(4)  # of the difference, of its square, of the weights' squares, and how many
    for name, tensor in tensors:
        if isinstance(tensor, str):  # tied to one that was there
            continue
        bits_here = tensor.coded_bits if isinstance(tensor, Quantized) else 8 * tensor.dtype.itemsize
        count = tensor.indices.numel() if isinstance(tensor, Quantized) else tensor.numel()
        parameters = 0 if is_buffer(name) else count  # a buffer takes bytes alone
        nonzero = _nonzero(tensor) if parameters else 0
        row = Inspected(
            name=name,
            parameters=parameters,
            nonzero=nonzero,
            bits=bits_here,
            bytes_paper=-(-nonzero * bits_here // 8),
            bytes_file=0,  # once all of its part are known
            bytes_bound=entropy_bound(tensor),
        )
        if original is not None:
            errors = _errors(name, tensor, original, path)
            sums += errors if parameters else 0
            row = _with_errors(row, errors)
        rows.append(row)
        del tensor
    bounds = {row.name: row.bytes_bound for row in rows}
    taken = {name: share for part in index.parts for name, share in _shares(part, bounds).items()}
    rows = [replace(row, bytes_file=taken[row.name]) for row in rows]
    bits = {row.bits for row in rows if row.parameters}
    total = Inspected(
        name="total",
        parameters=sum(row.parameters for row in rows),
        nonzero=sum(row.nonzero for row in rows),
        bits=bits.pop() if len(bits) == 1 else None,
        bytes_paper=sum(row.bytes_paper for row in rows),
        bytes_file=sum(row.bytes_file for row in rows),
        bytes_bound=sum(row.bytes_bound for row in rows),
    )
    if original is not None:
        total = _with_errors(total, sums)
    return Inspection(tuple(rows), total, index.bytes_beside, Path(path).stat().st_size)


def print_inspection(found: Inspection) -> None:
    """The table, as plain text: wide enough for a terminal of 120 columns."""
    rows = [*found.tensors, found.total]
    names = [row.name.replace("encoder.sentence_encoder.", "") for row in rows]
    width = max(map(len, names))
    errors = found.total.relative_error is not None
    heads = ["parameters", "not zero", "bits", "paper B", "file B", "entropy B"]
    heads += ["error mean", "variance", "relative"] if errors else []
    print(f"{'tensor':<{width}}" + "".join(f"{head:>12}" for head in heads))
    for name, row in zip(names, rows):
        cells = [f"{row.parameters:,}", f"{row.nonzero:,}", str(row.bits or "mixed")]
        cells += [f"{row.bytes_paper:,}", f"{row.bytes_file:,}", f"{row.bytes_bound:,.0f}"]
        if errors:
            cells += [f"{value:.3g}" for value in (row.error_mean, row.error_variance, row.relative_error)]
        print(f"{name:<{width}}" + "".join(f"{cell:>12}" for cell in cells))
    ratio = found.total.bytes_file / found.total.bytes_bound if found.total.bytes_bound else 1.0
    print(f"\nweights {ratio:.3f} times their entropy; {found.bytes_beside:,} bytes of configuration and dictionary;")
    print(f"the file {found.bytes_whole:,} bytes")


def write_csv(found: Inspection, path: Path) -> None:
    """Every tensor's figures, and their total, as CSV. Raises UserError where it cannot be written."""
    with whole(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Inspected)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in [*found.tensors, found.total])


def entropy_bound(tensor: Quantized | Tensor) -> float:
    """The fewest bytes that a coder could take which codes every symbol of a tensor by itself, with its ranges.

    The symbols are the codes, without the bit that a trellis makes, and, where zeros are kept, one more for zero. For
    plain values they are their bytes, the four of a float32 apart.
    """
    if isinstance(tensor, Quantized):
        codes = tensor.indices if tensor.mask is None else tensor.indices[tensor.mask]
        zeros = tensor.indices.numel() - codes.numel()
        counts = torch.bincount(codes.reshape(-1))
        if tensor.trellis:
            counts = counts.new_zeros(-(-len(counts) // 2)).index_add_(0, torch.arange(len(counts)) // 2, counts)
        return entropy(np.array([*counts.tolist(), zeros])) / 8 + RANGE_BYTES * tensor.step.numel()
    planes = tensor.contiguous().reshape(-1).view(torch.uint8).reshape(tensor.numel(), tensor.element_size()).T.numpy()
    return sum(entropy(np.bincount(plane, minlength=256)) for plane in planes) / 8


def entropy(counts: np.ndarray) -> float:
    """The bits that symbols take which come `counts` times each: their number times their empirical entropy."""
    counts = counts[counts > 0]
    if not len(counts):
        return 0.0
    return float(np.sum(counts * (np.log2(counts.sum()) - np.log2(counts))))


def _shares(part: Part, bounds: Mapping[str, float]) -> dict[str, int]:
    """The bytes of a part, divided among its tensors by their entropy; together they are all of them."""
    upto = np.cumsum([bounds[entry.name] for entry in part.entries])
    ends = np.rint(
        sum(part.blocks) * upto / upto[-1] if upto[-1] else np.linspace(0, sum(part.blocks), len(upto) + 1)[1:]
    )
    return {entry.name: int(share) for entry, share in zip(part.entries, np.diff(ends, prepend=0))}


def _nonzero(tensor: Quantized | Tensor) -> int:
    if not isinstance(tensor, Quantized):
        return int(torch.count_nonzero(tensor))
    if tensor.step.numel() > 1:
        return int(torch.count_nonzero(dequantize(tensor)))
    # Of one grid: which of its few values is zero, instead of all weights.
    codes = tensor.indices if tensor.mask is None else tensor.indices[tensor.mask]
    if not codes.numel():
        return 0
    counts = torch.bincount(codes.reshape(-1))
    each = torch.arange(len(counts)).to(tensor.indices.dtype)
    return int(counts[dequantize(replace(tensor, indices=each, mask=None, granularity="tensor")) != 0].sum())


def _errors(name: str, tensor: Quantized | Tensor, original: Mapping[str, Tensor], path: Path) -> np.ndarray:
    w = dequantize(tensor) if isinstance(tensor, Quantized) else tensor
    if name not in original or original[name].shape != w.shape:
        raise UserError(f"{path}: the original has no {name} of the shape {tuple(w.shape)}: give what it was made of.")
    sums = np.zeros(3)
    for theirs, ours in zip(original[name].reshape(-1).split(_AT_A_TIME), w.reshape(-1).split(_AT_A_TIME), strict=True):
        difference = theirs.double() - ours.double()
        sums += [float(difference.sum()), float(difference.square().sum()), float(theirs.double().square().sum())]
    return np.array([*sums, w.numel()])


def _with_errors(row: Inspected, sums: np.ndarray) -> Inspected:
    total, squares, weights, count = sums
    mean = total / count if count else 0.0
    variance = squares / count - mean**2 if count else 0.0
    relative = float(np.sqrt(squares / weights)) if weights else 0.0
    return replace(row, error_mean=mean, error_variance=variance, relative_error=relative)
