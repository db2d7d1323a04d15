"""Criteria that train to a budget: fairseq's own losses, each with the same few lines around it."""

from . import label_smoothed_cross_entropy, masked_lm, sentence_prediction  # noqa: F401
