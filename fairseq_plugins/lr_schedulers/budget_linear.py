"""`--lr-scheduler budget_linear`: up over the first part of the budget, then down to zero at its end."""

# No postponed annotations here: fairseq makes flags of the fields' types (fairseq/dataclass/utils.py:40, 0.12.3.1).
from dataclasses import dataclass, field
from typing import Any, List

from fairseq.dataclass import FairseqDataclass
from fairseq.optim.lr_scheduler import FairseqLRScheduler, register_lr_scheduler
from omegaconf import II

from fairseq_plugins import budgeted_run
from fairseq_plugins.run import fail
from train_large.budget import warmup_then_linear


@dataclass
class BudgetLinearConfig(FairseqDataclass):
    warmup_fraction: float = field(
        default=0.06,
        metadata={
            "help": "share of the budget over which the rate rises linearly to --lr; over the rest it falls to zero"
        },
    )
    lr: List[float] = II("optimization.lr")


@register_lr_scheduler("budget_linear", dataclass=BudgetLinearConfig)
class BudgetLinearSchedule(FairseqLRScheduler):
    """RoBERTa's schedule with the budget in the place of the number of updates. The first of `--lr` is the peak."""

    def __init__(self, cfg: BudgetLinearConfig, optimizer: Any) -> None:
        super().__init__(cfg, optimizer)
        if not 0 <= cfg.warmup_fraction <= 1:
            fail(f"--warmup-fraction {cfg.warmup_fraction} is not between 0 and 1.")
        run = budgeted_run.current
        if run is None:
            fail("--lr-scheduler budget_linear needs a budget: add --criterion budgeted_masked_lm --budget 2h.")
        self.run = run
        # fairseq sets the rate before the criterion has read the clock: set it again once it has.
        run.after_update(self._set)

    def _set(self) -> None:
        self.optimizer.set_lr(self.cfg.lr[0] * warmup_then_linear(self.run.fraction(), self.cfg.warmup_fraction))

    def step_update(self, num_updates: int) -> float:
        self._set()
        return self.optimizer.get_lr()
