"""The BPE against fairseq's own reader and encoder of GPT-2's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fairseq.data import Dictionary
from fairseq.data.encoders.gpt2_bpe import GPT2BPE, GPT2BPEConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from train_large.data import bpe
from train_large.errors import UserError

HARD_LINES = [
    "tab\there  two   spaces \t\n x",
    "<|endoftext|> <s> </s> <mask> <unk>",
    "naïve café — “quotes” … 日本語の文章 русский текст العربية हिन्दी",
    "👩‍👩‍👧‍👦 👍🏽 ½ ² ① Ⅷ 12345",
    "I'll we've DON'T it's O'Neill'd",
    "x\x1cy\x85z\u00a0w\u2028v\u3000u \u200b a",
    "a\u0301 \ud7ff\ue000 \U0010ffff \x00\x01",
]


@pytest.fixture(scope="module")
def lines(prose: list[list[str]]) -> list[str]:
    return [line for document in prose for line in document]


@pytest.fixture(scope="module")
def files(lines: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bpe")
    for name, content in bpe.train_bpe(lines, 1500).items():
        (folder / name).write_text(content, encoding="utf-8")
    return folder / "encoder.json", folder / "vocab.bpe"


@pytest.fixture(scope="module")
def tokenizer(files: tuple[Path, Path]) -> Tokenizer:
    return bpe.load_bpe(*files)


def test_fairseq_gives_the_same_ids(tokenizer: Tokenizer, files: tuple[Path, Path], lines: list[str]) -> None:
    theirs = GPT2BPE(GPT2BPEConfig(gpt2_encoder_json=str(files[0]), gpt2_vocab_bpe=str(files[1])))
    text = [*lines, *HARD_LINES]
    ours = list(bpe.encode(tokenizer, enumerate(text)))
    assert [(key, line) for key, line, _ in ours] == list(enumerate(text))
    assert [" ".join(map(str, ids)) for _, _, ids in ours] == [theirs.encode(line) for line in text]


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ((_, _, ids),) = bpe.encode(tokenizer, [(0, text)])
    assert tokenizer.decode(ids) == text


def test_training_fills_the_vocabulary_and_merges_what_is_frequent(tokenizer: Tokenizer, lines: list[str]) -> None:
    assert tokenizer.get_vocab_size() == 1500
    tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(lines))
    assert tokens < sum(len(line) for line in lines) / 3
    assert bpe.train_bpe(lines[:200], 400) == bpe.train_bpe(iter(lines[:200]), 400)
    smallest = bpe.train_bpe(["ab", "cd"], 1000)  # no pair is seen twice
    assert sorted(json.loads(smallest["encoder.json"]).values()) == list(range(256))


def test_batches_are_an_inner_matter(tokenizer: Tokenizer, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(bpe.encode(tokenizer, enumerate(lines[:300])))
    monkeypatch.setattr(bpe, "_BATCH_CHARACTERS", 100)
    assert list(bpe.encode(tokenizer, enumerate(lines[:300]))) == whole


@pytest.mark.parametrize(("entries", "size"), [(256, 264), (1500, 1504), (8192, 8200), (50257, 50264)])
def test_the_dictionary_lists_every_entry_by_frequency(entries: int, size: int, tmp_path: Path) -> None:
    counts = [(7 * index) % 50 for index in range(entries)]
    assert bpe.write_dictionary(tmp_path / "dict.txt", counts) == size
    dictionary = Dictionary.load(str(tmp_path / "dict.txt"))
    assert len(dictionary) == size
    assert size % 8 == 0
    for index, count in enumerate(counts):
        assert dictionary.count[dictionary.indices[str(index)]] == count
    assert dictionary.count[4:] == sorted(dictionary.count[4:], reverse=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("encoder.json", None, "encoder.json cannot be read"),
        ("encoder.json", "[1, 2]", "is not an encoder.json"),
        ("encoder.json", '{"a": ', "is not an encoder.json"),
        ("encoder.json", '{"a": "b"}', "is not an encoder.json"),
        ("encoder.json", '{"a": 0, "b": 2}', "does not number its 2 entries"),
        ("encoder.json", '{"a": 0, "b": 1}', "lacks some of the 256 bytes"),
        ("vocab.bpe", None, "vocab.bpe cannot be read"),
        ("vocab.bpe", "a b\n", "does not begin with a '#version' line"),
        ("vocab.bpe", "#version: 0.2\nt h\nzq qz\n", "vocab.bpe, line 3, is not a merge"),
    ],
)
def test_files_that_are_not_gpt2s_are_refused(
    name: str, content: str | None, message: str, files: tuple[Path, Path], tmp_path: Path
) -> None:
    paths = [tmp_path / file.name for file in files]
    for path, file in zip(paths, files):
        path.write_bytes(file.read_bytes())
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        bpe.load_bpe(*paths)
