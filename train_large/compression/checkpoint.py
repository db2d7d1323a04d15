"""fairseq checkpoints: read without running code, written whole or not at all, and made to load in stock fairseq.

A checkpoint is a dict (`Trainer.state_dict`, fairseq/trainer.py:376, 0.12.3.1): `model` is the state dict, `cfg` the
configuration of the run, whose `cfg.model` is an `argparse.Namespace` for every model that is registered by arguments;
releases before 0.10 have one Namespace `args` instead.
"""

from __future__ import annotations

import argparse
import contextlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train_large.compression.mapped import forget
from train_large.errors import UserError
from train_large.files import whole

WANTED = "a checkpoint that fairseq-train saved, such as checkpoint_best.pt"
ZIP_MAGIC = b"PK\x03\x04"  # torch.save since 1.6
# torch.save before that: MAGIC_NUMBER of torch/serialization.py, pickled
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

# What stock fairseq calls the parts of a run that fairseq_plugins extends: the registered name, its class where a
# checkpoint holds it, and its options: stock refuses an option that it does not know (OmegaConf merges them into a
# dataclass). The tests compare these tables with fairseq.
OUR_MODELS = "prenorm_roberta"
STOCK_MODEL = "roberta_prenorm"
BEYOND_STOCK = ("layer_heads", "layer_ffn")  # options of our models without which stock builds other shapes
STOCK_CRITERIA = {
    "masked_lm": ("MaskedLmLoss", {"tpu"}),
    "sentence_prediction": (
        "SentencePredictionCriterion",
        {
            "classification_head_name",
            "regression_target",
            "report_mcc",
            "report_acc_and_f1",
            "report_pearson_and_spearman",
        },
    ),
    "label_smoothed_cross_entropy": (
        "LabelSmoothedCrossEntropyCriterion",
        {"label_smoothing", "report_accuracy", "ignore_prefix_size", "sentence_avg"},
    ),
    "cross_entropy": ("CrossEntropyCriterion", {"sentence_avg"}),
}
OUR_CRITERIA = {
    f"budgeted_{name}": name for name in ("masked_lm", "sentence_prediction", "label_smoothed_cross_entropy")
}
STOCK_TASKS = {
    "masked_lm": {
        *("data", "sample_break_mode", "tokens_per_sample", "mask_prob", "leave_unmasked_prob", "random_token_prob"),
        *("freq_weighted_replacement", "mask_whole_words", "mask_multiple_length", "mask_stdev", "shorten_method"),
        *("shorten_data_split_list", "seed", "include_target_tokens", "include_index", "skip_masking", "d2v2_multi"),
    },
    "sentence_prediction": {
        *(
            "data",
            "num_classes",
            "init_token",
            "separator_token",
            "no_shuffle",
            "shorten_method",
            "shorten_data_split_list",
        ),
        *(
            "add_prev_output_tokens",
            "max_positions",
            "regression_target",
            "classification_head_name",
            "seed",
            "d2v2_multi",
        ),
    },
    "translation": {
        *("data", "source_lang", "target_lang", "load_alignments", "left_pad_source", "left_pad_target"),
        *("max_source_positions", "max_target_positions", "upsample_primary", "truncate_source", "num_batch_buckets"),
        *(
            "train_subset",
            "dataset_impl",
            "required_seq_len_multiple",
            "eval_bleu",
            "eval_bleu_args",
            "eval_bleu_detok",
        ),
        *("eval_bleu_detok_args", "eval_tokenized_bleu", "eval_bleu_remove_bpe", "eval_bleu_print_samples"),
    },
}
# What fairseq's checkpoints hold besides tensors and plain values: options in a Namespace, and scores as NumPy's
# numbers where scikit-learn or SciPy computed them (--report-acc-and-f1). None of these runs code when it is loaded.
PLAIN_CLASSES: tuple[Any, ...] = (
    argparse.Namespace,
    np.float64(0).__reduce__()[0],
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?")},
)
OUR_TASKS = {f"pruning_{name}": name for name in STOCK_TASKS}
OUR_SCHEDULER = "budget_linear"
STOCK_SCHEDULER = "polynomial_decay"

