"""The pocket English-French corpus: help pages, manual pages and messages out of Debian packages (see data.md).

Standard library only, so that any environment of the project can run it.
"""

from __future__ import annotations

import collections
import gzip
import hashlib
import html.parser
import json
import os
import re
import shutil
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from train_large.errors import UserError
from train_large.files import whole

Pair = tuple[str, str]  # English, French

HELP = ("libreoffice-help-en-us", "libreoffice-help-fr")
MANUAL = ("manpages", "manpages-dev", "manpages-fr", "manpages-fr-dev")
MESSAGES = ("libreoffice-l10n-fr",)
LICENCES = {
    HELP: "MPL-2.0",
    MANUAL: "one for each page, mostly Linux-man-pages-copyleft, GPL-2+ or BSD; the translations GPL-3+",
    MESSAGES: "MPL-2.0",
}

LEAST_WORDS, MOST_WORDS = 3, 60
# French takes about a sixth more characters than English; a pair beyond these bounds is seldom a translation.
LEAST_RATIO, MOST_RATIO = 0.6, 2.5
# Below this share of letters among its characters (spaces aside), a text is code or a table more than prose.
LEAST_LETTERS = 0.75


# ---- the corpus


def fetch_pairs(folder: Path) -> Path:
    """English-French pairs: folder/enfr/pairs.tsv, UTF-8, a pair a line (English, tab, French). Fetched once.

    Beside it, sources.json has each source's packages, versions, licence and number of pairs. The lines are in the
    order of a hash of the English text: any stretch of them is a fair sample of all sources, and an English text with
    several translations has them together.
    Raises UserError where apt-get is missing or fails, where a package is not as expected, where the folder cannot be
    written, or where an earlier pairs.tsv has changed.
    """
    folder = folder.resolve()  # apt-get and dpkg-deb are run in folders of their own
    out = folder / "enfr"
    if out.exists():
        return _verified(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".enfr.", dir=str(folder)) as work:
            part = Path(work, "enfr")
            part.mkdir()
            _write(part, *_collect(Path(work)))
            os.replace(str(part), str(out))
    except OSError as error:
        raise UserError(
            f"{out} could not be written ({error.strerror or error}): make room or choose another folder"
        ) from error
    return out / "pairs.tsv"


def short_pairs(pairs: Path, most_words: int, out: Path) -> None:
    """Write the pairs of at most so many words a side to `out`, in their order.

    Raises UserError where `pairs` is no file of pairs, where none is short enough, or where `out` cannot be written.
    """
    kept = []
    try:
        lines = pairs.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{pairs} is not there or not UTF-8 text: give a file of English, tab, French") from None
    for number, line in enumerate(lines, 1):
        sides = line.split("\t")
        if line and len(sides) != 2:
            raise UserError(f"{pairs}, line {number}, is not English, one tab, French: mend the line")
        if line and max(len(text.split()) for text in sides) <= most_words:
            kept.append(line + "\n")
    if not kept:
        raise UserError(f"{pairs} has no pair of at most {most_words} words: allow longer ones")
    with whole(out) as aside:
        aside.write_bytes("".join(kept).encode("utf-8"))


