"""`--task pruning_sentence_prediction`, `pruning_translation`, `pruning_masked_lm`: fairseq's own tasks with a ladder
in them."""

from dataclasses import dataclass

from fairseq.tasks import register_task
from fairseq.tasks.masked_lm import MaskedLMConfig, MaskedLMTask
from fairseq.tasks.sentence_prediction import SentencePredictionConfig, SentencePredictionTask
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from fairseq_plugins.tasks.ladder import Ladder, LadderConfig


@dataclass
class PruningSentencePredictionConfig(LadderConfig, SentencePredictionConfig):
    pass


@register_task("pruning_sentence_prediction", dataclass=PruningSentencePredictionConfig)
class PruningSentencePredictionTask(Ladder, SentencePredictionTask):
    """Measured by accuracy; a regression by exp(-loss)."""

    scores = {"accuracy": "accuracy", "loss": "exp_minus_loss"}


@dataclass
class PruningTranslationConfig(LadderConfig, TranslationConfig):
    pass


@register_task("pruning_translation", dataclass=PruningTranslationConfig)
class PruningTranslationTask(Ladder, TranslationTask):
    """Measured by BLEU under --eval-bleu, else by the inverse of the perplexity (without label smoothing)."""

    scores = {"bleu": "bleu", "nll_loss": "inverse_perplexity", "loss": "inverse_perplexity"}


@dataclass
class PruningMaskedLMConfig(LadderConfig, MaskedLMConfig):
    pass


@register_task("pruning_masked_lm", dataclass=PruningMaskedLMConfig)
class PruningMaskedLMTask(Ladder, MaskedLMTask):
    """Measured by the inverse of the perplexity."""

    scores = {"nll_loss": "inverse_perplexity", "loss": "inverse_perplexity"}
