"""The packed file: a model with its configuration, dictionary and labels in one safetensors file, without pickle.

    train-large pack IN.pt OUT.safetensors --bits 6

The file has two byte tensors and a little metadata. docs/packed.md has all that a reader in another language needs.

    safetensors header      {"__metadata__": METADATA, "index": U8 [m], "weights": U8 [n]}
    METADATA                what this is, its version, the model's size, and the CRC-32 of the index
    index                   JSON, compressed by LZMA: the checkpoint without its weights, what `weights` holds, and the
                            dictionary, label names and BPE
    weights                 the blocks (coding.py) of each part, one after the other, in the order of the index

A part is one tensor, or all small ones that are stored alike, as if they were one: the fewer the weights, the more
weighs what is said about them. A quantized part is a block of ranges, then for every 2^22 weights: a block of one bit a
weight if some are zeros that are kept (1: not zero), then the codes of the weights that are not, in a block of up to 8
bits; codes wider than that have a block for their leading 8 bits and one for the others. Of codes that a trellis allows
(trellis.py) the lowest bit is left out. An example, six weights at k = 3, one of them pruned:

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

import contextlib
import itertools
import json
import lzma
import math
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import safetensors
import torch
from torch import Tensor

from train_large.compression.coding import LEVELS, SYMBOLS_PER_BYTE, decode, encode, is_deep, to_lzma, unlzma
from train_large.compression.parallel import pool
from train_large.compression.quantization import MAX_BITS, Quantized, dequantize, dequantized
from train_large.compression.storage import block_size
from train_large.compression.trellis import lowest_bits
from train_large.errors import UserError
from train_large.files import whole

NAME = "train-large"
FORMAT = "packed model"
FILES = ("dict.txt", "labels.txt", "encoder.json", "vocab.bpe")  # what goes with a model
VERSIONS = PLAIN, WITH_TRELLIS, WITH_DEEP_BLOCKS = 2, 3, 4
CHUNK = 1 << 22  # weights to a block
SMALL = 1 << 12  # weights: tensors of no more are coded with others
AHEAD = 8  # parts that are decoded before they are asked for
WANTED = "a file that `train-large pack` wrote"

# The dtypes of what is stored as it is: buffers, and parameters at 32 bits.
_PLAIN = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
_PLAIN.update({name: getattr(torch, name) for name in ("int64", "int32", "int16", "int8", "uint8", "bool")})
_KIND = (
    "bits",
    "granularity",
    "dtype",
    "mask",
    "trellis",
    "deep",
)  # of a part: with its tensors' shapes, all that says what blocks are
# What reading JSON of another shape than it should have may raise.
_WRONG = (ValueError, TypeError, KeyError, AttributeError, RecursionError, MemoryError)
_MAX_INDEX = 1 << 28  # bytes of JSON
_FEW_BYTES, _BYTES_PER_BYTE = 1 << 20, 64  # of JSON, some of it text of a BPE, for each byte of its frame
_FEW_VALUES, _VALUES_PER_BYTE = 1 << 17, 4  # of an index: what it holds takes tens of bytes each once it is read
# For text: some context from the byte before, none from the place within a word.
_LZMA = {"lc": 2, "lp": 0, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 26}


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
    """What the index says of one tensor: the part it is in, or another entry that it is the `same_as`."""

    name: str
    shape: tuple[int, ...] = ()
    part: int | None = None
    same_as: str | None = None

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Part:
    """What the index says of tensors that are coded as one.

    bits: of quantized tensors; None where `dtype` says what the values are. blocks: the bytes of each block. trellis:
    whether the lowest bit of the codes is left out. deep: whether some of its blocks are (coding.py).
    """

    entries: tuple[Entry, ...]
    bits: int | None
    granularity: str
    dtype: str | None
    mask: bool
    blocks: tuple[int, ...]
    trellis: bool = False
    deep: bool = False

    @property
    def count(self) -> int:
        return sum(entry.count for entry in self.entries)

    @property
    def levels(self) -> int:
        """How many blocks of BYTES and SPLIT may lie within each other."""
        return LEVELS if self.deep else 1

    @property
    def groups(self) -> list[int]:
        """How many ranges each tensor has."""
        return [-(-entry.count // block_size(entry.shape, self.granularity)) for entry in self.entries]

    @property
    def widths(self) -> list[int]:
        """Bits of a symbol in each block that a chunk has behind its mask."""
        if self.bits is None:
            return [8] * _PLAIN[self.dtype].itemsize  # type: ignore[index]
        bits = self.bits - self.trellis
        return [bits] if bits <= 8 else [8, bits - 8]

    def __str__(self) -> str:
        first, *others = (entry.name for entry in self.entries)
        return f"{first} (coded together with {', '.join(others)})" if others else first


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
    entries: list[list[Any]] = []
    parts: list[_Draft] = []
    small: dict[tuple[Any, ...], int] = {}
    for name, tensor in tensors:
        if isinstance(tensor, str):
            entries.append([name, tensor])
            continue
        kind, shape = _kind(name, tensor), _shape(tensor)
        number = len(parts)
        if math.prod(shape) <= SMALL:
            number = small.setdefault(tuple(kind.items()), number)
        if number == len(parts):
            parts.append(_Draft(kind))
        parts[number].add(name, shape, tensor)
        if math.prod(shape) > SMALL:
            parts[number].encode()
        entries.append([name, shape, number])
    for number in small.values():
        parts[number].encode()
    described, blocks = [], []
    for part in parts:
        mine = [block for future in part.coming for block in future.result()]
        kind = {**part.kind, **({"deep": True} if any(map(is_deep, mine)) else {})}
        described.append({**kind, "blocks": [*map(len, mine)], "crc32": _crc32(part.shapes, kind, mine)})
        blocks += mine
    # The files are text, and share much of it: in one frame with the rest they take the least.
    index = {"checkpoint": checkpoint, "tensors": entries, "parts": described, "files": dict(files)}
    try:
        text = _json(index)
    except ValueError as error:
        reason = "numbers that are not finite" if "float" in str(error) else "text that is not UTF-8"
        raise UserError(f"the checkpoint's configuration has {reason}: it cannot be packed.") from None
    if json.loads(text) != index:
        raise UserError("the checkpoint's configuration has keys that are not text: it cannot be packed.")
    frame = to_lzma(text, **_LZMA)
    pieces = [_header(checkpoint, frame, sum(map(len, blocks)), _version(described)), frame, *blocks]
    if path is not None:
        with whole(path) as aside, aside.open("wb") as file:
            file.writelines(pieces)
    return sum(map(len, pieces))


class _Draft:
    """A part in the making. Tensors are let go as soon as they are being encoded."""

    def __init__(self, kind: dict[str, Any]) -> None:
        self.kind = kind
        self.shapes: list[tuple[str, list[int]]] = []
        self.tensors: list[Any] = []
        self.coming: list[Future[list[bytes]]] = []

    def add(self, name: str, shape: list[int], tensor: Quantized | Tensor) -> None:
        self.shapes.append((name, shape))
        self.tensors.append(tensor)

    def encode(self) -> None:
        self.coming = list(_encoded(self.tensors))
        self.tensors = []


def _header(checkpoint: Mapping[str, Any], frame: bytes, weights: int, version: int) -> bytes:
    """The head of a safetensors file of two byte tensors: its length in eight bytes, then JSON.

    By hand, because the library wants all of the file in memory, and orders metadata by chance.
    """
    ends = (len(frame), len(frame) + weights)
    header = {
        "__metadata__": _metadata(checkpoint, zlib.crc32(frame), version),
        "index": {"dtype": "U8", "shape": [len(frame)], "data_offsets": [0, ends[0]]},
        "weights": {"dtype": "U8", "shape": [weights], "data_offsets": [ends[0], ends[1]]},
    }
    text = _json(header)
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


def read_tensors(path: Path) -> tuple[Index, Iterator[tuple[str, Quantized | Tensor | str]]]:
    """The index of a packed file, and its tensors by name, one at a time: of one that is tied to an earlier one that
    one's name. Raises UserError as `read_packed` does, and so does reading on."""
    index, weights = read_index(path)
    return index, _tensors(path, index, weights)


