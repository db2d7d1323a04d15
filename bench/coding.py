"""Coders of quantized weights side by side: bytes over entropy, and weights a second, on one core.

    PYTHONPATH=. .venv-peers/bin/python bench/coding.py       (writes bench/coding.csv; `make bench` runs it)

The codes are those of MiniLM's 22.7 million weights, a grid for each tensor. Every coder takes one tensor at a time, in
turn, and what it wrote is decoded and compared.
"""

from __future__ import annotations

import lzma
import time
from collections.abc import Callable
from pathlib import Path

import constriction
import numpy as np
import table
import torch
import zstandard
from file_size import fetch_minilm
from safetensors.torch import load_file

from train_large.compression.coding import decode, encode, pack_bits, unpack_bits
from train_large.compression.inspection import entropy
from train_large.compression.quantization import quantize_tensor
from train_large.machine import describe

BITS = (8, 6, 5, 4, 3, 2)
Coder = tuple[Callable[[np.ndarray, int], bytes], Callable[[bytes, int, int], np.ndarray]]


def ans(codes: np.ndarray, bits: int) -> bytes:
    """constriction's stream coder with the frequencies of the codes, which are stored with them as 32-bit counts."""
    counts = np.bincount(codes, minlength=2**bits)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(codes.astype(np.int32), _model(counts))
    return counts.astype("<u4").tobytes() + coder.get_compressed().tobytes()


def unans(block: bytes, count: int, bits: int) -> np.ndarray:
    counts = np.frombuffer(block[: 4 * 2**bits], "<u4")
    words = np.frombuffer(block[4 * 2**bits :], np.uint32)
    return constriction.stream.stack.AnsCoder(words.copy()).decode(_model(counts), count).astype(np.uint8)


def _model(counts: np.ndarray) -> constriction.stream.model.Categorical:
    return constriction.stream.model.Categorical((counts / max(1, counts.sum())).astype(np.float32), perfect=False)


CODERS: dict[str, Coder] = {
    "packed file": (encode, decode),
    "bit string": (pack_bits, unpack_bits),
    "constriction ANS": (ans, unans),
    "zstandard -3, a byte a code": (
        lambda codes, bits: zstandard.compress(codes.tobytes(), 3),
        lambda block, count, bits: np.frombuffer(zstandard.decompress(block), np.uint8),
    ),
    "zstandard -3 over the bit string": (
        lambda codes, bits: zstandard.compress(pack_bits(codes, bits), 3),
        lambda block, count, bits: unpack_bits(zstandard.decompress(block), count, bits),
    ),
    "zstandard -19, a byte a code": (
        lambda codes, bits: zstandard.compress(codes.tobytes(), 19),
        lambda block, count, bits: np.frombuffer(zstandard.decompress(block), np.uint8),
    ),
    "xz, a byte a code": (
        lambda codes, bits: lzma.compress(codes.tobytes()),
        lambda block, count, bits: np.frombuffer(lzma.decompress(block), np.uint8),
    ),
}


def main(downloads: Path, out: Path) -> None:
    torch.set_num_threads(1)
    tensors = [w for w in load_file(fetch_minilm(downloads)).values() if w.is_floating_point()]
    rows = []
    for bits in BITS:
        codes = [quantize_tensor(w, bits).indices.reshape(-1).numpy() for w in tensors]
        count = sum(map(len, codes))
        bound = sum(entropy(np.bincount(some)) for some in codes) / 8
        sizes, times = dict.fromkeys(CODERS, 0), {name: [0.0, 0.0] for name in CODERS}
        for some in codes:
            for name, (coder, decoder) in CODERS.items():
                began = time.perf_counter()
                block = coder(some, bits)
                middle = time.perf_counter()
                back = decoder(block, len(some), bits)
                times[name][0] += middle - began
                times[name][1] += time.perf_counter() - middle
                assert np.array_equal(back, some), name
                sizes[name] += len(block)
        for name in CODERS:
            row = {
                "coder": name,
                "bits": bits,
                "bytes": sizes[name],
                "entropy_bytes": round(bound),
                "over_entropy": f"{sizes[name] / bound:.4f}",
                "encode_million_per_second": f"{count / 1e6 / times[name][0]:.0f}",
                "decode_million_per_second": f"{count / 1e6 / times[name][1]:.0f}",
                "machine": describe(1),
            }
            print(*row.values(), sep="  ", flush=True)
            rows.append(row)
    table.write(rows, out)


if __name__ == "__main__":
    main(Path("runs/downloads"), Path(__file__).with_suffix(".csv"))
