"""What every budgeted criterion shares: the flags, and where the budget looks in on fairseq's loop."""

# No postponed annotations here: fairseq makes flags of the fields' types (fairseq/dataclass/utils.py:40, 0.12.3.1).
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Optional

from fairseq.dataclass import FairseqDataclass
from fairseq.dataclass.constants import ChoiceEnum

from fairseq_plugins import budgeted_run
from fairseq_plugins.budgeted_run import BudgetedRun
from fairseq_plugins.lazy_run import LazyRun
from fairseq_plugins.run import root_config
from train_large.budget import CLOCKS


@dataclass
class BudgetConfig(FairseqDataclass):
    budget: Optional[str] = field(
        default=None,
        metadata={
            "help": "how long to train: seconds, or a number with s, m, h or d (90s, 2h, 11.5d); no limit if not given"
        },
    )
    budget_clock: ChoiceEnum(CLOCKS) = field(  # type: ignore[valid-type]
        default="train",
        metadata={
            "help": "train: updates only, waiting for data included; wall: everything since the process started; "
            "calibrated: updates times --seconds-per-update"
        },
    )
    seconds_per_update: Optional[str] = field(
        default=None,
        metadata={"help": "for --budget-clock calibrated: a number, or the table that `train-large time-steps` wrote"},
    )
    target_ppl: Optional[float] = field(
        default=None,
        metadata={"help": "stop when a validation of the first --valid-subset comes to this perplexity or below"},
    )


class Budgeted:
    """Mixed in before one of fairseq's criteria: the same loss, and a run that is timed, logged and stopped.

    `loss_name` is the meter that holds the loss in fairseq's base 2.
    """

    loss_name: ClassVar[str] = "loss"

    @classmethod
    def build_criterion(cls, cfg: Any, task: Any) -> Any:
        criterion = super().build_criterion(cfg, task)  # type: ignore[misc]
        if budgeted_run.current is not None:
            budgeted_run.current.finish()  # the run before in this process, of `fairseq-hydra-train --multirun`
        root = root_config(cfg)
        kind = LazyRun if root is not None and root.common.tpu else BudgetedRun
        criterion.run = budgeted_run.current = kind(cfg, cls.loss_name)
        criterion.run.vocabulary = len(task.source_dictionary)
        criterion.run.task = task
        return criterion

    @abstractmethod
    def flops(self, sample: dict[str, Any]) -> float:
        """Training FLOPs of one micro-batch by Clark et al.'s rules; padding counts too."""

    def train(self, mode: bool = True) -> Any:
        """`Trainer` calls this at the start of every update, and with False for every validation batch."""
        # torch calls it too, while the module is being built.
        if hasattr(self, "run"):
            if mode:
                self.run.begin_update()
            else:
                self.run.interrupt()
        return super().train(mode)  # type: ignore[misc]

    def forward(self, model: Any, sample: dict[str, Any], reduce: bool = True) -> tuple[Any, Any, dict[str, Any]]:
        stamp = self.run.stamp(self.flops(sample)) if self.training and self.run.has_begun else {}  # type: ignore[attr-defined]
        loss, sample_size, logging_output = super().forward(model, sample, reduce)  # type: ignore[misc]
        logging_output.update(stamp)
        if stamp:
            self.run.remember(logging_output)  # type: ignore[attr-defined]
        return loss, sample_size, logging_output

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        super().reduce_metrics(logging_outputs)  # type: ignore[misc]
        run = budgeted_run.current
        if run is None:
            return
        if any("budget_used" in log for log in logging_outputs):
            run.end_update(logging_outputs)
        else:
            run.see_validation()
