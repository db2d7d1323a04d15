"""The packed file: a model with its configuration, dictionary and labels in one safetensors file, without pickle.

    train-large pack IN.pt OUT.safetensors --bits 6

The file has two byte tensors and one line of metadata. docs/packed.md has all that a reader in another language needs.

    safetensors header      {"__metadata__": {"train-large": LINE}, "index": U8 [m], "weights": U8 [n]}
    LINE                    JSON: format, version, size, and the CRC-32 of the index
    index                   JSON, compressed by xz: the checkpoint without its weights, what `weights` holds, and the
                            dictionary, label names and BPE
    weights                 blocks (coding.py), one after the other, in the order of the index

A quantized tensor is a block of ranges, then for every 2^22 weights: a block of one bit a weight if some are zeros that
are kept (1: not zero), then the codes of the weights that are not, in a block of up to 8 bits; codes wider than that
have a block for their leading 8 bits and one for the others. An example, six weights at k = 3, one of them pruned:

    weights                 0.50  -0.25   0   0.15  -0.05  0.50     min -0.25, step 0.75 / 7 = 0x3ddb6db7 as float32
    codes                      7      0   -      4      2     7
    mask                       1      1   0      1      1     1

    the three blocks, each with 0 for its method (a bit string)
    ranges   00 | 00b7 006d 80db be3d       the four bytes of min and of step, the lowest of both first
    mask     00 | 3b                        = 0b00111011, the first weight in the lowest bit
    codes    00 | 0775                      = 7 + 0 * 2^3 + 4 * 2^6 + 2 * 2^9 + 7 * 2^12, the lowest byte first

                   byte 0            byte 1
              0 0|0 0 0|1 1 1   0|1 1 1|0 1 0|1         highest bit on the left
               4    0     7     -   7     2   4

`unpack` gives bit for bit what `quantize` gives.
"""

from __future__ import annotations

import itertools
import json
import lzma
import math
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from train_large.compression.coding import SYMBOLS_PER_BYTE, decode, encode
from train_large.compression.parallel import pool
from train_large.compression.quantization import MAX_BITS, Quantized, dequantize, dequantized
from train_large.compression.storage import block_size
from train_large.errors import UserError
from train_large.files import whole

NAME = "train-large"
FORMAT = "packed model"
VERSION = 1
CHUNK = 1 << 22  # weights to a block
AHEAD = 8  # tensors that are decoded before they are asked for
WANTED = "a file that `train-large pack` wrote"

# The dtypes of what is stored as it is: buffers, and parameters at 32 bits.
_PLAIN = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
_PLAIN.update({name: getattr(torch, name) for name in ("int64", "int32", "int16", "int8", "uint8", "bool")})
_KIND = ("bits", "granularity", "dtype", "mask")  # of an entry: with its name and shape, all that says what blocks are
# What reading JSON of another shape than it should have may raise.
_WRONG = (ValueError, TypeError, KeyError, AttributeError, RecursionError, MemoryError)
_MAX_INDEX = 1 << 28  # bytes of JSON
_XZ_MEMORY = 1 << 29
# For text: more context from the byte before, none from the place within a word.
_XZ = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0, "dict_size": 1 << 26}]


