"""How long a prediction takes, and in how much memory: `make bench` writes bench/latency.csv.

One classifier with random weights, in fairseq's fp32, packed and run by train_large, and in the peers: torchao's int8
weight-only, torch's and onnxruntime's dynamic int8, on the Hugging Face model that `train_large.export` makes of it.
With random weights all labels are close calls, so those are off, but for one contestant, which decides a tenth of a
large batch again, once, as trained models do (docs/runtime.md). Each runs in a process of its own and all of them wait
while one computes. They take turns (A B C A B C), on the same tokens, and the ratios are medians over the rounds of
what a round gives.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from train_large.compression.kernels import supported
from train_large.machine import describe

SHAPES = ((6, 512), (12, 768))  # layers, hidden; heads of 64
ENTRIES, LENGTH, CLASSES = 50265, 128, 2
BATCHES = 1, 32  # sentences
OURS = ("int8 8", "int8 8 again", "int8 6", "int8 4", "bfloat16 8", "float32 8", "float32 6", "float32 4")
AGAIN = 0.1  # of a batch, rounded down, by the one that is called so
PEERS = ("torchao int8wo fp32", "torchao int8wo bf16", "torch dynamic int8", "onnxruntime dynamic int8")
BASE = "fairseq fp32"

_REST = 0.1  # seconds, for the threads of the one before, which wait busily for a while

Predict = Callable[[torch.Tensor], object]


def prepare(folder: Path, layers: int, hidden: int) -> None:
    """Write the model in every form but onnxruntime's: fairseq's checkpoint, packed files, a Hugging Face folder."""
    from safetensors.torch import save_file

    from train_large.compression.checkpoint import stock_form, write_checkpoint
    from train_large.compression.packed import write_packed
    from train_large.compression.quantization import quantize_tensor
    from train_large.compression.storage import tied_to
    from train_large.export.roberta import convert

    model = fairseq_model(layers, hidden)
    cfg = {"model": {**vars(model.args), "arch": "prenorm_roberta", "_name": "prenorm_roberta"}}
    checkpoint = stock_form({"cfg": cfg, "model": model.state_dict()})
    write_checkpoint(checkpoint, folder / "model.pt")
    state, first = checkpoint["model"], tied_to(checkpoint["model"])
    rest = {key: value for key, value in checkpoint.items() if key != "model"}
    for bits in sorted({int(name.split()[1]) for name in OURS}):
        tensors = (
            (name, w if name not in first else quantize_tensor(w, bits) if first[name] == name else first[name])
            for name, w in state.items()
        )
        write_packed(tensors, rest, {}, folder / f"{bits}.packed")
    exported = convert(checkpoint["cfg"], state)
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps(exported.config))
    save_file(exported.tensors, folder / "hf" / "model.safetensors", metadata={"format": "pt"})


def fairseq_model(layers: int, hidden: int) -> torch.nn.Module:
    from fairseq.data import Dictionary

    from fairseq_plugins.models.prenorm_roberta import PrenormRobertaModel

    class Words:
        source_dictionary = Dictionary()

    for i in range(ENTRIES - len(Words.source_dictionary)):
        Words.source_dictionary.add_symbol(str(i))
    torch.manual_seed(1)
    args = argparse.Namespace(
        encoder_layers=layers, encoder_embed_dim=hidden, encoder_attention_heads=hidden // 64, max_positions=512
    )
    model = PrenormRobertaModel.build_model(args, Words)
    model.register_classification_head("head", num_classes=CLASSES)
    return model.eval()


def load_fairseq(folder: Path) -> tuple[Predict, int]:
    from train_large.compression.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(folder / "model.pt")
    args = checkpoint["cfg"]["model"]
    model = fairseq_model(args["encoder_layers"], args["encoder_embed_dim"])
    model.load_state_dict(checkpoint["model"])
    return lambda ids: model(ids, classification_head_name="head")[0], _fp32_bytes(model)


def load_ours(folder: Path, precision: str, bits: str, again: str = "") -> tuple[Predict, int]:
    from train_large.compression.runtime import load_model

    model = load_model(folder / f"{bits}.packed", precision)
    quick = replace(model, doubts=())

    @functools.cache
    def that_decides(batch: int) -> Any:
        again_at_most = int(AGAIN * batch) if again else 0
        if not again_at_most:
            return quick
        leads = (quick.logits(_tokens(batch).tolist())[0] @ torch.tensor([1.0, -1.0])).abs().sort().values
        return replace(model, doubts=(float(leads[again_at_most]),))

    return lambda ids: that_decides(len(ids)).logits(ids.tolist()), model.resident_bytes()


def load_torchao(folder: Path, dtype: torch.dtype) -> tuple[Predict, int]:
    import transformers
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "hf", dtype=dtype).eval()
    quantize_(model, Int8WeightOnlyConfig())
    return lambda ids: model(ids, torch.ones_like(ids)).logits, 0


def load_dynamic(folder: Path) -> tuple[Predict, int]:
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "hf").eval()
    model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    return lambda ids: model(ids, torch.ones_like(ids)).logits, 0


def write_onnx(folder: Path) -> None:
    import transformers
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "hf").eval()
    ids = torch.randint(4, ENTRIES, (2, LENGTH))
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        *(model, (ids, torch.ones_like(ids)), folder / "fp32.onnx"),
        dynamo=True,
        input_names=["input_ids", "attention_mask"],
        dynamic_shapes={"input_ids": {0: batch}, "attention_mask": {0: batch}},
    )
    quant_pre_process(folder / "fp32.onnx", folder / "shapes.onnx")
    quantize_dynamic(folder / "shapes.onnx", folder / "int8.onnx", weight_type=QuantType.QInt8)


def load_onnx(folder: Path) -> tuple[Predict, int]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / "int8.onnx", options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def predict(ids: torch.Tensor) -> object:
        return session.run(None, dict(zip(names, (ids.numpy(), torch.ones_like(ids).numpy()))))

    return predict, 0


def work(name: str, folder: Path) -> None:
    """Load a contestant, then answer each line {"batch", "repeats"} with the seconds that predictions took."""
    loaders = {
        BASE: lambda: load_fairseq(folder),
        PEERS[0]: lambda: load_torchao(folder, torch.float32),
        PEERS[1]: lambda: load_torchao(folder, torch.bfloat16),
        PEERS[2]: lambda: load_dynamic(folder),
        PEERS[3]: lambda: load_onnx(folder),
        **{f"packed {ours}": lambda ours=ours: load_ours(folder, *ours.split()) for ours in OURS},
    }
    predict, weights = loaders[name]()
    _answer({"weights": weights})
    with torch.inference_mode():
        for line in sys.stdin:
            request = json.loads(line)
            ids = _tokens(request["batch"])
            predict(ids)  # its caches belonged to another
            seconds = []
            _forget_peak()
            for _ in range(request["repeats"]):
                begin = time.perf_counter()
                predict(ids)
                seconds.append(time.perf_counter() - begin)
            _answer({"seconds": statistics.median(seconds), "peak": _peak()})


class Contestant:
    """A process that predicts when it is asked to, by lines of JSON."""

    def __init__(self, python: Path, name: str, folder: Path, threads: int) -> None:
        environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": str(threads)}
        self.name, self.rounds, self.peak = name, defaultdict(list), 0.0
        self.process = subprocess.Popen(
            [python, __file__, "--work", name, "--folder", folder],
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment},
        )
        self.weights = self._hear()["weights"]

    def measure(self, batch: int, repeats: int) -> None:
        self.process.stdin.write(json.dumps({"batch": batch, "repeats": repeats}) + "\n")
        self.process.stdin.flush()
        answer = self._hear()
        self.rounds[batch].append(answer["seconds"])
        self.peak = max(self.peak, answer["peak"])

    def _hear(self) -> dict:
        for line in self.process.stdout:  # libraries may print other lines
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise SystemExit(f"{self.name} ended: its error is above")


def race(
    layers: int, hidden: int, batches: Sequence[int], chosen: Sequence[str], peers: Path, rounds: int, threads: int
) -> list[dict]:
    """Rows of the table for one shape, of the contestants that are `chosen`, and BASE."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for python, step in ((sys.executable, "prepare"), (peers, "onnx")):
            command = [python, __file__, "--step", step, "--folder", place, "--shape", f"{layers}x{hidden}"]
            subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
        names = [BASE, *(name for name in chosen if name in PEERS or supported(name.split()[1]))]
        contestants = [
            Contestant(peers if name in PEERS else Path(sys.executable), name, folder, threads) for name in names
        ]
        for batch in batches:
            repeats = max(1, 5 // batch)
            for _ in range(rounds):
                for contestant in contestants:
                    time.sleep(_REST)
                    contestant.measure(batch, repeats)
        for contestant in contestants:
            contestant.process.stdin.close()
            contestant.process.wait()
    base = contestants[0]
    return [
        {
            "model": f"{layers}l_{hidden}h",
            "batch": f"{batch}x{LENGTH}",
            "contestant": contestant.name,
            "milliseconds": f"{1000 * statistics.median(contestant.rounds[batch]):.1f}",
            "ratio_to_fairseq": f"{_ratio(contestant, base, batch):.3f}",
            **{
                f"ratio_to_{peer.name}": f"{_ratio(contestant, peer, batch):.3f}"
                for peer in contestants
                if peer.name in PEERS
            },
            "resident_weights_share_of_fp32": f"{contestant.weights / base.weights:.4f}" if contestant.weights else "",
            "peak_process_mb": f"{contestant.peak / 1e6:.0f}",
            "rounds": rounds,
            "machine": describe(threads),
            "torch": torch.__version__,
        }
        for batch in batches
        for contestant in contestants
    ]


def _tokens(batch: int) -> torch.Tensor:
    return torch.randint(4, ENTRIES, (batch, LENGTH), generator=torch.Generator().manual_seed(batch))


def _ratio(one: Contestant, other: Contestant, batch: int) -> float:
    return statistics.median(a / b for a, b in zip(one.rounds[batch], other.rounds[batch]))


def _fp32_bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * 4 for p in model.parameters())


