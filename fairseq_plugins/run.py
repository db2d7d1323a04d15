"""The run that a plugin is part of: fairseq hands a plugin its section of the configuration, this finds the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from omegaconf import DictConfig

from train_large.compression.structures import parse_per_layer
from train_large.errors import UserError
from train_large.sizes import Size


def root_config(section: DictConfig) -> DictConfig | None:
    """The whole configuration of the run that `section` (a task's, criterion's or scheduler's) belongs to.

    fairseq keeps the way up (`merge_with_parent`, fairseq/dataclass/utils.py:508, 0.12.3.1), and
    `fairseq_cli.train.main` reads the same object after every update. None for a section that stands alone, as when a
    checkpoint is loaded for evaluation.
    """
    root = section._get_root() if isinstance(section, DictConfig) else None
    return root if root is not None and "optimization" in root else None


def encoder_size(model_args: Any) -> Size:
    """The size of the encoder that `model_args` (a run's `cfg.model`) builds, before any layer was shrunk."""
    return Size(
        model_args.encoder_layers,
        model_args.encoder_embed_dim,
        model_args.encoder_ffn_embed_dim,
        model_args.encoder_attention_heads,
    )


def layer_shapes(model_args: Any) -> list[tuple[int, int]]:
    """The heads and the FFN rows of each layer of that encoder."""
    size = encoder_size(model_args)
    heads = per_layer(model_args, "layer_heads") or (size.heads,) * size.layers
    ffn = per_layer(model_args, "layer_ffn") or (size.ffn,) * size.layers
    return list(zip(heads, ffn))


def per_layer(model_args: Any, name: str) -> tuple[int, ...] | None:
    """`layer_heads` or `layer_ffn` of `model_args` as numbers, None where there is none. Raises UserError."""
    text = getattr(model_args, name, None)
    if text is None:
        return None
    return parse_per_layer(str(text), f"--{name.replace('_', '-')}", model_args.encoder_layers)


def shape_facts(model_args: Any) -> dict[str, Any]:
    """What the run log says of the layers: `heads` and `ffn`, None where layers differ, and the lists of each layer;
    what they share, and that there is no norm of the embeddings, None where it is as usual."""

    def common(name: str, of_model: str) -> int | None:
        found = per_layer(model_args, name)
        if found is None:
            return getattr(model_args, of_model, None)
        return found[0] if len(set(found)) == 1 else None

    lists = {name: getattr(model_args, name, None) for name in ("layer_heads", "layer_ffn")}
    share = getattr(model_args, "share_layers", "none")
    return {
        "ffn": common("layer_ffn", "encoder_ffn_embed_dim"),
        "heads": common("layer_heads", "encoder_attention_heads"),
        **{name: None if found is None else str(found) for name, found in lists.items()},
        "share_layers": None if share == "none" else share,
        "embedding_norm": False if getattr(model_args, "no_embedding_norm", False) else None,
    }


def stop_after_this_update(root: DictConfig) -> None:
    """Let fairseq end the run in its own way once the update in hand is done: it validates, saves and returns.

    `validate_and_save` (fairseq_cli/train.py:372, 0.12.3.1) compares the updates so far to `max_update` after every
    update. Every worker must call this in the same update, or the others wait for it in a collective for ever.
    """
    root.optimization.max_update = 1


def do_not_train(root: DictConfig) -> None:
    """Let a run that has nothing left to do end before its first update: `main` reads this after loading."""
    root.optimization.max_epoch = -1  # 0 would mean no limit (fairseq_cli/train.py:178, 0.12.3.1)


def fail(sentence: str) -> NoReturn:
    """End the process with one sentence on standard error and a status that is not 0, without a traceback."""
    raise SystemExit(f"error: {sentence}")


@contextmanager
def user_errors_end_the_run() -> Iterator[None]:
    """Turn the core's UserError into that ending: fairseq would print a traceback instead."""
    try:
        yield
    except UserError as error:
        fail(str(error))
