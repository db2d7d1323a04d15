"""The paper's claims, figures and tables of what the scripts have made: python claims.py OUT REPORT

Reads what is finished below OUT, of all experiments and seeds, into the study's CSV files (REPORT/results), and writes
the study's report of them into REPORT: index.html, claims.csv and the figures. Nothing is trained.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "study")]

import compressed  # noqa: E402
import finetuned  # noqa: E402
import measurements  # noqa: E402
import study_report  # noqa: E402

from train_large import runlog, sizes  # noqa: E402
from train_large.budget import seconds_used  # noqa: E402
from train_large.errors import UserError  # noqa: E402
from train_large.sizes import Size  # noqa: E402

NAME = re.compile(
    r"(?P<size>\d+l_\d+h)-batch(?P<batch>\d+)(-share_(?P<share>\w+?))?(-data(?P<data>[\d.]+))?(-to(?P<target>[\d.]+))?"
    r"-seed(?P<seed>\d+)"
)
RECIPE = re.compile(r"batch(\d+),rate([^,]+),seed(\d+),dropout([^,]+)")  # of sst2_grid
LENGTH = 128  # positions of every model (common.sh)
BATCH, RATE, DROPOUT = 32, 1e-5, 0.1  # of finetuning, unless a grid has others (common.sh)


@dataclass(frozen=True)
class Run:
    """A pretraining in OUT/pretrain, by its folder's name and its log."""

    folder: Path
    size: Size
    batch: int
    share: str
    data: float
    target: float | None
    seed: int
    lines: list[dict[str, Any]]

    @property
    def fields(self) -> dict[str, Any]:
        """Those that every row of a masked language model has (`measurements.Trained`)."""
        said = runlog.facts(self.lines)
        entries = int(said["vocabulary"])
        return {
            **{"run": self.folder.name, "size": self.size.name, "layers": self.size.layers, "hidden": self.size.hidden},
            "parameters": sizes.parameters(self.size, entries, max_positions=LENGTH, share=self.share),
            "layer_parameters": sizes.parameters_without_embeddings(self.size, entries, share=self.share),
            **{"batch": self.batch, "rate": float(said["learning_rate"]), "share": self.share, "data": self.data},
            **{"target": self.target, "seed": self.seed},
        }

    @property
    def experiments(self) -> list[str]:
        """Those whose curves it is among, by what the scripts give them."""
        if self.target is not None:
            return ["finetuning"]
        plain = self.share == "none" and self.data == 100
        deep, wide = plain and self.size.hidden == 768, plain and self.size.layers == 12
        one, usual = self.size.name == "12l_768h", self.batch == 8192
        found = {
            "depth": deep and usual,
            "width": wide and usual,
            "batch_size": plain and one,
            "flops": plain and (one or ((deep or wide) and usual)),
            "dataset_size": self.share == "none" and self.size.hidden == 768 and usual,
            "layer_sharing": self.data == 100 and one and usual,
        }
        return [name for name, is_in in found.items() if is_in]

    def seconds(self, line: dict[str, Any]) -> float:
        return _seconds(self.folder, runlog.facts(self.lines), line)

    def validations(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == "valid" and line["subset"] == "valid"]

    def at(self, updates: int) -> dict[str, Any]:
        """`updates`, `seconds` and `perplexity` of its first validation from so many updates on, or its last."""
        lines = self.validations()
        line = next((line for line in lines if line["updates"] >= updates), lines[-1])
        return {"updates": updates, "seconds": self.seconds({**line, "updates": updates}), "perplexity": _ppl(line)}


def main(arguments: Sequence[str] | None = None) -> int:
    words = argparse.ArgumentParser(prog="claims.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    words.add_argument("out", type=Path, metavar="OUT", help="where the scripts wrote to")
    words.add_argument("report", type=Path, metavar="REPORT", help="folder to make")
    options = words.parse_args(arguments)
    try:
        rows = gather(options.out)
        if not any(rows.values()):
            raise UserError(f"{options.out}: nothing is finished there; run an experiment's paper.sh first.")
        for name, found in rows.items():
            measurements.write(found, options.report / "results" / name)
        study_report.write(options.report / "results", options.report)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.report / 'index.html'}")
    return 0


def gather(out: Path) -> dict[str, list[Any]]:
    """The rows of every experiment. Raises UserError for what is finished and cannot be read."""
    runs = {run.folder.name: run for run in _runs(out / "pretrain")}
    rows: dict[str, list[Any]] = {name: [] for name in (*_EXPERIMENTS, "batch_size", "translation")}
    for run in runs.values():
        for name in run.experiments:
            rows[name] += _curve(run)
    rows["layer_sharing"] += _memory(out)
    for name, find in _EXPERIMENTS.items():
        if find is not None:
            rows[name] += find(out, runs)
    rows["translation"] += _translations(out)
    return rows


