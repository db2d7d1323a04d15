"""Each patch mends what it says, and is still needed: upstream without it fails."""

from __future__ import annotations

import functools
import inspect
import logging
import re
from argparse import Namespace
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as met
import torch_xla.distributed.xla_multiprocessing as xmp
import torch_xla.runtime as xr
from fairseq import models, utils
from fairseq.criterions.masked_lm import MaskedLmLoss
from fairseq.criterions.sentence_prediction import SentencePredictionCriterion
from fairseq.data import Dictionary, FairseqDataset, data_utils
from fairseq.data.iterators import CountingIterator, GroupedIterator
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase
from fairseq.tasks import FairseqTask
from fairseq.trainer import Trainer
from fairseq_cli import train
from torch import nn
from torch_xla._internal import pjrt

from xla import criterions, patches, rematerialization, spawn
from xla.batches import Shape, pad_batch
from xla.compilations import WARM_UP

PAD = 1


@pytest.fixture
def mended(monkeypatch: pytest.MonkeyPatch):
    """A function that applies a patch for this test only: `mended(patch, object, name, ...)`, of all that it sets."""

    def mend(patch: Any, *places: Any) -> None:
        for thing, name in zip(places[::2], places[1::2], strict=True):
            monkeypatch.setattr(thing, name, getattr(thing, name, None), raising=False)
        patch()

    return mend


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PJRT_DEVICE", "CPU")


def device() -> torch.device:
    return torch_xla.device()


# -- names that have moved --


def test_memory_is_told_in_kilobytes(mended):
    with pytest.raises(RuntimeError):  # no longer needed on the CPU if it does not
        xm.get_memory_info(device())
    mended(patches.memory_in_kilobytes, xm, "get_memory_info")
    info = xm.get_memory_info(device())
    assert 0 < info["kb_free"] < info["kb_total"] == info["bytes_limit"] // 1024


def test_names_of_ranks(mended):
    for name in ("xrt_world_size", "get_ordinal"):
        assert not hasattr(xm, name), "no longer needed: names_of_ranks"
        assert f"xm.{name}()" in inspect.getsource(distributed_utils)
    mended(patches.names_of_ranks, xm, "xrt_world_size", xm, "get_ordinal")
    assert (xm.xrt_world_size(), xm.get_ordinal(), xm.get_local_ordinal()) == (1, 0, 0)


def test_meet_nobody_alone(mended, monkeypatch):
    assert "xm.rendezvous" in inspect.getsource(Trainer.valid_step), "no longer needed: meet_nobody_alone"
    waits: list[tuple[Any, ...]] = []
    monkeypatch.setattr(xm, "rendezvous", lambda *asked: waits.append(asked) or [b"a", b"b"])
    mended(patches.meet_nobody_alone, xm, "rendezvous")
    assert xm.rendezvous("valid_step", b"mine") == [b"mine"]
    assert waits == []
    monkeypatch.setattr(patches.xr, "world_size", lambda: 2)
    assert xm.rendezvous("valid_step", b"mine", (0, 1)) == [b"a", b"b"]
    assert waits == [("valid_step", b"mine", [0, 1])]


def test_every_device_has_its_process_and_they_are_patched(mended, monkeypatch):
    calls: list[Any] = []
    with pytest.raises(ValueError, match="nprocs"):  # no longer needed if it does not
        xmp.spawn(print, nprocs=4)
    monkeypatch.setattr(xmp, "spawn", lambda fn, args=(), nprocs=None: calls.append((fn, args, nprocs)))
    own = patches.Options("spawn", "auto", False)
    mended(
        lambda: spawn.listen(own, calls.append), distributed_utils, "call_main", xmp, "spawn", pjrt, "run_multiprocess"
    )
    section = SimpleNamespace(
        distributed_init_method=None, distributed_world_size=4, distributed_port=-1, pipeline_model_parallel=False
    )
    cfg = SimpleNamespace(distributed_training=section, common=SimpleNamespace(tpu=True))
    monkeypatch.setattr(distributed_utils, "infer_init_method", lambda section: None)
    monkeypatch.setattr(torch.multiprocessing, "set_sharing_strategy", lambda strategy: None)
    distributed_utils.call_main(cfg, train.main)
    assert calls == [cfg, (spawn.patched_main, (own, train.main, cfg, {}), None)]


# -- the two that nothing would tell of --


