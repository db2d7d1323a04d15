"""The pocket English-French corpus: its readers on small files in the packages' formats, and the real apt-get and
dpkg-deb on packages made here, without network."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import random
import shutil
import struct
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train_large.errors import UserError

POCKET_MT = Path(__file__).parents[2] / "user_dir_examples" / "pocket_mt"
HELP_EN = """<html><body><p id="bm_module">frame</p>
<h1 id="hd_id1" dir="auto">Find &amp; Replace&nbsp;Bar</h1>
<p id="par_id2" class="paragraph">The <span class="menuitem">Find</span> toolbar
  searches the contents .<br>It is quick.</p>
<p id="par_id3">Press <span class="switchinline"><span hidden="true" class="MAC"><span class="keycode">Command</span>
</span><span hidden="true"><span class="keycode">Ctrl</span></span></span><span class="keycode">+F</span> now.</p>
<p id="par_id4"><span class="switchinline"><span hidden="true" class="WRITER">Only in Writer.</span></span></p>
<p id="par_id5" class="code">Print 1 + 1</p>
<p id="par_id6">Only in the English page.</p>
<p id="par_id7">Not translated at all yet.</p>
</body></html>"""
HELP_FR = """<html><body><h1 id="hd_id1" dir="auto">Barre Rechercher et remplacer</h1>
<p id="par_id3">Appuyez maintenant sur <span class="switchinline"><span hidden="true" class="MAC">Commande</span>
<span hidden="true">Ctrl</span></span>+F.</p>
<p id="par_id2">La barre d\u2019outils Rechercher parcourt le contenu. Elle est rapide.</p>
<p id="par_id4"><span class="switchinline"><span hidden="true" class="WRITER">Seulement Writer.</span></span></p>
<p id="par_id7">Not translated at all yet.</p></body></html>"""
PAGE_EN = r"""'\" t
.\" a comment
.TH demo 3 2022-12-29
.SH NAME
demo \- show what a \
page looks like
.SH DESCRIPTION
The
.BR demo ()
function returns
.I two
values.
It is
.IR fast ,
and
.B "very small" indeed.
.PP
Before the code:
.nf
int demo(void);  never a pair of sentences
.fi
.TP
.B \-\-tag
Explains the \fBtag\fP\&\(aqs meaning.
.LP
An unknown \(xx escape is left out.
.PP
So is
.UR somewhere
a link.
.UE
.SS "Further notes on it"
One paragraph more.
.PP
Too many paragraphs here.
.SH BUGS
It has no bugs yet.
"""
PAGE_FR = r""".TH demo 3 "29 décembre 2022"
.SH NOM
demo \- montrer à quoi ressemble une page
.SH DESCRIPTION
La fonction \fBdemo\fP() renvoie \fIdeux\fP valeurs. Elle est \f(CWrapide\fP, et
\fBtrès petite\fP en vérité.
.PP
Avant le code\ :
.nf
int demo(void);  jamais une paire de phrases
.fi
.TP
\fB\-\-étiquette\fP
Explique le sens de l\[aq]étiquette.
.PP
Une séquence \(xx inconnue est omise.
.PP
De même
.UR somewhere
un lien.
.UE
.SS "Remarques complémentaires à ce sujet"
Un paragraphe de plus.
.SH BOGUES
Elle n'a pas encore de bogue.
.SH TRADUCTION
La traduction française de cette page.
"""
CATALOGUE = {
    "": "Content-Type: text/plain; charset=UTF-8\n",
    "dialog|keep\4Whole wor_ds only": "Mots entiers uni_quement",
    "STR_RETRY\4~Retry saving\nthe file": "~Réessayer d'enregistrer le fichier",
    "STR_NOT_HERE\4The file $filename$ is not here": "Le fichier $filename$ n'est pas ici",
    "STR_ROW\4One row\0Many rows": "Une ligne\0Plusieurs lignes",
}
CATALOGUE_PAIRS = [
    ("Retry saving the file", "Réessayer d'enregistrer le fichier"),
    ("Whole words only", "Mots entiers uniquement"),
]


@pytest.fixture(scope="module")
def fetch() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pocket_mt_fetch", POCKET_MT / "fetch.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_catalogue(entries: dict[str, str], order: str = "<") -> bytes:
    """A .mo file as the gettext manual draws it: header, two tables of (length, offset), NUL-ended strings."""
    keys = sorted(entries)
    strings = [key.encode() for key in keys] + [entries[key].encode() for key in keys]
    at, table = 28 + 8 * len(strings), b""
    for string in strings:
        table += struct.pack(order + "2I", len(string), at)
        at += len(string) + 1
    header = struct.pack(order + "7I", 0x950412DE, 0, len(keys), 28, 28 + 8 * len(keys), 0, 0)
    return header + table + b"".join(string + b"\0" for string in strings)


# ---- the readers


def test_help_paragraphs(fetch: ModuleType) -> None:
    assert fetch.help_paragraphs(HELP_EN) == {
        "hd_id1": "Find & Replace Bar",
        "par_id2": "The Find toolbar searches the contents. It is quick.",
        "par_id3": "Press Ctrl+F now.",
        "par_id6": "Only in the English page.",
        "par_id7": "Not translated at all yet.",
    }


def test_manual_pairs_go_by_the_order_of_requests(fetch: ModuleType) -> None:
    assert list(fetch.manual_pairs(PAGE_EN, PAGE_FR)) == [
        ("NAME", "NOM"),
        ("demo - show what a page looks like", "demo - montrer à quoi ressemble une page"),
        ("DESCRIPTION", "DESCRIPTION"),
        (
            "The demo() function returns two values. It is fast, and very small indeed.",
            "La fonction demo() renvoie deux valeurs. Elle est rapide, et très petite en vérité.",
        ),
        ("Before the code:", "Avant le code :"),
        ("Explains the tag's meaning.", "Explique le sens de l'étiquette."),
        ("BUGS", "BOGUES"),
        ("It has no bugs yet.", "Elle n'a pas encore de bogue."),
    ]


@given(st.lists(st.text("abcdé ,.\"'\\-()", min_size=1), max_size=6))
def test_what_a_reader_gives_is_one_line_without_escapes(fetch: ModuleType, lines: list[str]) -> None:
    page = "\n".join([".SH x", *lines])
    for section in fetch.manual_sections(page):
        for _, text in section:
            assert text == " ".join(text.split())
            assert "\\" not in text or "\\\\" in page


@pytest.mark.parametrize("order", ["<", ">"])
def test_messages(fetch: ModuleType, order: str) -> None:
    assert list(fetch.messages(make_catalogue(CATALOGUE, order), Path("demo.mo"))) == CATALOGUE_PAIRS


@pytest.mark.parametrize("cut", [0, 3, 20, 40, 70])
def test_a_catalogue_cut_short_is_named(fetch: ModuleType, cut: int) -> None:
    with pytest.raises(UserError, match="demo.mo of the package is no catalogue"):
        list(fetch.messages(make_catalogue(CATALOGUE)[:cut], Path("demo.mo")))


# ---- the pairs


@pytest.mark.parametrize(
    ("english", "french", "split"),
    [
        ("One is here. Two is there.", "Un est ici. Deux est là.", ["One is here.", "Two is there."]),
        ("See e.g. Writer for it. Go on!", "Voir p. ex. Writer. Continuez !", ["See e.g. Writer for it.", "Go on!"]),
        ("One is here. Two is there.", "Un est ici, deux est là.", None),  # one sentence against two
        ("One. Two sentences of very unequal length.", "La première est la longue. Deux.", None),
    ],
)
def test_sentences(fetch: ModuleType, english: str, french: str, split: list[str] | None) -> None:
    assert [one for one, _ in fetch.sentences((english, french))] == (split or [english])
    assert " ".join(other for _, other in fetch.sentences((english, french))) == french


@given(st.text("Aa. é", max_size=40), st.text("Aa. é", max_size=40))
def test_splitting_loses_nothing(fetch: ModuleType, english: str, french: str) -> None:
    pair = (" ".join(english.split()), " ".join(french.split()))
    split = fetch.sentences(pair)
    assert (" ".join(one for one, _ in split), " ".join(other for _, other in split)) == pair


@pytest.mark.parametrize(
    ("english", "french", "kept"),
    [
        ("The file already exists.", "Ce fichier existe déjà.", True),
        ("At most 2,048 bytes are read.", "Au plus 2 048 octets sont lus.", True),
        ("At most 2,048 bytes are read.", "Au plus 4 096 octets sont lus.", False),  # another number
        ("The file already exists.", "the file already exists.", False),  # not translated
        ("A file", "Un fichier", False),  # too short
        ("word " * 61, "mot " * 61, False),  # too long
        ("The file already exists.", "Il y est.", False),  # half the letters
        ("x = f(a) + g(b) - h(c)", "y = f(a) + g(b) - h(c)", False),  # no prose
    ],
)
def test_keep(fetch: ModuleType, english: str, french: str, kept: bool) -> None:
    assert fetch.keep((english, french)) is kept


# ---- the download


def contents() -> dict[str, dict[str, bytes]]:
    """What each package holds: path by path, as Debian lays it out."""
    help_root, manual = "usr/share/libreoffice/help", "usr/share/man"
    english = {f"{manual}/man3/demo.3.gz": gzip.compress(PAGE_EN.encode())}
    french = {f"{manual}/fr/man3/demo.3.gz": gzip.compress(PAGE_FR.encode())}
    catalogues = "usr/lib/libreoffice/program/resource/fr/LC_MESSAGES"
    return {
        "libreoffice-help-en-us": {f"{help_root}/en-US/text/shared/find.html": HELP_EN.encode()},
        "libreoffice-help-fr": {f"{help_root}/fr/text/shared/find.html": HELP_FR.encode()},
        "manpages": {f"{manual}/man3/only_english.3.gz": gzip.compress(PAGE_EN.encode())},
        "manpages-dev": english,
        "manpages-fr": {f"{manual}/fr/man3/only_french.3.gz": gzip.compress(PAGE_FR.encode())},
        "manpages-fr-dev": french,
        "libreoffice-l10n-fr": {f"{catalogues}/demo.mo": make_catalogue(CATALOGUE)},
    }


PAIRS = {
    ("Find & Replace Bar", "Barre Rechercher et remplacer"),
    ("The Find toolbar searches the contents.", "La barre d'outils Rechercher parcourt le contenu."),
    ("It is quick.", "Elle est rapide."),
    ("Press Ctrl+F now.", "Appuyez maintenant sur Ctrl+F."),
    ("demo - show what a page looks like", "demo - montrer à quoi ressemble une page"),
    ("The demo() function returns two values.", "La fonction demo() renvoie deux valeurs."),
    ("It is fast, and very small indeed.", "Elle est rapide, et très petite en vérité."),
    ("Before the code:", "Avant le code :"),
    ("Explains the tag's meaning.", "Explique le sens de l'étiquette."),
    ("It has no bugs yet.", "Elle n'a pas encore de bogue."),
    *CATALOGUE_PAIRS,
}


def make_index(folder: Path) -> None:
    """Write the list of packages for whatever archives are in `folder`."""
    entries = []
    for archive in sorted(folder.glob("*.deb")):
        content = archive.read_bytes()
        fields = {"Package": archive.name.partition("_")[0], "Version": "1:2.0-1", "Architecture": "all"}
        fields.update(Filename=f"./{archive.name}", Size=str(len(content)), SHA256=hashlib.sha256(content).hexdigest())
        entries.append("".join(f"{name}: {value}\n" for name, value in fields.items()))
    (folder / "Packages").write_text("\n".join(entries))
    subprocess.run(["apt-get", "update"], check=True, capture_output=True)


def make_package(folder: Path, package: str, files: dict[str, bytes]) -> None:
    """Let dpkg-deb build folder/<package>_2.deb."""
    tree = folder / "tree"
    control = f"Package: {package}\nVersion: 1:2.0-1\nArchitecture: all\nMaintainer: A <a@b>\nDescription: {package}\n"
    for path, content in {"DEBIAN/control": control.encode(), **files}.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(content)
    build = ["dpkg-deb", "--root-owner-group", "-Znone", "--build", str(tree), str(folder / f"{package}_2.deb")]
    subprocess.run(build, check=True, capture_output=True)
    shutil.rmtree(tree)


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that apt-get takes instead of any server, with lists and caches of its own."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        pytest.skip("apt-get and dpkg-deb are not on this system")
    folder, state = tmp_path / "archive", tmp_path / "apt"
    folder.mkdir()
    for name in ("lists/partial", "cache/archives/partial", "parts"):
        (state / name).mkdir(parents=True)
    (state / "status").touch()
    (state / "sources.list").write_text(f"deb [trusted=yes] file:{folder} ./\n")
    settings = {
        "Dir::State": state, "Dir::State::status": state / "status", "Dir::State::lists": state / "lists",
        "Dir::Cache": state / "cache", "Dir::Etc::sourcelist": state / "sources.list",
        "Dir::Etc::sourceparts": state / "parts", "APT::Sandbox::User": "",
    }  # fmt: skip
    (state / "apt.conf").write_text("".join(f'{name} "{value}";\n' for name, value in settings.items()))
    monkeypatch.setenv("APT_CONFIG", str(state / "apt.conf"))
    for package, files in contents().items():
        make_package(folder, package, files)
    make_index(folder)
    return folder


def read_pairs(path: Path) -> list[tuple[str, ...]]:
    return [tuple(line.split("\t")) for line in path.read_text(encoding="utf-8").splitlines()]


def test_pairs_are_fetched_once(
    fetch: ModuleType, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second time there is no package any more
        path = fetch.fetch_pairs(Path("data"))
        assert path == data / "enfr" / "pairs.tsv"
        assert set(read_pairs(path)) == PAIRS
        assert len(read_pairs(path)) == len(PAIRS)
        for package in archive.iterdir():
            package.unlink()
    assert sorted(str(file.relative_to(data)) for file in data.rglob("*")) == [
        "enfr", "enfr/pairs.tsv", "enfr/sources.json"
    ]  # fmt: skip
    record = json.loads((data / "enfr" / "sources.json").read_text())
    assert record["pairs"] == len(PAIRS)
    assert [source["pairs"] for source in record["sources"]] == [4, 6, 2]
    assert {package for source in record["sources"] for package in source["packages"]} == set(contents())
    assert {version for source in record["sources"] for version in source["packages"].values()} == {"1:2.0-1"}


def test_the_order_is_by_the_english_letters_alone(fetch: ModuleType) -> None:
    pairs = [("abcdefg"[i % 7] + f" text {i % 2}" + "." * (i % 3), f"texte {i}") for i in range(60)]
    ordered = sorted(pairs, key=fetch._order)
    first = [english[0] for english, _ in ordered]
    assert sum(one != other for one, other in zip(first, first[1:])) == 6  # each text in one run
    assert first != sorted(first)
    random.Random(0).shuffle(pairs)
    assert sorted(pairs, key=fetch._order) == ordered


def test_one_spelling(fetch: ModuleType) -> None:
    pairs = [("Page 1.", "Page 1."), ("Page 1.", "La page 1."), ("page 2", "page 2"), ("Pages", "Pages")]
    assert fetch.one_spelling(pairs) == [pairs[0], pairs[1], pairs[3]]


def test_short_pairs(fetch: ModuleType, tmp_path: Path) -> None:
    pairs, short = tmp_path / "pairs.tsv", tmp_path / "short.tsv"
    pairs.write_text("one two\tun deux\none\tun deux trois\none two three\tun\nun\tone\n", encoding="utf-8")
    fetch.short_pairs(pairs, 2, short)
    assert short.read_text(encoding="utf-8") == "one two\tun deux\nun\tone\n"
    with pytest.raises(UserError, match="no pair of at most 0 words"):
        fetch.short_pairs(pairs, 0, short)
    pairs.write_text("one\tun\none and no French\n", encoding="utf-8")
    with pytest.raises(UserError, match="pairs.tsv, line 2, is not English, one tab, French"):
        fetch.short_pairs(pairs, 2, short)
    pairs.write_bytes(b"caf\xe9\tcaf\xe9\n")
    with pytest.raises(UserError, match="not UTF-8 text"):
        fetch.short_pairs(pairs, 2, short)
    assert short.read_text(encoding="utf-8") == "one two\tun deux\nun\tone\n"


def test_a_package_that_is_not_offered(fetch: ModuleType, archive: Path, tmp_path: Path) -> None:
    (archive / "manpages-fr_2.deb").unlink()
    make_index(archive)
    with pytest.raises(
        UserError, match=r"Unable to locate package manpages-fr\): run `apt-get update` as root .*--pairs"
    ):
        fetch.fetch_pairs(tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_an_archive_that_is_not_the_listed_one(fetch: ModuleType, archive: Path, tmp_path: Path) -> None:
    package = archive / "manpages-fr_2.deb"
    package.write_bytes(package.read_bytes()[::-1])
    with pytest.raises(UserError, match="apt-get download failed"):
        fetch.fetch_pairs(tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize("kept", [0, 50, 2000])
def test_an_archive_cut_short(fetch: ModuleType, archive: Path, tmp_path: Path, kept: int) -> None:
    package = archive / "manpages-fr_2.deb"
    package.write_bytes(package.read_bytes()[:kept])
    make_index(archive)
    with pytest.raises(UserError, match="failed .*--pairs FILE"):
        fetch.fetch_pairs(tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_packages_without_pairs(fetch: ModuleType, archive: Path, tmp_path: Path) -> None:
    make_package(archive, "libreoffice-help-fr", {"usr/share/elsewhere/find.html": HELP_FR.encode()})
    make_index(archive)
    with pytest.raises(UserError, match="libreoffice-help-en-us, libreoffice-help-fr hold no sentence pairs"):
        fetch.fetch_pairs(tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_a_damaged_page_is_named(fetch: ModuleType, archive: Path, tmp_path: Path) -> None:
    ((path, content),) = contents()["manpages-dev"].items()
    make_package(archive, "manpages-dev", {path: content[: len(content) // 2]})
    make_index(archive)
    with pytest.raises(UserError, match="demo.3.gz of the package is damaged"):
        fetch.fetch_pairs(tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_without_apt_get(fetch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="apt-get is not here.*--pairs FILE"):
        fetch.fetch_pairs(tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_pairs_that_have_changed_are_refused(fetch: ModuleType, archive: Path, tmp_path: Path) -> None:
    path = fetch.fetch_pairs(tmp_path / "data")
    path.write_text("changed\tchangé\n", encoding="utf-8")
    with pytest.raises(UserError, match="pairs.tsv is missing or not what was fetched: delete"):
        fetch.fetch_pairs(tmp_path / "data")
    path.with_name("sources.json").unlink()
    with pytest.raises(UserError, match="pairs.tsv is missing or not what was fetched: delete"):
        fetch.fetch_pairs(tmp_path / "data")


def test_a_folder_that_cannot_be_made(fetch: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="could not be written .*choose another folder"):
        fetch.fetch_pairs(tmp_path / "file" / "data")


@pytest.mark.slow
def test_the_real_packages(fetch: ModuleType, tmp_path: Path) -> None:
    packages = [*fetch.HELP, *fetch.MANUAL, *fetch.MESSAGES]
    if not shutil.which("apt-get") or subprocess.run(["apt-cache", "show", *packages], capture_output=True).returncode:
        pytest.skip("no package lists of Debian's kind that have these packages")
    pairs = read_pairs(fetch.fetch_pairs(tmp_path))
    assert len(pairs) > 50_000  # 67,164 in Debian 12
    assert all(len(pair) == 2 for pair in pairs)
    assert len(set(pairs)) == len(pairs)
    # A pair that is a translation has one side's accents and articles, and the other's not.
    french = [pair for pair in pairs if set(pair[1].lower().split()) & {"le", "la", "les", "de", "des", "un", "une"}]
    english = [pair for pair in pairs if set(pair[1].lower().split()) & {"the", "of", "and"}]
    assert len(french) > 0.8 * len(pairs)
    assert len(english) < 0.01 * len(pairs)
