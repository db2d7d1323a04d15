"""Section 4.3 of the paper in one fairseq run: measure, prune, finetune until that is made up for, save, next level.

`Ladder` is mixed in before one of fairseq's tasks. It lives in two places of fairseq's loop: before the first forward
of a run it measures the finetuned model and prunes it to the first level; after every optimizer step it sets the pruned
weights to zero again and, every so often, measures. A level ends when the score has come back or its epochs are over.
Then what has just been measured is saved as checkpoint_sparsity_{15,30,...}.pt, and the next level begins.
"""

# Not `from __future__ import annotations`: fairseq makes flags of the types of a dataclass, and they must not be
# strings.

import contextlib
import itertools
import json
import logging
import math
import os
import random
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from fairseq import utils
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from fairseq.tasks import FairseqTask
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from fairseq_plugins.device import compute, is_lazy
from fairseq_plugins.run import (
    do_not_train,
    fail,
    root_config,
    stop_after_this_update,
    user_errors_end_the_run,
)
from train_large.compression.levels import level_name, parse_levels
from train_large.compression.pruning import SCOPES, prunable, smallest, sparsity_of
from train_large.compression.structures import (
    STRUCTURES,
    Block,
    blocks,
    highest_sparsity,
    magnitudes,
    smallest_structures,
    spread,
    structured_sparsity_of,
)
from train_large.files import whole, write_text

logger = logging.getLogger(__name__)

LOG = "ladder.jsonl"  # in the save dir: one line per level, the unpruned model first


@dataclass
class LadderConfig(FairseqDataclass):
    sparsity_levels: str = field(
        default="0.15,0.30,0.45,0.60,0.75,0.90",
        metadata={"help": "shares of the weights to prune, one level after the other"},
    )
    recovery: float = field(
        default=0.995,
        metadata={"help": "a level is done when its score comes to this share of the unpruned model's"},
    )
    recovery_epochs: float = field(
        default=1.0,
        metadata={"help": "or when it has been finetuned for this many epochs; 0 to prune without finetuning"},
    )
    recovery_interval: int = field(
        default=0,
        metadata={"help": "updates between two measurements of a level; 0 for a tenth of an epoch"},
    )
    prune_scope: ChoiceEnum(SCOPES) = field(  # type: ignore[valid-type]
        default="global",
        metadata={"help": "the smallest weights of the whole model, or of each matrix by itself"},
    )
    prune_structure: ChoiceEnum(STRUCTURES) = field(  # type: ignore[valid-type]
        default="weights",
        metadata={"help": "single weights, or whole attention heads, whole rows of the feed-forward networks, or both"},
    )
    prune_head: bool = field(default=False, metadata={"help": "prune the classification head too"})


@dataclass
class Progress:
    """How far a ladder has come: all that a resume needs, in plain values, for it is part of every checkpoint.

    The masks are not in it: pruning to the level in hand once more picks the weights, or structures, that are zero.
    """

    records: list[dict[str, Any]] = field(default_factory=list)  # the lines of ladder.jsonl
    sparsity: float = 0.0  # of the level in hand
    updates: int = 0  # spent on it
    seconds: float = 0.0  # since the level before it ended


