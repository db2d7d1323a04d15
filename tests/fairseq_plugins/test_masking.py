"""Batches that are made whole are fairseq's, bit for bit."""

from __future__ import annotations

import itertools
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary, LRUCacheDataset, indexed_dataset
from fairseq.tasks.masked_lm import MaskedLMConfig, MaskedLMTask
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fairseq_plugins import masking
from fairseq_plugins.masking import WholeBatches, seed_words, unsupported, whole
from fairseq_plugins.tasks.pruning import PruningMaskedLMConfig, PruningMaskedLMTask
from xla.batches import Shape, padded_collater

WORDS = 40
MODES = ["none", "complete", "complete_doc"]
if hasattr(np, "compat"):  # fairseq/data/token_block_dataset.py:125 (0.12.3.1) needs numpy below 2.0 for this one
    MODES.append("eos")


def write(folder: Path, lengths: list[int], split: str = "train", impl: str = "mmap", seed: int = 0) -> None:
    """A data folder of sentences that are `lengths` long without their end."""
    folder.mkdir(parents=True, exist_ok=True)
    dictionary = Dictionary()
    for word in range(WORDS):
        dictionary.add_symbol(f"w{word}", n=word + 1)
    dictionary.finalize(padding_factor=1)
    dictionary.save(str(folder / "dict.txt"))
    path = str(folder / split)
    builder = indexed_dataset.make_builder(f"{path}.bin", impl=impl, vocab_size=len(dictionary))
    rng = np.random.default_rng(seed)
    for length in lengths:
        words = rng.integers(dictionary.nspecial, len(dictionary), length)
        builder.add_item(torch.tensor([*words, dictionary.eos()], dtype=torch.int32))
    builder.finalize(f"{path}.idx")


def lengths(count: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, 30, count).tolist()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masking")
    write(folder, lengths(300))
    write(folder, lengths(30, seed=2), split="valid", seed=3)
    return folder


# fairseq's own, which the plugin listens at once it is imported.
LOAD_DATASET = getattr(MaskedLMTask.load_dataset, "__wrapped__", MaskedLMTask.load_dataset)


def loaded(data: Any, split: str = "train", epoch: int = 1, combine: bool = True, **options: Any) -> MaskedLMTask:
    options = {"tokens_per_sample": 32, "seed": 5, **options}
    cfg = OmegaConf.structured(MaskedLMConfig(data=str(data), **options))
    task = MaskedLMTask.setup_task(cfg)
    LOAD_DATASET(task, split, epoch=epoch, combine=combine)
    return task


def with_whole_batches(task: MaskedLMTask) -> MaskedLMTask:
    for split, dataset in task.datasets.items():
        task.datasets[split] = whole(dataset)
        assert isinstance(task.datasets[split], WholeBatches)
    return task


def iterator(task: MaskedLMTask, split: str = "train", **options: Any) -> Any:
    options = {"max_sentences": 8, "max_positions": 512, "ignore_invalid_inputs": True, "seed": 3, **options}
    return task.get_batch_iterator(task.datasets[split], **options)


def epochs(task: MaskedLMTask, count: int = 2, split: str = "train", **options: Any) -> Iterator[Any]:
    batches = iterator(task, split, **options)
    for _ in range(count):
        LRUCacheDataset.__getitem__.cache_clear()  # see `test_a_new_epoch_has_new_masks_at_once`
        yield batches.first_batch
        yield from batches.next_epoch_itr(shuffle=True)
    if batches.num_workers > 0:
        batches.dataloader._iterator._shutdown_workers()


def assert_equal(stock: Any, ours: Any, path: str = "batch") -> None:
    assert type(stock) is type(ours), path
    if isinstance(stock, dict):
        assert list(stock) == list(ours), path
        for key in stock:
            assert_equal(stock[key], ours[key], f"{path}.{key}")
    elif isinstance(stock, torch.Tensor):
        assert (stock.dtype, stock.shape, stock.stride()) == (ours.dtype, ours.shape, ours.stride()), path
        assert torch.equal(stock, ours), path
    else:
        assert stock == ours, path


def assert_same(stock: Iterator[Any], ours: Iterator[Any]) -> int:
    """That both give the same batches; how many."""
    pairs = list(itertools.zip_longest(stock, ours))
    for one, other in pairs:
        assert_equal(one, other)
    return len(pairs)


