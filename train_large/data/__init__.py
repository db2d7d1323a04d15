"""From plain text and task files to what fairseq reads. Needs `tokenizers` and, in a process of its own, fairseq."""

from train_large.data.glue import TaskSummary, prepare_task
from train_large.data.text import SplitSummary, TextSummary, prepare_text

__all__ = ["SplitSummary", "TaskSummary", "TextSummary", "prepare_task", "prepare_text"]
