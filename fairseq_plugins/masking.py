"""Masked LM batches made whole: the very batches of fairseq's masked_lm task, without its work per sequence and token.

fairseq draws the masks of every sequence twice (for the source and for the target), with two new generators that each
cost more than the drawing, weighs the whole vocabulary for every random token, and takes the sequence through seven
datasets and collaters. Here the masks of a sequence are drawn once, from the same seed in the same order, and
everything else is done to the batch: what comes out is equal, bit for bit.

fairseq's own datasets stay beneath: they give sizes, order, batches, epochs and, where something asks for a single
sequence, that.

There are two differences. With --num-workers 1 (its default) or more fairseq keeps the workers of the first epoch, each
with its copy of the dataset, and so every epoch has the masks of the first; here the epoch is in memory that the
workers share, and every epoch has its own. And fairseq keeps the last two or three sequences that it made
(`LRUCacheDataset`) and does not forget them when an epoch ends, so one that ends an epoch and begins the next, with
nothing in between, has the masks of the old epoch there; here it has those of the new one.
"""

from __future__ import annotations

import functools
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from fairseq.data import (
    BaseWrapperDataset,
    ConcatDataset,
    FairseqDataset,
    IdDataset,
    LRUCacheDataset,
    MaskTokensDataset,
    NestedDictionaryDataset,
    NumelDataset,
    NumSamplesDataset,
    PrependTokenDataset,
    RightPadDataset,
    SortDataset,
    TokenBlockDataset,
)
from fairseq.data.indexed_dataset import MMapIndexedDataset
from fairseq.data.shorten_dataset import RandomCropDataset, TruncateDataset
from fairseq.tasks.masked_lm import MaskedLMTask
from numpy.random import PCG64, Generator, default_rng
from numpy.random.bit_generator import ISeedSequence

logger = logging.getLogger(__name__)

OPT_OUT = "TRAIN_LARGE_BATCHES"  # in the environment: the task is fairseq's own, and takes no flag of ours


def make_masked_batches_whole() -> None:
    """Make the batches of masked LM whole where `unsupported` has nothing against it.

    Listens at `MaskedLMTask.load_dataset` (fairseq/tasks/masked_lm.py:194, 0.12.3.1), which builds the datasets of a
    split; its subclasses come by there too.
    """
    upstream = MaskedLMTask.load_dataset

    @functools.wraps(upstream)
    def load_dataset(self: MaskedLMTask, split: str, *args: Any, **kwargs: Any) -> None:
        upstream(self, split, *args, **kwargs)
        reason = unsupported(self.cfg)
        if reason is None:
            self.datasets[split] = whole(self.datasets[split])
        else:
            logger.info("%s: batches are made by fairseq: %s", split, reason)

    MaskedLMTask.load_dataset = load_dataset


def unsupported(cfg: Any) -> str | None:
    """Why the batches of a masked LM task with configuration `cfg` are left to fairseq; None: they are made here."""
    if os.environ.get(OPT_OUT) == "fairseq":
        return f"{OPT_OUT}=fairseq asks for it"
    if getattr(cfg, "mask_prob", None) is None:
        return "the task is not masked_lm"
    if getattr(cfg, "d2v2_multi", False):
        return "--d2v2-multi makes other batches"
    if getattr(cfg, "skip_masking", False):
        return "--skip-masking leaves nothing to mask"
    if cfg.mask_whole_words:
        return "--mask-whole-words draws words, not tokens"
    if cfg.mask_stdev > 0:
        return "--mask-stdev draws the length of every mask"
    if int(torch.__version__.split(".")[0]) < 2:
        return f"torch {torch.__version__} asks for single sequences, not for batches (torch 2.0 and later do)"
    if not _draws_are_known():
        return f"numpy {np.__version__} draws random numbers in another way than those that were compared"
    return None


def whole(dataset: FairseqDataset) -> FairseqDataset:
    """`dataset`, a split of fairseq's masked_lm, with batches made whole; itself where it is built in another way."""
    if isinstance(dataset, WholeBatches):
        return dataset
    try:
        return WholeBatches(dataset)
    except UnknownDataset as error:
        logger.info("batches are made by fairseq: %s", error)
        return dataset


class UnknownDataset(ValueError):
    """A dataset is not made of the parts that `MaskedLMTask.load_dataset` takes."""


class Rows(Sequence):
    """Sequences `indices` of `dataset`, looked up only if someone asks for one of them."""

    def __init__(self, dataset: FairseqDataset, indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return Rows(self.dataset, self.indices[position])
        return self.dataset[self.indices[position]]


class WholeBatches(BaseWrapperDataset):
    """`dataset`, what `MaskedLMTask.load_dataset` made, with a `collater` that makes a batch from indices.

    torch's data loaders fetch a batch through `__getitems__` if there is one. Whoever fetches single sequences, as
    `EpochBatchIterator.first_batch` does (fairseq/data/iterators.py:362, 0.12.3.1), gets fairseq's.
    """

    def __init__(self, dataset: FairseqDataset, epoch: torch.Tensor | None = None) -> None:
        super().__init__(dataset)
        nested = _expect(dataset, SortDataset).dataset
        self._fields, self._masking = _fields(_expect(nested, NestedDictionaryDataset).defn)
        masking = self._masking
        if masking.mask_whole_words is not None or masking.mask_stdev > 0 or masking.skip_masking:
            raise UnknownDataset("its masks are drawn in another way")
        # Where a loader's workers see it change: fairseq keeps them (fairseq/data/iterators.py:482, 0.12.3.1).
        self._epoch = torch.tensor([masking.epoch]).share_memory_() if epoch is None else epoch
        self._sequences = _expect(masking.dataset, LRUCacheDataset).dataset
        self._blocks, self._streams = _streams(self._sequences)
        # Where each stream begins, and the last one ends, in the tokens of all of them.
        self._begins = np.cumsum([0, *map(len, self._streams)])
        self._cumulative = _cumulative(masking.weights) if masking.random_token_prob > 0 else None

    def __reduce__(self) -> tuple[Any, ...]:
        # The streams are views of mapped files: another process opens those itself.
        return WholeBatches, (self.dataset, self._epoch)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self._epoch.fill_(epoch)

    def __getitems__(self, indices: Sequence[int]) -> Rows:
        return Rows(self.dataset, indices)

    def collater(self, samples: Sequence[Any]) -> dict[str, Any]:
        """A batch as fairseq's `NestedDictionaryDataset.collater` makes it: tokens (rows, longest), int64."""
        if not isinstance(samples, Rows) or len(samples) == 0:
            return self.dataset.collater(samples)
        indices = np.array(samples.indices, dtype=np.int64)
        tokens, lengths = self._tokens(indices)
        seeds = [int(hash((self._masking.seed, int(self._epoch), index)) % 1e6) for index in indices.tolist()]
        source, target = _mask(tokens, lengths, seeds, self._masking, self._cumulative)
        batch: dict[str, Any] = OrderedDict()
        for path, make in self._fields:
            *folders, name = path.split(".")
            place = batch
            for folder in folders:
                place = place.setdefault(folder, OrderedDict())
            place[name] = make(indices, lengths, source, target)
        return batch

    def _tokens(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The sequences before masking, padded on the right: (rows, longest), and their lengths, both int64."""
        pad = self._masking.pad_idx
        if not self._streams:
            items = [self._sequences[index].numpy() for index in indices.tolist()]
            lengths = np.array([len(item) for item in items])
            tokens = np.full((len(items), lengths.max()), pad, dtype=np.int64)
            for row, item in zip(tokens, items, strict=True):
                row[: len(item)] = item
            return tokens, lengths
        slices = self._blocks.slice_indices[indices].astype(np.int64)
        lengths = slices[:, 1] - slices[:, 0] + 1  # one more, at the beginning
        tokens = np.full((len(indices), lengths.max()), pad, dtype=np.int64)
        tokens[:, 0] = self._sequences.token
        for row, (begin, end) in zip(tokens, slices.tolist(), strict=True):
            for stream, first in self._read(begin, end):
                piece = stream[max(0, begin - first) : end - first]
                at = 1 + max(0, first - begin)
                row[at : at + len(piece)] = piece
        return tokens, lengths

    def _read(self, begin: int, end: int) -> Iterator[tuple[np.ndarray, int]]:
        """The streams that hold tokens `begin` to `end`, each with the number of tokens before it."""
        if len(self._streams) == 1:
            yield self._streams[0], 0
            return
        at = int(np.searchsorted(self._begins, begin, side="right")) - 1
        while at < len(self._streams) and self._begins[at] < end:
            yield self._streams[at], int(self._begins[at])
            at += 1


def _mask(
    tokens: np.ndarray, lengths: np.ndarray, seeds: list[int], masking: MaskTokensDataset, cumulative: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Source and target of `tokens` (rows, longest), as `MaskTokensDataset` makes them of each row
    (fairseq/data/mask_tokens_dataset.py:116, 0.12.3.1) with its seed of `seeds`.

    Of a row's random numbers it takes first the masked positions, then one per token that decides which of them are
    left or replaced, then one per token that decides between the two, then the replacements, in order of position.
    """
    if (tokens == masking.mask_idx).any():
        raise AssertionError(f"Dataset contains mask_idx (={masking.mask_idx}), this is not expected!")
    rows, longest = tokens.shape
    kept, replaced = masking.leave_unmasked_prob, masking.random_token_prob
    run = masking.mask_multiple_length
    # The most that a row can need; what it does not is drawn in vain, at the end.
    uniform = np.empty((rows, 2 * longest + (int(masking.mask_prob * longest / run) + 1) * run))
    masked = np.zeros((rows, longest), dtype=bool)
    seeded = _Seeded()
    for length, words, row, numbers in zip(lengths.tolist(), seed_words(seeds), masked, uniform, strict=True):
        seeded.words = words
        rng = Generator(PCG64(seeded))
        number = int(masking.mask_prob * length / float(run) + rng.random())
        chosen = rng.choice(length, number, replace=False)
        if run > 1:
            chosen = (chosen[:, None] + np.arange(run)).ravel()
            chosen = chosen[chosen < length]
        row[chosen] = True
        if kept + replaced > 0:
            rng.random(out=numbers)

    where = np.flatnonzero(masked)
    originals = tokens.ravel()[where]
    target = np.full(tokens.shape, masking.pad_idx, dtype=np.int64)
    target.ravel()[where] = originals
    source = tokens
    if kept + replaced == 0:
        source.ravel()[where] = masking.mask_idx
        return source, target

    row, column = np.divmod(where, longest)
    spared = uniform[row, column] < kept + replaced
    row, column = row[spared], column[spared]
    both = bool(kept and replaced)
    if both:
        replacing = uniform[row, lengths[row] + column] >= kept / (kept + replaced)
    else:
        replacing = np.full(len(row), bool(replaced))
    values = np.full(len(where), masking.mask_idx)
    values[spared] = originals[spared]
    if replaced:
        row = row[replacing]
        rank = np.arange(len(row)) - np.searchsorted(row, row)  # which replacement of its row
        drawn = uniform[row, (1 + both) * lengths[row] + rank]
        values[np.flatnonzero(spared)[replacing]] = cumulative.searchsorted(drawn, side="right")
    source.ravel()[where] = values
    return source, target


def _cumulative(weights: np.ndarray) -> np.ndarray:
    """What `Generator.choice` makes of the probabilities, each time anew, to look a uniform number up in."""
    cumulative = weights.cumsum()
    cumulative /= cumulative[-1]
    return cumulative


class _Seeded(ISeedSequence):
    """Hands a generator the words that it is seeded with."""

    words: np.ndarray

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        return self.words


def seed_words(seeds: Sequence[int]) -> np.ndarray:
    """`SeedSequence(seed).generate_state(4, np.uint64)` of many seeds below 2**32 at once: (seeds, 4).

    numpy promises that these words will not change. The algorithm is O'Neill's seed_seq_fe, with a pool of 4 words of
    32 bits: https://www.pcg-random.org/posts/developing-a-seed_seq-alternative.html

    >>> from numpy.random import SeedSequence
    >>> int(seed_words([7])[0, 0]) == int(SeedSequence(7).generate_state(4, np.uint64)[0])
    True
    """
    pool = np.zeros((4, len(seeds)), dtype=np.uint32)
    pool[0] = seeds
    constants = _hash_constants(0x43B0D7E5, 0x931E8875, 4 + 4 * 3)
    pool = _hash(pool, constants[:5])
    for word in range(4):
        others = [other for other in range(4) if other != word]
        hashed = _hash(pool[word], constants[4 + 3 * word : 8 + 3 * word])
        mixed = pool[others] * np.uint32(0xCA01F9DD) - hashed * np.uint32(0x4973F715)
        pool[others] = mixed ^ (mixed >> np.uint32(16))
    words = _hash(pool[[0, 1, 2, 3, 0, 1, 2, 3]], _hash_constants(0x8B51F9DD, 0x58F38DED, 8))
    words = words.astype(np.uint64)
    return np.ascontiguousarray((words[0::2] | (words[1::2] << np.uint64(32))).T)


def _hash(words: np.ndarray, constants: np.ndarray) -> np.ndarray:
    """Row i of `words`, or all of one row, hashed with constants i and i + 1: (constants - 1, seeds)."""
    hashed = (words ^ constants[:-1]) * constants[1:]
    return hashed ^ (hashed >> np.uint32(16))


@functools.cache
def _hash_constants(first: int, factor: int, steps: int) -> np.ndarray:
    """(steps + 1, 1): `first` and what comes of it by multiplying with `factor`, modulo 2**32."""
    return np.array([[first * pow(factor, step, 2**32) % 2**32] for step in range(steps + 1)], dtype=np.uint32)


@functools.cache
def _draws_are_known() -> bool:
    """Whether this numpy draws as `_mask` does: what a `Generator` draws may change with numpy's version."""
    weights = np.arange(50.0) / np.arange(50.0).sum()
    for seed, words in zip((0, 7, 999_999), seed_words([0, 7, 999_999]), strict=True):
        theirs = default_rng(seed)
        seeded = _Seeded()
        seeded.words = words
        ours = Generator(PCG64(seeded))
        if type(theirs.bit_generator) is not PCG64 or theirs.bit_generator.state != ours.bit_generator.state:
            return False
        drawn = [theirs.random(3), theirs.random(4), theirs.choice(50, 5, p=weights)]
        numbers = np.empty(20)
        ours.random(out=numbers)
        if not np.array_equal(np.concatenate(drawn[:2]), numbers[:7]):
            return False
        if not np.array_equal(drawn[2], _cumulative(weights).searchsorted(numbers[7:12], side="right")):
            return False
    return True


Field = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], Any]  # of indices, lengths, source and target


