"""fairseq's binary datasets, written by fairseq-preprocess in a process of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from train_large.errors import UserError

# Below this a second process costs more than it saves, and a share without a single line could come out.
_BYTES_PER_WORKER = 1 << 20


def binarize(texts: Mapping[Path, Path], dictionary: Path, workers: int = 1) -> None:
    """Turn files of dictionary entries separated by spaces into PREFIX.bin and PREFIX.idx, dict.txt beside them.

    texts: prefix of the dataset (.../data-bin/train) -> text file; all the text files must lie in one folder, which
    is used for the work; a text file is deleted once its dataset is there. Each line becomes one item that ends in
    </s>. Raises UserError with fairseq's last words if it fails.

    fairseq-preprocess takes a list of files for --testpref only; giving it all of them there saves a start of several
    seconds per split. Names are given relative to their folder since a comma in a path would cut it in two.
    """
    (work,) = {text.parent for text in texts.values()}
    largest = max(text.stat().st_size for text in texts.values())
    command = [sys.executable, "-m", "fairseq_cli.preprocess", "--only-source", "--srcdict", str(dictionary.resolve())]
    command += ["--testpref", ",".join(text.name for text in texts.values()), "--destdir", "binary"]
    command += ["--workers", str(max(1, min(workers, largest // _BYTES_PER_WORKER)))]
    run = subprocess.run(command, cwd=work, capture_output=True, text=True, errors="replace")
    if run.returncode != 0:
        said = (run.stderr.strip() or run.stdout.strip() or "nothing said").splitlines()[-1]
        raise UserError(
            f"fairseq-preprocess failed with status {run.returncode} ({said}): see that `{sys.executable} -m "
            "fairseq_cli.preprocess --help` works (make env), and for memory and disk"
        )
    for index, (prefix, text) in enumerate(texts.items()):
        prefix.parent.mkdir(parents=True, exist_ok=True)
        for suffix in ("bin", "idx"):
            (work / "binary" / f"test{index or ''}.{suffix}").replace(f"{prefix}.{suffix}")
        shutil.copyfile(work / "binary" / "dict.txt", prefix.parent / "dict.txt")
        text.unlink()
    shutil.rmtree(work / "binary")