@dataclass(frozen=True)
class PackedModel:
    """What a packed file holds.

    tensors: by state-dict name and in its order, quantized or as they are; names of tied weights share one object.
    checkpoint: the rest of the checkpoint, in plain values (`stock_form`, without `model`).
    files: what goes with the model, by name: dict.txt, labels.txt, encoder.json, vocab.bpe; each if it is known.
    """

    tensors: dict[str, Quantized | Tensor]
    checkpoint: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)

    def state(self) -> dict[str, Tensor]:
        """The model's state dict, quantized weights as the float32 values of their grid points; tied names share."""
        made: dict[int, Tensor] = {}
        for tensor in self.tensors.values():
            if id(tensor) not in made:
                made[id(tensor)] = dequantize(tensor) if isinstance(tensor, Quantized) else tensor
        return {name: made[id(tensor)] for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class Entry:
    """What the index says of one tensor; `same_as` names another entry instead of having weights of its own.

    bits: of a quantized tensor; None where `dtype` says what its values are. blocks: the bytes of each block.
    """

    name: str
    shape: tuple[int, ...] = ()
    bits: int | None = None
    granularity: str = "tensor"
    dtype: str | None = None
    mask: bool = False
    blocks: tuple[int, ...] = ()
    crc32: int = 0
    same_as: str | None = None

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def widths(self) -> list[int]:
        """Bits of a symbol in each block that a chunk has behind its mask."""
        if self.bits is None:
            return [8] * _PLAIN[self.dtype].itemsize  # type: ignore[index]
        return [self.bits] if self.bits <= 8 else [8, self.bits - 8]


def write_packed(
    tensors: Iterable[tuple[str, Quantized | Tensor | str]],
    checkpoint: Mapping[str, Any],
    files: Mapping[str, str],
    path: Path | None,
) -> int:
    """Write a packed file, whole or not at all, and return its bytes; with no `path`, only count them.

    `tensors` gives each entry of the state dict: quantized, as it is, or the name of the earlier one that it is tied
    to. Nothing but codes is held in memory, so it may be a generator. Raises UserError for a dtype or configuration
    that the format has no place for, and where the file cannot be written.
    """
    entries: list[dict[str, Any]] = []
    blocks: list[bytes] = []
    coming: list[tuple[dict[str, Any], list[Future[list[bytes]]]]] = []
    for name, tensor in tensors:
        coming.append((_described(name, tensor), list(_encoded(tensor))))
    for entry, futures in coming:
        if futures:
            mine = [block for future in futures for block in future.result()]
            entry["blocks"] = [len(block) for block in mine]
            entry["crc32"] = _crc32(entry, mine)
            blocks += mine
        entries.append(entry)
    # The files are text, and share much of it: in one frame with the rest they take the least.
    index = {"checkpoint": checkpoint, "tensors": entries, "files": dict(files)}
    text = _json(index)
    if json.loads(text) != index:
        raise UserError("the checkpoint's configuration has keys that are not text: it cannot be packed.")
    frame = lzma.compress(text, lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=_XZ)
    parts = [_header(checkpoint, frame, sum(map(len, blocks))), frame, *blocks]
    if path is not None:
        with whole(path) as aside, aside.open("wb") as file:
            file.writelines(parts)
    return sum(map(len, parts))


def _header(checkpoint: Mapping[str, Any], frame: bytes, weights: int) -> bytes:
    """The head of a safetensors file of two byte tensors: its length in eight bytes, then JSON, filled up by spaces.

    By hand, because the library wants all of the file in memory, and orders metadata by chance.
    """
    ends = (len(frame), len(frame) + weights)
    header = {
        "__metadata__": {NAME: _json(_metadata(checkpoint, zlib.crc32(frame))).decode()},
        "index": {"dtype": "U8", "shape": [len(frame)], "data_offsets": [0, ends[0]]},
        "weights": {"dtype": "U8", "shape": [weights], "data_offsets": [ends[0], ends[1]]},
    }
    text = _json(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_packed(path: Path) -> PackedModel:
    """Read a packed file. Nothing in it is run.

    Raises UserError, which names the file and the tensor, for whatever is not exactly what `write_packed` writes: cut
    short, changed in any bit, of a newer format, or with an index that asks for more than the file can hold.
    """
    index, weights = read_index(path)
    made: dict[str, Quantized | Tensor] = {}
    for name, tensor in _tensors(path, index, weights):
        made[name] = made[tensor] if isinstance(tensor, str) else tensor
    return PackedModel(made, index.checkpoint, index.files)


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict in a packed file (`PackedModel.state`) and the rest of its checkpoint; no two forms of all of the
    weights are in memory together. Raises UserError as `read_packed` does.
    """
    index, weights = read_index(path)
    return dequantized(_tensors(path, index, weights)), index.checkpoint


def _tensors(path: Path, index: Index, weights: memoryview) -> Iterator[tuple[str, Quantized | Tensor | str]]:
    """What `write_packed` was given, decoded a few tensors ahead and let go one by one."""
    starts = itertools.accumulate((sum(entry.blocks) for entry in index.tensors), initial=0)
    coming: deque[tuple[Entry, Future[Quantized | Tensor] | None]] = deque()
    rest = zip(index.tensors, starts)
    while True:
        for entry, start in itertools.islice(rest, AHEAD - len(coming)):
            blocks = weights[start : start + sum(entry.blocks)]
            coming.append((entry, pool().submit(_decoded, entry, blocks) if entry.same_as is None else None))
        if not coming:
            return
        entry, future = coming.popleft()
        if future is None:
            yield entry.name, str(entry.same_as)
            continue
        try:
            yield entry.name, future.result()
        except ValueError as error:
            raise UserError(f"{path}: {entry.name} is damaged ({error}): get the file once more.") from error


@dataclass(frozen=True)
class Index:
    """The index of a packed file, checked against the file; `bytes_beside` is what is not weights."""

    checkpoint: dict[str, Any]
    tensors: tuple[Entry, ...]
    files: dict[str, str]
    bytes_beside: int


def read_index(path: Path) -> tuple[Index, memoryview]:
    """The index of a packed file, and the bytes of its blocks. Raises UserError as `read_packed` does."""
    path = Path(path)
    try:
        with safetensors.safe_open(path, "numpy") as file:
            found = (file.metadata() or {}).get(NAME)
            if found is None or set(file.keys()) != {"index", "weights"}:
                raise ValueError(f"it is not {WANTED}")
            line = json.loads(found)
            _check_version(line)
            frame, weights = file.get_tensor("index"), file.get_tensor("weights")
        if any(array.dtype != np.uint8 or array.ndim != 1 for array in (frame, weights)):
            raise ValueError("its parts are not bytes")
        text = _json_of(frame.tobytes(), line)
        return _index(text, line, weights.data, path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give {WANTED}.") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (OSError, EOFError, safetensors.SafetensorError, lzma.LZMAError, *_WRONG) as error:
        raise UserError(f"{path} cannot be read ({error}): give {WANTED}, whole.") from error


def _check_version(line: Any) -> None:
    if not isinstance(line, dict) or line.get("format") != FORMAT or type(line.get("version")) is not int:
        raise ValueError(f"it is not {WANTED}")
    if line["version"] != VERSION:
        raise UserError(
            f"it is of format {line['version']}, and this train-large reads {VERSION}: install the one that wrote it."
        )


def _json_of(frame: bytes, line: Mapping[str, Any]) -> Any:
    """The index, out of its frame. Raises ValueError and lzma.LZMAError where there is none."""
    if zlib.crc32(frame) != line.get("index_crc32"):
        raise ValueError("its index is damaged")
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
    text = decompressor.decompress(frame, min(_MAX_INDEX, 2000 * len(frame)))
    if not decompressor.eof or decompressor.unused_data:
        raise ValueError("its index is longer than it can be")
    return json.loads(text)


def _index(value: Any, line: Mapping[str, Any], weights: memoryview, path: Path) -> tuple[Index, memoryview]:
    if not isinstance(value, dict) or set(value) != {"checkpoint", "tensors", "files"}:
        raise ValueError("its index has other parts than it should")
    if not isinstance(value["checkpoint"], dict):
        raise ValueError("its index has no configuration")
    if line != _metadata(value["checkpoint"], line["index_crc32"]):
        raise ValueError("its metadata and its index differ")
    entries: dict[str, Entry] = {}
    end = 0
    for one in value["tensors"]:
        entry = _entry(one, entries)
        entries[entry.name] = entry
        blocks, end = weights[end : end + sum(entry.blocks)], end + sum(entry.blocks)
        if len(blocks) < sum(entry.blocks):
            raise UserError(f"{entry.name} is cut short: get the file once more.")
        if entry.same_as is None and _crc32(one, [blocks]) != entry.crc32:
            raise UserError(f"{entry.name} is damaged: get the file once more.")
    files = value["files"]
    if not isinstance(files, dict) or not all(type(text) is str for text in files.values()):
        raise ValueError("its index has files that are not text")
    if end != len(weights):
        raise ValueError(f"it has {len(weights)} bytes of weights, and its index {end}")
    return Index(value["checkpoint"], tuple(entries.values()), files, path.stat().st_size - end), weights


def _entry(one: Any, before: Mapping[str, Entry]) -> Entry:
    """An entry of the index, with every field checked."""
    if not isinstance(one, dict) or type(one.get("name")) is not str or one["name"] in before:
        raise ValueError("its index has a tensor without a name of its own")
    name = one["name"]
    if "same_as" in one:
        if one.keys() != {"name", "same_as"} or one["same_as"] not in before or before[one["same_as"]].same_as:
            raise UserError(f"{name} is tied to what is not there: the index is damaged.")
        return Entry(name, same_as=one["same_as"])
    known = {"name", "shape", "mask", "blocks", "crc32"}
    if not isinstance(one.get("shape"), list) or not isinstance(one.get("blocks"), list) or len(one["shape"]) > 8:
        raise UserError(f"{name} has no shape or no blocks: the index is damaged.")
    shape, blocks = tuple(map(_natural, one["shape"])), tuple(map(_natural, one["blocks"]))
    mask, crc32 = one.get("mask", False), one.get("crc32")
    if type(mask) is not bool or type(crc32) is not int:
        raise UserError(f"{name}: the index is damaged.")
    entry = Entry(name, shape, mask=mask, blocks=blocks, crc32=crc32)
    if "bits" in one:
        bits, granularity = one["bits"], one.get("granularity")
        if one.keys() - known != {"bits", "granularity"} or type(bits) is not int or not 2 <= bits <= MAX_BITS:
            raise UserError(f"{name} has {bits!r} bits, not 2 to {MAX_BITS}: the index is damaged.")
        if type(granularity) is not str:
            raise UserError(f"{name} has no granularity: the index is damaged.")
        try:
            block_size(shape, granularity)
        except UserError:
            raise UserError(f"{name} has a granularity of {granularity!r}: the index is damaged.") from None
        entry = Entry(name, shape, bits, granularity, None, mask, blocks, crc32)
    else:
        if one.keys() - known != {"dtype"} or one["dtype"] not in _PLAIN or (mask and one["dtype"] != "float32"):
            raise UserError(f"{name} has a dtype that this format does not have: the index is damaged.")
        entry = Entry(name, shape, None, "tensor", one["dtype"], mask, blocks, crc32)
    chunks = -(-entry.count // CHUNK)
    if len(blocks) != (entry.bits is not None) + chunks * (len(entry.widths) + mask):
        raise UserError(f"{name} has {len(blocks)} blocks, which do not fit its shape: the index is damaged.")
    if entry.count > SYMBOLS_PER_BYTE * sum(blocks):
        raise UserError(f"{name} has more weights than {sum(blocks)} bytes can hold: the index is damaged.")
    return entry


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 48:
        raise ValueError(f"its index has {value!r} where a length should be")
    return value


def _described(name: str, tensor: Quantized | Tensor | str) -> dict[str, Any]:
    """The index's entry of a tensor, but for its blocks."""
    if isinstance(tensor, str):
        return {"name": name, "same_as": tensor}
    if isinstance(tensor, Quantized):
        return {
            "name": name,
            "shape": list(tensor.indices.shape),
            "bits": tensor.bits,
            "granularity": tensor.granularity,
            "mask": tensor.mask is not None,
        }
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _PLAIN:
        raise UserError(f"{name} is of {dtype}, which the packed file has no place for.")
    return {"name": name, "shape": list(tensor.shape), "dtype": dtype, "mask": _has_zeros(tensor)}


def _has_zeros(tensor: Tensor) -> bool:
    """Whether so many values of a float32 tensor are zero that a mask of them pays."""
    if tensor.dtype != torch.float32:
        return False
    return 32 * (tensor.numel() - int(torch.count_nonzero(tensor))) > tensor.numel() and not _minus_zero(tensor)


def _minus_zero(tensor: Tensor) -> bool:
    return bool(((tensor == 0) & torch.signbit(tensor)).any())


def _encoded(tensor: Quantized | Tensor | str) -> Iterator[Future[list[bytes]]]:
    """The blocks of a tensor, in the making."""
    if isinstance(tensor, str):
        return
    if isinstance(tensor, Quantized):
        ranges = torch.stack([tensor.minimum, tensor.step]).numpy()
        yield pool().submit(lambda: [encode(_byte_planes(ranges).reshape(-1), 8)])
        values, kept = tensor.indices.reshape(-1).numpy(), tensor.mask
        keep = None if kept is None else kept.reshape(-1).numpy()
        bits = tensor.bits
    else:
        values = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().reshape(tensor.numel(), -1)
        keep = (tensor.reshape(-1) != 0).numpy() if _has_zeros(tensor) else None
        bits = 0
    for start in range(0, len(values), CHUNK):
        part = slice(start, start + CHUNK)
        yield pool().submit(_encode_chunk, values[part], None if keep is None else keep[part], bits)


def _encode_chunk(values: np.ndarray, keep: np.ndarray | None, bits: int) -> list[bytes]:
    blocks = []
    if keep is not None:
        blocks.append(encode(keep.view(np.uint8), 1))
        values = values[keep]
    if not bits:  # bytes of plain values, the last byte of each first: the one that has its sign and exponent
        return blocks + [encode(np.ascontiguousarray(plane), 8) for plane in values.T[::-1]]
    if bits <= 8:
        return [*blocks, encode(values, bits)]
    low = bits - 8
    return [
        *blocks,
        encode((values >> low).astype(np.uint8), 8),
        encode((values & ((1 << low) - 1)).astype(np.uint8), low),
    ]


def _decoded(entry: Entry, blocks: memoryview) -> Quantized | Tensor:
    """The tensor of an entry. Raises ValueError where its blocks do not hold it."""
    ends = np.cumsum(entry.blocks)
    pieces = iter([blocks[end - length : end] for end, length in zip(ends, entry.blocks)])
    if entry.bits is not None:
        groups = -(-entry.count // block_size(entry.shape, entry.granularity))
        ranges = _from_byte_planes(decode(next(pieces), 8 * groups, 8), "<f4").reshape(2, groups)
        if not np.isfinite(ranges).all():
            raise ValueError("its ranges are not finite")
        values = np.zeros(entry.count, np.uint8 if entry.bits <= 8 else np.int16)
    else:
        values = np.zeros((entry.count, len(entry.widths)), np.uint8)
    mask = np.empty(entry.count, bool) if entry.mask else None
    for start in range(0, entry.count, CHUNK):
        here = values[start : start + CHUNK]
        count, keep = len(here), None
        if mask is not None:
            keep = decode(next(pieces), count, 1).astype(bool)
            mask[start : start + CHUNK] = keep
            count = int(np.count_nonzero(keep))
        symbols = [decode(next(pieces), count, width) for width in entry.widths]
        if entry.bits is None:
            part: np.ndarray = np.stack(symbols[::-1], axis=1)
        elif len(symbols) == 1:
            part = symbols[0]
        else:
            part = symbols[0].astype(np.int16) << (entry.bits - 8) | symbols[1]
        here[slice(None) if keep is None else keep] = part
    if entry.bits is None:
        return torch.from_numpy(values.reshape(-1)).view(_PLAIN[entry.dtype]).view(entry.shape)  # type: ignore[index]
    return Quantized(
        indices=torch.from_numpy(values).view(entry.shape),
        minimum=torch.from_numpy(ranges[0].copy()),
        step=torch.from_numpy(ranges[1].copy()),
        mask=None if mask is None else torch.from_numpy(mask).view(entry.shape),
        granularity=entry.granularity,
        bits=entry.bits,
    )


def _byte_planes(values: np.ndarray) -> np.ndarray:
    """The bytes of float32 values: the lowest byte of each first, then the next of each, (4, N)."""
    return values.astype("<f4").reshape(-1, 1).view(np.uint8).T


def _from_byte_planes(planes: np.ndarray, dtype: str) -> np.ndarray:
    return np.ascontiguousarray(planes.reshape(4, -1).T).view(dtype).reshape(-1)


def _metadata(checkpoint: Mapping[str, Any], index_crc32: int) -> dict[str, Any]:
    model = (checkpoint.get("cfg") or {}).get("model") or {}
    layers, hidden = model.get("encoder_layers"), model.get("encoder_embed_dim")
    size = f"{layers}l_{hidden}h" if layers and hidden else None
    return {"format": FORMAT, "version": VERSION, "size": size, "index_crc32": index_crc32}


def _crc32(entry: Mapping[str, Any], blocks: Iterable[bytes | memoryview]) -> int:
    """Of a tensor's blocks, and of what the index says of them, so that neither fits another."""
    crc = zlib.crc32(_json([entry[key] for key in ("name", "shape", *_KIND) if key in entry]))
    for block in blocks:
        crc = zlib.crc32(block, crc)
    return crc


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