def _fields(datasets: dict[str, Any]) -> tuple[list[tuple[str, Field]], MaskTokensDataset]:
    """How the entry of a batch at each dotted path is made, and the dataset that masks the source."""
    source = target = None
    fields: list[tuple[str, Field]] = []
    for path, dataset in datasets.items():
        if type(dataset) is IdDataset:
            make = _ids
        elif type(dataset) is NumSamplesDataset:
            make = _count
        elif type(dataset) in (NumelDataset, RightPadDataset):
            masking = _expect(_expect(dataset.dataset, LRUCacheDataset).dataset, MaskTokensDataset)
            if masking.return_masked_tokens:
                target = target or masking
                make = _target
            else:
                source = source or masking
                make = _source
            if masking is not source and masking is not target:
                raise UnknownDataset(f"{path} is masked by itself")
            if type(dataset) is NumelDataset:
                make = _token_count if dataset.reduce else _lengths
            elif dataset.pad_idx != masking.pad_idx or dataset.pad_length is not None:
                raise UnknownDataset(f"{path} is padded in another way")
        else:
            raise UnknownDataset(f"{path} is a {type(dataset).__name__}")
        fields.append((path, make))
    if source is None or target is None or _draws(source) != _draws(target):
        raise UnknownDataset("source and target are not masked alike")
    return fields, source