def _runs(folder: Path) -> Iterator[Run]:
    for done in sorted(folder.glob("*/done")):
        match = NAME.fullmatch(done.parent.name)
        if match is None:
            continue
        target = None if match["target"] is None else float(match["target"])
        yield Run(
            folder=done.parent,
            size=Size.parse(match["size"]),
            batch=int(match["batch"]),
            share=match["share"] or "none",
            data=float(match["data"] or 100),
            target=target,
            seed=int(match["seed"]),
            lines=runlog.read(str(done.with_name(runlog.NAME))),
        )


def _ppl(line: dict[str, Any]) -> float:
    return float("inf") if line["perplexity"] is None else line["perplexity"]  # of a run that diverged


def _curve(run: Run) -> Iterator[measurements.Point]:
    for line in run.validations():
        yield measurements.Point(
            **run.fields,
            updates=int(line["updates"]),
            seconds=run.seconds(line),
            flops=float(line["flops"]),
            tokens=int(line["tokens"]),
            perplexity=_ppl(line),
            bleu=None,
        )


def _memory(out: Path) -> Iterator[measurements.Memory]:
    """Of the GPU, at 32 sequences; measured once for all seeds."""
    for path in sorted(out.glob("memory-*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                yield measurements.Memory(
                    size=row["size"],
                    share=path.stem.removeprefix("memory-"),
                    batch=32,
                    length=LENGTH,
                    seed=1,
                    peak_bytes=int(row["peak_memory_bytes"]),
                )


# ------------------------------------------------------------------------------------------------ accuracies


def _accuracies(
    out: Path,
    task: str,
    run: Run,
    folder: Path,
    recipe: tuple[int, float, int, float] | None = None,
    checkpoint: tuple[float, int] | None = None,
) -> Iterator[measurements.Accuracy]:
    """A row for each packed file in folder/quantized. `checkpoint`: its share of the pretraining, and its updates;
    the end unless given. `bytes` are those of the files."""
    ladder = {}
    if (folder / "ladder.jsonl").exists():
        ladder = {
            round(100 * line["sparsity"]): line
            for line in map(json.loads, (folder / "ladder.jsonl").read_text(encoding="utf-8").splitlines())
        }
    share, updates = checkpoint or (1.0, int(run.lines[-1]["updates"]))
    for row in compressed.rows_of(folder):
        level = ladder.get(row.sparsity, {"updates": 0, "recovered": True})
        yield measurements.Accuracy(
            **run.fields,
            **run.at(updates),
            **_finetuning(run, recipe),
            checkpoint=share,
            sparsity=row.sparsity / 100,
            bits=row.bits,
            accuracy=row.accuracy,
            examples=_examples(out / task),
            nonzero=row.nonzero,
            bytes=row.bytes_file,
            bytes_paper=row.bytes_paper,
            recovery_updates=int(level["updates"]),
            recovered=bool(level["recovered"]),
        )


def _finetuning(run: Run, recipe: tuple[int, float, int, float] | None) -> dict[str, Any]:
    names = ("finetune_batch", "finetune_rate", "finetune_seed", "finetune_dropout")
    return dict(zip(names, recipe or (BATCH, RATE, run.seed, DROPOUT), strict=True))


def _examples(prepared: Path) -> int:
    record = json.loads((prepared / "prepared.json").read_text(encoding="utf-8"))
    return sum(record["summary"]["splits"]["valid"].values())


def _compression(out: Path, runs: dict[str, Run]) -> Iterator[Any]:
    for folder in _measured(out / "compress" / "mnli", runs):
        yield from _accuracies(out, "mnli", runs[folder.name], folder)


def _measured(folder: Path, runs: dict[str, Run], behind: str = "") -> list[Path]:
    found = (quantized.parent for quantized in sorted(folder.glob(f"*{behind}/quantized")))
    return [path for path in found if path.name.removesuffix(behind) in runs and any(path.glob("quantized/*.log"))]


def _sst2_grid(out: Path, runs: dict[str, Run]) -> Iterator[Any]:
    for folder in _measured(out / "sst2_grid", runs, "-compressed"):
        name = folder.name.removesuffix("-compressed")
        match = RECIPE.fullmatch((folder.with_name(name) / "best").readlink().name)
        if match is None:
            raise UserError(f"{folder.with_name(name) / 'best'}: it is no link to a finetuning of the grid.")
        recipe = (int(match[1]), float(match[2]), int(match[3]), float(match[4]))
        yield from _accuracies(out, "sst-2", runs[name], folder, recipe)


def _convergence(out: Path, runs: dict[str, Run]) -> Iterator[Any]:
    """A checkpoint's share is that of the last epoch that was finetuned of its size."""
    found: dict[str, dict[int, Path]] = {}
    for quantized in (out / "convergence").glob("*-epoch*/quantized"):
        name, _, epoch = quantized.parent.name.rpartition("-epoch")
        if name in runs:
            found.setdefault(name, {})[int(epoch)] = quantized.parent
    for name, folders in sorted(found.items()):
        for epoch, folder in sorted(folders.items()):
            saved = [
                line
                for line in runs[name].lines
                if line["kind"] == "checkpoint" and line.get("file") == f"checkpoint{epoch}.pt"
            ]
            if not saved:
                raise UserError(f"{runs[name].folder / runlog.NAME}: it has no checkpoint{epoch}.pt.")
            checkpoint = (epoch / max(folders), int(saved[-1]["updates"]))
            yield from _accuracies(out, "mnli", runs[name], folder, checkpoint=checkpoint)


def _finetuned(out: Path, runs: dict[str, Run]) -> Iterator[Any]:
    """Table 2's on MNLI: accuracies of what nothing was taken from."""
    for run in runs.values():
        folder = out / "finetune" / "mnli" / run.folder.name
        if run.target is None or not (folder / "done").exists():
            continue
        fields, whole = run.fields, 4 * run.fields["parameters"]
        yield measurements.Accuracy(
            **fields,
            **run.at(int(run.lines[-1]["updates"])),
            **_finetuning(run, None),
            checkpoint=1.0,
            sparsity=0.0,
            bits=32,
            accuracy=finetuned.best_accuracy(folder),
            examples=_examples(out / "mnli"),
            nonzero=fields["parameters"],
            bytes=whole,
            bytes_paper=whole,
            recovery_updates=0,
            recovered=True,
        )


def _weight_error(out: Path, runs: dict[str, Run]) -> Iterator[measurements.Error]:
    for run in runs.values():
        path = out / f"weight_error-{run.size.name}-seed{run.seed}.csv"
        if "depth" not in run.experiments or not path.exists():
            continue
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                numbers = {name: float(row[name]) for name in ("mean", "mean_absolute", "variance", "deviation")}
                yield measurements.Error(
                    **run.fields,
                    **numbers,
                    sparsity=float(row["sparsity"]),
                    bits=int(row["bits"]),
                    kind=row["kind"],
                    weights=int(row["parameters"]),
                )


_EXPERIMENTS = {
    **dict.fromkeys(("depth", "width", "flops", "dataset_size", "layer_sharing")),
    "compression": _compression,
    "sst2_grid": _sst2_grid,
    "convergence": _convergence,
    "finetuning": _finetuned,
    "weight_error": _weight_error,
}


# ------------------------------------------------------------------------------------------------ translation


def _translations(out: Path) -> Iterator[Any]:
    for path in sorted((out / "translate").glob("*/scores.json")):
        folder = path.parent
        match = re.fullmatch(r"(\d+l_\d+h)-gpus\d+-seed(\d+)", folder.name)
        if match is None:
            continue
        lines = runlog.read(str(folder / runlog.NAME))
        said, size = runlog.facts(lines), Size.parse(match[1])
        parameters, end = int(said["parameters"]), lines[-1]
        fields: dict[str, Any] = {
            **{"run": folder.name, "size": size.name, "layers": size.layers, "hidden": size.hidden},
            **{"parameters": parameters, "layer_parameters": parameters - int(said["vocabulary"]) * size.hidden},
            "batch": int(said["batch_tokens"]),
            "rate": 0.0,  # the log does not tell
            **{"share": "none", "data": 100.0, "target": None, "seed": int(match[2])},
        }
        validations = [line for line in lines if line["kind"] == "valid" and line["subset"] == "dev"]
        for line in validations:
            yield measurements.Point(
                **fields,
                updates=int(line["updates"]),
                seconds=_seconds(folder, said, line),
                flops=float(line["flops"]),
                tokens=int(line["tokens"]),
                perplexity=_ppl(line),
                bleu=line.get("bleu"),
            )
        scores = json.loads(path.read_text(encoding="utf-8"))
        yield measurements.Translated(
            **fields,
            updates=int(end["updates"]),
            seconds=_seconds(folder, said, end),
            perplexity=_ppl(validations[-1]),
            bleu=scores["paper"],
            bleu_error=scores["paper_error"],
        )


def _seconds(folder: Path, said: dict[str, Any], line: dict[str, Any]) -> float:
    seconds = seconds_used(said, line)
    if seconds is None:
        raise UserError(f"{folder / runlog.NAME}: it does not say what an update counts.")
    return round(seconds, 6)


if __name__ == "__main__":
    sys.exit(main())
