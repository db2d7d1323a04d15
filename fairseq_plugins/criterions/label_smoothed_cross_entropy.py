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
from fairseq_plugins.run import encoder_size, fail
from train_large.flops import translation_train_flops
from train_large.sizes import Size


@dataclass
class BudgetedLabelSmoothedCrossEntropyConfig(BudgetConfig, LabelSmoothedCrossEntropyCriterionConfig):
    pass


@register_criterion("budgeted_label_smoothed_cross_entropy", dataclass=BudgetedLabelSmoothedCrossEntropyConfig)
class BudgetedLabelSmoothedCrossEntropyCriterion(Budgeted, LabelSmoothedCrossEntropyCriterion):
    """fairseq's translation loss under a budget. The log's losses and perplexities are those without the smoothing."""

    loss_name = "nll_loss"

    @classmethod
    def build_criterion(cls, cfg: Any, task: Any) -> Any:
        criterion = super().build_criterion(cfg, task)
        root = criterion.run.root
        if root is not None and getattr(root.model, "decoder_ffn_embed_dim", None) is None:
            fail(
                f"--arch {getattr(root.model, 'arch', root.model._name)} is no Transformer, whose FLOPs "
                "budgeted_label_smoothed_cross_entropy counts: take label_smoothed_cross_entropy."
            )
        return criterion

    def flops(self, sample: dict[str, Any]) -> float:
        sequences, source = sample["net_input"]["src_tokens"].size()
        target, model = sample["target"].size(1), self.run.root.model
        decoder = Size(
            *(model.decoder_layers, model.decoder_embed_dim),
            *(model.decoder_ffn_embed_dim, model.decoder_attention_heads),
        )
        return translation_train_flops(
            encoder_size(model), len(self.task.target_dictionary), source, target, sequences, decoder
        )
