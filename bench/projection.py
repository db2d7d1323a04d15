"""What projecting only the masked positions saves on torch-xla: `make bench` writes bench/projection.csv.

The same model takes updates (forward, backward, Adam) on the same padded batches in one process, projecting all
positions on the vocabulary or as many as can be masked. The two take turns; the ratio is of the turns' medians. On the
CPU device of PJRT; a TPU was not at hand.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from argparse import Namespace
from pathlib import Path

os.environ.setdefault("PJRT_DEVICE", "CPU")

import fairseq_cli.train  # noqa: F401
import table
import torch
import torch_xla
import torch_xla.core.xla_model as xm
from fairseq import options, tasks, utils
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from train_large import machine
from xla.batches import Shape, most_masked, pad_batch
from xla.criterions import masked_lm_loss
from xla.spmd import to_device

SIZES = ((2, 128), (3, 256))
VOCABULARIES = (8_192, 50_265)
ROWS, LENGTH, MASKED = 8, 128, 0.15
TURNS, UPDATES = 6, 3


def build(layers: int, hidden: int, vocabulary: int, folder: Path):
    """A fairseq task and model of prenorm_roberta on the device, with a dictionary of `vocabulary` entries."""
    dictionary = Dictionary()
    for i in range(vocabulary - len(dictionary) - 1):
        dictionary.add_symbol(str(i))
    dictionary.save(str(folder / "dict.txt"))
    flags = f"""
        {folder} --user-dir fairseq_plugins --task masked_lm --criterion masked_lm --arch prenorm_roberta
        --encoder-layers {layers} --encoder-embed-dim {hidden} --tokens-per-sample {LENGTH} --tpu
        --dropout 0 --attention-dropout 0 --batch-size {ROWS} --optimizer adam --lr 1e-4
    """.split()
    parsed = options.parse_args_and_arch(options.get_training_parser(), flags)
    config = convert_namespace_to_omegaconf(parsed)
    utils.import_user_module(Namespace(user_dir="fairseq_plugins"))
    task = tasks.setup_task(config.task)
    model = task.build_model(config.model).to(torch_xla.device())
    model.encoder.lm_head.weight = model.encoder.sentence_encoder.embed_tokens.weight
    return task, model, task.build_criterion(config.criterion)


def batch(task) -> dict:
    """A full padded batch, with as many targets per sequence as fairseq masks at most."""
    rng = torch.Generator().manual_seed(1)
    pad, masked = task.source_dictionary.pad(), most_masked(LENGTH, MASKED)
    tokens = torch.randint(10, len(task.source_dictionary), (ROWS, LENGTH), generator=rng)
    target = torch.full_like(tokens, pad)
    chosen = torch.rand(ROWS, LENGTH, generator=rng).argsort(dim=1)[:, :masked]
    target.scatter_(1, chosen, tokens.gather(1, chosen))
    lengths = torch.full((ROWS,), LENGTH)
    sample = {"net_input": {"src_tokens": tokens, "src_lengths": lengths}, "target": target}
    return to_device(pad_batch(sample, Shape(ROWS, LENGTH, LENGTH, pad, masked)))


def seconds(model, criterion, optimizer, sample: dict) -> float:
    """Seconds per update over a few, from idle to idle."""
    xm.wait_device_ops()
    start = time.perf_counter()
    for _ in range(UPDATES):
        optimizer.zero_grad()
        loss, count, _ = masked_lm_loss(criterion, model, sample)
        (loss * (1 / count)).backward()
        optimizer.step()
        torch_xla.sync()
    xm.wait_device_ops()
    return (time.perf_counter() - start) / UPDATES


def main() -> None:
    rows = []
    for layers, hidden in SIZES:
        for vocabulary in VOCABULARIES:
            with tempfile.TemporaryDirectory() as folder:
                task, model, criterion = build(layers, hidden, vocabulary, Path(folder))
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
            some = batch(task)
            every = {name: value for name, value in some.items() if not name.startswith("projected")}
            for sample in (some, every):
                seconds(model, criterion, optimizer, sample)  # compiles
            times: dict[str, list[float]] = {"masked": [], "all": []}
            for _ in range(TURNS):
                times["masked"].append(seconds(model, criterion, optimizer, some))
                times["all"].append(seconds(model, criterion, optimizer, every))
            masked, everything = statistics.median(times["masked"]), statistics.median(times["all"])
            rows.append(
                {
                    "size": f"{layers}l_{hidden}h",
                    "vocabulary": vocabulary,
                    "sequences": ROWS,
                    "length": LENGTH,
                    "positions": most_masked(LENGTH, MASKED),
                    "seconds_all": round(everything, 4),
                    "seconds_masked": round(masked, 4),
                    "ratio": round(everything / masked, 3),
                    "ratio_of_minima": round(min(times["all"]) / min(times["masked"]), 3),
                    "torch_xla": torch_xla.__version__,
                    "machine": machine.describe(torch.get_num_threads()),
                }
            )
            print(rows[-1])
    table.write(rows, Path(__file__).with_suffix(".csv"))


if __name__ == "__main__":
    main()
