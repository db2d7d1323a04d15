"""A checkpoint of fairseq as a folder that plain `transformers` loads: config, weights, tokenizer, model card.

config.json         the class and its sizes, label names          README.md              the model card
model.safetensors   the weights, float32                          tokenizer.json, tokenizer_config.json
model.onnx          if asked for
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from train_large.compression.checkpoint import configuration, is_safetensors, read_checkpoint, stock_form
from train_large.compression.conversion import files_of
from train_large.compression.packed import read_packed
from train_large.data import folder
from train_large.data.dictionary import (
    BOS,
    EOS,
    check_trained_with,
    find_dictionary,
    read_dictionary,
    read_labels,
)
from train_large.errors import UserError
from train_large.export.model_card import model_card
from train_large.export.onnx import export_onnx
from train_large.export.packages import need
from train_large.export.roberta import RESERVED_POSITIONS, Exported, convert
from train_large.export.tokenizer import find_bpe, write_tokenizer

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


@dataclass(frozen=True)
class Export:
    """What was written."""

    architecture: str
    """the class in transformers"""
    labels: tuple[str, ...]
    """names of the classes; none for a masked language model, or where they are not known"""
    files: dict[str, int]
    """bytes by the name of the file"""


def export_hf(
    source: Path,
    target: Path,
    *,
    dictionary: Path | None = None,
    bpe: Path | None = None,
    labels: Sequence[str] | None = None,
    head: str | None = None,
    scores: Mapping[str, float] | None = None,
    onnx: bool = False,
) -> Export:
    """Write the fairseq checkpoint or packed file `source` as the new folder `target`, whole or not at all.

    A checkpoint with a classification head becomes a RobertaPreLayerNormForSequenceClassification, one without a
    ...ForMaskedLM; XLMRobertaXL takes its place for models without a norm on the embeddings. Values are those of the
    checkpoint, in float32, quantized or not.

    dictionary: dict.txt, or a folder of the data that holds it (see `find_dictionary`). bpe: the folder of
    encoder.json and vocab.bpe, or a prepared text; without it no tokenizer is written. Without a dictionary, both are
    those that a packed file holds, or those of the data that the checkpoint was trained on (`files_of`). labels: names
    of the classes in order; without them those of label/dict.txt beside the dictionary's folder, where it exists. head:
    which classification head, where there are several. scores: measured ones for the model card, by name.

    Raises UserError for a bad checkpoint, a model that Hugging Face's classes cannot express (with the flag in the
    way), a dictionary or labels of another model, and where `target` exists or cannot be written.
    """
    try:
        if target.exists() or target.is_symlink():
            raise UserError(f"{target} exists already: choose another folder or delete it")
    except OSError as error:
        raise UserError(f"{target} could not be written ({error.strerror}): give another place.") from error
    need("safetensors.torch")
    with tempfile.TemporaryDirectory() as own:
        checkpoint, files = _read(source, with_files=dictionary is None)
        if dictionary is None:
            if "dict.txt" not in files:
                raise UserError(f"the dictionary of {source} is not known: give it by --dictionary")
            try:
                dictionary = _lay_out(files, Path(own))
            except OSError as error:
                raise UserError(f"{own} could not be written ({error.strerror}): make room, or set TMPDIR.") from None
            bpe = bpe or (dictionary if "encoder.json" in files else None)
        return _export(checkpoint, source, target, dictionary, bpe, labels, head, scores or {}, onnx)


def _export(
    checkpoint: Mapping[str, Any],
    source: Path,
    target: Path,
    dictionary: Path,
    bpe: Path | None,
    labels: Sequence[str] | None,
    head: str | None,
    scores: Mapping[str, float],
    onnx: bool,
) -> Export:
    stock = stock_form(checkpoint)
    try:
        exported = convert(stock["cfg"], stock["model"], head)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    file = find_dictionary(dictionary)
    symbols = read_dictionary(file)
    expected = stock["cfg"]["model"].get("dictionary_digest")
    check_trained_with(symbols, str(file), exported.config["vocab_size"], expected)
    names = _label_names(labels, file, exported)
    pieces = find_bpe(bpe) if bpe is not None else None
    config = {**exported.config, **_label_config(names, exported.classes)}

    with folder.whole(target) as part:
        (part / CONFIG).write_text(json.dumps(config, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        _save(exported.tensors, part / WEIGHTS)
        unknown = None
        if pieces is not None:
            task = stock["cfg"]["task"]
            unknown = write_tokenizer(
                part,
                symbols,
                pieces,
                max_length=config["max_position_embeddings"] - RESERVED_POSITIONS,
                init_token=task.get("init_token", BOS),  # pretraining has no such flag, and begins with <s>
                separator_token=task.get("separator_token", EOS),
                sentences=exported.classes is not None,
            )
        card = model_card(
            checkpoint,
            configuration(checkpoint),
            exported,
            source=source.name,
            file_bytes=(part / WEIGHTS).stat().st_size,
            labels=names,
            unknown=unknown,
            scores=scores,
        )
        (part / CARD).write_text(card, encoding="utf-8")
        if onnx:
            export_onnx(part)
        files = {file.name: file.stat().st_size for file in sorted(part.iterdir())}
    return Export(config["architectures"][0], tuple(names or ()), files)


def _read(source: Path, with_files: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """A checkpoint, and the files that go with it by the names of `PackedModel.files`."""
    if not is_safetensors(source):
        return read_checkpoint(source), files_of(source) if with_files else {}
    packed = read_packed(source)
    return {**packed.checkpoint, "model": packed.state()}, packed.files


def _lay_out(files: Mapping[str, str], folder: Path) -> Path:
    """Write them where they lie in a prepared task, and the BPE in a prepared text."""
    places = {"dict.txt": "input0/dict.txt", "labels.txt": "label/dict.txt"}
    places |= {name: f"bpe/{name}" for name in ("encoder.json", "vocab.bpe")}
    for name, text in files.items():
        place = folder / places[name]
        place.parent.mkdir(exist_ok=True)
        place.write_text(text, encoding="utf-8")
    return folder


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    safetensors = need("safetensors")
    try:
        need("safetensors.torch").save_file(dict(tensors), file, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:  # its own, for a full disk too
        raise OSError(str(error)) from error
    shutil.copymode(file.with_name(CONFIG), file)  # it writes for the owner's eyes only


def _label_names(labels: Sequence[str] | None, dictionary: Path, exported: Exported) -> list[str] | None:
    """The names of the classes where they are given or found, in order."""
    if exported.classes is None:
        if labels is not None:
            raise UserError("--labels are for a classifier: the checkpoint is a masked language model")
        return None
    if labels is not None:
        if len(labels) != exported.classes or len(set(labels)) != len(labels) or not all(map(str.strip, labels)):
            raise UserError(f"--labels {','.join(labels)}: give {exported.classes} different names, one for each class")
        return list(labels)
    beside = dictionary.parent.parent / "label" / "dict.txt"
    if dictionary.parent.name == "input0" and beside.is_file() and exported.config.get("problem_type") != "regression":
        return read_labels(beside, exported.classes)
    return None


def _label_config(names: Sequence[str] | None, classes: int | None) -> dict[str, dict]:
    if classes is None:
        return {}
    names = names or [f"LABEL_{index}" for index in range(classes)]
    return {
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }
