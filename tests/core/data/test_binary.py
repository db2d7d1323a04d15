from __future__ import annotations

from pathlib import Path

import pytest

from train_large.data.binary import binarize
from train_large.errors import UserError


def test_fairseqs_last_words_are_passed_on(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("1 2\n")
    (tmp_path / "dict.txt").write_text("1 many\n")
    with pytest.raises(UserError, match="fairseq-preprocess failed with status 1 .*Incorrect dictionary format"):
        binarize({tmp_path / "out" / "train": tmp_path / "text"}, tmp_path / "dict.txt")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_number_of_workers_does_not_show(tmp_path: Path) -> None:
    """Also where a file has fewer lines than there are workers."""
    results = []
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        folder.mkdir()
        (folder / "dict.txt").write_text("".join(f"{index} 1\n" for index in range(50)))
        (folder / "large").write_text("".join(f"{i % 50} {i % 7} {i % 3}\n\n" for i in range(400_000)))
        (folder / "small").write_text("7 8 9\n")
        texts = {folder / "a" / "train": folder / "large", folder / "b" / "valid": folder / "small"}
        binarize(texts, folder / "dict.txt", workers)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        results.append({str(path.relative_to(folder)): path.read_bytes() for path in files})
    assert results[0] == results[1]
    assert list(results[0]) == [
        "a/dict.txt",
        "a/train.bin",
        "a/train.idx",
        "b/dict.txt",
        "b/valid.bin",
        "b/valid.idx",
        "dict.txt",
    ]