def _tensors(path: Path, index: Index, weights: memoryview) -> Iterator[tuple[str, Quantized | Tensor | str]]:
    """What `write_packed` was given, decoded a few parts ahead and let go one by one."""
    starts = itertools.accumulate((sum(part.blocks) for part in index.parts), initial=0)
    rest = enumerate(zip(index.parts, starts))
    coming: dict[int, Callable[[], deque[Quantized | Tensor]]] = {}
    decoded: dict[int, deque[Quantized | Tensor]] = {}
    submitted = 0
    for entry in index.tensors:
        if entry.part is None:
            yield entry.name, str(entry.same_as)
            continue
        try:
            for number, (part, start) in itertools.islice(rest, max(0, entry.part + AHEAD - submitted)):
                blocks = weights[start : start + sum(part.blocks)]
                coming[number] = _decoding(part, blocks)
                submitted += 1
            if entry.part in coming:
                decoded[entry.part] = coming.pop(entry.part)()
        except MemoryError:
            raise UserError(f"{path}: there is no memory for its weights: read it where there is more.") from None
        except ValueError as error:
            damaged = index.parts[entry.part]
            raise UserError(f"{path}: {damaged} is damaged ({error}): get the file once more.") from error
        tensor = decoded[entry.part].popleft()
        if not decoded[entry.part]:
            del decoded[entry.part]
        yield entry.name, tensor
        del tensor


