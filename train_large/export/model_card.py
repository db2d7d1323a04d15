"""The README.md of an exported model: what its checkpoint knows of itself, and what was counted. Nothing else.

What a checkpoint does not hold is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from train_large.compression.checkpoint import budget_of
from train_large.compression.pruning import prunable, sparsity_of
from train_large.compression.storage import tied_to
from train_large.export.roberta import RESERVED_POSITIONS, Exported

# Units of what fairseq logs: losses in base 2 (`log_scalar("loss", loss_sum / sample_size / math.log(2))` in its
# criterions), accuracies in per cent.
UNITS = {"loss": " (base 2)", "nll_loss": " (base 2)", "accuracy": " (%)"}
USE_CLASSIFIER = """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForSequenceClassification.from_pretrained(".").eval()
ids = [ids[:{longest}] for ids in tokenizer(["a sentence", "another one"])["input_ids"]]  # as fairseq cuts
logits = model(**tokenizer.pad({{"input_ids": ids}}, return_tensors="pt")).logits"""
USE_LANGUAGE_MODEL = """\
from transformers import AutoModelForMaskedLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForMaskedLM.from_pretrained(".").eval()
logits = model(**tokenizer(["a <mask> sentence"], padding=True, return_tensors="pt")).logits"""


def model_card(
    checkpoint: Mapping[str, Any],
    cfg: Mapping[str, Any],
    exported: Exported,
    *,
    source: str,
    file_bytes: int,
    labels: Sequence[str] | None,
    unknown: int | None,
    scores: Mapping[str, float],
) -> str:
    """Markdown with the YAML header that the Hugging Face hub reads.

    checkpoint: as `read_checkpoint` gives it; cfg: its configuration in plain values. source: the checkpoint's file
    name. file_bytes: of model.safetensors. unknown: entries of the BPE that the dictionary lacks; None without a
    tokenizer. scores: by name, as the user gave them.
    """
    language_model = exported.classes is None
    longest = exported.config["max_position_embeddings"] - RESERVED_POSITIONS
    use = USE_LANGUAGE_MODEL if language_model else USE_CLASSIFIER.format(longest=longest)
    title = f"Pre-norm RoBERTa, {exported.config['num_hidden_layers']} layers, {exported.config['hidden_size']} wide"
    parts = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {'fill-mask' if language_model else 'text-classification'}",
        "tags:",
        "- train-large",
        "---",
        "",
        f"# {title}",
        "",
        f"`{exported.config['architectures'][0]}`, written by `train-large export-hf` from `{source}`, a checkpoint of "
        "fairseq.",
        "",
        *_table("Model", _model(exported, file_bytes, labels)),
        *_table("Training", _training(checkpoint, cfg)),
        *_table("Compression", _compression(checkpoint, exported)),
        *_table("Scores", _scores(checkpoint, cfg, scores)),
        "## Use",
        "",
        _tokenizer_note(language_model, unknown, longest),
        *([] if unknown is None else ["", "```python", use, "```"]),
    ]
    return "\n".join(parts) + "\n"


def _table(title: str, rows: Sequence[tuple[str, str]]) -> list[str]:
    if not rows:
        return []
    lines = [f"| {_cell(what)} | {_cell(value)} |" for what, value in rows]
    return [f"## {title}", "", "| | |", "|---|---|", *lines, ""]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _model(exported: Exported, file_bytes: int, labels: Sequence[str] | None) -> list[tuple[str, str]]:
    config = exported.config
    rows = [
        ("layers", str(config["num_hidden_layers"])),
        ("hidden size", str(config["hidden_size"])),
        ("feed-forward size", str(config["intermediate_size"])),
        ("attention heads", str(config["num_attention_heads"])),
        ("vocabulary", f"{config['vocab_size']:,}"),
        ("tokens, at most", str(config["max_position_embeddings"] - RESERVED_POSITIONS)),
        ("parameters", f"{sum(weight.numel() for weight in _weights(exported).values()):,}"),
        ("model.safetensors", f"{file_bytes:,} bytes, float32"),
    ]
    if exported.classes is not None:
        rows.append(("classes", ", ".join(labels) if labels else str(exported.classes)))
    return rows


def _training(checkpoint: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[tuple[str, str]]:
    model, task, criterion = (_section(cfg, name) for name in ("model", "task", "criterion"))
    budget = budget_of(checkpoint)
    rows = [
        ("architecture", model.get("arch")),
        ("task", task.get("_name")),
        ("criterion", criterion.get("_name")),
        ("layers shared", None if model.get("share_layers") == "none" else model.get("share_layers")),
        ("budget", budget.get("budget")),
        ("budget's clock", budget.get("budget_clock")),
    ]
    updates = [
        f"{entry['num_updates']:,} ({entry['criterion_name']})"
        for entry in checkpoint.get("optimizer_history") or []
        if entry.get("num_updates") and entry.get("criterion_name")
    ]
    rows.append(("updates, one run after the other", ", then ".join(updates)))
    seconds = _section(checkpoint, "extra_state").get("previous_training_time")
    rows.append(("time by fairseq's clock, all runs", f"{seconds:.0f} s" if seconds else None))
    return [(what, str(value)) for what, value in rows if value]


def _compression(checkpoint: Mapping[str, Any], exported: Exported) -> list[tuple[str, str]]:
    body = {name: weight for name, weight in _weights(exported).items() if not name.startswith("classifier.")}
    zeros, count = sparsity_of(prunable(body))
    rows = [("zeros here, in matrices and embeddings", f"{zeros:,} of {count:,} ({zeros / count:.2%})")]
    pruning = _pruning(checkpoint)
    if pruning:
        zeros, count = pruning["zeros"], pruning["prunable"]
        rows.append((f"pruned to a sparsity of {_figure(pruning['sparsity'])}", f"{zeros:,} of {count:,}"))
    for record in checkpoint.get("compression") or []:
        facts = [f"{key} {_figure(value)}" for key, value in record.items() if key not in ("version", "method")]
        rows.append((str(record.get("method", "compressed")), ", ".join(facts)))
    return rows


def _scores(checkpoint: Mapping[str, Any], cfg: Mapping[str, Any], given: Mapping[str, float]) -> list[tuple[str, str]]:
    later = ", before the last conversion of the weights" if checkpoint.get("compression") else ""
    rows = []
    metric = _section(cfg, "checkpoint").get("best_checkpoint_metric")
    value = _section(checkpoint, "extra_state").get("val_loss")
    if metric and value is not None:
        rows.append((f"{metric}{UNITS.get(metric, '')} on the validation set{later}", _figure(value)))
    pruning = _pruning(checkpoint)
    if pruning:
        rows.append((f"{pruning['metric']} on the validation set{later}", _figure(pruning["score"])))
        rows.append((f"{pruning['metric']} before pruning", _figure(pruning["baseline"])))
    return rows + [(name, _figure(score)) for name, score in given.items()]


def _pruning(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a pruning task noted at the end of a level; empty if none did."""
    record = _section(_section(checkpoint, "extra_state"), "pruning")
    return record if record.keys() >= {"sparsity", "zeros", "prunable", "metric", "score", "baseline"} else {}


def _section(mapping: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = mapping.get(name)
    return section if isinstance(section, Mapping) else {}


def _tokenizer_note(language_model: bool, unknown: int | None, longest: int) -> str:
    if unknown is None:
        return "There is no tokenizer here: input ids are the places in fairseq's dictionary."
    notes = ["The tokenizer gives fairseq's ids."]
    if language_model:
        notes.append("Special tokens in the text are recognized.")
    else:
        notes.append("It trims sentences; special tokens in them are text.")
        notes.append(f"Beyond {longest} tokens fairseq cuts the end, `</s>` included; `truncation=True` would keep it.")
    if unknown:
        notes.append(f"{unknown:,} entries of the BPE are not in the dictionary and so are `<unk>`.")
    return " ".join(notes)


def _weights(exported: Exported) -> dict[str, Tensor]:
    """The tensors of the model without the one that fairseq does not have, and every tied or shared one once."""
    ours = {name: tensor for name, tensor in exported.tensors.items() if "token_type_embeddings" not in name}
    return {name: ours[name] for name, first in tied_to(ours).items() if name == first}


def _figure(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
