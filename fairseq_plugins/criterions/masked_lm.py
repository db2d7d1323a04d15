"""`--criterion budgeted_masked_lm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fairseq.criterions import register_criterion
from fairseq.criterions.masked_lm import MaskedLmConfig, MaskedLmLoss

from fairseq_plugins.criterions.budgeted import BudgetConfig, Budgeted
from fairseq_plugins.run import encoder_size, layer_shapes
from train_large.flops import train_flops


class QuickMaskedLmLoss(MaskedLmLoss):
    """fairseq's, without the logits of all masked positions in memory, where the model can do that."""

    def forward(self, model: Any, sample: dict[str, Any], reduce: bool = True) -> tuple[Any, Any, dict[str, Any]]:
        if self.tpu or not getattr(model, "is_fast", bool)():
            return super().forward(model, sample, reduce)
        masked_tokens = sample["target"].ne(self.padding_idx)
        targets = sample["target"][masked_tokens]
        loss, _ = model(**sample["net_input"], masked_tokens=masked_tokens, masked_targets=targets)
        sample_size = masked_tokens.int().sum()
        logging_output = {
            "loss": loss.detach(),
            "ntokens": sample["ntokens"],
            "nsentences": sample["nsentences"],
            "sample_size": sample_size,
        }
        return loss, sample_size, logging_output


@dataclass
class BudgetedMaskedLmConfig(BudgetConfig, MaskedLmConfig):
    pass


@register_criterion("budgeted_masked_lm", dataclass=BudgetedMaskedLmConfig)
class BudgetedMaskedLmCriterion(Budgeted, QuickMaskedLmLoss):
    """fairseq's masked LM loss under a budget."""

    def flops(self, sample: dict[str, Any]) -> float:
        sequences, length = sample["net_input"]["src_tokens"].size()
        args, vocabulary = self.run.root.model, len(self.task.source_dictionary)
        return train_flops(encoder_size(args), vocabulary, length, sequences, layers=layer_shapes(args))