# What options point to by interpolation ("${common.seed}") and an older release's `args` may lack, with their defaults.
OLD_DEFAULTS: dict[str, dict[str, Any]] = {
    "common": {"seed": 1, "tpu": False},
    "dataset": {"train_subset": "train", "gen_subset": "test", "dataset_impl": None, "required_seq_len_multiple": 1},
    "optimization": {"sentence_avg": False},
}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint at `path` on the CPU; its `model` is a dict of finite tensors. No code in the file ever runs.

    Tensors stay on disk until they are used where the format allows it (mmap), so an optimizer's state costs no memory.
    Raises UserError, which names the file, for whatever is not such a checkpoint.
    """
    path = Path(path)
    start = _start(path)
    if not start:
        raise UserError(f"{path} is empty: give {WANTED}.")
    if _begins_as_safetensors(start):  # which torch.load reads too, by the name
        raise UserError(f"{path} is a safetensors file and not a checkpoint of fairseq: give {WANTED}.")
    try:
        with _namespaces_allowed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on what a file that is no checkpoint looks like to torch
            # Only the zip format can be mapped into memory.
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=start.startswith(ZIP_MAGIC))
    except (
        Exception
    ) as error:  # a parser of arbitrary bytes may raise anything, OSError for a place outside the file too
        raise UserError(_why_unreadable(path, start, error)) from error
    model = state.get("model") if isinstance(state, dict) else None
    if not isinstance(model, dict) or not model:
        raise UserError(f"{path} holds no 'model', so it is not a checkpoint of fairseq: give {WANTED}.")
    for name, tensor in model.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(
                f"{path}: 'model' holds more than named tensors, so it is not one of fairseq: give {WANTED}."
            )
        if tensor.is_floating_point() and tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
            raise UserError(
                f"{path}: {name} holds NaN or infinity, so training diverged: give a checkpoint saved before that."
            )
        forget(tensor)
    return state


def write_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Save `state` at `path`, whole or not at all: written beside it, flushed to the disk, then renamed.

    Raises UserError when it cannot be written (a full disk, no such folder); what was at `path` is then untouched.
    """
    with whole(path) as aside:
        torch.save(state, aside)