@settings(deadline=None, max_examples=60)
@given(
    options=st.fixed_dictionaries(
        {
            "sample_break_mode": st.sampled_from(MODES),
            "tokens_per_sample": st.integers(3, 60),
            "mask_prob": st.sampled_from([0.01, 0.15, 0.4, 0.99]),
            "leave_unmasked_prob": st.sampled_from([0.0, 0.1, 0.5]),
            "random_token_prob": st.sampled_from([0.0, 0.1, 0.5]),
            "mask_multiple_length": st.integers(1, 3),
            "freq_weighted_replacement": st.booleans(),
            "include_target_tokens": st.booleans(),
            "include_index": st.booleans(),
            "shorten_method": st.sampled_from(["none", "truncate", "random_crop"]),
            "seed": st.integers(0, 2**31),
        }
    ),
    sentences=st.lists(st.integers(0, 25), max_size=60).map(lambda sentences: [3, *sentences]),
    batching=st.fixed_dictionaries(
        {
            "max_sentences": st.integers(1, 9),
            "max_tokens": st.sampled_from([None, 200]),
            "max_positions": st.sampled_from([20, 512]),
            "epoch": st.integers(1, 3),
        }
    ),
)
def test_every_batch_of_two_epochs_is_fairseqs(
    options: dict, sentences: list, batching: dict, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("text")
    write(folder, sentences)
    stock, ours = loaded(folder, **options), with_whole_batches(loaded(folder, **options))
    if len(iterator(loaded(folder, **options), **batching)) == 0:
        return  # everything is too long
    assert_same(epochs(stock, **batching), epochs(ours, **batching))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_with_workers(workers: int, data: Path) -> None:
    """They are what fairseq makes without workers: with them, its second epoch has the masks of the first."""
    options = {"data_buffer_size": 10}
    stock, ours = loaded(data), with_whole_batches(loaded(data))
    assert assert_same(epochs(stock, **options), epochs(ours, num_workers=workers, **options)) > 20


def test_fairseqs_workers_keep_the_masks_of_the_first_epoch(data: Path) -> None:
    """Else the epoch in shared memory is no longer needed."""
    stock = iterator(loaded(data), num_workers=1)
    first, second = (
        {
            int(row): target
            for batch in stock.next_epoch_itr(shuffle=True)
            for row, target in zip(batch["id"], batch["target"], strict=True)
        }
        for _ in range(2)
    )
    stock.dataloader._iterator._shutdown_workers()
    assert first.keys() == second.keys()
    for row, target in first.items():
        kept, again = (each[each != 1].tolist() for each in (target, second[row]))
        assert kept == again


def test_validation(data: Path) -> None:
    stock = loaded(data, split="valid")
    ours = with_whole_batches(loaded(data, split="valid"))
    options = {"split": "valid", "num_workers": 1}
    assert assert_same(epochs(stock, 1, **options), epochs(ours, 1, **options)) > 1


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_in_the_middle_of_an_epoch(workers: int, data: Path) -> None:
    """Either of them goes on from where the other stopped."""
    first = iterator(with_whole_batches(loaded(data)), epoch=2, num_workers=workers)
    batches = first.next_epoch_itr(shuffle=True)
    for _ in range(5):
        next(batches)
    state = first.state_dict()
    assert (state["epoch"], state["iterations_in_epoch"]) == (2, 5)
    stock, ours = (
        iterator(task, epoch=2, num_workers=workers) for task in (loaded(data), with_whole_batches(loaded(data)))
    )
    stock.load_state_dict(state)
    ours.load_state_dict(state)
    assert assert_same(stock.next_epoch_itr(shuffle=True), ours.next_epoch_itr(shuffle=True)) == len(stock) - 5


def test_several_devices_and_empty_batches(data: Path) -> None:
    """A device that runs out of batches is given empty ones."""
    sizes = []
    for shard in range(3):
        options = {"num_shards": 3, "shard_id": shard, "max_sentences": 7}
        stock, ours = loaded(data), with_whole_batches(loaded(data))
        assert_same(epochs(stock, **options), epochs(ours, **options))
        sizes += [len(batch) for batch in epochs(ours, 1, **options)]
    assert 0 in sizes


def test_folders_that_take_turns(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path / f"part{number}", lengths(100, seed=number), seed=number)
    paths = f"{tmp_path}/part1:{tmp_path}/part2"
    for epoch in (1, 2, 3):
        stock, ours = loaded(paths, epoch=epoch), with_whole_batches(loaded(paths, epoch=epoch))
        assert assert_same(epochs(stock, 1, epoch=epoch), epochs(ours, 1, epoch=epoch)) > 5


@pytest.mark.parametrize("mode", MODES)
def test_files_that_are_read_as_one(mode: str, tmp_path: Path) -> None:
    """train, train1 and train2, with blocks that lie in two or in all three of them."""
    for number, split in enumerate(["train", "train1", "train2"]):
        write(tmp_path, [3] if number == 1 else lengths(40, seed=number), split=split, seed=number)
    options = {"sample_break_mode": mode, "tokens_per_sample": 60}
    stock, ours = loaded(tmp_path, **options), with_whole_batches(loaded(tmp_path, **options))
    assert len(ours.datasets["train"]._streams) == 3
    assert assert_same(epochs(stock), epochs(ours)) > 4


def test_files_that_are_not_mapped(tmp_path: Path) -> None:
    """Text is read by fairseq, a sequence at a time."""
    write(tmp_path, [1], split="valid")
    words = np.random.default_rng(1).integers(0, WORDS, (60, 9))
    (tmp_path / "train").write_text("".join(" ".join(f"w{word}" for word in line) + "\n" for line in words))
    stock, ours = loaded(tmp_path), with_whole_batches(loaded(tmp_path))
    assert ours.datasets["train"]._streams == []
    assert assert_same(epochs(stock), epochs(ours)) > 4


def test_files_that_are_fetched_ahead(tmp_path: Path) -> None:
    """fairseq reads the sequences of an epoch before it begins."""
    write(tmp_path, lengths(60), impl="cached")
    stock, ours = loaded(tmp_path), with_whole_batches(loaded(tmp_path))
    assert ours.datasets["train"]._streams == []
    assert assert_same(iterator(stock).next_epoch_itr(), iterator(ours).next_epoch_itr()) > 2


@pytest.mark.parametrize("method", ["truncate", "random_crop"])
@pytest.mark.parametrize(("longest", "mapped"), [(20, False), (31, True)])
def test_shortened_sentences(method: str, longest: int, mapped: bool, data: Path) -> None:
    """Where no sentence is too long, the file is read as it is."""
    options = {"tokens_per_sample": longest, "shorten_method": method, "sample_break_mode": "complete"}
    stock, ours = loaded(data, **options), with_whole_batches(loaded(data, **options))
    assert bool(ours.datasets["train"]._streams) == mapped
    assert assert_same(epochs(stock), epochs(ours)) > 20


@pytest.mark.slow
def test_a_spawned_worker_makes_the_same_batches(data: Path) -> None:
    ours = with_whole_batches(loaded(data)).datasets["train"]
    ours.set_epoch(4)
    indices = [list(range(start, start + 6)) for start in range(0, 30, 6)]
    loader = torch.utils.data.DataLoader(
        ours, batch_sampler=indices, collate_fn=ours.collater, num_workers=1, multiprocessing_context="spawn"
    )
    stock = loaded(data).datasets["train"]
    stock.set_epoch(4)
    assert assert_same((stock.collater([stock[i] for i in batch]) for batch in indices), iter(loader)) == 5
    assert len(pickle.dumps(ours)) <= len(pickle.dumps(stock)) + 600  # nothing that was read goes along


def test_sizes_and_items_are_fairseqs(data: Path) -> None:
    stock, ours = loaded(data).datasets["train"], with_whole_batches(loaded(data)).datasets["train"]
    assert len(stock) == len(ours)
    assert len(ours.sizes) == 1
    assert np.array_equal(stock.sizes[0], ours.sizes[0])
    assert_equal(stock[3], ours[3])
    rows = ours.__getitems__([4, 3, 2])
    assert_equal(stock[3], rows[1])
    assert [int(row["id"]) for row in rows[1:]] == [3, 2]


def test_tensors_of_a_batch_share_nothing(data: Path) -> None:
    """What changes one of them in place leaves the others."""
    ours = with_whole_batches(loaded(data, include_target_tokens=True)).datasets["train"]
    batch = ours.collater(ours.__getitems__([1, 2]))
    tensors = [batch["id"], batch["target"], *batch["net_input"].values()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors) == 6


def test_batches_of_one_shape_for_torch_xla(data: Path) -> None:
    ours = with_whole_batches(loaded(data, sample_break_mode="complete")).datasets["train"]
    stock = loaded(data, sample_break_mode="complete").datasets["train"]
    shape = Shape(rows=4, source=32, target=32, pad=1, masked=5)
    indices = [3, 4, 5]
    padded = padded_collater(ours.collater, shape, None, ours.__getitems__(indices))
    assert_equal(padded_collater(stock.collater, shape, None, [stock[i] for i in indices]), padded)
    assert padded_collater(ours.collater, shape, {"nothing": True}, ours.__getitems__([])) == {"nothing": True}


def test_a_new_epoch_has_new_masks_at_once(data: Path) -> None:
    """A difference: fairseq keeps the last sequences of an epoch for the next."""
    stock, ours = loaded(data).datasets["train"], with_whole_batches(loaded(data)).datasets["train"]
    LRUCacheDataset.__getitem__.cache_clear()
    for dataset in (stock, ours):
        dataset.set_epoch(1)
    before = stock.collater([stock[7]])
    for dataset in (stock, ours):
        dataset.set_epoch(2)
    kept = stock.collater([stock[7]])
    assert_equal(before, kept)
    new = ours.collater(ours.__getitems__([7]))
    assert not torch.equal(new["target"], kept["target"])
    LRUCacheDataset.__getitem__.cache_clear()
    assert_equal(stock.collater([stock[7]]), new)


def test_a_mask_in_the_text_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [5, 5])
    with (tmp_path / "dict.txt").open("a") as file:
        file.write("<mask> 1\n")
    task = loaded(tmp_path)
    path = str(tmp_path / "train")
    builder = indexed_dataset.make_builder(f"{path}.bin", impl="mmap", vocab_size=len(task.dictionary))
    builder.add_item(torch.tensor([5, task.mask_idx, 2], dtype=torch.int32))
    builder.finalize(f"{path}.idx")
    stock, ours = loaded(tmp_path).datasets["train"], with_whole_batches(loaded(tmp_path)).datasets["train"]
    with pytest.raises(AssertionError) as theirs:
        stock[0]
    with pytest.raises(AssertionError) as error:
        ours.collater(ours.__getitems__([0]))
    assert str(error.value) == str(theirs.value)


