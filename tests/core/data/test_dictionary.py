from __future__ import annotations

import pytest
from fairseq.data import Dictionary
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_plugins.models.prenorm_roberta import dictionary_digest
from train_large.data.dictionary import digest, read_dictionary, read_labels
from train_large.errors import UserError


def fairseqs(path):
    result = Dictionary.load(str(path))
    result.add_symbol("<mask>")
    return result


@settings(max_examples=50)
@given(words=st.lists(st.text("ab12é東 \u2028\u00a0", min_size=1), unique=True))
def test_symbols_are_those_of_fairseq(tmp_path_factory, words):
    path = tmp_path_factory.mktemp("dictionary") / "dict.txt"
    path.write_text("".join(f"{word} {len(word)}\n" for word in words) or "x 1\n", encoding="utf-8")
    assert read_dictionary(path) == fairseqs(path).symbols
    assert digest(read_dictionary(path)) == dictionary_digest(fairseqs(path))


@pytest.mark.parametrize(
    "content", ["a 1\n<mask> 0\nb 1\n", "a 1\nb 2\na 3 #fairseq:overwrite\n", "a 1\n<s> 2 #fairseq:overwrite"]
)
def test_rare_lines_are_read_as_fairseq_reads_them(tmp_path, content):
    (tmp_path / "dict.txt").write_text(content)
    assert read_dictionary(tmp_path / "dict.txt") == fairseqs(tmp_path / "dict.txt").symbols


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a 1\nb\n", "line 2, is not a symbol and its count"),
        (b"a 1\nb x\n", "line 2, is not a symbol and its count"),
        (b"", "line 1, is not a symbol and its count"),
        (b"a 1\nb 2\na 1\n", "line 3: 'a' comes twice"),
        (b"<pad> 1\n", "line 1: '<pad>' comes twice"),
        (b"\xff\xfe 1\n", "cannot be read as UTF-8"),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path, content, message):
    (tmp_path / "dict.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_dictionary(tmp_path / "dict.txt")


def test_labels(tmp_path):
    (tmp_path / "dict.txt").write_text("no 3\nyes 2\nmadeupword0000 0\nmadeupword0001 0\n")
    assert read_labels(tmp_path / "dict.txt", 2) == ["no", "yes"]
    with pytest.raises(UserError, match="names 2 classes .no, yes. and the checkpoint's head has 4"):
        read_labels(tmp_path / "dict.txt", 4)
