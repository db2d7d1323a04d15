"""The places where fairseq 0.12.3.1 on torch-xla 2.9 must be mended, one function each.

`tests/xla/test_patches.py` says when one of them is no longer needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr
from fairseq import models, utils
from fairseq.criterions.masked_lm import MaskedLmLoss
from fairseq.criterions.sentence_prediction import SentencePredictionCriterion
from fairseq.data.iterators import CountingIterator
from fairseq.tasks import FairseqTask
from fairseq.trainer import Trainer, _catalog_shared_params, _get_module_by_path, _set_module_by_path

from xla import criterions
from xla.batches import Shape, hollow, longest, most_masked, padded_collater
from xla.compilations import Watch
from xla.rematerialization import recompute_layers
from xla.spmd import to_device


@dataclass(frozen=True)
class Options:
    """The launcher's own flags."""

    mode: str
    projected_positions: str
    checkpoint_activations: bool


def apply(options: Options) -> None:
    """Mend everything, before the plugin is imported, which listens to what is mended here."""
    memory_in_kilobytes()
    names_of_ranks()
    meet_nobody_alone()
    move_batches_in_their_order()
    keep_weights_tied()
    one_shape_for_all_batches(options.projected_positions)
    losses_of_padded_batches()
    sum_sample_sizes_on_the_device()
    log_numbers_of_the_host()
    watch_compilations()
    one_host_saves()
    halves_become_floats_on_the_host()
    if options.checkpoint_activations:
        checkpoint_activations()