def test_the_listener_takes_this_plugins_tasks_too(data: Path) -> None:
    cfg = OmegaConf.structured(PruningMaskedLMConfig(data=str(data), tokens_per_sample=32, seed=1))
    for task in (loaded(data), PruningMaskedLMTask(cfg, PruningMaskedLMTask.load_dict(cfg))):
        for split in ("train", "valid"):
            task.load_dataset(split)
            assert isinstance(task.datasets[split], WholeBatches)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mask_stdev": 1.0}, "--mask-stdev"),
        ({"skip_masking": True}, "--skip-masking"),
        ({"d2v2_multi": True}, "--d2v2-multi"),
    ],
)
def test_other_options_are_left_to_fairseq(
    options: dict, reason: str, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = loaded(data, **options)
    with caplog.at_level(logging.INFO):
        task.load_dataset("train")
    assert not isinstance(task.datasets["train"], WholeBatches)
    assert unsupported(task.cfg).startswith(reason)
    assert reason in caplog.text
    assert len(list(epochs(task, 1))) > 5


def test_whole_words_are_left_to_fairseq(data: Path) -> None:
    assert "--mask-whole-words" in unsupported(MaskedLMConfig(data=str(data), mask_whole_words=True))


def test_who_asks_for_fairseqs_batches_gets_them(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAIN_LARGE_BATCHES", "fairseq")
    task = MaskedLMTask.setup_task(OmegaConf.structured(MaskedLMConfig(data=str(data), tokens_per_sample=32, seed=1)))
    task.load_dataset("train")
    assert not isinstance(task.datasets["train"], WholeBatches)
    monkeypatch.delenv("TRAIN_LARGE_BATCHES")
    task.load_dataset("train")
    assert isinstance(task.datasets["train"], WholeBatches)


def test_supported() -> None:
    assert unsupported(MaskedLMConfig(data="", mask_multiple_length=2, freq_weighted_replacement=True)) is None
    assert unsupported(OmegaConf.create({"_name": "translation"})) == "the task is not masked_lm"


def test_another_numpy_is_left_to_fairseq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "_draws_are_known", lambda: False)
    assert f"numpy {np.__version__}" in unsupported(MaskedLMConfig(data=""))


def test_datasets_of_other_parts_are_left_as_they_are(data: Path) -> None:
    task = loaded(data)
    sorted_dataset = task.datasets["train"]
    assert whole(sorted_dataset.dataset) is sorted_dataset.dataset
    stdev = loaded(data, mask_stdev=1.0).datasets["train"]
    assert whole(stdev) is stdev
    ours = whole(sorted_dataset)
    assert whole(ours) is ours


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), max_size=20))
def test_seed_words(seeds: list[int]) -> None:
    theirs = [np.random.SeedSequence(seed).generate_state(4, np.uint64) for seed in seeds]
    assert np.array_equal(seed_words(seeds), np.array(theirs, dtype=np.uint64).reshape(-1, 4))