@dataclass(frozen=True)
class Index:
    """The index of a packed file, checked against the file; `bytes_beside` is what is not weights."""

    checkpoint: dict[str, Any]
    tensors: tuple[Entry, ...]
    parts: tuple[Part, ...]
    files: dict[str, str]
    bytes_beside: int


def read_index(path: Path) -> tuple[Index, memoryview]:
    """The index of a packed file, and the bytes of its blocks. Raises UserError as `read_packed` does."""
    path = Path(path)
    if path.is_dir() or (path.exists() and path.stat().st_size == 0):
        raise UserError(f"{path} is {'a directory' if path.is_dir() else 'empty'}: give {WANTED}.")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get(NAME) != FORMAT or set(file.keys()) != {"index", "weights"}:
                raise ValueError(f"it is not {WANTED}")
            _check_version(metadata.get("version"))
            frame, weights = file.get_tensor("index"), file.get_tensor("weights")
        if any(array.dtype != np.uint8 or array.ndim != 1 for array in (frame, weights)):
            raise ValueError("its parts are not bytes")
        return _index(_json_of(frame.tobytes(), metadata), metadata, weights.data, path)
    except FileNotFoundError:  # safetensors says so of files that may not be read, too
        reason = "cannot be read" if path.exists() else "does not exist"
        raise UserError(f"{path} {reason}: give {WANTED}.") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (OSError, EOFError, safetensors.SafetensorError, *_WRONG) as error:
        with contextlib.suppress(OSError), path.open("rb") as file:
            if file.read(4) == b"PK\x03\x04":
                raise UserError(f"{path} looks like a checkpoint of fairseq: pack it first.") from None
        raise UserError(f"{path} cannot be read ({error}): give {WANTED}, whole.") from error


def _check_version(version: str | None) -> None:
    if version not in [str(readable) for readable in VERSIONS]:
        raise UserError(
            f"it is of format {version}, and this train-large reads {VERSIONS[0]} to {VERSIONS[-1]}: install the one "
            "that wrote it."
        )


def _json_of(frame: bytes, metadata: Mapping[str, str]) -> Any:
    """The index, out of its frame. Raises ValueError where there is none."""
    if _hex(zlib.crc32(frame)) != metadata.get("crc32"):
        raise ValueError("its index is damaged")
    text = unlzma(frame, min(_MAX_INDEX, _FEW_BYTES + _BYTES_PER_BYTE * len(frame)), _LZMA["dict_size"])
    if sum(map(text.count, (b",", b"[", b"{"))) > _FEW_VALUES + _VALUES_PER_BYTE * len(frame):
        raise ValueError(f"its index has more values than {len(frame)} bytes should")
    return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"its index has {name}, which is not JSON")