class Batches:
    """An iterable that knows how many of its items were taken."""

    def __init__(self, number: int) -> None:
        self.number, self.taken = number, 0

    def __len__(self) -> int:
        return self.number

    def __iter__(self):
        for i in range(self.number):
            self.taken += 1
            yield {"net_input": {"src_tokens": torch.full((2, 3), i)}, "nsentences": 2}


def drawn(loader: Any) -> list[int]:
    return [int(batch["net_input"]["src_tokens"][0, 0]) for batch in loader]


def upstream_loses_batches() -> bool:
    """Whether it does so once in a few goes: it is a race."""
    for _ in range(10):
        inner = CountingIterator(Batches(12))
        loader = utils.tpu_data_loader(inner)
        try:
            next(loader)
            ahead = inner.n > 1
            rest = drawn(loader)
        except (IndexError, StopIteration):
            return True
        if ahead or rest != list(range(1, 12)) or loader.n != 12:
            return True
    return False


def test_no_batch_is_lost_or_drawn_before_its_time(mended):
    assert upstream_loses_batches(), "no longer needed: move_batches_in_their_order"
    mended(patches.move_batches_in_their_order, utils, "tpu_data_loader")
    batches = Batches(12)
    inner = CountingIterator(batches)
    loader = utils.tpu_data_loader(inner)
    assert (inner.n, loader.n, len(loader)) == (0, 0, 12)
    for i, batch in enumerate(loader):
        # What a checkpoint stores is the position of the inner one.
        assert inner.n == loader.n == batches.taken == i + 1
        assert batch["net_input"]["src_tokens"].device.type == "xla"
        assert int(batch["net_input"]["src_tokens"][0, 0]) == i
    assert loader.n == 12
    assert not loader.has_next()


def test_no_batch_is_lost_after_a_resume_or_in_groups(mended):
    mended(patches.move_batches_in_their_order, utils, "tpu_data_loader")
    inner = CountingIterator(Batches(12))
    inner.skip(5)
    assert drawn(utils.tpu_data_loader(inner)) == list(range(5, 12))
    groups = GroupedIterator(CountingIterator(Batches(7)), 2)
    assert [drawn(group) for group in utils.tpu_data_loader(groups)] == [[0, 1], [2, 3], [4, 5], [6]]


