"""From checkpoint to checkpoint: quantized for stock fairseq, or packed into a file as small as its information."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from train_large.compression.checkpoint import configuration, read_checkpoint, stock_form, write_checkpoint
from train_large.compression.levels import FULL_BITS, check_bits
from train_large.compression.packed import read_state, write_packed
from train_large.compression.quantization import Quantizer, dequantized, quantized, uniform
from train_large.compression.rate import quantizer_for
from train_large.compression.shrink import ENCODER
from train_large.compression.storage import StorageSummary, block_size, storage
from train_large.data.dictionary import check_trained_with, label_names, parse_dictionary
from train_large.data.documents import digest
from train_large.data.folder import recorded
from train_large.errors import UserError

RECORD_VERSION = 1


@dataclass(frozen=True)
class Method:
    """How to quantize: the paper's way at `bits` bits, or by rate and distortion to a target (rate.py), with weights
    rounded one by one or, by a trellis, together.

    Raises UserError for what does not go together.
    """

    bits: int | None = None
    granularity: str = "tensor"
    clip: bool = False
    target_error: float | None = None
    target_bytes: int | None = None
    trellis: bool = False

    def __post_init__(self) -> None:
        chosen = [self.bits is not None, self.target_error is not None, self.target_bytes is not None]
        if sum(chosen) != 1:
            raise UserError("give one of --bits, --target-error and --target-bytes.")
        if self.bits is None and (self.granularity != "tensor" or self.clip):
            raise UserError("--granularity and --range belong to --bits: a target chooses its own steps.")
        if self.bits is not None and self.trellis:
            raise UserError("--trellis belongs to --target-error and --target-bytes: the paper's grid has none.")
        if self.bits is not None:
            check_bits(self.bits)
            block_size((1,), self.granularity)
        if self.bits == FULL_BITS and (self.granularity != "tensor" or self.clip):
            raise UserError("--granularity and --range are for 2 to 8 bits: 32 leave the weights as they are.")

    def quantizer(self, checkpoint: Mapping[str, Any], files: Mapping[str, str]) -> Quantizer:
        """What makes codes of the weights of `checkpoint`; a target counts the bytes of everything that is packed."""
        if self.bits is not None:
            return uniform(self.bits, self.granularity, self.clip)
        state: dict[str, Tensor] = checkpoint["model"]
        if self.target_error is not None:
            return quantizer_for(state, target_error=self.target_error, trellis=self.trellis)

        def size(quantizer: Quantizer) -> int:
            return write_packed(quantized(state, quantizer), self.described(checkpoint), files, None)

        return quantizer_for(state, target_bytes=self.target_bytes, size=size, trellis=self.trellis)

    def described(self, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """`stock_form` without the weights, with a record of this conversion at the end of its list `compression`."""
        result = stock_form(checkpoint)
        state = result.pop("model")
        record: dict[str, Any] = {"version": RECORD_VERSION}
        if self.bits is not None:
            summary = storage(state, self.bits, self.granularity)
            record |= {"method": "uniform", "bits": self.bits, "granularity": self.granularity}
            if self.clip:
                record["range"] = "mse"
            record |= {"parameters": summary.parameters, "nonzero": summary.nonzero}
            record |= {"bytes": summary.bytes, "bytes_paper": summary.bytes_paper}
        else:
            record |= {"method": "rate", "target_error": self.target_error, "target_bytes": self.target_bytes}
            if self.trellis:
                record["trellis"] = True
        return {**result, "compression": [*result.get("compression", []), record]}


def quantize_checkpoint(source: Path, target: Path, method: Method) -> StorageSummary:
    """Write the checkpoint `source`, quantized, to `target` (it may be the same) in the form that stock fairseq loads.

    The weights are written as the float32 values of their grid points: the model computes what it would at `bits`
    bits, and the summary says what that takes, but the file itself is not that small: `pack_checkpoint` makes one that
    is. The list `compression` in the file has a record of every conversion.

    Raises UserError for a bad checkpoint, bits or granularity, and when `target` cannot be written.
    """
    if method.target_bytes is not None:
        raise UserError("--target-bytes is about the packed file: pack to that size, then unpack.")
    checkpoint = read_checkpoint(source)
    try:
        result = method.described(checkpoint)
        state = dequantized(quantized(checkpoint["model"], method.quantizer(checkpoint, {})))
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    write_checkpoint({**result, "model": state}, target)
    if method.bits is None:
        return storage(state, FULL_BITS)
    return storage(checkpoint["model"], method.bits, method.granularity)


def pack_checkpoint(source: Path, target: Path, method: Method, files: Mapping[str, str] | None = None) -> int:
    """Write the checkpoint `source` as a packed file with `files` in it (see `PackedModel`), and return its bytes.

    Raises UserError as `quantize_checkpoint` does, and for a dictionary with which the model was not trained.
    """
    checkpoint = read_checkpoint(source)
    files = files or {}
    try:
        if "dict.txt" in files:
            _check_dictionary(checkpoint, files["dict.txt"], "dict.txt")
        described = method.described(checkpoint)
        if described.get("criterion"):
            raise UserError("its criterion has weights of its own, which a packed file has no place for.")
        tensors = quantized(checkpoint["model"], method.quantizer(checkpoint, files))
        return write_packed(tensors, described, files, target)
    except UserError as error:
        of_target = str(error).startswith(f"{target} ")  # which is written while the weights are read
        raise UserError(str(error) if of_target else f"{source}: {error}") from error


def unpack_checkpoint(source: Path, target: Path) -> StorageSummary:
    """Write the packed file `source` as the checkpoint that `quantize_checkpoint` makes, bit for bit.

    Raises UserError for a damaged file, and when `target` cannot be written.
    """
    state, checkpoint = read_state(source)
    write_checkpoint({**checkpoint, "model": state}, target)
    return storage(state, FULL_BITS)


def files_of(source: Path, data: Path | None = None, bpe: Path | None = None) -> dict[str, str]:
    """The dictionary, label names and BPE of a checkpoint: what `predict` and `export-hf` need beside the weights.

    `data` is fairseq's data folder; without it, the one that the checkpoint was trained on, if it is still there.
    `bpe` has encoder.json and vocab.bpe; without it, `bpe/` beside the data, or in `text/` beside it, if it is there
    and prepared.json says that the data was encoded with it.
    Raises UserError for a folder that was named and lacks them, and for a dictionary of another model.
    """
    checkpoint = read_checkpoint(source)
    trained_on = str((configuration(checkpoint).get("task") or {}).get("data") or "").split(":")[0]
    found: dict[str, str] = {}
    try:
        if data is not None or trained_on:
            found = _files_in((data or Path(trained_on)).resolve(), checkpoint, bpe)
    except OSError as error:
        if data is not None or bpe is not None:
            raise UserError(f"{error.filename} cannot be read ({error.strerror}): give a folder that can.") from error
    if data is not None and "dict.txt" not in found:
        raise UserError(f"{data} has neither input0/dict.txt nor dict.txt: give fairseq's data folder.")
    if bpe is not None and "dict.txt" not in found:
        raise UserError(f"--bpe {bpe}: the dictionary that goes with it is not known: give --data too.")
    if bpe is not None and "encoder.json" not in found:
        raise UserError(f"{bpe} has not both of encoder.json and vocab.bpe: give the folder that prepare-text made.")
    return found


def _files_in(data: Path, checkpoint: Mapping[str, Any], bpe: Path | None) -> dict[str, str]:
    """What is there of them. Raises OSError for what cannot be read."""
    found: dict[str, str] = {}
    for name, places in {"dict.txt": ["input0/dict.txt", "dict.txt"], "labels.txt": ["label/dict.txt"]}.items():
        for place in places:
            if (data / place).is_file() and name not in found:
                text = _text(data / place)
                if name == "dict.txt":
                    _check_dictionary(checkpoint, text, str(data / place))
                elif not _has_classes(checkpoint, text, str(data / place)):
                    continue
                found[name] = text
    if "dict.txt" not in found:
        return found
    folders = [bpe, bpe / "bpe"] if bpe else [data / "bpe", data.parent / "bpe", data.parent / "text" / "bpe"]
    for folder in folders:
        pair = {name: folder / name for name in ("encoder.json", "vocab.bpe")}
        if all(path.is_file() for path in pair.values()) and (bpe or _encoded_with(folder, data)):
            return found | {name: _text(path) for name, path in pair.items()}
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: give the folder that prepare-text or prepare-task made.") from None


def _encoded_with(bpe: Path, data: Path) -> bool:
    """Whether prepare-task's record in `data`, or prepare-text's above it, says that its BPE is the one in `bpe`."""
    task, _ = recorded(data)
    if "text" in task:  # the digests of encoder.json, vocab.bpe and dict.txt
        return [digest(bpe / "encoder.json"), digest(bpe / "vocab.bpe")] == task["text"][:2]
    text = data.parent
    _, sizes = recorded(text)
    files = [bpe / "encoder.json", bpe / "vocab.bpe", data / "dict.txt"]
    return bpe.parent == text and all(
        file.is_file() and sizes.get(str(file.relative_to(text))) == file.stat().st_size for file in files
    )


def _has_classes(checkpoint: Mapping[str, Any], text: str, name: str) -> bool:
    """Whether `text`, the dictionary of labels called `name`, names what the model gives. Raises UserError
    where it names another number than any of its heads has."""
    cfg = configuration(checkpoint)
    if any((cfg.get(part) or {}).get("regression_target") for part in ("task", "criterion")):
        return False
    outputs = [
        len(weight)
        for key, weight in checkpoint["model"].items()
        if key.startswith("classification_heads.") and key.endswith(".out_proj.weight")
    ]
    names = label_names(parse_dictionary(text, name))
    if outputs and len(names) not in outputs:
        raise UserError(
            f"{name} names {len(names)} classes ({', '.join(names[:5])}) and the model has {outputs[0]}: give the data "
            f"that it was finetuned on, or finetune it on these with --num-classes {len(names)}."
        )
    return True


def _check_dictionary(checkpoint: Mapping[str, Any], text: str, name: str) -> None:
    """Raise UserError if `text`, the dict.txt called `name`, is of another model than `checkpoint`."""
    expected = (configuration(checkpoint).get("model") or {}).get("dictionary_digest")
    embedding = checkpoint["model"].get(f"{ENCODER}.embed_tokens.weight")
    if expected is not None or embedding is not None:
        rows = None if embedding is None else len(embedding)
        check_trained_with(parse_dictionary(text, name), name, rows, expected)