def _draws(masking: MaskTokensDataset) -> tuple[Any, ...]:
    """What decides which tokens are masked."""
    options = ("seed", "epoch", "mask_prob", "mask_multiple_length", "mask_stdev", "skip_masking", "pad_idx")
    return (id(masking.dataset), *(getattr(masking, option, None) for option in options))


def _ids(indices: np.ndarray, lengths: np.ndarray, source: np.ndarray, target: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(indices.copy())


def _count(indices: np.ndarray, lengths: np.ndarray, source: np.ndarray, target: np.ndarray) -> int:
    return len(indices)


def _lengths(indices: np.ndarray, lengths: np.ndarray, source: np.ndarray, target: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(lengths.copy())


def _token_count(indices: np.ndarray, lengths: np.ndarray, source: np.ndarray, target: np.ndarray) -> int:
    return int(lengths.sum())


def _source(indices: np.ndarray, lengths: np.ndarray, source: np.ndarray, target: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(source)


def _target(indices: np.ndarray, lengths: np.ndarray, source: np.ndarray, target: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(target.copy())  # --include-target-tokens has it twice


def _streams(sequences: FairseqDataset) -> tuple[Any, list[np.ndarray]]:
    """The blocks that `sequences` puts a token before, and the arrays of tokens, one after the other, that they are cut
    from; no arrays if the tokens lie in another way, then each sequence is asked for."""
    if type(sequences) is not PrependTokenDataset or sequences.token is None:
        return None, []
    blocks = sequences.dataset
    if type(blocks) is not TokenBlockDataset or blocks.include_targets:
        return None, []
    streams = _mapped(blocks.dataset)
    if blocks.slice_indices.max() > sum(map(len, streams)):
        return None, []
    return blocks, streams


def _mapped(dataset: Any) -> list[np.ndarray]:
    """The tokens of a dataset in mapped files, one array per file; none if it is another one."""
    if type(dataset) in (TruncateDataset, RandomCropDataset):  # both leave what is short enough as it is
        inner = dataset.dataset
        return _mapped(inner) if inner.sizes.max() <= dataset.truncation_length else []
    if type(dataset) is ConcatDataset:
        parts = [_mapped(part) for part in dataset.datasets]
        alike = all(ratio == 1 for ratio in dataset.sample_ratios)
        return [stream for part in parts for stream in part] if alike and all(parts) else []
    if type(dataset) is not MMapIndexedDataset:
        return []
    sizes, pointers = dataset.sizes, dataset._index._pointers
    itemsize = np.dtype(dataset._index.dtype).itemsize
    if pointers[0] != 0 or not _without_gaps(sizes, pointers, itemsize):
        return []
    # `dataset` unmaps the file when it goes; it is held by the same WholeBatches as this view.
    count = int(pointers[-1]) // itemsize + int(sizes[-1])
    return [np.frombuffer(dataset._bin_buffer, dtype=dataset._index.dtype, count=count)]


def _without_gaps(sizes: np.ndarray, pointers: np.ndarray, itemsize: int) -> bool:
    """Whether every sentence begins where the one before it ends; looked at in pieces, to hold little of it at once."""
    step = 1 << 20
    for start in range(0, len(sizes) - 1, step):
        part = pointers[start : start + step + 1]
        if not np.array_equal(np.diff(part), sizes[start : start + len(part) - 1].astype(np.int64) * itemsize):
            return False
    return True


def _expect(dataset: Any, kind: type) -> Any:
    if type(dataset) is not kind:
        raise UnknownDataset(f"a {type(dataset).__name__} is where a {kind.__name__} was expected")
    return dataset
