"""The demo's classifiers in plain transformers and onnxruntime beside fairseq: writes bench/exported_labels.csv.

    PYTHONPATH=.:user_dir_examples/pocket .venv/bin/python bench/exported_labels.py --demo runs/demo \
        --sentences runs/downloads/movie-reviews/reviews.tsv

Every finetuned and pruned checkpoint of the demo, and the packed files that it keeps, are exported by `export_hf`.
transformers reads the whole validation set as text, by the folder's own tokenizer, and fairseq what the demo prepared
of the same sentences.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

import evaluate  # user_dir_examples/pocket's
import onnxruntime
import table
import torch
from fairseq import utils
from recipe import USER_DIR

from train_large.compression.conversion import unpack_checkpoint
from train_large.data.documents import digest
from train_large.data.folder import RECORD
from train_large.data.glue import _hold_out, _read
from train_large.export.huggingface import export_hf
from train_large.export.onnx import export_onnx
from train_large.export.packages import need
from train_large.machine import describe

transformers = need("transformers")  # not by import: see there
HEAD = "sentence_classification_head"
BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="the demo's folder")
    parser.add_argument("--sentences", type=Path, required=True, help="the task's TSV, which the demo was made from")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    utils.import_user_module(Namespace(user_dir=str(USER_DIR)))
    task = args.demo / "task"
    made = json.loads((task / RECORD).read_text(encoding="utf-8"))["parameters"]
    if digest(args.sentences) != made["source"]["train"]:
        raise SystemExit(f"error: {args.demo} was not made from {args.sentences}: give the TSV that it was made from.")
    held_out = _hold_out(list(_read("tsv", args.sentences)), args.sentences, made["valid_fraction"], made["seed"])
    sentences = [row.sentences[0] for row in held_out["valid"]]
    rows = []
    for model, kind, source in sources(args.demo):
        row = {"model": model, "weights": kind, **compare(source, task, args.demo / "text", sentences)}
        rows.append(row | {"machine": describe(torch.get_num_threads()), "transformers": transformers.__version__})
        print(*row.values(), sep="\t", flush=True)
    table.write(rows, args.out)


def sources(demo: Path) -> Iterator[tuple[str, str, Path]]:
    """(size, what was done to its weights, the file)."""
    for folder in sorted(path.parent for path in demo.glob("*/finetune")):
        yield folder.name, "finetuned", folder / "finetune" / "checkpoint_best.pt"
        for pruned in sorted((folder / "prune").glob("checkpoint_sparsity_*.pt")):
            yield folder.name, f"pruned to {pruned.stem.removeprefix('checkpoint_sparsity_')} %", pruned
        for packed in sorted((folder / "measure").glob("packed_[468].safetensors")):
            yield folder.name, f"packed at {packed.stem.removeprefix('packed_')} bits", packed


@torch.no_grad()
def compare(source: Path, data: Path, text: Path, sentences: Sequence[str]) -> dict[str, object]:
    """fairseq's logits beside those of the exported folder, over the whole validation set."""
    with tempfile.TemporaryDirectory() as folder:
        exported, checkpoint = Path(folder) / "exported", source
        if source.suffix == ".safetensors":
            checkpoint = Path(folder) / "unpacked.pt"
            unpack_checkpoint(source, checkpoint)
        export_hf(source, exported, dictionary=data, bpe=text)
        session = onnxruntime.InferenceSession(export_onnx(exported))
        tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
        network = transformers.AutoModelForSequenceClassification.from_pretrained(exported).eval()
        model, task, _ = evaluate.load(str(checkpoint), str(data))
    dataset = task.dataset("valid")
    assert len(dataset) == len(sentences)
    classes = task.label_dictionary
    names = [network.config.id2label[at] for at in range(network.config.num_labels)]
    assert names == classes.symbols[classes.nspecial : classes.nspecial + len(names)]
    same_ids = right = 0
    labels = {"transformers": 0, "onnxruntime": 0}
    largest = dict.fromkeys(labels, 0.0)
    for start in range(0, len(sentences), BATCH):
        examples = [dataset[at] for at in range(start, min(start + BATCH, len(sentences)))]
        sample = dataset.collater(examples)
        logits = model(**sample["net_input"], features_only=True, classification_head_name=HEAD)[0]
        # fairseq cuts the end, </s> included (docs/export.md).
        ids = [each[: task.cfg.max_positions] for each in tokenizer(sentences[start : start + BATCH])["input_ids"]]
        same_ids += sum(
            own == example["net_input.src_tokens"].tolist() for own, example in zip(ids, examples, strict=True)
        )
        batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        theirs = {
            "transformers": network(**inputs).logits,
            "onnxruntime": torch.from_numpy(session.run(None, {name: t.numpy() for name, t in inputs.items()})[0]),
        }
        told = logits.argmax(1)
        right += int((told == sample["target"].view(-1)).sum())
        for name, found in theirs.items():
            assert found.isfinite().all()
            labels[name] += int((found.argmax(1) == told).sum())
            largest[name] = max(largest[name], float((found - logits).abs().max()))
    return {
        "sentences": len(sentences),
        "accuracy": f"{right / len(sentences):.4f}",
        "same_ids": same_ids,
        **{f"same_labels_{name}": count for name, count in labels.items()},
        **{f"largest_difference_{name}": f"{value:.1e}" for name, value in largest.items()},
    }


if __name__ == "__main__":
    main()