class Ladder(FairseqTask):
    """Mixed in before a fairseq task whose configuration extends `LadderConfig`.

    `scores` says what quality is: the first of these meters that the criterion's `reduce_metrics` fills, and what it is
    called here. An accuracy counts as a share, BLEU as it is, and a loss (in fairseq's base 2) as exp(-loss in nats),
    the probability per token, which is the inverse of the perplexity: 99.5 % of it is a perplexity 0.5 % above the
    unpruned model's, or a loss 0.005 nats above.
    """

    scores: ClassVar[dict[str, str]]
    levels: tuple[float, ...]
    root: Any  # the configuration of the run; None when a checkpoint is only evaluated
    progress: Progress
    _masked: list[tuple[Tensor, Tensor]] | None  # tensors to keep sparse, and what to multiply each with
    _metric: str
    _batches_per_epoch: int

    # -- what fairseq calls --

    @classmethod
    def setup_task(cls, cfg: DictConfig, **kwargs: Any) -> Any:
        with user_errors_end_the_run():
            levels = parse_levels(cfg.sparsity_levels)
        if not cfg.recovery > 0:
            fail(f"--recovery {cfg.recovery:g} must be above 0: a share of the unpruned model's score, such as 0.995.")
        if not 0 <= cfg.recovery_epochs < math.inf:
            fail(f"--recovery-epochs {cfg.recovery_epochs:g} must be 0 or more.")
        if cfg.recovery_interval < 0:
            fail(f"--recovery-interval {cfg.recovery_interval} must be some updates, or 0 for a tenth of an epoch.")
        if cfg.prune_head and cfg.prune_structure != "weights":
            fail(
                f"--prune-head prunes weights of the classification head, --prune-structure {cfg.prune_structure} "
                "whole structures of the layers: give one of them."
            )
        root = root_config(cfg)
        if root is not None:
            _refuse_partial_models(root)
        task = super().setup_task(cfg, **kwargs)
        task.levels = levels
        task.root = root
        task.progress = Progress()
        task._masked = None
        task._began = time.monotonic()
        task._epoch = 1
        return task

    def get_batch_iterator(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        batches = super().get_batch_iterator(dataset, *args, **kwargs)
        if self.root is not None and dataset is self.datasets.get(self.root.dataset.train_subset):
            self._batches_per_epoch = len(batches)
        return batches

    def begin_epoch(self, epoch: int, model: Any) -> None:
        super().begin_epoch(epoch, model)
        self._epoch = epoch

    def train_step(
        self, sample: Any, model: Any, criterion: Any, optimizer: Any, update_num: int, **kwargs: Any
    ) -> Any:
        if self._masked is None:
            self._masked = []
            self._model, self._criterion, self._optimizer = model, criterion, optimizer
            self._start(update_num)
        return super().train_step(sample, model, criterion, optimizer, update_num, **kwargs)

    def optimizer_step(self, optimizer: Any, model: Any, update_num: int) -> None:
        super().optimizer_step(optimizer, model, update_num)
        self._keep_zero()
        if not self._levels_to_come():
            return
        self.progress.updates += 1
        if self.progress.updates % self._interval() == 0 or self.progress.updates >= self._limit():
            score = self._measure()
            if self._is_over(score):
                self._end_level(score, update_num + 1)
                self._climb(update_num + 1)

    def get_checkpoint_dict(self) -> dict[str, Any]:
        """What `save_checkpoint` (fairseq/checkpoint_utils.py:112, 0.12.3.1) puts beside the model."""
        self._count_seconds()
        return {type(self).__name__: asdict(self.progress)}

    def set_checkpoint_dict(self, state: dict[str, Any]) -> None:
        """fairseq calls this when a run is resumed, and not when one starts from another's model
        (checkpoint_utils.py:295)."""
        self.progress = Progress(**state)
        if not self._levels_to_come():
            logger.info(f"all of --sparsity-levels {self.cfg.sparsity_levels} are reached already: nothing to prune")
            do_not_train(self.root)

    # -- the ladder --

    def _start(self, update_num: int) -> None:
        """Before the first forward of this process."""
        self._began = time.monotonic()
        self._check_structures()
        if not self.progress.records:
            self._warn_of_random_weights()
            score = self._measure()
            if not math.isfinite(score):
                fail(f"the {self._metric} of the unpruned model is {score}: start from a model that works.")
            self._record(0.0, score, recovered=True)
            self._climb(update_num)
            return
        level = self._levels_to_come()[0]
        if level < self.progress.sparsity and hasattr(self._optimizer, "hold_at_zero"):
            fail(
                f"{self._path(LOG)}: this ladder is at sparsity {level_name(self.progress.sparsity)} %, above the next "
                f"of --sparsity-levels, {level_name(level)} %, and --optimizer fused_adam holds the pruned weights at "
                "zero: run with the same levels, or start again with another --save-dir."
            )
        if level == self.progress.sparsity:
            logger.info(f"going on at sparsity {level_name(level)} % after {self.progress.updates} updates")
            self._prune(level)
        else:
            self._climb(update_num)

    def _climb(self, update_num: int) -> None:
        """Prune to the next level, and to the one after it where that does no harm."""
        for level in self._levels_to_come():
            self._prune(level)
            self.progress.sparsity, self.progress.updates = level, 0
            score = self._measure()
            if not self._is_over(score):
                logger.info(f"sparsity {level_name(level)} %: {self._against_baseline(score)}: finetuning")
                return
            self._end_level(score, update_num)
        stop_after_this_update(self.root)

    def _levels_to_come(self) -> list[float]:
        """The level in hand first; none when the ladder is climbed."""
        reached = self.progress.records[-1]["sparsity"] if self.progress.records else 0.0
        return [level for level in self.levels if level > reached]

    def _is_over(self, score: float) -> bool:
        return self._is_recovered(score) or self.progress.updates >= self._limit()

    def _is_recovered(self, score: float) -> bool:
        return score >= self.cfg.recovery * self._baseline()

    def _baseline(self) -> float:
        first = self.progress.records[0]
        if first["metric"] != self._metric:
            fail(
                f"{self._path(LOG)}: the unpruned model was measured by {first['metric']}, this run measures "
                f"{self._metric}; run with the same flags, or start again with another --save-dir."
            )
        return first["score"]

    def _against_baseline(self, score: float) -> str:
        baseline = self._baseline()
        share = f" ({score / baseline:.2%} of {baseline:.4f})" if baseline else ""
        return f"{self._metric} {score:.4f}{share}"

    def _end_level(self, score: float, update_num: int) -> None:
        record = self._record(self.progress.sparsity, score, self._is_recovered(score))
        logger.info(
            f"sparsity {level_name(record['sparsity'])} %: {self._against_baseline(score)} after {record['updates']} "
            f"updates, {'recovered' if record['recovered'] else 'not recovered'}"
        )
        if self._is_master() and not self.root.checkpoint.no_save:
            path = self._path(f"checkpoint_sparsity_{level_name(record['sparsity'])}.pt")
            with user_errors_end_the_run(), whole(path) as aside:
                torch.save(self._checkpoint(record, update_num), aside)
            logger.info(f"saved {path}")

    def _record(self, sparsity: float, score: float, recovered: bool) -> dict[str, Any]:
        """Note that a level has been reached, and write the log anew: a level reached again after a kill stands in it
        once."""
        self._count_seconds()
        zeros, total = self._zeros()
        record = {
            "level": len(self.progress.records),
            "sparsity": sparsity,
            "structure": str(self.cfg.prune_structure),
            "zeros": zeros,
            "prunable": total,
            "metric": self._metric,
            "score": score,
            "baseline": self._baseline() if self.progress.records else score,
            "recovered": recovered,
            "updates": self.progress.updates,
            "seconds": self.progress.seconds,
        }
        self.progress.records.append(record)
        self.progress.seconds = 0.0
        if self._is_master():
            lines = "".join(json.dumps(line) + "\n" for line in self.progress.records)
            with user_errors_end_the_run():
                write_text(self._path(LOG), lines)
        return record

    def _count_seconds(self) -> None:
        now = time.monotonic()
        self.progress.seconds += now - self._began
        self._began = now

    def _updates_per_epoch(self) -> int:
        frequencies = self.root.optimization.update_freq
        frequency = frequencies[min(self._epoch, len(frequencies)) - 1]
        whole, rest = divmod(self._batches_per_epoch, frequency)
        return max(1, whole + (rest > 0 and not self.root.optimization.skip_remainder_batch))

    def _limit(self) -> int:
        """Updates that a level may take."""
        epochs = self.cfg.recovery_epochs
        return max(1, round(epochs * self._updates_per_epoch())) if epochs else 0

    def _interval(self) -> int:
        """Updates between two measurements."""
        return self.cfg.recovery_interval or math.ceil(self._updates_per_epoch() / 10)

    # -- weights --

    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def _weights(self) -> dict[str, Tensor]:
        """The weights to look at: on a lazy device a copy, since sorting and counting there means compiling."""
        weights = dict(_inner(self._model).named_parameters())
        if not is_lazy(self._device()):
            return weights
        compute(self._device())
        return _on_cpu({name: weight.detach() for name, weight in weights.items()})

    def _prunable(self) -> dict[str, Tensor]:
        return prunable(self._weights(), self.cfg.prune_head)

    def _structured(self) -> bool:
        return self.cfg.prune_structure != "weights"

    def _blocks(self) -> list[Block]:
        """What structures are pruned of; empty where single weights are."""
        if not self._structured():
            return []
        model = _inner(self._model)
        heads = {name: module.num_heads for name, module in model.named_modules() if hasattr(module, "num_heads")}
        return blocks(self._weights(), heads, str(self.cfg.prune_structure))

    def _zeros(self) -> tuple[int, int]:
        """How many of the weights that may go are gone, and how many there are."""
        return structured_sparsity_of(self._blocks()) if self._structured() else sparsity_of(self._prunable())

    def _smallest(self, sparsity: float) -> dict[str, Tensor]:
        """Masks of what goes at `sparsity`, by the parameters' names."""
        if not self._structured():
            return smallest(self._prunable(), sparsity, self.cfg.prune_scope)
        found = self._blocks()
        return spread(found, smallest_structures(found, sparsity, self.cfg.prune_scope))

    def _check_structures(self) -> None:
        """End the run where the structures cannot be pruned as asked, before time is spent."""
        asked = str(self.cfg.prune_structure)
        begun = self.progress.records[0].get("structure", "weights") if self.progress.records else asked
        if begun != asked:
            fail(
                f"{self._path(LOG)}: this ladder was begun with --prune-structure {begun}, not {asked}; "
                "run with the same flags, or start again with another --save-dir."
            )
        if not self._structured():
            return
        found = self._blocks()
        top = highest_sparsity(found)
        if not top:
            fail(
                f"--prune-structure {asked}: no layer of this model has more than one to prune, and one stays in each; "
                "take another --prune-structure."
            )
        total = sum(block.size * block.count for block in found)
        # A level between two numbers of structures is met from below; one with room for another structure is not met.
        too_much = round(top * total) + min(block.size for block in found)
        if self.cfg.prune_scope == "global" and round(self.levels[-1] * total) >= too_much:
            fail(
                f"--sparsity-levels {self.cfg.sparsity_levels}: --prune-structure {asked} can prune "
                f"{math.floor(1000 * top) / 10:g} % of this model's at most, since one stays in each layer; "
                "leave out the levels above that."
            )

    @torch.no_grad()
    def _prune(self, sparsity: float) -> None:
        zeros, total = self._zeros()
        if zeros > round(sparsity * total):
            logger.warning(f"the model has {zeros / total:.2%} zeros already: more than {level_name(sparsity)} %")
        pruned = self._smallest(sparsity)
        weights = dict(_inner(self._model).named_parameters())
        masters = dict(_masters(self._optimizer))
        hold_at_zero = getattr(self._optimizer, "hold_at_zero", None)  # --optimizer fused_adam
        self._masked = []
        for name, gone in pruned.items():
            weight = weights[name]
            gone = gone.to(weight.device)
            if hold_at_zero is not None and hold_at_zero(weight, gone):
                continue
            for tensor in (weight.data, *([masters[weight]] if weight in masters else [])):
                tensor.masked_fill_(gone, 0)
                kept = ~gone
                # On a CPU a product with the same type takes a sixth of the time of one with bool; elsewhere memory is
                # what counts.
                self._masked.append((tensor, kept.to(tensor.dtype) if tensor.device.type == "cpu" else kept))
        if self._structured():
            logger.info(f"sparsity {level_name(sparsity)} %: {_left(self._blocks())} left")

    @torch.no_grad()
    def _keep_zero(self) -> None:
        """Momentum moves pruned weights too: put them back, in the model and in the optimizer's own copy. None are
        left to put back where the optimizer holds them itself."""
        if self._masked:
            tensors, kept = zip(*self._masked, strict=True)
            torch._foreach_mul_(tensors, kept)

    # -- measuring --

    def _measure(self) -> float:
        """The score of the model as it is on the first of --valid-subset, the same on every worker."""
        model, criterion = self._model, self._criterion
        compute(self._device())  # an update in hand is not part of what is measured
        was_training = model.training, criterion.training
        model.eval()
        criterion.eval()  # this stops the clock of a budget, too
        with _unchanged_random_state(), torch.no_grad():
            utils.set_torch_seed(self.root.dataset.fixed_validation_seed or self.root.common.seed)
            logging_outputs = self._over_workers([self._valid_log(*batch) for batch in self._valid_batches()])
        with metrics.aggregate(new_root=True) as meters:
            self.reduce_metrics(logging_outputs, _inner(criterion))
        model.train(was_training[0])
        criterion.train(was_training[1])
        meter = next((name for name in self.scores if name in meters), None)
        if meter is None:
            fail(f"--criterion {self.root.criterion._name} gives no {' or '.join(self.scores)} to measure by.")
        self._metric = self.scores[meter]
        value = float(getattr(meters[meter], "avg", 0.0) if meter != "bleu" else meters.get_smoothed_value(meter))
        if meter == "accuracy":
            return value / 100  # fairseq's is in per cent
        return value if meter == "bleu" else 2.0**-value

    def _valid_batches(self) -> Iterator[tuple[Any, bool]]:
        """What `Trainer.get_valid_iterator` gives (fairseq/trainer.py:739, 0.12.3.1): batches, and whether each is only
        a stand-in.

        Every worker gets as many; one that has run out repeats the first batch, for the sake of collectives within the
        model.
        """
        data, workers = self.root.dataset, self._workers()
        subset = data.valid_subset.split(",")[0]
        if subset not in self.datasets:  # --disable-validation
            self.load_dataset(subset, combine=data.combine_valid_subsets or False, epoch=1)
        epoch_batches = self.get_batch_iterator(
            dataset=self.dataset(subset),
            max_tokens=data.max_tokens_valid,
            max_sentences=data.batch_size_valid,
            max_positions=utils.resolve_max_positions(self.max_positions(), _inner(self._model).max_positions()),
            ignore_invalid_inputs=data.skip_invalid_size_inputs_valid_test,
            required_batch_size_multiple=data.required_batch_size_multiple,
            seed=self.root.common.seed,
            num_shards=workers,
            shard_id=distributed_utils.get_data_parallel_rank() if workers > 1 else 0,
            num_workers=data.num_workers,
            epoch=1,
            data_buffer_size=data.data_buffer_size,
        )
        # fairseq's own validation stops after one batch more than it is told to (fairseq_cli/train.py:497).
        stop = data.max_valid_steps + 1 if data.max_valid_steps is not None else None
        batches = epoch_batches.next_epoch_itr(shuffle=False, set_dataset_epoch=False)
        if self.root.common.tpu:
            batches = utils.tpu_data_loader(batches)
        for batch in itertools.islice(batches, stop):
            yield (batch, False) if batch else (epoch_batches.first_batch, True)

    def _valid_log(self, batch: Any, is_stand_in: bool) -> dict[str, Any]:
        """The logging output of one batch; a stand-in counts nothing."""
        like = next(self._model.parameters())

        def to_model(tensor: Tensor) -> Tensor:
            return tensor.to(like.device, like.dtype if tensor.dtype == torch.float32 else tensor.dtype)

        _, _, log = self.valid_step(utils.apply_to_sample(to_model, batch), self._model, self._criterion)
        compute(like.device)
        if is_stand_in:
            return {name: value * 0 for name, value in log.items() if _is_number(value)}
        return log

    def _over_workers(self, logging_outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What all workers have logged, so that all come to the same decision."""
        if self._workers() == 1:
            return logging_outputs
        if not self.logging_outputs_can_be_summed(_inner(self._criterion)):
            fail(f"--criterion {self.root.criterion._name} cannot be summed over workers: prune in one process.")
        names = sorted(name for name, value in logging_outputs[0].items() if _is_number(value))
        sums = torch.tensor([float(sum(log[name] for log in logging_outputs)) for name in names], dtype=torch.float64)
        sums = distributed_utils.all_reduce(
            sums.to(next(self._model.parameters()).device),
            group=distributed_utils.get_data_parallel_group(),
        )
        return [dict(zip(names, sums.tolist(), strict=True))]

    # -- saving --

    def _checkpoint(self, record: dict[str, Any], update_num: int) -> dict[str, Any]:
        """The model as it is, in the form of `Trainer.state_dict` (fairseq/trainer.py:402, 0.12.3.1), without optimizer
        and classes."""
        cfg: Any = OmegaConf.to_container(self.root, resolve=True, enum_to_str=True)
        if isinstance(cfg["model"], Namespace):
            cfg["model"] = vars(cfg["model"]).copy()
        return {
            "args": None,
            "cfg": cfg,
            "model": _on_cpu(_inner(self._model).state_dict(keep_vars=True)),
            "criterion": None,
            "optimizer_history": [
                {
                    "criterion_name": type(_inner(self._criterion)).__name__,
                    "optimizer_name": type(self._optimizer).__name__,
                    "lr_scheduler_state": {},
                    "num_updates": update_num,
                }
            ],
            "task_state": {},
            "extra_state": {
                "train_iterator": {"version": 2, "epoch": self._epoch, "iterations_in_epoch": 0, "shuffle": True},
                "pruning": record,
            },
        }

    def _path(self, name: str) -> Path:
        return Path(self.root.checkpoint.save_dir) / name

    def _workers(self) -> int:
        if self.root.distributed_training.distributed_world_size == 1:
            return 1
        return distributed_utils.get_data_parallel_world_size()

    def _is_master(self) -> bool:
        return self._workers() == 1 or distributed_utils.get_data_parallel_rank() == 0

    def _warn_of_random_weights(self) -> None:
        checkpoint = self.root.checkpoint
        restored = checkpoint.restore_file
        if restored == "checkpoint_last.pt":  # the default, which lies in the save dir
            restored = self._path(restored)
        given = (checkpoint.finetune_from_model, checkpoint.get("continue_once"))
        if not any(given) and not os.path.exists(restored):
            logger.warning(
                "no model to prune: neither --finetune-from-model nor --restore-file gives one, so random weights are "
                "pruned; start with --finetune-from-model finetuned/checkpoint_best.pt"
            )


def _left(found: list[Block]) -> str:
    """How many structures are left of how many: "7 of 12 heads, 1024 of 2048 FFN rows"."""
    counts = {}
    for kind, what in (("heads", "heads"), ("ffn", "FFN rows")):
        alive = [magnitudes(block) != 0 for block in found if block.kind == kind]
        if alive:
            counts[what] = (sum(int(mask.sum()) for mask in alive), sum(len(mask) for mask in alive))
    return ", ".join(f"{left} of {count} {what}" for what, (left, count) in counts.items())


def _refuse_partial_models(root: DictConfig) -> None:
    """The smallest weights of a model can be found only where all of it is."""
    if root.distributed_training.ddp_backend == "fully_sharded" or root.common.model_parallel_size > 1:
        fail("a model split over workers cannot be pruned: take --ddp-backend legacy_ddp, no --model-parallel-size.")
    if root.optimization.use_bmuf:
        fail("--use-bmuf moves weights outside of the optimizer's step, pruned ones too: prune without it.")


def _inner(module: Any) -> Any:
    """The model or criterion within fairseq's wrappers for several workers."""
    while isinstance(getattr(module, "module", None), nn.Module):
        module = module.module
    return module


def _masters(optimizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The parameters of which `optimizer` keeps a copy in single precision, each with that copy.

    `FP16Optimizer.build_fp32_params` (fairseq/optim/fp16_optimizer.py:32, 0.12.3.1) makes a list of tensors, or one
    flat tensor per device.
    """
    copies = getattr(optimizer, "fp32_params", None)
    if copies is None:
        return
    if not isinstance(copies, Mapping):
        yield from ((weight, copy.data) for weight, copy in zip(optimizer.fp16_params, copies, strict=True))
        return
    offsets = dict.fromkeys(copies, 0)
    for weight in optimizer.fp16_params:
        device = weight.device.index
        start = offsets[device]
        offsets[device] += weight.numel()
        yield weight, copies[device].data[start : offsets[device]].view(weight.shape)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (torch.is_tensor(value) and value.numel() == 1)


def _on_cpu(state: Mapping[str, Any]) -> dict[str, Any]:
    """`state` as fairseq saves it (`move_to_cpu`), with tensors that several names share still shared."""
    moved: dict[Any, Any] = {}
    result = {}
    for name, tensor in state.items():
        # A device without addresses gives 0; there only names of one and the same parameter are known to share it.
        identity = (tensor.data_ptr() or id(tensor), tensor.shape, tensor.dtype)
        if identity not in moved:
            moved[identity] = utils.move_to_cpu(tensor.detach())
        result[name] = moved[identity]
    return result


@contextlib.contextmanager
def _unchanged_random_state() -> Iterator[None]:
    """Measuring must not change the random numbers of training."""
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])