class Tied(nn.Module):
    """Embeddings and a head of the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(5, 4)
        self.lm_head = nn.Linear(4, 5, bias=False)
        self.lm_head.weight = self.embed_tokens.weight


def test_embeddings_and_head_stay_one_weight_on_the_device(mended, monkeypatch):
    mended(patches.names_of_ranks, xm, "xrt_world_size", xm, "get_ordinal")
    monkeypatch.setattr(distributed_utils, "_USE_XLA", True)
    group = ("tpu", [[0]])

    def wrap() -> tuple[Tied, Any]:
        model = Tied()
        assert len(list(model.parameters())) == 1
        return model, models.DistributedFairseqModel(Namespace(tpu=True), model, process_group=group, device=device())

    model, _ = wrap()
    assert model.lm_head.weight is not model.embed_tokens.weight, "no longer needed: keep_weights_tied"

    mended(patches.keep_weights_tied, models, "DistributedFairseqModel")
    model, wrapped = wrap()
    assert model.lm_head.weight is model.embed_tokens.weight
    assert model.lm_head.weight.device.type == "xla"
    assert len(list(wrapped.parameters())) == 1  # what the optimizer and the sum of gradients over workers see


# -- padded batches --


class Sentences(FairseqDataset):
    """Sentences of 2 to 5 tokens, to be classified."""

    sizes = torch.tensor([2, 2, 3, 3, 4, 4, 5, 5, 3, 2]).numpy()

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.arange(4, 4 + int(self.sizes[i]))

    def num_tokens(self, i: int) -> int:
        return int(self.sizes[i])

    def ordered_indices(self):
        return torch.arange(len(self)).numpy()

    def collater(self, samples: list[torch.Tensor]) -> dict[str, Any]:
        lengths = torch.tensor([len(sample) for sample in samples])
        tokens = data_utils.collate_tokens(samples, PAD)
        return {"net_input": {"src_tokens": tokens, "src_lengths": lengths}, "target": lengths % 2}


class Task(FairseqTask):
    source_dictionary = Dictionary()


def shapes_of_batches() -> list[tuple[int, ...]]:
    task = Task(Namespace())
    batches = task.get_batch_iterator(
        Sentences(), max_sentences=4, max_positions=None, required_batch_size_multiple=8, num_workers=0
    ).next_epoch_itr(shuffle=False)
    return [tuple(batch["net_input"]["src_tokens"].shape) for batch in batches]


def test_all_batches_have_one_shape_and_no_sentence_is_left_out(mended):
    assert shapes_of_batches() == [(4, 3), (4, 5)], "perhaps no longer needed: one_shape_for_all_batches"
    mended(lambda: patches.one_shape_for_all_batches("auto"), FairseqTask, "get_batch_iterator")
    assert shapes_of_batches() == [(4, 5)] * 3


class Encoder(nn.Module):
    """What a criterion wants of a model: (rows, length) -> (rows, length or classes, vocabulary)."""

    def __init__(self, classes: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(12, 6)
        self.head = nn.Linear(6, classes or 12)
        self.classes = classes
        self.classification_heads = {"sentence_classification_head": self.head}
        self.encoder = SimpleNamespace(output_layer=self.head)

    def get_targets(self, sample: dict[str, Any], outputs: Any) -> torch.Tensor:
        return sample["target"]

    def forward(
        self,
        src_tokens: torch.Tensor,
        src_lengths: torch.Tensor,
        masked_tokens: torch.Tensor | None = None,
        features_only: bool = False,
        classification_head_name: str | None = None,
    ) -> tuple[torch.Tensor, None]:
        features = self.embed(src_tokens)
        if self.classes:
            return self.head(features[:, 0]), None
        if features_only:
            return features, None
        return self.head(features if masked_tokens is None else features[masked_tokens]), None


def task_of_criterion() -> Any:
    dictionary = SimpleNamespace(pad=lambda: PAD)
    return SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary, label_dictionary=None)


def numbers(result: tuple[Any, Any, dict[str, Any]]) -> dict[str, float]:
    loss, sample_size, log = result
    names = ("ntokens", "nsentences", "sample_size", "ncorrect")
    return {"loss": float(loss.detach()), "sample size": int(sample_size)} | {
        name: int(log[name]) for name in names if name in log
    }


def masked_batch() -> dict[str, Any]:
    """As fairseq's, which counts the tokens of a masked LM's batch without padding."""
    tokens = torch.tensor([[4, 5, 6, 7], [8, 9, PAD, PAD], [10, 11, 4, PAD]])
    target = torch.tensor([[PAD, 7, PAD, 8], [9, PAD, PAD, PAD], [PAD, PAD, PAD, PAD]])
    lengths = torch.tensor([4, 2, 3])
    return {
        "net_input": {"src_tokens": tokens, "src_lengths": lengths},
        "target": target,
        "ntokens": 9,
        "nsentences": 3,
    }


@pytest.mark.parametrize("masked", [None, 1, 2])
def test_masked_lm_of_padded_batches(mended, masked):
    criterion = MaskedLmLoss(Namespace(tpu=True), task_of_criterion())
    model = Encoder()
    projected: list[int] = []
    model.head.register_forward_hook(lambda head, inputs, logits: projected.append(logits[..., 0].numel()))
    padded = pad_batch(masked_batch(), Shape(5, 6, 6, PAD, masked))
    expected = numbers(criterion(model, masked_batch()))
    criterion(model, padded)
    mended(patches.losses_of_padded_batches, MaskedLmLoss, "forward", SentencePredictionCriterion, "forward")
    assert numbers(criterion(model, padded)) == pytest.approx(expected, rel=1e-6)
    whole, upstreams, ours = projected
    assert (whole, upstreams) == (3 * 4, 5 * 6), "perhaps no longer needed: losses_of_padded_batches"
    assert ours == 5 * (2 if masked else 6)  # a row has two, which a room for one is doubled for


def test_classification_of_padded_batches(mended):
    cfg = SimpleNamespace(
        classification_head_name="sentence_classification_head",
        regression_target=False,
        report_mcc=False,
        report_acc_and_f1=False,
        report_pearson_and_spearman=False,
    )
    criterion = SentencePredictionCriterion(cfg, task_of_criterion())
    model = Encoder(classes=2)
    batch = masked_batch() | {"target": torch.tensor([1, 0, 1])}
    padded = pad_batch(batch, Shape(5, 6, 6, PAD))
    expected = numbers(criterion(model, batch))
    assert numbers(criterion(model, padded))["sample size"] == 5, "perhaps no longer needed: losses_of_padded_batches"
    mended(patches.losses_of_padded_batches, MaskedLmLoss, "forward", SentencePredictionCriterion, "forward")
    assert numbers(criterion(model, padded)) == pytest.approx(expected, rel=1e-6)


# -- several processes --


class MaskedSentences(Sentences):
    """The same with all of their tokens masked."""

    def collater(self, samples: list[torch.Tensor]) -> dict[str, Any]:
        if not samples:
            return {}
        batch = super().collater(samples)
        counts = {"ntokens": int(batch["net_input"]["src_lengths"].sum()), "nsentences": len(samples)}
        return batch | counts | {"target": batch["net_input"]["src_tokens"].clone()}


def batches_of_the_second_of_two() -> list[Any]:
    iterator = Task(Namespace()).get_batch_iterator(
        MaskedSentences(), max_sentences=4, required_batch_size_multiple=1, num_shards=2, shard_id=1, num_workers=0
    )
    return list(iterator.next_epoch_itr(shuffle=False))


def test_a_process_that_has_run_out_of_batches_goes_on_with_ones_that_count_nothing(mended, monkeypatch):
    """Three batches for two: fairseq gives the second nothing for its last one, and takes what it puts in its place
    out of the gradients again, together with all batches that the update has accumulated."""
    assert batches_of_the_second_of_two()[-1] == {}, "perhaps no longer needed"
    assert "is_dummy_batch" in inspect.getsource(Trainer.train_step), "perhaps no longer needed"
    monkeypatch.setattr(xr, "world_size", lambda: 2)
    mended(lambda: patches.one_shape_for_all_batches("auto"), FairseqTask, "get_batch_iterator")
    mended(patches.losses_of_padded_batches, MaskedLmLoss, "forward", SentencePredictionCriterion, "forward")
    full, stand_in = batches_of_the_second_of_two()
    assert full["net_input"]["src_tokens"].shape == stand_in["net_input"]["src_tokens"].shape
    criterion = MaskedLmLoss(Namespace(tpu=True), task_of_criterion())
    assert numbers(criterion(Encoder(), full))["nsentences"] == 4
    assert set(numbers(criterion(Encoder(), stand_in)).values()) == {0}
    assert (stand_in["ntokens"], stand_in["nsentences"]) == (0, 0)  # which translation's criterion counts by


@pytest.mark.parametrize(
    ("flags", "asked", "alone", "of_two"),
    [
        ({}, "auto", 3, 3),
        ({}, "1", 1, 3),
        ({}, "4", 4, 4),
        ({}, "all", None, None),
        ({"mask_whole_words": True}, "auto", 3, None),
        ({"mask_stdev": 0.1}, "2", 2, None),
    ],
)
def test_all_processes_project_as_many_positions(mended, monkeypatch, flags, asked, alone, of_two):
    """Alone, a batch with a sequence that has more may make its own program wider."""
    masking = {"mask_prob": 0.15, "mask_multiple_length": 1, "mask_whole_words": False, "mask_stdev": 0.0}
    task = SimpleNamespace(mask_idx=4, cfg=SimpleNamespace(**masking | flags), source_dictionary=Dictionary())
    assert patches._shape(task, (16, 16), 2, asked).masked == alone
    monkeypatch.setattr(xr, "world_size", lambda: 2)
    assert patches._shape(task, (16, 16), 2, asked).masked == of_two


# -- nothing that waits, and nothing that is compiled anew --


def executions() -> int:
    data = met.metric_data("ExecuteTime")
    return data[0] if data is not None else 0


def test_sums_of_sample_sizes_are_not_waited_for(mended, monkeypatch):
    assert "(sample_size or 1.0)" in inspect.getsource(Trainer.train_step), "perhaps no longer needed"
    size = torch.ones((), device=device()) * 3
    monkeypatch.setattr(
        Trainer, "_aggregate_logging_outputs", lambda self, logs, *sums, ignore=False: (logs, list(sums))
    )

    def divide() -> int:
        """The programs that were executed to divide by the sum."""
        _, [total, _] = Trainer._aggregate_logging_outputs(SimpleNamespace(), [], size + 1, 0)
        before = executions()
        2 / (total or 1.0)
        return executions() - before

    assert divide() > 0, "no longer needed: sum_sample_sizes_on_the_device"
    mended(patches.sum_sample_sizes_on_the_device, Trainer, "_aggregate_logging_outputs")
    assert divide() == 0


def test_only_the_sum_of_sample_sizes_is_a_count(mended, monkeypatch):
    """What is logged goes into meters and so into checkpoints, which hold no classes."""
    mended(patches.sum_sample_sizes_on_the_device, Trainer, "_aggregate_logging_outputs")
    monkeypatch.setattr(distributed_utils, "all_reduce", lambda tensor, group: tensor)
    trainer = SimpleNamespace(device=device(), data_parallel_process_group=None, get_criterion=lambda: None)
    trainer._fast_stat_sync_sum = functools.partial(Trainer._fast_stat_sync_sum, trainer)
    trainer.task = type("Task", (), {"logging_outputs_can_be_summed": staticmethod(lambda criterion: True)})()
    size = criterions.count(torch.ones((), device=device()) * 3)
    [log], [total, _] = Trainer._aggregate_logging_outputs(trainer, [{"loss": size.as_subclass(torch.Tensor)}], size, 0)
    assert type(total) is criterions.Count
    assert float(total) == 3
    assert type(log["loss"]) is torch.Tensor
    assert float(log["loss"]) == 3


def logged(clip_norm: float = 1.0) -> dict[str, Any]:
    """What is in the meters after an update whose gradients had a norm of 2."""
    task = SimpleNamespace(reduce_metrics=lambda logs, criterion: metrics.log_scalar("loss", 1.0))
    cfg = SimpleNamespace(optimization=SimpleNamespace(clip_norm=clip_norm))
    trainer = SimpleNamespace(cfg=cfg, task=task, tpu=True, get_criterion=lambda: None)
    with metrics.aggregate(new_root=True) as meters:
        Trainer._reduce_and_log_stats(trainer, [], 1, torch.ones((), device=device()) * 2)
        return {name: meters[name].sum for name in ("gnorm", "clip")}


def test_meters_hold_numbers_of_the_host(mended):
    assert {value.device.type for value in logged().values()} == {"xla"}, "no longer needed: log_numbers_of_the_host"
    mended(patches.log_numbers_of_the_host, Trainer, "_reduce_and_log_stats")
    found = logged()
    assert {value.device.type for value in found.values()} == {"cpu"}
    assert {name: float(value) for name, value in found.items()} == {"gnorm": 2, "clip": 100}


def test_late_compilations_are_told_of_with_their_shape_and_early_ones_not(mended, monkeypatch, caplog):
    def train_step(trainer: Any, samples: list[dict[str, torch.Tensor]]) -> str:
        samples[0]["src_tokens"].sum().item()
        Trainer._check_xla_compilation(trainer)
        return "logs"

    monkeypatch.setattr(Trainer, "train_step", train_step)
    rank = SimpleNamespace(distributed_training=SimpleNamespace(distributed_rank=0))
    trainer = SimpleNamespace(cfg=rank, _num_xla_compiles=0)

    def updates(*lengths: int) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            for length in lengths:
                tokens = torch.ones(3, length, device=device())
                assert Trainer.train_step(trainer, [{"src_tokens": tokens}]) == "logs"
        return [record.getMessage() for record in caplog.records]

    early = [61] * (WARM_UP + 1)
    assert updates(*early), "no longer needed: upstream is silent of the first one"
    mended(patches.watch_compilations, Trainer, "train_step", Trainer, "_check_xla_compilation")
    assert not updates(62, *early[1:])
    [message] = updates(63, 63, 62)
    assert "src_tokens 3x63" in message


class SavingTrainer(Trainer):
    """A trainer of which only what it saves is left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, spmd: bool, host: int) -> None:
        section = SimpleNamespace(base_layers=0, no_save_optimizer_state=True)
        self.cfg = SimpleNamespace(model=section, checkpoint=section)
        monkeypatch.setattr(Trainer, "is_fsdp", False)
        monkeypatch.setattr(Trainer, "is_data_parallel_master", True)
        monkeypatch.setattr(xr, "is_spmd", lambda: spmd)
        monkeypatch.setattr(xr, "process_index", lambda: host)
        monkeypatch.setattr(xr, "process_count", lambda: 2)


