from __future__ import annotations

import json

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from train_large.data.dictionary import read_dictionary
from train_large.errors import UserError
from train_large.export.tokenizer import find_bpe, write_tokenizer


def write(folder, prepared, **changes):
    options = {"max_length": 20, "init_token": 0, "separator_token": 2, "sentences": True, **changes}
    return write_tokenizer(folder, read_dictionary(prepared.dictionary), find_bpe(prepared.folder), **options)


@pytest.fixture(scope="module")
def tokenizer(prepared, tmp_path_factory):
    """What `AutoTokenizer` makes of the folder, which has no config.json here."""
    folder = tmp_path_factory.mktemp("tokenizer")
    assert write(folder, prepared) == 0
    return transformers.AutoTokenizer.from_pretrained(folder)


class TestIdsAreThoseOfFairseq:
    def test_on_text(self, tokenizer, prepared, text):
        for sentence in text:
            assert tokenizer(sentence)["input_ids"] == [0, *prepared.encode(sentence.strip())]

    @settings(max_examples=300)
    @given(sentence=st.text())
    def test_on_any_sentence(self, tokenizer, prepared, sentence):
        # Sentences are trimmed by prepare-task (data/glue.py).
        assert tokenizer(sentence)["input_ids"] == [0, *prepared.encode(sentence.strip())]

    @settings(max_examples=100)
    @given(sentence=st.text(alphabet=[chr(c) for c in range(0x3001) if chr(c).isspace()] + ["a", ".", "\u200b"]))
    def test_on_every_white_space(self, tokenizer, prepared, sentence):
        assert tokenizer(sentence)["input_ids"] == [0, *prepared.encode(sentence.strip())]

    @settings(max_examples=50)
    @given(one=st.text(), other=st.text(min_size=1))  # transformers takes "" for no second sentence
    def test_on_pairs(self, tokenizer, prepared, one, other):
        # PrependTokenDataset and ConcatSentencesDataset of fairseq/tasks/sentence_prediction.py
        expected = [0, *prepared.encode(one.strip()), 2, *prepared.encode(other.strip())]
        assert tokenizer(one, other)["input_ids"] == expected

    def test_special_tokens_in_a_sentence_are_text(self, tokenizer, prepared):
        sentence = "<s> a </s><pad> b <mask> <unk>"
        assert tokenizer(sentence)["input_ids"] == [0, *prepared.encode(sentence)]

    @pytest.mark.parametrize(("init", "separator"), [(None, None), (None, 2), (0, None), (7, 9)])
    def test_with_other_flags_of_the_task(self, prepared, tmp_path, init, separator):
        write(tmp_path, prepared, init_token=init, separator_token=separator)
        found = transformers.AutoTokenizer.from_pretrained(tmp_path)("the film", "is a delight")["input_ids"]
        first, second = ([] if token is None else [token] for token in (init, separator))
        assert found == [*first, *prepared.encode("the film"), *second, *prepared.encode("is a delight")]

    def test_a_flag_beyond_the_dictionary_is_named(self, prepared, tmp_path):
        with pytest.raises(UserError, match="--init-token 90000 is in the way: the dictionary has"):
            write(tmp_path, prepared, init_token=90000)