def _index(value: Any, metadata: Mapping[str, str], weights: memoryview, path: Path) -> tuple[Index, memoryview]:
    if not isinstance(value, dict) or set(value) != {"checkpoint", "tensors", "parts", "files"}:
        raise ValueError("its index has other parts than it should")
    if not isinstance(value["checkpoint"], dict):
        raise ValueError("its index has no configuration")
    _check_checkpoint(value["checkpoint"])
    if not isinstance(value["parts"], list):
        raise ValueError("its index has no list of parts")
    if metadata != _metadata(value["checkpoint"], int(metadata["crc32"], 16), _version(value["parts"])):
        raise ValueError("its metadata and its index differ")
    entries: dict[str, Entry] = {}
    members: list[list[Entry]] = []
    for one in value["tensors"]:
        entry = _entry(one, entries)
        entries[entry.name] = entry
        if entry.part is not None:
            if entry.part > len(members) or entry.part >= len(value["parts"]):
                raise UserError(f"{entry.name} is in a part that is not there: the index is damaged.")
            if entry.part == len(members):
                members.append([])
            members[entry.part].append(entry)
    if len(members) != len(value["parts"]):
        raise ValueError("its index has parts without tensors")
    parts = []
    end = 0
    for mine, one in zip(members, value["parts"]):
        part, crc32 = _part(one, tuple(mine))
        parts.append(part)
        blocks, end = weights[end : end + sum(part.blocks)], end + sum(part.blocks)
        if len(blocks) < sum(part.blocks):
            raise UserError(f"{part} is cut short: get the file once more.")
        if _crc32([(entry.name, entry.shape) for entry in mine], one, [blocks]) != crc32:
            raise UserError(f"{part} is damaged: get the file once more.")
    files = value["files"]
    if not isinstance(files, dict) or not all(type(text) is str for text in files.values()):
        raise ValueError("its index has files that are not text")
    if not set(files) <= set(FILES):  # from which folders are made
        raise ValueError("its index has files of other names than it may")
    if end != len(weights):
        raise ValueError(f"it has {len(weights)} bytes of weights, and its index {end}")
    beside = path.stat().st_size - end
    return Index(value["checkpoint"], tuple(entries.values()), tuple(parts), files, beside), weights


def _check_checkpoint(checkpoint: Mapping[str, Any]) -> None:
    """Raise ValueError where what is read of a checkpoint is of other kinds than in those that are packed."""

    def check(section: Any, name: str, *kinds: type) -> None:
        if section is not None and type(section) not in kinds:
            raise ValueError(f"its index has a {type(section).__name__} for {name}")

    for name, kind in (("cfg", dict), ("extra_state", dict), ("optimizer_history", list), ("compression", list)):
        check(checkpoint.get(name), name, kind)
    for name, section in (checkpoint.get("cfg") or {}).items():
        if name in ("common", "model", "task", "criterion", "lr_scheduler", "checkpoint"):
            check(section, name, dict)
    for name in ("init_token", "separator_token"):
        check(((checkpoint.get("cfg") or {}).get("task") or {}).get(name), name, int)
    for record in checkpoint.get("compression") or []:
        check(record, "a record of a conversion", dict)
    check((checkpoint.get("extra_state") or {}).get("previous_training_time"), "previous_training_time", int, float)
    for entry in checkpoint.get("optimizer_history") or []:
        check(entry, "an entry of optimizer_history", dict)
        check((entry or {}).get("num_updates"), "num_updates", int)
        check((entry or {}).get("criterion_name"), "criterion_name", str)
        check((entry or {}).get("lr_scheduler_state"), "lr_scheduler_state", dict)