def test_one_host_of_a_pod_saves_and_all_fetch_what_it_saves(mended, monkeypatch):
    fetched: list[dict[str, Any]] = []
    monkeypatch.setattr(utils, "move_to_cpu", lambda state: fetched.append(state) or "on the host")
    monkeypatch.setattr(Trainer, "state_dict", lambda self: "on the device")
    assert SavingTrainer(monkeypatch, True, 1).should_save_checkpoint_on_current_rank, (
        "no longer needed: one_host_saves"
    )
    mended(
        patches.one_host_saves,
        *(Trainer, "should_save_checkpoint_on_current_rank"),
        *(Trainer, "consolidate_optimizer", Trainer, "state_dict"),
    )

    def saves(spmd: bool, host: int) -> bool:
        fetched.clear()
        trainer = SavingTrainer(monkeypatch, spmd, host)
        trainer.consolidate_optimizer()
        return trainer.should_save_checkpoint_on_current_rank

    for host in (1, 0):
        assert saves(True, host) == (host == 0)
        assert fetched == ["on the device"]
    trainer = SavingTrainer(monkeypatch, True, 0)
    assert [trainer.state_dict(), trainer.state_dict()] == ["on the host", "on the device"]
    assert saves(False, 1)  # with a process for each device, fairseq knows its rank
    assert not fetched
    monkeypatch.setattr(Trainer, "is_data_parallel_master", False)
    assert not SavingTrainer.should_save_checkpoint_on_current_rank.fget(trainer)


