"""What can be told of a checkpoint before fairseq loads it, and where it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fairseq_plugins.run import user_errors_end_the_run
from train_large.compression.checkpoint import read_checkpoint
from train_large.errors import UserError

# What the shapes of a model's weights depend on, by the names that fairseq's models have for it.
_SHAPING = (
    *("encoder_layers", "encoder_embed_dim", "encoder_ffn_embed_dim", "layer_heads", "layer_ffn", "max_positions"),
    *("decoder_layers", "decoder_embed_dim", "decoder_ffn_embed_dim", "layernorm_embedding", "share_layers"),
)


def check_before_loading(path: Path, model: Any, task: Any) -> None:
    """End the run with one sentence if the checkpoint at `path` cannot be read safely, belongs to another dictionary
    than the data, or has another number of attention heads, whose weights would load and be nonsense.

    Which dictionary a model was trained with is known of the models of this plugin, which carry its digest
    (`dictionary_digest` in their arguments); of others only the number of entries is.
    """
    with user_errors_end_the_run():
        checkpoint = read_checkpoint(path)
        trained_with = _model_argument(checkpoint, "dictionary_digest")
        ours = getattr(getattr(model, "args", None), "dictionary_digest", None)
        for name in ("encoder_attention_heads", "decoder_attention_heads"):
            theirs, here = _model_argument(checkpoint, name), getattr(getattr(model, "args", None), name, None)
            if theirs is not None and here is not None and theirs != here:
                raise UserError(f"{path}: it was trained with {_told(name, theirs)}, not {here}: give that.")
        embedding = checkpoint["model"].get("encoder.sentence_encoder.embed_tokens.weight")
        dictionary = getattr(task, "source_dictionary", None)
        entries = len(dictionary) if dictionary is not None else None
        other_size = embedding is not None and entries is not None and embedding.size(0) != entries
        if other_size or (trained_with is not None and ours is not None and trained_with != ours):
            raise UserError(
                f"{path}: this model was trained with another dictionary than the data's ({entries} entries); "
                "preprocess the data with the dict.txt and the BPE of the model's own data."
            )


def misfit(path: Path, model: Any, reason: str) -> str:
    """One sentence for a checkpoint that `model` did not load, for this `reason`: the flags that differ, if any do."""
    with user_errors_end_the_run():
        checkpoint = read_checkpoint(path)
    ours = getattr(model, "args", None)
    pairs = {name: (_model_argument(checkpoint, name), getattr(ours, name, None)) for name in _SHAPING}
    if _model_argument(checkpoint, "encoder_normalize_before") != getattr(ours, "encoder_normalize_before", None):
        pairs = {"arch": (_model_argument(checkpoint, "arch"), getattr(ours, "arch", None))}
    differing = [
        (_told(name, theirs), _told(name, here))
        for name, (theirs, here) in pairs.items()
        if _given(theirs) != _given(here)
    ]
    if not differing:
        return f"{path}: its weights are not those of this model ({reason}); give another checkpoint or --save-dir."
    theirs, here = (", ".join(told) for told in zip(*differing))
    return (
        f"{path}: it was trained with {theirs}, and this model has {here}: give the same, another checkpoint, or "
        "another --save-dir."
    )


def _given(value: Any) -> Any:
    """None where a checkpoint that does not know the flag means the same."""
    return None if value in (False, "none") else value


def _told(name: str, value: Any) -> str:
    """A flag of a model, as it is given."""
    if name == "layernorm_embedding":
        return "an embedding norm" if value else "--no-embedding-norm"
    flag = f"--{name.replace('_', '-')}"
    return f"no {flag}" if value is None else f"{flag} {value}"


def _model_argument(checkpoint: dict[str, Any], name: str) -> Any:
    """An argument that a checkpoint's model was built with."""
    arguments = (checkpoint.get("cfg") or {}).get("model") or checkpoint.get("args")
    return arguments.get(name) if isinstance(arguments, dict) else getattr(arguments, name, None)
