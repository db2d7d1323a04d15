"""What a trellis takes off a file at the error of other libraries: `make bench` writes bench/trellis.csv, after
bench/file_size.csv.

    PYTHONPATH=. .venv-peers/bin/python bench/trellis.py

For the settings on MiniLM over which ours, rounded weight by weight, is above the aim of 0.9: the bytes of `pack
--target-error E --trellis` at the setting's error or less.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import table
import torch
from file_size import models, pack

from train_large.compression.rate import Plans, quantizer_for
from train_large.machine import describe

MODEL = "MiniLM"


def main(downloads: Path, sizes: Path, least: float, out: Path) -> None:
    name, tensors = next(models(Path(), downloads))
    assert name == MODEL
    with sizes.open(newline="") as file:
        found = [row for row in csv.DictReader(file) if row["model"] == MODEL and row["ours_over_peer"]]
    found = [row for row in found if float(row["ours_over_peer"]) >= least]
    plans, packed, rows = Plans(tensors), {}, []
    for row in sorted(found, key=lambda row: -float(row["ours_over_peer"])):
        target = float(row["relative_error"])
        if target not in packed:
            begin = time.perf_counter()
            mine = pack(tensors, quantizer_for(tensors, target_error=target, plans=plans, trellis=True))
            packed[target] = mine, time.perf_counter() - begin
        mine, seconds = packed[target]
        rows.append(
            {key: row[key] for key in ("model", "peer", "setting", "bytes", "relative_error", "ours_over_peer")}
            | {
                "trellis_bytes": mine["bytes"],
                "trellis_relative_error": mine["relative_error"],
                "trellis_over_peer": f"{mine['bytes'] / float(row['bytes']):.4f}",
                "trellis_over_ours": f"{mine['bytes'] / float(row['ours_bytes']):.4f}",
                "seconds": f"{seconds:.0f}",
                "machine": describe(torch.get_num_threads()),
            }
        )
        print(*list(rows[-1].values())[:-1], sep="  ", flush=True)
    table.write(rows, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--downloads", type=Path, default=Path("runs/downloads"), help="where MiniLM's weights are")
    parser.add_argument("--sizes", type=Path, default=Path(__file__).with_name("file_size.csv"))
    parser.add_argument("--least", type=float, default=0.9, help="settings with an `ours_over_peer` of this or more")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    arguments = parser.parse_args()
    main(arguments.downloads, arguments.sizes, arguments.least, arguments.out)