def _entry(one: Any, before: Mapping[str, Entry]) -> Entry:
    """An entry of the index, with every field checked."""
    if not isinstance(one, list) or not one or type(one[0]) is not str or one[0] in before:
        raise ValueError("its index has a tensor without a name of its own")
    name, *rest = one
    if len(rest) == 1 and type(rest[0]) is str:
        if rest[0] not in before or before[rest[0]].same_as:
            raise UserError(f"{name} is tied to what is not there: the index is damaged.")
        return Entry(name, same_as=rest[0])
    if len(rest) != 2 or not isinstance(rest[0], list) or len(rest[0]) > 8:
        raise UserError(f"{name} has no shape or no part: the index is damaged.")
    shape = tuple(map(_natural, rest[0]))
    _natural(math.prod(length or 1 for length in shape))  # torch counts strides so, of an empty tensor too
    return Entry(name, shape, _natural(rest[1]))


def _part(one: Any, entries: tuple[Entry, ...]) -> tuple[Part, int]:
    """A part of the index with every field checked, and its CRC-32."""
    name = entries[0].name
    known = {"mask", "deep", "blocks", "crc32"}  # the first two may be missing, as may `granularity`
    if not isinstance(one, dict) or not isinstance(one.get("blocks"), list):
        raise UserError(f"{name} has no blocks: the index is damaged.")
    blocks = tuple(map(_natural, one["blocks"]))
    mask, deep, crc32 = one.get("mask", False), one.get("deep", False), one.get("crc32")
    if type(mask) is not bool or type(deep) is not bool or type(crc32) is not int:
        raise UserError(f"{name}: the index is damaged.")
    if "bits" in one:
        bits, granularity = one["bits"], one.get("granularity", "tensor")
        trellis = one.get("trellis", False)
        if (
            one.keys() - known - {"bits", "granularity", "trellis"}
            or type(bits) is not int
            or not 2 <= bits <= MAX_BITS
        ):
            raise UserError(f"{name} has {bits!r} bits, not 2 to {MAX_BITS}: the index is damaged.")
        if type(granularity) is not str:
            raise UserError(f"{name} has no granularity: the index is damaged.")
        try:
            block_size((1,), granularity)
        except UserError:
            raise UserError(f"{name} has a granularity of {granularity!r}: the index is damaged.") from None
        if type(trellis) is not bool or (trellis and (bits < 3 or granularity != "tensor" or len(entries) > 1)):
            raise UserError(f"{name} has a trellis where there can be none: the index is damaged.")
        part = Part(entries, bits, granularity, None, mask, blocks, trellis, deep)
    else:
        if one.keys() - known != {"dtype"} or one["dtype"] not in _PLAIN or (mask and one["dtype"] != "float32"):
            raise UserError(f"{name} has a dtype that this format does not have: the index is damaged.")
        part = Part(entries, None, "tensor", one["dtype"], mask, blocks, deep=deep)
    chunks = -(-part.count // CHUNK)
    if len(blocks) != (part.bits is not None) + chunks * (len(part.widths) + mask):
        raise UserError(f"{part} has {len(blocks)} blocks, which do not fit its shape: the index is damaged.")
    symbols = part.count * (1 if mask else len(part.widths))  # what a mask leaves out is in no other block
    if symbols > SYMBOLS_PER_BYTE * sum(blocks):
        raise UserError(f"{part} has more weights than {sum(blocks)} bytes can hold: the index is damaged.")
    return part, crc32


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 48:
        raise ValueError(f"its index has {value!r} where a length should be")
    return value


def _kind(name: str, tensor: Quantized | Tensor) -> dict[str, Any]:
    """How a tensor is stored: what tensors of one part have in common. What is usual is left out."""
    if isinstance(tensor, Quantized):
        grid = {} if tensor.granularity == "tensor" else {"granularity": tensor.granularity}
        mask = {} if tensor.mask is None else {"mask": True}
        return {"bits": tensor.bits, **grid, **mask, **({"trellis": True} if tensor.trellis else {})}
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _PLAIN:
        raise UserError(f"{name} is of {dtype}, which the packed file has no place for.")
    return {"dtype": dtype, **({"mask": True} if _has_zeros(tensor) else {})}


def _shape(tensor: Quantized | Tensor) -> list[int]:
    return list(tensor.indices.shape if isinstance(tensor, Quantized) else tensor.shape)


def _has_zeros(tensor: Tensor) -> bool:
    """Whether so many values of a float32 tensor are zero that a mask of them pays."""
    if tensor.dtype != torch.float32:
        return False
    return 32 * (tensor.numel() - int(torch.count_nonzero(tensor))) > tensor.numel() and not _minus_zero(tensor)


def _minus_zero(tensor: Tensor) -> bool:
    return bool(((tensor == 0) & torch.signbit(tensor)).any())


def _encoded(tensors: Sequence[Any]) -> Iterator[Future[list[bytes]]]:
    """The blocks of a part, in the making; its tensors are of one kind."""
    keep, bits, trellis = None, 0, False
    if isinstance(tensors[0], Quantized):
        minima, steps = [tensor.minimum for tensor in tensors], [tensor.step for tensor in tensors]
        ranges = np.stack([_flat(minima), _flat(steps)])
        yield pool().submit(lambda: [encode(_byte_planes(ranges).reshape(-1), 8)])
        values, bits = _flat([tensor.indices for tensor in tensors]), tensors[0].bits
        trellis = tensors[0].trellis
        if tensors[0].mask is not None:
            keep = _flat([tensor.mask for tensor in tensors])
    else:
        values = _flat([tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors])
        values = values.reshape(-1, tensors[0].itemsize)
        if _has_zeros(tensors[0]):
            keep = _flat([tensor != 0 for tensor in tensors])
    for start in range(0, len(values), CHUNK):
        part = slice(start, start + CHUNK)
        yield pool().submit(_encode_chunk, values[part], None if keep is None else keep[part], bits, trellis)


def _flat(tensors: Sequence[Tensor]) -> np.ndarray:
    """The values of all tensors in one row; of a single one without a copy."""
    rows = [tensor.reshape(-1) for tensor in tensors]
    return (torch.cat(rows) if len(rows) > 1 else rows[0]).numpy()


def _encode_chunk(values: np.ndarray, keep: np.ndarray | None, bits: int, trellis: bool) -> list[bytes]:
    blocks = []
    if keep is not None:
        blocks.append(encode(keep.view(np.uint8), 1))
        values = values[keep]
    if not bits:  # bytes of plain values, the last byte of each first: the one that has its sign and exponent
        return blocks + [encode(np.ascontiguousarray(plane), 8) for plane in values.T[::-1]]
    if trellis:
        values, lowest, bits = values >> 1, values & 1, bits - 1
        if not np.array_equal(lowest_bits(values), lowest):
            raise ValueError("the indices are not such as the trellis allows")
    if bits <= 8:
        return [*blocks, encode(values.astype(np.uint8), bits)]
    low = bits - 8
    return [
        *blocks,
        encode((values >> low).astype(np.uint8), 8),
        encode((values & ((1 << low) - 1)).astype(np.uint8), low),
    ]


def _decoding(part: Part, blocks: memoryview) -> Callable[[], deque[Quantized | Tensor]]:
    """A part whose chunks all cores begin to decode, and what waits for its tensors: it raises ValueError where the
    blocks do not hold them."""
    ends = np.cumsum(part.blocks)
    pieces = iter([blocks[end - length : end] for end, length in zip(ends, part.blocks)])
    ranges = None if part.bits is None else pool().submit(_decode_ranges, part, next(pieces))
    if part.bits is None:
        values = np.zeros((part.count, len(part.widths)), np.uint8)
    else:
        values = np.zeros(part.count, np.uint8 if part.bits <= 8 else np.int16)
    mask = np.empty(part.count, bool) if part.mask else None
    chunks = []
    for start in range(0, part.count, CHUNK):
        here = slice(start, start + CHUNK)
        each = list(itertools.islice(pieces, part.mask + len(part.widths)))
        chunks.append(pool().submit(_decode_chunk, part, each, values[here], None if mask is None else mask[here]))

    def tensors() -> deque[Quantized | Tensor]:
        for chunk in chunks:
            chunk.result()
        flat = torch.from_numpy(values)
        if ranges is None:
            plain = flat.reshape(-1).view(_PLAIN[part.dtype])  # type: ignore[index]
            if plain.is_floating_point() and not plain.isfinite().all():
                raise ValueError("its values are not finite")
            return deque(_divided(plain, part.entries))
        minima, steps = (torch.from_numpy(row).split(part.groups) for row in ranges.result())
        indices = _divided(flat, part.entries)
        masks = [None] * len(indices) if mask is None else _divided(torch.from_numpy(mask), part.entries)
        assert part.bits is not None
        return deque(
            Quantized(index, minimum.clone(), step.clone(), kept, part.granularity, part.bits, part.trellis)
            for index, minimum, step, kept in zip(indices, minima, steps, masks)
        )

    return tensors


def _decode_ranges(part: Part, block: memoryview) -> np.ndarray:
    """Minima and steps, float32 (2, R)."""
    count = sum(part.groups)
    ranges = _from_byte_planes(decode(block, 8 * count, 8, part.levels), "<f4").reshape(2, count)
    with np.errstate(over="ignore", invalid="ignore"):
        highest = ranges[0] + ranges[1] * np.float32(2 ** (part.bits or 0) - 1)
    if not (np.isfinite(ranges).all() and np.isfinite(highest).all()):
        raise ValueError("its ranges are not finite")
    return ranges


def _decode_chunk(part: Part, blocks: Sequence[memoryview], values: np.ndarray, mask: np.ndarray | None) -> None:
    """Write the values and the mask of a chunk, whose `blocks` these are."""
    count, keep = len(values), None
    if mask is not None:
        keep = decode(blocks[0], count, 1, part.levels).astype(bool)
        mask[:] = keep
        count, blocks = int(np.count_nonzero(keep)), blocks[1:]
    symbols = [decode(block, count, width, part.levels) for block, width in zip(blocks, part.widths)]
    if part.bits is None:
        found: np.ndarray = np.stack(symbols[::-1], axis=1)
    elif len(symbols) == 1:
        found = symbols[0]
    else:
        found = symbols[0].astype(np.int16) << part.widths[1] | symbols[1]
    if part.trellis:
        found = np.left_shift(found, 1, dtype=values.dtype) | lowest_bits(found)
    values[slice(None) if keep is None else keep] = found


def _divided(flat: Tensor, entries: Sequence[Entry]) -> list[Tensor]:
    """The tensors that `flat` holds one after the other; of several, each has memory of its own."""
    if len(entries) == 1:
        return [flat.view(entries[0].shape)]
    parts = flat.split([entry.count for entry in entries])
    return [part.clone().view(entry.shape) for part, entry in zip(parts, entries)]


def _byte_planes(values: np.ndarray) -> np.ndarray:
    """The bytes of float32 values: the lowest byte of each first, then the next of each, (4, N)."""
    return values.astype("<f4").reshape(-1, 1).view(np.uint8).T


def _from_byte_planes(planes: np.ndarray, dtype: str) -> np.ndarray:
    return np.ascontiguousarray(planes.reshape(4, -1).T).view(dtype).reshape(-1)


def _version(parts: Iterable[Any]) -> int:
    """The first format that has what these parts need."""
    described = [part for part in parts if isinstance(part, dict)]
    if any(part.get("deep") for part in described):
        return WITH_DEEP_BLOCKS
    return WITH_TRELLIS if any(part.get("trellis") for part in described) else PLAIN


def _metadata(checkpoint: Mapping[str, Any], index_crc32: int, version: int) -> dict[str, str]:
    model = (checkpoint.get("cfg") or {}).get("model") or {}
    layers, hidden = model.get("encoder_layers"), model.get("encoder_embed_dim")
    size = {"size": f"{layers}l_{hidden}h"} if layers and hidden else {}
    return {NAME: FORMAT, "version": str(version), **size, "crc32": _hex(index_crc32)}


def _hex(crc32: int) -> str:
    return f"{crc32:08x}"


def _crc32(
    shapes: Sequence[tuple[str, Sequence[int]]], kind: Mapping[str, Any], blocks: Iterable[bytes | memoryview]
) -> int:
    """Of a part's blocks, and of what the index says of them, so that neither fits another."""
    crc = zlib.crc32(_json([shapes, *(kind[key] for key in _KIND if key in kind)]))
    for block in blocks:
        crc = zlib.crc32(block, crc)
    return crc


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
