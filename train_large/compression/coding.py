"""Small numbers to few bytes and back: bit strings, zstandard's Huffman coder over bytes of several symbols, and LZMA.

A block is one byte that names its method, then the method's bytes. For n symbols of `width` bits:

    0           a bit string: symbol i has the bits i * width to i * width + width - 1, the lowest bit of a byte first
    1, 2, 4, 8  a zstandard frame of bytes that hold so many symbols each, the first in the lowest bits, filled up by 0
    128 + n     such bytes of n symbols by LZMA: its properties (one byte, as in an .lzma file), a raw stream with end
                marker
    254         of symbols of width 1: the bytes of their bit string, as a block of symbols of width 8
    255         the commonest symbol (one byte), the length of the next block (four bytes, lowest first), a block of
                width 1 that has a 1 for every symbol that is not the commonest, and a block of those

Huffman codes give every symbol a whole number of bits, which costs much where one symbol has more than half of the
probability: there several symbols to a byte, or the split, take the loss away (docs/packed.md has the measurements).
A few large weights make symbols too wide to be several to a byte; then what a split leaves is split again, at most
LEVELS times, and so are the bytes of a bit string of few ones (254). Such a block is deep.

LZMA's range coder learns as it goes, so it needs no table, and it can learn each column of a narrow matrix apart. It is
slow: a twentieth of zstandard's speed, and so for blocks of at most 2^16 symbols, where a table weighs the most.

No block holds more than 512 symbols a byte (frames are padded with zeros), so a reader can tell from the length of a
file how much memory it may ask for.
"""

from __future__ import annotations

import lzma
import threading
from functools import partial
from typing import Callable

import numpy as np
import torch
import zstandard

RAW, LZMA, BYTES, SPLIT = 0, 128, 254, 255
LEVELS = 4  # blocks of BYTES and SPLIT, one within the other
PER_BYTE = (1, 2, 4, 8)
SYMBOLS_PER_BYTE = 512  # at most

_SAMPLE = 1 << 16  # symbols to choose the method by
_STRETCH = 1 << 12

# All of zstandard but its Huffman coder is in the way: weights do not repeat. A hash table of 64 places and matches of
# seven bytes leave next to none of the search for repetitions; strategy 1 ("fast") is the one that looks least.
_PARAMETERS = zstandard.ZstdCompressionParameters(
    strategy=1, min_match=7, hash_log=6, search_log=1, window_log=17, target_length=0, write_content_size=1
)
_LZMA_DICTIONARY = 1 << 17
_PERIOD = 16  # symbols: columns of a narrow matrix, in LZMA's terms literal positions
_DEEP = 1.01  # what is not deep is read more quickly, and may be so much longer
_STEP = 1 << 18  # symbols whose places fit a cache
_local = threading.local()  # compressors are not for several threads


