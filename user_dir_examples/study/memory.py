"""How much memory training takes: python memory.py SETTINGS.yaml RUN

A few updates of the paper's own size on random tokens, on the CPU: the largest resident memory of the process, and of
one that loads the same libraries and trains nothing. What is freed is given back to the system at once, so that this is
what was in use, the same at every try: kept for what comes next (`train_large.allocation`), it is in pieces, into which
more or less fits by chance, up to a sixth of all. Writes memory.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import experiments
import jobs
import numpy
from omegaconf import DictConfig

from train_large.data.binary import binarize
from train_large.data.dictionary import SPECIAL
from train_large.errors import UserError
from train_large.files import whole
from train_large.processes import started
from train_large.sizes import Size

LARGE = 1 << 16
"""Bytes from which on a block of memory is given back when it is freed."""


def main() -> int:
    settings_file, name = sys.argv[1:]
    settings = experiments.load(Path(settings_file))
    run = jobs.find(settings, f"memory/{name}").work
    assert isinstance(run, experiments.MemoryRun)
    try:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "data-bin"
            random_text(settings, data, run.seed)
            train = training(settings, run, data)
            peaks = {"loaded": peak_bytes([*train, "--help"]), "trained": peak_bytes(train)}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    with whole(jobs.folder(settings, run) / "memory.json") as aside:
        aside.write_text(json.dumps(peaks, indent=1) + "\n")
    return 0


def random_text(settings: DictConfig, data: Path, seed: int) -> None:
    """A text of random entries of a dictionary as long as the paper's: memory depends on no word."""
    memory = settings.memory
    words = memory.vocabulary - len(SPECIAL) - 1  # and <mask>
    draw = numpy.random.default_rng(seed)
    sequences = memory.batch * memory.updates
    work = data.with_name("text")
    work.mkdir()
    dictionary = work / "words.txt"
    dictionary.write_text("".join(f"w{number} 1\n" for number in range(words)))
    lines = [" ".join(f"w{n}" for n in draw.integers(words, size=memory.length - 1)) for _ in range(sequences)]
    (work / "train.txt").write_text("\n".join(lines) + "\n")
    binarize({data / "train": work / "train.txt"}, dictionary)


def peak_bytes(command: list[str]) -> int:
    """The largest resident memory of a process, in bytes. Raises UserError if it fails."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(LARGE)}  # glibc's
    with tempfile.TemporaryFile() as output:
        options = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output, "env": environment}
        # It takes over the files that this process was given, the lock of job.py among them.
        with started(command, close_fds=False, **options) as (process, asked):
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if asked:
            raise UserError("fairseq-train was stopped.")
        if process.returncode:
            output.seek(0)
            said = output.read().decode(errors="replace").strip().splitlines() or ["it printed nothing"]
            raise UserError(f"fairseq-train ended with status {process.returncode}: {said[-1]}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def training(settings: DictConfig, run: experiments.MemoryRun, data: Path) -> list[str]:
    """fairseq-train for a few updates of one batch each."""
    memory, size = settings.memory, Size.parse(settings.memory.size)
    flags = f"""
        --task masked_lm --criterion budgeted_masked_lm --arch prenorm_roberta
        --encoder-layers {size.layers} --encoder-embed-dim {size.hidden} --share-layers {run.share}
        --tokens-per-sample {memory.length} --max-positions {memory.length} --batch-size {memory.batch}
        --max-update {memory.updates} --optimizer fused_adam --lr 0.0001 --seed {run.seed}
        --cpu --no-save --disable-validation --num-workers 0
    """.split()
    flags += ["--user-dir", str(jobs.pocket.USER_DIR), "--save-dir", str(data.with_name("run"))]
    return [sys.executable, "-m", "fairseq_cli.train", str(data), *flags]


if __name__ == "__main__":
    sys.exit(main())
