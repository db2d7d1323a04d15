"""`--criterion budgeted_masked_lm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fairseq.criterions import register_criterion
from fairseq.criterions.masked_lm import MaskedLmConfig, MaskedLmLoss

from fairseq_plugins.criterions.budgeted import BudgetConfig, Budgeted
from fairseq_plugins.run import encoder_size
from train_large.flops import train_flops


@dataclass
class BudgetedMaskedLmConfig(BudgetConfig, MaskedLmConfig):
    pass


@register_criterion("budgeted_masked_lm", dataclass=BudgetedMaskedLmConfig)
class BudgetedMaskedLmCriterion(Budgeted, MaskedLmLoss):
    """fairseq's masked LM loss under a budget."""

    def flops(self, sample: dict[str, Any]) -> float:
        sequences, length = sample["net_input"]["src_tokens"].size()
        return train_flops(encoder_size(self.run.root.model), len(self.task.source_dictionary), length, sequences)
