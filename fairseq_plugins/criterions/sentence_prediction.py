"""`--criterion budgeted_sentence_prediction`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fairseq.criterions import register_criterion
from fairseq.criterions.sentence_prediction import SentencePredictionConfig, SentencePredictionCriterion

from fairseq_plugins.criterions.budgeted import BudgetConfig, Budgeted
from fairseq_plugins.run import encoder_size, fail, layer_shapes, root_config
from train_large.data.dictionary import label_names
from train_large.flops import train_flops


@dataclass
class BudgetedSentencePredictionConfig(BudgetConfig, SentencePredictionConfig):
    pass


@register_criterion("budgeted_sentence_prediction", dataclass=BudgetedSentencePredictionConfig)
class BudgetedSentencePredictionCriterion(Budgeted, SentencePredictionCriterion):
    """fairseq's classification loss under a budget."""

    @classmethod
    def build_criterion(cls, cfg: Any, task: Any) -> Any:
        if root_config(cfg) is not None and not task.cfg.regression_target:
            names, asked = label_names(task.label_dictionary.symbols), task.cfg.num_classes
            if asked != len(names):
                fail(f"--num-classes {asked}: {task.cfg.data}/label/dict.txt names {len(names)}: give {len(names)}.")
        return super().build_criterion(cfg, task)

    def flops(self, sample: dict[str, Any]) -> float:
        sequences, length = sample["net_input"]["src_tokens"].size()
        args, vocabulary = self.run.root.model, len(self.task.source_dictionary)
        size, layers, classes = encoder_size(args), layer_shapes(args), self.task.cfg.num_classes
        return train_flops(size, vocabulary, length, sequences, head="classification", classes=classes, layers=layers)
