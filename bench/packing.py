"""Speed and memory of packing, unpacking and choosing what to prune: `make bench` writes bench/packing.csv.

    PYTHONPATH=. .venv/bin/python bench/packing.py

A checkpoint of 12 layers 768 wide (494 MB of weights, drawn with the heavy tails that trained ones have) is packed,
read into memory, and unpacked into a file again, each in a process of its own, so that peak memory is its own; three
rounds in turn, medians. Choosing the smallest of 353 million weights is done on tensors of 24 x 1,024's shapes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import table
import torch
from torch import Tensor

from train_large.compression.checkpoint import write_checkpoint
from train_large.compression.conversion import Method, pack_checkpoint, unpack_checkpoint
from train_large.compression.packed import read_state
from train_large.compression.pruning import smallest
from train_large.machine import describe

ROUNDS, BITS, SPARSITY = 3, (8, 6, 4), 0.6


def weights(layers: int, hidden: int, entries: int = 50_265, positions: int = 514) -> dict[str, Tensor]:
    """A state dict as fairseq's RoBERTa has it, of Student's t with five degrees of freedom."""
    torch.manual_seed(1)
    t = torch.distributions.StudentT(5.0)

    def draw(*shape: int) -> Tensor:
        return t.sample(shape).mul_(0.02)

    prefix = "encoder.sentence_encoder."
    state = {f"{prefix}embed_tokens.weight": draw(entries, hidden)}
    state[f"{prefix}embed_positions.weight"] = draw(positions, hidden)
    for i in range(layers):
        layer = f"{prefix}layers.{i}."
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            state[f"{layer}self_attn.{name}.weight"] = draw(hidden, hidden)
            state[f"{layer}self_attn.{name}.bias"] = draw(hidden)
        for name, shape in {"fc1": (4 * hidden, hidden), "fc2": (hidden, 4 * hidden)}.items():
            state[f"{layer}{name}.weight"], state[f"{layer}{name}.bias"] = draw(*shape), draw(shape[0])
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            state[f"{layer}{name}.weight"], state[f"{layer}{name}.bias"] = 1 + draw(hidden), draw(hidden)
    return state


def memory_mb(field: str) -> float:
    """VmRSS, what is resident now, or VmHWM, the most that was: of this program alone, as getrusage's is not."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024 / 1e6


def one(what: str, bits: int, folder: Path) -> dict[str, float]:
    """One measurement, in this process: seconds, and the peak of its memory with and without what it starts with."""
    source, packed = folder / "in.pt", folder / f"{bits}.safetensors"
    before = memory_mb("VmRSS")
    chosen = weights(24, 1024) if what == "threshold" else {}
    if chosen:  # what drawing them left in the heap is not theirs
        before = memory_mb("VmRSS") - sum(w.numel() for w in chosen.values()) * 4 / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, once the weights to choose from are there
    began = time.perf_counter()
    if what == "pack":
        pack_checkpoint(source, packed, Method(bits))
    elif what == "read":
        read_state(packed)
    elif what == "unpack":
        unpack_checkpoint(packed, folder / "out.pt")
    else:
        chosen = {name: w for name, w in chosen.items() if w.dim() > 1}
        smallest(chosen, SPARSITY)
    return {"seconds": time.perf_counter() - began, "peak_mb": memory_mb("VmHWM"), "before_mb": before}


def main(out: Path) -> None:
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        state = weights(12, 768)
        size = sum(w.numel() for w in state.values()) * 4 / 1e6
        prunable = sum(w.numel() for w in weights(24, 1024).values() if w.dim() > 1)
        model = {"encoder_layers": 12, "encoder_embed_dim": 768, "_name": "roberta_prenorm", "arch": "roberta_prenorm"}
        write_checkpoint({"model": state, "cfg": {"model": model}}, folder / "in.pt")
        del state
        tasks = [(what, bits) for bits in BITS for what in ("pack", "read", "unpack")] + [("threshold", 32)]
        found: dict[tuple[str, int], list[dict[str, float]]] = {task: [] for task in tasks}
        for _ in range(ROUNDS):
            for what, bits in tasks:
                command = [sys.executable, __file__, "--one", what, "--bits", str(bits), "--folder", work]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found[what, bits].append(json.loads(done.stdout))
        rows = []
        for (what, bits), measured in found.items():
            seconds = statistics.median(one["seconds"] for one in measured)
            peak = max(one["peak_mb"] for one in measured)
            before = min(one["before_mb"] for one in measured)
            of = prunable * 4 / 1e6 if what == "threshold" else size
            row = {
                "what": what,
                "bits": bits,
                "float32_mb": f"{of:.0f}",
                "seconds_median": f"{seconds:.2f}",
                "mb_per_second": f"{of / seconds:.0f}",
                "peak_mb": f"{peak:.0f}",
                "peak_over_float32": f"{peak / of:.2f}",
                "peak_less_python_over_float32": f"{(peak - before) / of:.2f}",
                "file_mb": f"{(folder / f'{bits}.safetensors').stat().st_size / 1e6:.1f}" if bits < 32 else "",
                "rounds": ROUNDS,
                "machine": describe(torch.get_num_threads()),
                "torch": torch.__version__,
            }
            print(*row.values(), sep="  ", flush=True)
            rows.append(row)
    table.write(rows, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--one")
    parser.add_argument("--bits", type=int)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options.bits, options.folder)))
    else:
        main(Path(__file__).with_suffix(".csv"))
