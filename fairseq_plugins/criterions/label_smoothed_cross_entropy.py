"""`--criterion budgeted_label_smoothed_cross_entropy`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)

from fairseq_plugins.criterions.budgeted import BudgetConfig, Budgeted
from fairseq_plugins.run import encoder_size
from train_large.flops import translation_train_flops


@dataclass
class BudgetedLabelSmoothedCrossEntropyConfig(BudgetConfig, LabelSmoothedCrossEntropyCriterionConfig):
    pass


@register_criterion("budgeted_label_smoothed_cross_entropy", dataclass=BudgetedLabelSmoothedCrossEntropyConfig)
class BudgetedLabelSmoothedCrossEntropyCriterion(Budgeted, LabelSmoothedCrossEntropyCriterion):
    """fairseq's translation loss under a budget. The log's losses and perplexities are those without the smoothing."""

    loss_name = "nll_loss"

    def flops(self, sample: dict[str, Any]) -> float:
        sequences, source = sample["net_input"]["src_tokens"].size()
        target = sample["target"].size(1)
        return translation_train_flops(
            encoder_size(self.run.root.model), len(self.task.target_dictionary), source, target, sequences
        )
