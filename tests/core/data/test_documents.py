from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train_large.data.documents import digest, inspect, number_lines
from train_large.errors import UserError

WIKITEXT = (
    " \n = First = \n \n Some text . \n 1 + 1 = 2 \n = x , y = \n More text . \n \n = = Section = = \n \n Words . \n"
    " \n \n = Second article = \n \n Its text . \n"
)
# str.strip() and a file's line ends leave these as they are.
LINE = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Z"], exclude_characters="\ufeff"), min_size=1, max_size=20
)


def read(path: Path, style: str = "auto") -> list[list[str]]:
    file = inspect(path, style)
    documents: list[list[str]] = [[] for _ in range(file.documents)]
    for document, line in number_lines([file]):
        documents[document].append(line)
    return documents


def write(folder: Path, content: bytes | str, name: str = "text.txt") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        ("a b\nc\n", [["a b"], ["c"]]),
        ("a\nc", [["a"], ["c"]]),
        ("\n\na\nc\n\n \n", [["a"], ["c"]]),  # stray blank lines at the ends separate nothing
        ("a\nb\n\n \nc\n", [["a", "b"], ["c"]]),
        ("a\r\nb\r\n\r\nc\r\n", [["a", "b"], ["c"]]),
        ("\ufeffa\n  b \n", [["a"], ["b"]]),
    ],
)
def test_auto_tells_lines_from_blank_separated_documents(
    content: str, documents: list[list[str]], tmp_path: Path
) -> None:
    assert read(write(tmp_path, content)) == documents


def test_a_style_that_is_asked_for_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path, "a\n\nb\nc\n")
    assert read(path, "line") == [["a"], ["b"], ["c"]]
    assert read(path, "blank") == [["a"], ["b", "c"]]


def test_wikitext_begins_a_document_at_a_title_that_stands_alone(tmp_path: Path) -> None:
    assert read(write(tmp_path, WIKITEXT), "wikitext") == [
        ["= First =", "Some text .", "1 + 1 = 2", "= x , y =", "More text .", "= = Section = =", "Words ."],
        ["= Second article =", "Its text ."],
    ]


def test_a_title_may_be_one_letter(tmp_path: Path) -> None:
    path = write(tmp_path, " \n = A = \n \n Text . \n \n = M = \n \n Other . \n")
    assert read(path, "wikitext") == [["= A =", "Text ."], ["= M =", "Other ."]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(LINE, min_size=1, max_size=4), min_size=2, max_size=8))
def test_documents_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[str]]
) -> None:
    path = write(tmp_path_factory.mktemp("d"), "\n\n".join("\n".join(lines) for lines in documents))
    assert read(path, "auto") == read(path, "blank") == documents


def test_documents_are_numbered_through_all_files(tmp_path: Path) -> None:
    files = [inspect(write(tmp_path, text, name)) for name, text in [("1", "a\nb\n"), ("2", "c\n\nd\ne\n"), ("3", "f")]]
    assert list(number_lines(files)) == [(0, "a"), (1, "b"), (2, "c"), (3, "d"), (3, "e"), (4, "f")]


def test_what_is_not_utf8_is_named_with_its_offset(tmp_path: Path) -> None:
    path = write(tmp_path, "naïve\r\nfirst\ncaf".encode() + b"\xe9 late\n")
    offset = path.read_bytes().index(b"\xe9 late")
    with pytest.raises(UserError, match=rf"text\.txt is not UTF-8 \(byte 0xe9 at offset {offset}\)"):
        inspect(path)


@pytest.mark.parametrize(
    ("content", "style", "message"),
    [
        (" \n\n\t\n", "auto", "nothing but blank lines"),
        ("no title\n", "wikitext", "= Title ="),
        ("= a =\ntext\n", "wikitext", "= Title ="),  # a title stands alone
        ("= ab =\ntext\n", "wikitext", "= Title ="),
        ("\n= = a = =\n\ntext\n", "wikitext", "= Title ="),  # of a section
    ],
)
def test_text_without_documents_is_refused(content: str, style: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        inspect(write(tmp_path, content), style)
    assert "text.txt" in str(error.value)


def test_digest_refuses_what_is_no_text_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere.txt does not exist"):
        digest(tmp_path / "nowhere.txt")
    with pytest.raises(UserError, match="is a folder"):
        digest(tmp_path)
    with pytest.raises(UserError, match="text.txt is empty"):
        digest(write(tmp_path, ""))
    content = b"x" * 3_000_000
    assert digest(write(tmp_path, content)) == hashlib.sha256(content).hexdigest()


def test_only_the_first_line_may_have_a_byte_order_mark(tmp_path):
    (tmp_path / "text").write_text("\ufeffa\n\ufeffb\n", encoding="utf-8")
    assert [line for _, line in number_lines([inspect(tmp_path / "text")])] == ["a", "\ufeffb"]