def test_bf16_weights_are_saved_as_floats_without_a_program(mended):
    weights = {"weight": torch.rand(3, 41, device=device()).bfloat16(), "step": [torch.ones(2, dtype=torch.int64)]}
    torch_xla.sync()

    def executions_of_saving() -> int:
        before = executions()
        saved = utils.move_to_cpu(weights)
        assert saved["weight"].dtype == torch.float32
        assert saved["weight"].device.type == "cpu"
        assert torch.equal(saved["weight"], weights["weight"].cpu().float())
        assert saved["step"][0].dtype == torch.int64
        return executions() - before

    assert executions_of_saving() > 0, "no longer needed: halves_become_floats_on_the_host"
    mended(patches.halves_become_floats_on_the_host, utils, "move_to_cpu")
    assert executions_of_saving() == 0


# -- gradient checkpointing --


class Layers(nn.Module):
    """Two layers of fairseq's."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        encoder = SimpleNamespace(
            embed_dim=8,
            attention_heads=2,
            ffn_embed_dim=16,
            normalize_before=True,
            layers_to_keep=None,
            xformers_att_config=None,
        )
        cfg = SimpleNamespace(
            encoder=encoder,
            dropout=dropout,
            attention_dropout=dropout,
            activation_dropout=0.0,
            relu_dropout=0.0,
            activation_fn="gelu",
            export=False,
            quant_noise=SimpleNamespace(pq=0, pq_block_size=8),
        )
        self.layers = nn.ModuleList(TransformerEncoderLayerBase(cfg) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, encoder_padding_mask=None)
        return x


def backward(change: Any, dropout: float = 0.0) -> list[torch.Tensor]:
    """The gradients of two layers that `change` was done to."""
    torch.manual_seed(1)
    module = Layers(dropout)
    change(module)
    module.to(device())
    x = torch.randn(3, 2, 8).to(device())
    torch_xla.sync()
    xm.set_rng_state(5)
    module(x.requires_grad_()).pow(2).sum().backward()
    return [parameter.grad for parameter in module.parameters()]


def operations(change: Any) -> Counter[str]:
    """How often each operation is in the program of these gradients."""
    program = torch_xla._XLAC._get_xla_tensors_hlo(backward(change))
    return Counter(re.findall(r" = \S+ ([a-z-]+)\(", program) + re.findall(r" (opt-barrier)\(", program))


def nothing(module: nn.Module) -> None:
    pass


def test_layers_are_computed_again_behind_a_barrier():
    whole = operations(nothing)
    fairseqs = operations(lambda module: [checkpoint_wrapper(layer) for layer in module.layers])
    assert whole["opt-barrier"] == 0
    assert fairseqs["opt-barrier"] == 0, "perhaps no longer needed: fairseq's own checkpoint_wrapper will do"

    def apply(module: nn.Module) -> None:
        assert rematerialization.recompute_layers(module) == 2

    ours = operations(apply)
    assert ours["opt-barrier"] >= 2
    assert ours["dot"] > whole["dot"] > 0


def test_a_trainer_is_given_a_model_that_is_computed_again(mended, monkeypatch):
    given: list[nn.Module] = []
    monkeypatch.setattr(Trainer, "__init__", lambda self, cfg, task, model, *args: given.append(model))
    module = Layers(0.0)
    names = list(module.state_dict())
    mended(patches.checkpoint_activations, Trainer, "__init__")
    Trainer(None, None, module, None)
    [model] = given
    assert all(isinstance(layer.forward, functools.partial) for layer in model.layers)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_computed_again_the_gradients_are_the_same(dropout):
    """With dropout too: the same elements are dropped the second time."""
    expected = torch_xla._XLAC._xla_get_cpu_tensors(backward(nothing, dropout))
    gradients = torch_xla._XLAC._xla_get_cpu_tensors(backward(rematerialization.recompute_layers, dropout))
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


class Numbered(MaskedSentences):
    """Each of its own word."""

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.full((int(self.sizes[i]),), 4 + i)


def test_each_host_of_a_pod_takes_its_own_batches(mended, monkeypatch):
    monkeypatch.setattr(xr, "is_spmd", lambda: True)
    monkeypatch.setattr(xr, "process_count", lambda: 2)
    mended(lambda: patches.one_shape_for_all_batches("auto"), FairseqTask, "get_batch_iterator")
    taken: list[list[int]] = []
    for host in (0, 1):
        monkeypatch.setattr(xr, "process_index", lambda host=host: host)
        batches = Task(Namespace()).get_batch_iterator(Numbered(), max_sentences=4, num_workers=0)
        found = list(batches.next_epoch_itr(shuffle=False))
        assert len(found) == 2  # of three, and a stand-in
        taken.append([int(i) for each in found for i in each["net_input"]["src_tokens"][each["real"], 0]])
    assert sorted(taken[0] + taken[1]) == list(range(4, 14))
    assert taken[0]
    assert taken[1]


def test_sentences_that_are_left_out_make_no_batch_longer(mended):
    mended(lambda: patches.one_shape_for_all_batches("auto"), FairseqTask, "get_batch_iterator")
    batches = Task(Namespace()).get_batch_iterator(
        Sentences(), max_sentences=4, max_positions=4, ignore_invalid_inputs=True, num_workers=0
    )
    shapes = {tuple(batch["net_input"]["src_tokens"].shape) for batch in batches.next_epoch_itr(shuffle=False)}
    assert shapes == {(4, 4)}


class Kept(Sentences):
    """Whose iterator is, as those of fairseq's tasks are."""

    can_reuse_epoch_itr_across_epochs = True


