"""`--criterion budgeted_sentence_prediction`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fairseq.criterions import register_criterion
from fairseq.criterions.sentence_prediction import SentencePredictionConfig, SentencePredictionCriterion

from fairseq_plugins.criterions.budgeted import BudgetConfig, Budgeted
from fairseq_plugins.run import encoder_size
from train_large.flops import train_flops


@dataclass
class BudgetedSentencePredictionConfig(BudgetConfig, SentencePredictionConfig):
    pass


@register_criterion("budgeted_sentence_prediction", dataclass=BudgetedSentencePredictionConfig)
class BudgetedSentencePredictionCriterion(Budgeted, SentencePredictionCriterion):
    """fairseq's classification loss under a budget."""

    def flops(self, sample: dict[str, Any]) -> float:
        sequences, length = sample["net_input"]["src_tokens"].size()
        size, vocabulary = encoder_size(self.run.root.model), len(self.task.source_dictionary)
        return train_flops(
            size, vocabulary, length, sequences, head="classification", classes=self.task.cfg.num_classes
        )