def _answer(what: dict) -> None:
    print("answer", json.dumps(what), flush=True)


def _forget_peak() -> None:
    if os.path.exists("/proc/self/clear_refs"):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> float:
    """Bytes in memory at most since `_forget_peak`, where the system tells; else 0."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, default=Path(".venv-peers/bin/python"), help="Python with the peers")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each (9)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--shape", action="append", help="layers x hidden, as 6x512; can be repeated")
    parser.add_argument("--batch", type=int, action="append", help="sentences; can be repeated (1 and 32)")
    every = [*(f"packed {name}" for name in OURS), *PEERS]
    parser.add_argument("--contestant", action="append", choices=every, help="beside fairseq's; can be repeated (all)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--step", choices=("prepare", "onnx"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shape] if args.shape else SHAPES
    if args.work:
        return work(args.work, args.folder)
    if args.step == "prepare":
        return prepare(args.folder, *shapes[0])
    if args.step == "onnx":
        return write_onnx(args.folder)
    if not args.peers.exists():
        raise SystemExit(f"{args.peers} does not exist: run make env-peers, or give a Python with the peers by --peers")
    batches = args.batch or BATCHES
    chosen = args.contestant or every
    rows = [row for shape in shapes for row in race(*shape, batches, chosen, args.peers, args.rounds, args.threads)]
    for row in rows:
        print(*list(row.values())[:10], sep="\t")
    aside = args.out.with_suffix(".tmp")
    with aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return os.replace(aside, args.out)


if __name__ == "__main__":
    main()