def test_batches_that_are_handed_out_again_are_padded_once(mended):
    """fairseq keeps the iterator of validation; padded twice, the rows that fill up would count."""
    mended(lambda: patches.one_shape_for_all_batches("auto"), FairseqTask, "get_batch_iterator")
    task, dataset = Task(Namespace()), Kept()
    for _ in range(2):
        batches = task.get_batch_iterator(dataset, max_sentences=4, num_workers=0)
        assert sum(int(batch["real"].sum()) for batch in batches.next_epoch_itr(shuffle=False)) == len(dataset)


def test_regression_of_padded_batches(mended):
    flags = dict.fromkeys(("report_mcc", "report_acc_and_f1", "report_pearson_and_spearman"), False)
    cfg = SimpleNamespace(classification_head_name="sentence_classification_head", regression_target=True, **flags)
    criterion = SentencePredictionCriterion(cfg, task_of_criterion())
    model = Encoder(classes=1)
    batch: dict[str, Any] = masked_batch() | {"target": torch.tensor([0.5, 3.0, -1.0])}
    padded = pad_batch(batch, Shape(5, 6, 6, PAD))
    expected = numbers(criterion(model, batch))
    mended(patches.losses_of_padded_batches, MaskedLmLoss, "forward", SentencePredictionCriterion, "forward")
    assert numbers(criterion(model, padded)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_of_either_kind_are_saved_as_floats(mended, dtype):
    mended(patches.halves_become_floats_on_the_host, utils, "move_to_cpu")
    assert utils.move_to_cpu({"weight": torch.ones(2, dtype=dtype)})["weight"].dtype == torch.float32