def memory_in_kilobytes() -> None:
    """Mends `Trainer.train_step` (fairseq/trainer.py:1067, 0.12.3.1), which reads kb_free and kb_total of
    `xm.get_memory_info`; torch-xla 2 counts in bytes, and knows nothing of a CPU, whose memory is the machine's."""
    upstream = xm.get_memory_info

    @functools.wraps(upstream)
    def get_memory_info(device: Any = None) -> dict[str, int]:
        if xr.device_type() == "CPU":
            memory = psutil.virtual_memory()
            info = {"bytes_limit": memory.total, "bytes_used": memory.total - memory.available}
        else:
            info = dict(upstream(device))
        free = info["bytes_limit"] - info["bytes_used"]
        return {**info, "kb_free": free // 1024, "kb_total": info["bytes_limit"] // 1024}

    xm.get_memory_info = get_memory_info


def names_of_ranks() -> None:
    """Mends `distributed_init` and the ranks and world sizes (fairseq/distributed/utils.py:310-314, 469, 478,
    0.12.3.1), which call functions that torch-xla has moved to its `runtime`."""
    xm.xrt_world_size = lambda: xr.world_size()
    xm.get_ordinal = lambda: xr.global_ordinal()


def meet_nobody_alone() -> None:
    """Mends `xm.rendezvous` (torch_xla/core/xla_model.py:1362, 2.9.0), which fairseq calls before every validation
    batch (fairseq/trainer.py:1136, 0.12.3.1): the only process waits for its device there, and logs it."""
    upstream = xm.rendezvous

    @functools.wraps(upstream)
    def rendezvous(tag: str, payload: bytes = b"", replicas: Any = ()) -> list[bytes]:
        return [payload] if xr.world_size() == 1 else upstream(tag, payload, list(replicas))

    xm.rendezvous = rendezvous


def move_batches_in_their_order() -> None:
    """Mends `tpu_data_loader` (fairseq/utils.py:716, 0.12.3.1). It reads `itr.n` when the loader's thread has begun to
    draw from `itr`, so batches are lost at the end of an epoch, and the thread runs ahead of the position that a
    checkpoint stores, so a resume skips some. Here every batch is moved when it is asked for; torch-xla's copy to the
    device does not wait."""

    def tpu_data_loader(itr: Any) -> CountingIterator:
        start, total = getattr(itr, "n", 0), len(itr)
        return CountingIterator(map(to_device, itr), start=start, total=total)

    utils.tpu_data_loader = tpu_data_loader


def keep_weights_tied() -> None:
    """Mends `DistributedFairseqModel` (fairseq/models/distributed_fairseq_model.py:52, 0.12.3.1), which moves the model
    to the device: there tied weights (the embeddings and the head) become two. `Trainer.__init__` (trainer.py:113) ties
    them again only where there is one replica."""
    upstream = models.DistributedFairseqModel

    @functools.wraps(upstream)
    def distributed_model(args: Any, model: Any, process_group: Any, device: Any) -> Any:
        tied = _catalog_shared_params(model)
        wrapped = upstream(args, model, process_group=process_group, device=device)
        for first, *others in tied:
            for path in others:
                _set_module_by_path(model, path, _get_module_by_path(model, first))
        return wrapped

    models.DistributedFairseqModel = distributed_model


def one_shape_for_all_batches(projected_positions: str) -> None:
    """Pads every batch to the size of the largest: listens at `FairseqTask.get_batch_iterator`
    (fairseq/tasks/fairseq_task.py:208, 0.12.3.1), which every loader of batches is made by.

    Under SPMD on a pod, where fairseq knows of one worker, each host takes its share of the batches. Where there are
    several processes, one that has run out of batches goes on with stand-ins, which count nothing: all must execute
    the same programs. fairseq's own are batches that it takes out of the gradients again
    (`Trainer._prepare_sample`, fairseq/trainer.py:1290), and with them all that they were accumulated with.
    """
    upstream = FairseqTask.get_batch_iterator

    @functools.wraps(upstream)
    def get_batch_iterator(self: FairseqTask, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        if _several_hosts():
            kwargs |= {"num_shards": xr.process_count(), "shard_id": xr.process_index()}
        # All batches are padded, so a last one that is not a multiple of eight need not be dropped.
        kwargs["required_batch_size_multiple"] = 1
        batches = upstream(self, dataset, *args, **kwargs)
        if not _is_padded(batches.collate_fn):
            limits = kwargs.get("max_positions")
            shape = _shape(self, longest(dataset.sizes, limits), kwargs["max_sentences"], projected_positions)
            batches.collate_fn = functools.partial(padded_collater, batches.collate_fn, shape, None)
            if _several_processes() and len(batches.frozen_batches):
                stand_in = hollow(batches.first_batch)
                collate, shape, _ = batches.collate_fn.args
                batches.collate_fn = functools.partial(padded_collater, collate, shape, stand_in)
        return batches

    FairseqTask.get_batch_iterator = get_batch_iterator


def _several_hosts() -> bool:
    """Whether this is one host of several that are one worker, by SPMD."""
    return bool(xr.is_spmd() and xr.process_count() > 1)


def _several_processes() -> bool:
    return _several_hosts() or xr.world_size() > 1


def _is_padded(collate: Callable[..., Any]) -> bool:
    return isinstance(collate, functools.partial) and collate.func is padded_collater


def _shape(task: FairseqTask, lengths: tuple[int, int], rows: int, projected_positions: str) -> Shape:
    source, target = lengths
    masked = None
    if hasattr(task, "mask_idx") and projected_positions != "all":
        masked = _projected(task.cfg, source, projected_positions)
    return Shape(rows, source, target, task.source_dictionary.pad(), masked)


def _projected(cfg: Any, length: int, projected_positions: str) -> int | None:
    """How many positions of each sequence to project at first, None for all.

    A batch with a sequence that has more masked tokens projects more of each. Processes that must execute the same
    programs cannot do that, so they begin with as many as there can be.
    """
    most = most_masked(length, cfg.mask_prob, cfg.mask_multiple_length)
    number = most if projected_positions == "auto" else min(int(projected_positions), length)
    if not _several_processes():
        return number
    return None if cfg.mask_whole_words or cfg.mask_stdev > 0 else max(number, most)


def losses_of_padded_batches() -> None:
    """Mends `MaskedLmLoss.forward` and `SentencePredictionCriterion.forward`; see `xla.criterions`."""
    MaskedLmLoss.forward = criterions.masked_lm_loss
    SentencePredictionCriterion.forward = criterions.sentence_prediction_loss


def sum_sample_sizes_on_the_device() -> None:
    """Listens at `Trainer._aggregate_logging_outputs` (fairseq/trainer.py:1399, 0.12.3.1), whose sum over workers is on
    the device: `train_step` is not to wait for it; see `xla.criterions.Count`."""
    upstream = Trainer._aggregate_logging_outputs

    @functools.wraps(upstream)
    def aggregate(self: Trainer, logging_outputs: Any, sample_size: Any, *others: Any, ignore: bool = False) -> Any:
        if isinstance(sample_size, criterions.Count):
            # Upstream sums it in one tensor with all that is logged, which would become counts, and be saved as such.
            sample_size = sample_size.as_subclass(torch.Tensor)
        logs, sums = upstream(self, logging_outputs, sample_size, *others, ignore=ignore)
        if torch.is_tensor(sums[0]):
            sums = [criterions.count(sums[0]), *sums[1:]]
        return logs, sums

    Trainer._aggregate_logging_outputs = aggregate


def log_numbers_of_the_host() -> None:
    """Mends `Trainer._reduce_and_log_stats` (fairseq/trainer.py:1521, 0.12.3.1), which puts the norm of the gradients
    into meters as it is, on the device: their sums become part of the next update, whose program is then a new one."""
    upstream = Trainer._reduce_and_log_stats

    @functools.wraps(upstream)
    def reduce_and_log_stats(self: Trainer, logging_outputs: Any, sample_size: Any, grad_norm: Any = None) -> Any:
        return upstream(self, logging_outputs, sample_size, utils.xla_device_to_cpu(grad_norm))

    Trainer._reduce_and_log_stats = reduce_and_log_stats


def watch_compilations() -> None:
    """Warns of compilations in mid-training, with the shape that caused them. Replaces `Trainer._check_xla_compilation`
    (fairseq/trainer.py:1565, 0.12.3.1), which tells of every one, validation's too, and not what it was for."""
    upstream = Trainer.train_step
    watch = Watch()

    @functools.wraps(upstream)
    def train_step(self: Trainer, samples: Any, *args: Any, **kwargs: Any) -> Any:
        watch.begin_update()
        result = upstream(self, samples, *args, **kwargs)
        watch.end_update(samples)
        return result

    Trainer.train_step = train_step
    Trainer._check_xla_compilation = lambda self: None


def one_host_saves() -> None:
    """Mends `Trainer.should_save_checkpoint_on_current_rank` (fairseq/trainer.py:211, 0.12.3.1): under SPMD on a pod
    every host takes itself for the only worker, and all would write the same file.

    All of them fetch from the devices what one of them writes, in `Trainer.consolidate_optimizer` (trainer.py:382),
    which every worker calls before it is saved: what XLA has left on several hosts is brought together by a program.
    """
    should_save = Trainer.should_save_checkpoint_on_current_rank.fget
    consolidate, state_dict = Trainer.consolidate_optimizer, Trainer.state_dict
    fetched: list[dict[str, Any]] = []

    @functools.wraps(should_save)
    def host_should_save(self: Trainer) -> bool:
        return bool(should_save(self)) and not (xr.is_spmd() and xr.process_index() > 0)

    @functools.wraps(consolidate)
    def consolidate_optimizer(self: Trainer) -> None:
        consolidate(self)
        if _several_hosts():
            state = utils.move_to_cpu(state_dict(self))
            fetched[:] = [state] if self.should_save_checkpoint_on_current_rank else []

    @functools.wraps(state_dict)
    def fetched_state_dict(self: Trainer) -> dict[str, Any]:
        return fetched.pop() if fetched else state_dict(self)

    Trainer.should_save_checkpoint_on_current_rank = property(host_should_save)
    Trainer.consolidate_optimizer = consolidate_optimizer
    Trainer.state_dict = fetched_state_dict


def halves_become_floats_on_the_host() -> None:
    """Mends `move_to_cpu` (fairseq/utils.py:118, 0.12.3.1), by which a run in bf16 is saved: it makes floats of the
    weights before it fetches them, which is a program to compile for every shape of weight."""

    def to_cpu(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.cpu()
        return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor

    utils.move_to_cpu = functools.partial(utils.apply_to_sample, to_cpu)


def checkpoint_activations() -> None:
    """Listens at `Trainer.__init__` (fairseq/trainer.py:46, 0.12.3.1): RobertaModel has no --checkpoint-activations,
    and fairseq's way of doing it is undone by XLA; see `xla.rematerialization`."""
    upstream = Trainer.__init__

    @functools.wraps(upstream)
    def init(self: Trainer, cfg: Any, task: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        recompute_layers(model)
        upstream(self, cfg, task, model, *args, **kwargs)

    Trainer.__init__ = init