def _verified(out: Path) -> Path:
    pairs = out / "pairs.tsv"
    try:
        digest = json.loads((out / "sources.json").read_text(encoding="utf-8"))["sha256"]
        good = hashlib.sha256(pairs.read_bytes()).hexdigest() == digest
    except (OSError, ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise UserError(f"{pairs} is missing or not what was fetched: delete {out} and run again")
    return pairs


def _collect(work: Path) -> tuple[list[Pair], list[dict]]:
    """All pairs in their final order, and what is to be said of each source."""
    readers = {HELP: read_help, MANUAL: read_manual, MESSAGES: read_messages}
    versions = _download([package for packages in readers for package in packages], work)
    origins: dict[Pair, tuple[str, ...]] = {}  # the source that has the pair first
    for packages, read in readers.items():
        for pair in read(work / "files"):
            for sentence in filter(keep, sentences(pair)):
                origins.setdefault(sentence, packages)
    pairs = one_spelling(sorted(origins, key=_order))
    counts = collections.Counter(origins[pair] for pair in pairs)
    sources = []
    for packages in readers:
        if not counts[packages]:
            raise UserError(f"{', '.join(packages)} hold no sentence pairs where they were looked for: {_WAY_OUT}")
        named = {package: versions[package] for package in packages}
        sources.append({"packages": named, "licence": LICENCES[packages], "pairs": counts[packages]})
    return pairs, sources


def one_spelling(pairs: list[Pair]) -> list[Pair]:
    """Without the pairs whose English another one has but for digits, capitals and punctuation; the first one stays.

    So a split by the English text never has nearly the same sentence on two sides.
    """
    spelling: dict[str, str] = {}
    return [pair for pair in pairs if spelling.setdefault(_letters_of(pair[0]), pair[0]) == pair[0]]


def _letters_of(text: str) -> str:
    return "".join(filter(str.isalpha, text.casefold()))


def _order(pair: Pair) -> tuple[str, str, str]:
    return hashlib.sha256(_letters_of(pair[0]).encode("utf-8")).hexdigest(), pair[0], pair[1]


def _write(folder: Path, pairs: list[Pair], sources: list[dict]) -> None:
    content = "".join(f"{english}\t{french}\n" for english, french in pairs).encode("utf-8")
    (folder / "pairs.tsv").write_bytes(content)
    record = {"pairs": len(pairs), "sha256": hashlib.sha256(content).hexdigest(), "sources": sources}
    (folder / "sources.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


# ---- pairs that look like sentences


def sentences(pair: Pair) -> list[Pair]:
    """The pair's sentences one by one where both sides have as many, and those match in length; else the pair whole."""
    sides = [_ENDS.split(text) for text in pair]
    split = list(zip(*sides))
    if len(sides[0]) == len(sides[1]) and all(_ratio_is_fair(one) for one in split):
        return split
    return [pair]


# A point, then a new start; not after a single letter or an abbreviation ("e.g.", "p. ex.").
_ENDS = re.compile(
    r"(?<=[.!?])(?<!\b[^\W\d_]\.)(?<!\b[Cc]f\.)(?<!\b[Ee]x\.)(?<!etc\.)(?<!\bvs\.)(?<!\bNo\.) +"
    r"(?=[«“\"(\[]? ?[A-ZÀÂÇÈÉÊËÎÏÔÙÛÜŒ])"
)


def keep(pair: Pair) -> bool:
    """Whether both sides look like prose, of a fair length, and like each other's translation."""
    english, french = pair
    words = [sum(bool(_LETTER.search(word)) for word in text.split()) for text in pair]
    return (
        english.casefold() != french.casefold()
        and min(words) >= LEAST_WORDS
        and max(len(text.split()) for text in pair) <= MOST_WORDS
        and _ratio_is_fair(pair)
        and all(_share_of_letters(text) >= LEAST_LETTERS for text in pair)
        and _numbers(english) == _numbers(french)
    )


_LETTER = re.compile(r"[^\W\d_]")
_NUMBER = re.compile(r"\d+")


def _ratio_is_fair(pair: Pair) -> bool:
    return LEAST_RATIO <= len(pair[1]) / max(len(pair[0]), 1) <= MOST_RATIO


def _share_of_letters(text: str) -> float:
    dense = text.replace(" ", "")
    return sum(map(str.isalpha, dense)) / max(len(dense), 1)


def _numbers(text: str) -> list[str]:
    """All runs of digits, sorted: both sides must have the same ones (as 2,048 and 2 048 do)."""
    return sorted(_NUMBER.findall(text))


def _plain(text: str) -> str:
    """One line: single spaces, none before a point or comma, no zero-width characters, one kind of apostrophe."""
    text = " ".join(_INVISIBLE.sub("", text).replace("\u2019", "'").split())
    return re.sub(r" (?=[.,](?: |$))", "", text)


_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")


# ---- LibreOffice's help: the same page, the same paragraph id


def read_help(files: Path) -> Iterator[Pair]:
    """Paragraphs and headings of the same id, of the pages that both languages have."""
    english, french = (files / "usr/share/libreoffice/help" / language / "text" for language in ("en-US", "fr"))
    for page in sorted(english.glob("**/*.html")):
        other = french / page.relative_to(english)
        if other.is_file():
            ours, theirs = help_paragraphs(_text(page)), help_paragraphs(_text(other))
            for name, text in ours.items():
                if name in theirs:
                    yield text, theirs[name]


def help_paragraphs(page: str) -> dict[str, str]:
    """The text of each paragraph and heading of a help page by its id; program code is left out."""
    parser = _HelpPage()
    parser.feed(page)
    parser.close()
    return parser.paragraphs


class _HelpPage(html.parser.HTMLParser):
    """Text inside <p> and <h1> to <h6> whose id says it is the help's own, not the page's frame.

    Wording that depends on the system stands in a <span class="switchinline">, as one <span hidden> for each choice:
    with a class for one system, without for all others. The latter is taken; a paragraph that has none is left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: dict[str, str] = {}
        self.name = self.tag = ""
        self.text: list[str] = []
        self.spans: list[str] = []  # of what kind each open <span> is
        self.default_seen = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        has = dict(attrs)
        name, style = has.get("id") or "", has.get("class") or ""
        if tag == "p" or re.fullmatch("h[1-6]", tag):
            wanted = re.match("(par|hd)_", name) and "code" not in style
            self.name, self.tag, self.text, self.spans = name if wanted else "", tag, [], []
        elif tag == "span":
            kind = "switch" if style == "switchinline" else "plain"
            if "hidden" in has:
                kind = "other system" if style else "default"
            self.spans.append(kind)
            self.default_seen = kind == "default" or (self.default_seen and kind != "switch")
        elif tag in ("br", "img"):
            self.text.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag == "span" and self.spans:
            if self.spans.pop() == "switch" and not self.default_seen:
                self.name = ""
        elif tag == self.tag and self.name:
            self.paragraphs.setdefault(self.name, _plain("".join(self.text)))
            self.name = ""

    def handle_data(self, data: str) -> None:
        if "other system" not in self.spans:
            self.text.append(data)


# ---- manual pages: the same page, the same place in the order of its roff requests


def read_manual(files: Path) -> Iterator[Pair]:
    """Paragraphs of the pages that both languages have, section by section where these have the same requests."""
    english = files / "usr/share/man"
    for page in sorted(english.glob("man*/*.gz")):
        other = english / "fr" / page.relative_to(english)
        if other.is_file() and not page.is_symlink():
            yield from manual_pairs(_text(page), _text(other))


def manual_pairs(english: str, french: str) -> Iterator[Pair]:
    """Pair the paragraphs of two roff pages; the French one may have a section of its own at its end."""
    for ours, theirs in zip(manual_sections(english), manual_sections(french)):
        if [request for request, _ in ours] == [request for request, _ in theirs]:
            yield from ((one, other) for (_, one), (_, other) in zip(ours, theirs) if one and other)


def manual_sections(page: str) -> list[list[tuple[str, str]]]:
    """A page's sections, each a list of (request, text that belongs to it), from the section's own heading on.

    The text is empty where there is none, and where it is not prose: verbatim, a table, the tag of a .TP, or anything
    with a request or an escape that is not known here.
    """
    sections: list[list[tuple[str, list[str]]]] = []
    verbatim = tag_follows = False
    for line in page.replace("\\\n", "").split("\n"):  # a backslash at the end: the line goes on
        request, argument = _request(line)
        if request in ("SH", "SS"):
            sections.append([(request, [" ".join(_arguments(argument))]), ("PP", [])])
            verbatim = tag_follows = False
        elif not sections or request in _LAYOUT:
            continue
        elif request in _STRUCTURE:
            sections[-1].append((_STRUCTURE[request], []))
            verbatim = request in _OPENS or (verbatim and request not in _OPENS.values())
            tag_follows = request in ("TP", "TQ")
        elif tag_follows:
            tag_follows = False
        elif not verbatim:
            sections[-1][-1][1].append(_words_of(request, argument))
    return [[(request, _prose(lines)) for request, lines in section] for section in sections]


# Requests that begin something: both languages must have the same ones in the same order. .LP and .P are .PP.
_OPENS = {"nf": "fi", "EX": "EE", "TS": "TE", "SY": "YS"}  # between these a page shows code, tables and synopses
_STRUCTURE = {name: name for name in ("PP", "TP", "TQ", "IP", "HP", "RS", "RE", *_OPENS, *_OPENS.values())}
_STRUCTURE.update({"P": "PP", "LP": "PP"})
# These change how a page looks, not what it says; the empty name is a comment or an empty request.
_LAYOUT = {"", "ad", "hy", "nh", "in", "PD", "sp", "br", "ne", "ta", "ti", "na", "ft"}
_FONTS = {"B", "I", "R", "SM", "SB"}  # words in a font
_ALTERNATING = {"BR", "RB", "BI", "IB", "IR", "RI"}  # words without spaces between, in two fonts by turns
_ARGUMENT = re.compile(r'"((?:[^"]|"")*)"?|((?:\\.|[^ ])+)')
_ESCAPE = re.compile(r"\\(f\[.*?\]|f\(..|f.|s[-+]?\d|\[.*?\]|\(..|.|$)", re.DOTALL)
_UNKNOWN = "\0"
_CHARACTERS = dict.fromkeys("&|^/,:%)", "")  # these take no room
_CHARACTERS.update({" ": " ", "~": " ", "0": " ", "-": "-", "hy": "-", "en": "–", "em": "—", "e": "\\", "\\": "\\"})
_CHARACTERS.update({"aq": "'", "oq": "'", "cq": "'", "dq": '"', "lq": "“", "rq": "”", "Fo": "«", "Fc": "»", "ga": "`"})
_CHARACTERS.update({"ha": "^", "ti": "~", "at": "@", "mu": "×", "de": "°", "+-": "±", "co": "©", "sl": "/", "rs": "\\"})


def _request(line: str) -> tuple[str | None, str]:
    """The request's name and the rest of the line; None for a line of text."""
    if not line.startswith((".", "'")):
        return None, line
    name, _, argument = line[1:].strip().partition(" ")
    return ("" if name.startswith('\\"') else name), argument.strip()


def _arguments(text: str) -> list[str]:
    return [quoted.replace('""', '"') or bare for quoted, bare in _ARGUMENT.findall(text)]


def _words_of(request: str | None, argument: str) -> str:
    if request is None:
        return argument
    if request in _FONTS:
        return " ".join(_arguments(argument))
    return "".join(_arguments(argument)) if request in _ALTERNATING else _UNKNOWN


def _prose(lines: list[str]) -> str:
    """Lines of roff as one line of plain text; "" if anything in them is unknown."""
    text = _ESCAPE.sub(lambda escape: _character(escape.group(1)), "\n".join(lines))
    return "" if _UNKNOWN in text else _plain(text)


def _character(escape: str) -> str:
    """What an escape (without its backslash) prints: nothing for a change of font or size."""
    if escape[:1] in ("f", "s") and len(escape) > 1:
        return ""
    name = escape.lstrip("[(").rstrip("]") if len(escape) > 2 else escape
    return _CHARACTERS.get(name, _UNKNOWN)


# ---- LibreOffice's messages: compiled catalogues


def read_messages(files: Path) -> Iterator[Pair]:
    """The messages of every catalogue, English as the key, French as its translation."""
    for catalogue in sorted((files / "usr/lib/libreoffice/program/resource/fr/LC_MESSAGES").glob("*.mo")):
        yield from messages(catalogue.read_bytes(), catalogue)


def messages(catalogue: bytes, name: Path) -> Iterator[Pair]:
    """Pairs of a GNU .mo file: the header, plurals, and messages with a placeholder left out, mnemonic marks taken off.

    The format is that of the gettext manual, "The Format of GNU MO Files"; Python's gettext keeps no list of messages.
    Raises UserError where it is not such a file.
    """
    try:
        order = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}[catalogue[:4]]
        count, english, french = struct.unpack_from(order + "3I", catalogue, 8)
        for i in range(count):
            key, value = (_string(catalogue, order, table + 8 * i) for table in (english, french))
            text = key.rpartition("\4")[2]  # a context may stand before
            if text and "\0" not in text and not _PLACEHOLDER.search(text + value):
                yield _plain(_MNEMONIC.sub("", text, 1)), _plain(_MNEMONIC.sub("", value, 1))
    except (KeyError, struct.error, UnicodeDecodeError):
        raise UserError(f"{name.name} of the package is no catalogue of messages: report this as a bug") from None


def _string(catalogue: bytes, order: str, at: int) -> str:
    length, offset = struct.unpack_from(order + "2I", catalogue, at)
    return catalogue[offset : offset + length].decode("utf-8")


_MNEMONIC = re.compile(r"[~_](?=\w)")
_PLACEHOLDER = re.compile(r"%\w|\$\w|\w\$|#|<|_\w+_|\{")


# ---- Debian packages


def _download(packages: list[str], work: Path) -> dict[str, str]:
    """Let apt-get fetch the packages (it checks them against its signed lists), unpack them to work/files; versions."""
    for tool in ("apt-get", "dpkg-deb"):
        if not shutil.which(tool):
            raise UserError(f"{tool} is not here, this corpus comes out of Debian packages: {_WAY_OUT}")
    archives = work / "archives"
    archives.mkdir()
    _run(["apt-get", "download", *packages], archives, f"run `apt-get update` as root and try again, or {_WAY_OUT}")
    versions = {}
    for archive in sorted(archives.iterdir()):
        asked = ["dpkg-deb", "--show", "--showformat", "${Package}\t${Version}", str(archive)]
        package, _, version = _run(asked, work, _WAY_OUT).partition("\t")
        versions[package] = version
        _run(["dpkg-deb", "--extract", str(archive), str(work / "files")], work, f"make room, or {_WAY_OUT}")
    missing = [package for package in packages if package not in versions]
    if missing:
        raise UserError(f"apt-get brought no {', '.join(missing)}: {_WAY_OUT}")
    return versions


_WAY_OUT = "give your own pairs with --pairs FILE"


def _run(command: list[str], folder: Path, way_out: str) -> str:
    """What the command prints, run in `folder`. Raises UserError with its last words where it fails."""
    run = subprocess.run(
        command, cwd=str(folder), env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True, errors="replace"
    )
    if run.returncode != 0:
        said = run.stderr.strip().splitlines() or [f"status {run.returncode}"]
        raise UserError(f"{' '.join(command[:2])} failed ({said[-1]}): {way_out}")
    return run.stdout


def _text(path: Path) -> str:
    """A file's text, unpacked if need be; what is not UTF-8 becomes U+FFFD."""
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error):
        raise UserError(f"{path.name} of the package is damaged: {_WAY_OUT}") from None
    return content.decode("utf-8", errors="replace")
