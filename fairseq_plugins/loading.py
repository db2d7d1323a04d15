"""What can be told of a checkpoint before fairseq loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fairseq_plugins.run import user_errors_end_the_run
from train_large.compression.checkpoint import read_checkpoint
from train_large.errors import UserError


def check_before_loading(path: Path, model: Any, task: Any) -> None:
    """End the run with one sentence if the checkpoint at `path` cannot be read safely, or belongs to another
    dictionary than the data.

    Which dictionary a model was trained with is known of the models of this plugin, which carry its digest
    (`dictionary_digest` in their arguments); of others only the number of entries is.
    """
    with user_errors_end_the_run():
        checkpoint = read_checkpoint(path)
        trained_with = _model_argument(checkpoint, "dictionary_digest")
        ours = getattr(getattr(model, "args", None), "dictionary_digest", None)
        embedding = checkpoint["model"].get("encoder.sentence_encoder.embed_tokens.weight")
        dictionary = getattr(task, "source_dictionary", None)
        entries = len(dictionary) if dictionary is not None else None
        other_size = embedding is not None and entries is not None and embedding.size(0) != entries
        if other_size or (trained_with is not None and ours is not None and trained_with != ours):
            raise UserError(
                f"{path}: this model was trained with another dictionary than the data's ({entries} entries); "
                "preprocess the data with the dict.txt and the BPE of the model's own data."
            )


def _model_argument(checkpoint: dict[str, Any], name: str) -> Any:
    """An argument that a checkpoint's model was built with."""
    arguments = (checkpoint.get("cfg") or {}).get("model") or checkpoint.get("args")
    return arguments.get(name) if isinstance(arguments, dict) else getattr(arguments, name, None)