def test_ids_become_text_again(tokenizer, text):
    ids = tokenizer(text[2])["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text[2]


def test_batches_are_padded_with_a_mask(tokenizer, prepared):
    found = tokenizer(["the film", "the film is a delight"], padding=True)
    short, long = [0, *prepared.encode("the film")], [0, *prepared.encode("the film is a delight")]
    missing = len(long) - len(short)
    assert missing > 0
    assert found["input_ids"] == [short + [1] * missing, long]
    assert found["attention_mask"] == [[1] * len(short) + [0] * missing, [1] * len(long)]
    assert found.keys() == {"input_ids", "attention_mask"}  # the models have one token type


def test_special_tokens(tokenizer, prepared):
    names = ("bos_token", "cls_token", "pad_token", "eos_token", "sep_token", "unk_token", "mask_token")
    rows = [getattr(tokenizer, f"{name}_id") for name in names]
    assert rows == [0, 0, 1, 2, 2, 3, len(prepared.symbols()) - 1]
    assert len(tokenizer) == len(prepared.symbols())


def test_a_language_model_finds_its_mask_as_fairseq_does(prepared, tmp_path):
    """`fill_mask` of fairseq/models/roberta/hub_interface.py encodes the text around it, without the space before."""
    write(tmp_path, prepared, sentences=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    before, after = prepared.encode("The film")[:-1], prepared.encode(" a delight.")
    expected = [0, *before, len(prepared.symbols()) - 1, *after]
    assert tokenizer("The film <mask> a delight.")["input_ids"] == expected
    assert tokenizer("  two  spaces ")["input_ids"] == [0, *prepared.encode("  two  spaces ")]


def test_what_the_dictionary_lacks_is_unk(prepared, tmp_path, text):
    """Entries that no longer one is merged from: a byte, and merged ones."""
    encoder = json.loads((prepared.folder / "bpe" / "encoder.json").read_text())
    merges = [tuple(line.split(" ")) for line in (prepared.folder / "bpe" / "vocab.bpe").read_text().splitlines()[1:]]
    parts = {part for merge in merges for part in merge}
    merged = [left + right for left, right in merges if left + right not in parts]
    lost = {*merged[::2], *[byte for byte in "1234½" if byte in encoder and byte not in parts]}
    assert len(lost) > 10
    lines = prepared.dictionary.read_text().splitlines()
    kept = [line for line in lines if line.split(" ")[0] not in {str(encoder[piece]) for piece in lost}]
    smaller = type(prepared)(prepared.folder, tmp_path / "dict.txt")
    smaller.dictionary.write_text("\n".join(kept) + "\n")

    assert write(tmp_path, smaller) == len(lost)

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    found = [tokenizer(sentence)["input_ids"] for sentence in [*text, "111 ½½"]]
    assert found == [[0, *smaller.encode(sentence.strip())] for sentence in [*text, "111 ½½"]]
    assert sum(ids.count(3) for ids in found) > 5


def test_a_part_of_longer_entries_cannot_be_unk(prepared, tmp_path):
    encoder = json.loads((prepared.folder / "bpe" / "encoder.json").read_text())
    lines = prepared.dictionary.read_text().splitlines()
    (tmp_path / "dict.txt").write_text("\n".join(line for line in lines if line.split(" ")[0] != str(encoder["h"])))
    smaller = type(prepared)(prepared.folder, tmp_path / "dict.txt")
    with pytest.raises(UserError, match=f"lacks 1 entries of .* such as id {encoder['h']}: .*leave out --bpe"):
        write(tmp_path, smaller)


def test_the_bpe_of_another_dictionary_is_refused(prepared, tmp_path):
    (tmp_path / "dict.txt").write_text("the 5\nfilm 3\n")
    with pytest.raises(UserError, match="none of the ids in .* is in the dictionary"):
        write(tmp_path, type(prepared)(prepared.folder, tmp_path / "dict.txt"))
    with pytest.raises(UserError, match="does not hold encoder.json and vocab.bpe"):
        find_bpe(tmp_path)


def test_a_piece_of_text_may_be_called_like_a_special_token(prepared, tmp_path):
    """GPT-2's has <|endoftext|>; another may have fairseq's names."""
    encoder = json.loads((prepared.folder / "bpe" / "encoder.json").read_text())
    merges = (prepared.folder / "bpe" / "vocab.bpe").read_text()
    (tmp_path / "bpe").mkdir()
    (tmp_path / "bpe" / "encoder.json").write_text(
        json.dumps({**encoder, "<s": len(encoder), "<s>": len(encoder) + 1, "madeupword0000": len(encoder) + 2})
    )
    (tmp_path / "bpe" / "vocab.bpe").write_text(f"{merges}< s\n<s >\n")
    lines = "".join(f"{len(encoder) + extra} 1\n" for extra in range(3)) + "madeupword0000 0\n"
    old = [line for line in prepared.dictionary.read_text().splitlines(True) if not line.startswith("madeup")]
    (tmp_path / "dict.txt").write_text("".join(old) + lines)
    other = type(prepared)(tmp_path, tmp_path / "dict.txt")

    write(tmp_path, other)

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("a <s> b")["input_ids"] == [0, *other.encode("a <s> b")]
    assert tokenizer.convert_tokens_to_ids("<s>") == other.symbols().index(str(len(encoder) + 1))
    assert tokenizer.bos_token_id == 0
    assert len(tokenizer) == len(other.symbols())