def stock_form(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """`checkpoint` as stock fairseq loads it, without --user-dir and under any torch.

    Its configuration has plain values and stock names only, and there is no optimizer state. A prenorm_roberta of any
    size becomes roberta_prenorm with that size spelled out; shared layers stay one layer under every layer's name, and
    stock loads them as an unshared model that computes the same. Budgeted criteria, pruning tasks and the budget's
    schedule become the stock ones that they extend. Tensors are those of `checkpoint`, not copies.
    What stock cannot express (`flags_beyond_stock`) keeps the name prenorm_roberta; the rest is as stock's, so that
    fairseq with --user-dir fairseq_plugins loads it.
    Raises UserError when the configuration is missing or holds what is not a plain value.
    """
    cfg = configuration(checkpoint)
    model_state = checkpoint["model"]
    history = _last_update(checkpoint)
    task, criterion, schedule = (_section(cfg, name) for name in ("task", "criterion", "lr_scheduler"))
    names = {"task": task.get("_name"), "criterion": criterion.get("_name"), "lr_scheduler": schedule.get("_name")}

    task_state = plain(checkpoint.get("task_state") or {})
    if names["task"] in OUR_TASKS:
        names["task"] = OUR_TASKS[names["task"]]
        cfg["task"] = {**_only(task, STOCK_TASKS[names["task"]]), "_name": names["task"]}
        task_state = {}
    if names["criterion"] in OUR_CRITERIA:
        names["criterion"] = OUR_CRITERIA[names["criterion"]]
        class_name, options = STOCK_CRITERIA[names["criterion"]]
        cfg["criterion"] = {**_only(criterion, options), "_name": names["criterion"]}
        history["criterion_name"] = class_name
    if names["lr_scheduler"] == OUR_SCHEDULER:
        names["lr_scheduler"] = STOCK_SCHEDULER
        cfg["lr_scheduler"] = {
            **_only(schedule, {"lr"}),
            "_name": STOCK_SCHEDULER,
            "total_num_update": max(1, history["num_updates"]),
        }
        history["lr_scheduler_state"] = _only(history["lr_scheduler_state"], {"best"})

    model = _section(cfg, "model")
    if str(model.get("_name") or model.get("arch")).startswith(OUR_MODELS):
        name = OUR_MODELS if flags_beyond_stock(model) else STOCK_MODEL
        model.update(_name=name, arch=name, encoder_normalize_before=True)
        # The weights say whether there is a norm on the embeddings; stock's roberta_prenorm has none by default.
        model["layernorm_embedding"] = any(".layernorm_embedding." in name for name in model_state)
    model.update({name: value for name, value in names.items() if name in model})  # arguments hold every choice again
    for section in (model, _section(cfg, "common")):
        section["user_dir"] = None

    criterion_state, budget = checkpoint.get("criterion"), budget_of(checkpoint)
    return {
        "args": None,
        "cfg": cfg,
        "model": dict(model_state),
        "criterion": criterion_state if names["criterion"] == criterion.get("_name") else None,
        "optimizer_history": [history],
        "task_state": task_state,
        "extra_state": _progress(checkpoint),
        **({"compression": plain(checkpoint["compression"])} if "compression" in checkpoint else {}),
        **({"budget": budget} if budget else {}),
    }


def budget_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """`budget` and `budget_clock` of the training, as its criterion's configuration has them, or as `stock_form` keeps
    them beside a stock one; empty where there was none."""
    for section in (_section(dict(checkpoint.get("cfg") or {}), "criterion"), checkpoint.get("budget")):
        if isinstance(section, Mapping) and section.get("budget"):
            return {name: plain(section.get(name)) for name in ("budget", "budget_clock")}
    return {}


def configuration(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The plain configuration, from `cfg` or from an older release's `args`.

    Raises UserError when there is none, or when it holds what is not a plain value.
    """
    for key, kinds in (
        ("args", (argparse.Namespace, dict)),
        ("cfg", (dict,)),
    ):  # the order of load_model_ensemble_and_task
        found = checkpoint.get(key)
        if found is not None and not isinstance(found, kinds):
            break
        if found is not None:
            return _from_arguments(plain(found)) if key == "args" else plain(found)
    raise UserError("the checkpoint has no configuration (neither 'cfg' nor 'args'): give " + WANTED + ".")


def flags_beyond_stock(model: Mapping[str, Any]) -> str:
    """The flags of a model's configuration (`cfg.model`) that stock fairseq has not, as typed; "" when it has all.

    They are the shapes of layers that structured pruning has left: "--layer-heads 4,3 --layer-ffn 200,190".
    """
    found = {name: model.get(name) for name in BEYOND_STOCK}
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in found.items() if value is not None)


def plain(value: Any) -> Any:
    """`value` in dicts, lists, strings, numbers and None alone. Raises UserError for anything else."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, argparse.Namespace):
        return plain(vars(value))
    if isinstance(value, Mapping):
        return {key if type(key) in (bool, int, float, str) else str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if isinstance(value, (Tensor, np.generic)):
        return value.tolist()
    raise UserError(
        f"the checkpoint's configuration holds a {type(value).__name__}: remove it, stock fairseq cannot load it."
    )


def _from_arguments(args: dict[str, Any]) -> dict[str, Any]:
    """Today's configuration for the flat arguments of releases before 0.10.

    fairseq itself does it for a Namespace only (`_upgrade_state_dict`, fairseq/checkpoint_utils.py, 0.12.3.1).
    """
    args = dict(args)
    if args.get("max_positions") is not None:
        args.setdefault("max_source_positions", args["max_positions"])
        args.setdefault("max_target_positions", args["max_positions"])
    if isinstance(args.get("data"), list) and args["data"]:
        args["data"] = args["data"][0]
    if args.get("log_keys", ...) is None:
        del args["log_keys"]
    task = args.pop("task", None) or "translation"
    criterion = args.get("criterion") or "cross_entropy"
    known = STOCK_CRITERIA.get(OUR_CRITERIA.get(criterion, criterion), ("", set()))[1]
    return {
        **{section: {**defaults, **_only(args, set(defaults))} for section, defaults in OLD_DEFAULTS.items()},
        "model": {**args, "task": task, "_name": args.get("arch")},
        "task": {**args, "_name": task},
        "criterion": {**_only(args, known), "_name": criterion},
        "lr_scheduler": {**_only(args, {"lr"}), "_name": args.get("lr_scheduler")},
        "bpe": None,
        "tokenizer": None,
    }


def is_safetensors(path: Path) -> bool:
    """Whether the file begins as one of safetensors does. Raises UserError where it cannot be read."""
    return _begins_as_safetensors(_start(path))


def _begins_as_safetensors(start: bytes) -> bool:
    """With the length of the header in eight bytes, and the header's JSON."""
    return start[8:9] == b"{" and not start.startswith((ZIP_MAGIC, LEGACY_MAGIC))


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(len(LEGACY_MAGIC))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give {WANTED}.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory: give {WANTED}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give {WANTED}.") from error


def _last_update(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The last entry of `optimizer_history`, with the keys that fairseq looks up when it loads a checkpoint."""
    history = checkpoint.get("optimizer_history") or [{}]
    known = {"criterion_name", "optimizer_name", "lr_scheduler_state", "num_updates"}
    last = plain(_only(history[-1], known))  # releases before 0.6 kept the optimizer's tensors there too
    return {"criterion_name": None, "optimizer_name": None, "lr_scheduler_state": {}, "num_updates": 0, **last}


def _progress(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """`extra_state` without meters and averaged weights: where training stood, and its best score."""
    known = {"train_iterator", "val_loss", "best", "previous_training_time", "pruning"}
    extra = plain(_only(checkpoint.get("extra_state") or {}, known))
    return {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}, "val_loss": None, **extra}


def _section(cfg: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of the configuration, in place; an empty one where there was none."""
    if not isinstance(cfg.get(name), dict):
        cfg[name] = {}
    return cfg[name]


def _only(section: Mapping[str, Any], keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key in keys}


@contextlib.contextmanager
def _namespaces_allowed() -> Iterator[None]:
    """As `torch.serialization.safe_globals`, whose end would also forbid what fairseq_plugins had allowed before."""
    missing = [each for each in PLAIN_CLASSES if each not in torch.serialization.get_safe_globals()]
    with torch.serialization.safe_globals(missing) if missing else contextlib.nullcontext():
        yield


def _why_unreadable(path: Path, start: bytes, error: Exception) -> str:
    """One sentence on what `torch.load` made of the file at `path`, which begins with `start`."""
    if isinstance(error, pickle.UnpicklingError):
        code = re.search(r"(?:GLOBAL|class|function|type) ([A-Za-z_][\w.]*\.[\w.]+)", str(error))
        if code:
            return (
                f"{path} holds pickled code or classes ({code[1]}), none of which was run: "
                "give a checkpoint of tensors and plain values only."
            )
    if start.startswith(ZIP_MAGIC) and not zipfile.is_zipfile(path):
        return f"{path} is cut short: copy it again, or give a checkpoint that was saved whole."
    if start.startswith(LEGACY_MAGIC):
        return f"{path} is damaged or cut short: copy it again, or give a checkpoint that was saved whole."
    return f"{path} is not a checkpoint of fairseq, or is damaged: give {WANTED}."
