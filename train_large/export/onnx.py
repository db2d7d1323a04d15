"""An exported folder's model as ONNX, by torch's own exporter, kept only when onnxruntime computes the same."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from train_large.data.dictionary import PAD, SPECIAL
from train_large.errors import UserError
from train_large.export.packages import need
from train_large.export.roberta import RESERVED_POSITIONS

FILE = "model.onnx"
TOLERANCE = 1e-4  # between the logits of torch and of onnxruntime
PROTOBUF_LIMIT = 2**31  # bytes that one ONNX file may have; beyond, the weights lie in a second file


class _Logits(torch.nn.Module):
    """The model as a function of two tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def export_onnx(folder: Path) -> Path:
    """Write folder/model.onnx (int64 input_ids and attention_mask of any batch and length, to float32 logits).

    folder: as `export_hf` wrote it. The file appears after onnxruntime has computed torch's logits, to 1e-4, on padded
    batches of several shapes. Raises UserError when a package is missing, the folder is no exported model, or the
    logits differ.
    """
    for package in ("onnx", "onnxscript"):
        need(package)
    runtime, transformers = need("onnxruntime"), need("transformers")
    config = _config(folder)
    with _quiet(transformers):
        model = getattr(transformers, config["architectures"][0]).from_pretrained(folder, attn_implementation="eager")
    module = _Logits(model).eval()
    longest = config["max_position_embeddings"] - RESERVED_POSITIONS
    weights = sum(weight.numel() * weight.element_size() for weight in module.parameters())
    with tempfile.TemporaryDirectory(dir=folder, prefix=".onnx.") as aside:
        draft = Path(aside) / FILE
        sizes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=1, max=longest)}
        with _quiet(transformers):
            torch.onnx.export(
                module,
                _batch(config, 2, min(7, longest)),
                draft,
                input_names=["input_ids", "attention_mask"],
                output_names=["logits"],
                dynamic_shapes=(sizes, sizes),
                dynamo=True,
                external_data=weights > 0.9 * PROTOBUF_LIMIT,
                verbose=False,
            )
        session = runtime.InferenceSession(draft, providers=["CPUExecutionProvider"])
        for rows, length in ((1, 1), (1, longest), (3, min(5, longest)), (5, min(16, longest))):
            ids, mask = _batch(config, rows, length)
            with torch.no_grad():
                expected = module(ids, mask)
            (found,) = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
            difference = (torch.from_numpy(found) - expected).abs().max().item()
            if not difference <= TOLERANCE:
                raise UserError(
                    f"{folder / FILE} was not written: onnxruntime's logits differ from torch's by {difference:.2g}; "
                    "use the folder with transformers"
                )
        del session
        for file in sorted(Path(aside).iterdir(), key=lambda file: file.name == FILE):  # the model last
            os.replace(file, folder / file.name)
    return folder / FILE


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["architectures"][0], config["max_position_embeddings"], config["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        raise UserError(f"{folder} is not a model that export-hf wrote: give such a folder") from None
    return config


def _batch(config: dict[str, Any], rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids at random and their mask; all rows but the first end in padding, where they are long enough."""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(len(SPECIAL), config["vocab_size"], (rows, length), generator=generator)
    for row in range(1, rows):
        ids[row, max(1, length - row) :] = PAD
    return ids, (ids != PAD).long()


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the exporter's log of its steps, and transformers' bar for the loading of weights."""
    before, bars = logging.root.manager.disable, transformers.utils.logging
    with_bars = bars.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    bars.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        if with_bars:
            bars.enable_progress_bar()