def encode(
    symbols: np.ndarray, width: int, levels: int = LEVELS, slow: bool = True, widest: int | None = None
) -> bytes:
    """A block for `symbols` (uint8, 1-D, each below 2^width, width 1 to 8), by the method that is shortest on a sample
    of them. `levels` and `slow` say how many of BYTES and SPLIT may lie within each other, and whether LZMA may be
    tried, of few symbols. `widest`: the largest symbol, if it is known; of a sample the one of all that it is of.
    """
    sample = _sample(symbols)
    methods: dict[tuple[int, bool], Callable[[np.ndarray], bytes]] = {(RAW, False): partial(pack_bits, width=width)}
    if len(sample):
        counts = np.bincount(sample, minlength=256)
        widest = int(symbols.max()) if widest is None else widest
        fitting = [n for n in PER_BYTE if widest < 1 << 8 // n]
        # As many to a byte as fit, or fewer where the coder then has less to learn.
        methods.update({(n, False): partial(_zstd, per_byte=n) for n in fitting[-2:]})
        slow = slow and sample is symbols
        if slow:
            methods.update({(LZMA + n, False): partial(_lzma, per_byte=n) for n in fitting[-2:]})
        if width > 1 and 4 * counts.max() > len(sample):
            split = partial(_split, width=width, common=int(counts.argmax()), slow=slow, widest=widest)
            if levels in (1, LEVELS):
                methods[SPLIT, False] = partial(split, levels=0)
            if levels > 1:
                methods[SPLIT, True] = partial(split, levels=levels - 1)
        if width == 1 and levels and 5 * counts[0] > 4 * len(sample):
            methods[BYTES, True] = partial(_bytes, levels=levels - 1, slow=slow)
    tried = {method: code(sample) for method, code in methods.items()}
    best = min(tried, key=lambda method: len(tried[method]) * (_DEEP if method[1] and levels == LEVELS else 1))
    body = tried[best] if sample is symbols else methods[best](symbols)
    if best[0] != RAW and len(body) > -(-len(symbols) * width // 8):
        best, body = (RAW, False), pack_bits(symbols, width)
    if best[0] == BYTES and len(symbols) > SYMBOLS_PER_BYTE * len(body):
        best, body = (8, False), _zstd(symbols, 8)
    return bytes([best[0]]) + body


def is_deep(block: bytes | memoryview) -> bool:
    """Whether BYTES, or a SPLIT within what is left by another one, is in a block that `encode` made."""
    if block[0] != SPLIT:
        return block[0] == BYTES
    end = 6 + int.from_bytes(block[2:6], "little")
    return block[6] == BYTES or block[end] == SPLIT


def decode(block: memoryview | bytes, count: int, width: int, levels: int = LEVELS) -> np.ndarray:
    """The `count` symbols (uint8) of a block. Raises ValueError where it is not such a block, and for more than so many
    levels of BYTES and SPLIT.
    """
    if not block or count > SYMBOLS_PER_BYTE * len(block):
        raise ValueError(f"{len(block)} bytes cannot hold {count} symbols")
    method, body = block[0], block[1:]
    if method == RAW:
        return unpack_bits(body, count, width)
    if method in (BYTES, SPLIT):
        if levels == 0:
            raise ValueError("a block has more levels than it may")
        return _unsplit(body, count, width, levels - 1) if method == SPLIT else _unbytes(body, count, width, levels - 1)
    per_byte = method % LZMA
    if per_byte not in PER_BYTE:
        raise ValueError(f"{method} is no method of coding")
    size = -(-count // per_byte)
    content = unlzma(body, size) if method > LZMA else _unzstd(body, size)
    if len(content) != size:
        raise ValueError(f"a frame does not hold the {size} bytes that it should")
    return _apart(np.frombuffer(content, dtype=np.uint8), count, width, per_byte)


def pack_bits(symbols: np.ndarray, width: int) -> bytes:
    """A bit string of `width` bits for each symbol, the lowest bit first; the last byte is filled up by zeros."""
    if width == 8:
        return symbols.tobytes()
    if width == 1:
        return np.packbits(symbols.view(bool), bitorder="little").tobytes()
    words = np.zeros(-(-len(symbols) // 8), dtype="<u8")  # eight symbols are `width` bytes
    for i in range(8):
        column = symbols[i::8].astype("<u8")
        words[: len(column)] |= column << np.uint64(i * width)
    return words.view(np.uint8).reshape(-1, 8)[:, :width].tobytes()[: -(-len(symbols) * width // 8)]


def unpack_bits(data: memoryview | bytes, count: int, width: int) -> np.ndarray:
    """The inverse of `pack_bits`. Raises ValueError where `data` is shorter or longer than `count` symbols are."""
    if len(data) != -(-count * width // 8):
        raise ValueError(f"a bit string of {count} symbols is not {len(data)} bytes long")
    if width == 8:
        return np.frombuffer(data, dtype=np.uint8)
    if width == 1:
        return np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=count, bitorder="little")
    groups = -(-count // 8)
    words = np.zeros((groups, 8), dtype=np.uint8)
    filled = np.zeros(groups * width, dtype=np.uint8)
    filled[: len(data)] = np.frombuffer(data, dtype=np.uint8)
    words[:, :width] = filled.reshape(groups, width)
    word = words.view("<u8").reshape(-1)
    symbols = np.empty((groups, 8), dtype=np.uint8)
    for i in range(8):
        symbols[:, i] = (word >> np.uint64(i * width)) & np.uint64((1 << width) - 1)
    return symbols.reshape(-1)[:count]


def _sample(symbols: np.ndarray) -> np.ndarray:
    """Stretches from all over `symbols`, or all of them where they are few."""
    if len(symbols) <= _SAMPLE:
        return symbols
    starts = np.linspace(0, len(symbols) - _STRETCH, _SAMPLE // _STRETCH).astype(int) // 8 * 8
    return np.concatenate([symbols[start : start + _STRETCH] for start in starts])


def _together(symbols: np.ndarray, per_byte: int) -> np.ndarray:
    if per_byte == 1:
        return symbols
    width = 8 // per_byte
    missing = -len(symbols) % per_byte
    if missing:
        symbols = np.concatenate([symbols, np.zeros(missing, dtype=np.uint8)])
    if per_byte == 8:
        return np.packbits(symbols, bitorder="little")
    packed = symbols[::per_byte].copy()
    for i in range(1, per_byte):
        packed |= symbols[i::per_byte] << np.uint8(i * width)
    return packed


def _zstd(symbols: np.ndarray, per_byte: int) -> bytes:
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
    frame = _local.compressor.compress(_together(symbols, per_byte).data)
    return frame.ljust(-(-len(symbols) // SYMBOLS_PER_BYTE), b"\0")


def _unzstd(frame: memoryview | bytes, size: int) -> bytes:
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 17)
    try:
        if zstandard.frame_content_size(frame) != size:
            raise ValueError(f"a frame does not hold the {size} bytes that it should")
        return _local.decompressor.decompress(frame) if size else b""
    except zstandard.ZstdError as error:
        raise ValueError(f"a frame cannot be decompressed ({error})") from error


def _lzma(symbols: np.ndarray, per_byte: int) -> bytes:
    data = _together(symbols, per_byte).tobytes()
    # Repetition is worth as little here as to zstandard, but its search costs less than the coding.
    search = {"mf": lzma.MF_HC4, "depth": 4, "nice_len": 273, "dict_size": _LZMA_DICTIONARY}
    column_bits = (_PERIOD // per_byte).bit_length() - 1
    frame = min((to_lzma(data, lc=0, lp=lp, **search) for lp in (0, column_bits)), key=len)
    return frame.ljust(-(-len(symbols) // SYMBOLS_PER_BYTE), b"\0")


def to_lzma(data: bytes, lc: int, lp: int, **options: int) -> bytes:
    """A raw LZMA stream with end marker behind its byte of properties, (5 pb + lp) 9 + lc, where pb is 0.

    lc, lp: the literal coder's bits of context from the byte before, and from the position. options: as of `lzma`.
    """
    chain = [{"id": lzma.FILTER_LZMA1, "lc": lc, "lp": lp, "pb": 0, **options}]
    return bytes([lp * 9 + lc]) + lzma.compress(data, lzma.FORMAT_RAW, filters=chain)


def unlzma(frame: memoryview | bytes, most: int, dictionary: int = _LZMA_DICTIONARY) -> bytes:
    """The inverse of `to_lzma`. Raises ValueError where it is damaged or has more than `most` bytes."""
    if not frame or frame[0] >= 9 * 5:
        raise ValueError("a frame has no properties of LZMA")
    lp, lc = divmod(frame[0], 9)
    chain = [{"id": lzma.FILTER_LZMA1, "lc": lc, "lp": lp, "pb": 0, "dict_size": dictionary}]
    try:
        decompressor = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=chain)
        content = decompressor.decompress(frame[1:], most + 1)
    except lzma.LZMAError as error:
        raise ValueError(f"a frame cannot be decompressed ({error})") from error
    if len(content) > most or not decompressor.eof:
        raise ValueError("a frame is cut short, or longer than it can be")
    return content


def _apart(packed: np.ndarray, count: int, width: int, per_byte: int) -> np.ndarray:
    """The inverse of `_together`. Raises ValueError where a symbol has more than `width` bits."""
    if per_byte == 1:
        symbols = packed
    elif per_byte == 8:
        symbols = np.unpackbits(packed, bitorder="little")[:count]
    else:
        each = 8 // per_byte
        grid = np.empty((len(packed), per_byte), dtype=np.uint8)
        for i in range(per_byte):
            grid[:, i] = (packed >> np.uint8(i * each)) & np.uint8((1 << each) - 1)
        symbols = grid.reshape(-1)[:count]
    if width < 8 // per_byte and count and symbols.max() >= 1 << width:
        raise ValueError(f"a symbol is wider than {width} bits")
    return symbols


def _bytes(symbols: np.ndarray, levels: int, slow: bool) -> bytes:
    packed = np.frombuffer(pack_bits(symbols, 1), dtype=np.uint8)
    return encode(packed, 8, levels, slow)


def _unbytes(body: memoryview | bytes, count: int, width: int, levels: int) -> np.ndarray:
    if width != 1:
        raise ValueError(f"symbols of {width} bits are coded as if they were of one")
    return unpack_bits(decode(body, -(-count // 8), 8, levels).data, count, 1)


def _split(symbols: np.ndarray, width: int, common: int, levels: int, slow: bool, widest: int) -> bytes:
    others = symbols != common
    where = encode(others.view(np.uint8), 1, levels, slow)
    # A sample may lack the symbols that decide how many are put to a byte.
    rest = encode(symbols[others], width, levels, slow, widest if widest != common else None)
    return bytes([common]) + len(where).to_bytes(4, "little") + where + rest


def _unsplit(body: memoryview | bytes, count: int, width: int, levels: int) -> np.ndarray:
    if len(body) < 5 or body[0] >= 1 << width or width == 1:
        raise ValueError("a split is cut short or has no such symbol")
    length = int.from_bytes(body[1:5], "little")
    others = decode(body[5 : 5 + length], count, 1, levels).view(bool)
    rest = decode(body[5 + length :], int(np.count_nonzero(others)), width, levels)
    if 5 * len(rest) <= count:
        symbols = np.full(count, body[0], dtype=np.uint8)
        symbols[np.flatnonzero(others)] = rest
        return symbols
    # Where there are many others, their running count as an index takes less time than their places, or than a mask.
    values = torch.from_numpy(np.concatenate([np.array([body[0]], dtype=np.uint8), rest]))
    put_back, before = torch.empty(count, dtype=torch.uint8), 0
    for mask, part in zip(torch.from_numpy(others).split(_STEP), put_back.split(_STEP)):
        place = mask.cumsum(0, dtype=torch.int32)
        here = int(place[-1])
        torch.index_select(values, 0, place.add_(before).mul_(mask), out=part)
        before += here
    return put_back.numpy()
