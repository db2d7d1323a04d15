from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shards import decoded, generate

from t2t_problems import pairs as plugin
from t2t_problems import tensorflow_two

tensorflow_two.behave_as_one()

import tensorflow.compat.v1 as tf  # noqa: E402
from tensor2tensor.data_generators import problem  # noqa: E402
from tensor2tensor.utils import registry  # noqa: E402

TRAIN, DEV, TEST = problem.DatasetSplit.TRAIN, problem.DatasetSplit.EVAL, problem.DatasetSplit.TEST
NAMES = ["translate_enfr_pairs", "translate_enfr_pairs_5pc", "translate_enfr_pairs_1pc"]


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Distinct pairs; some English sentences have several translations."""
    draw = random.Random(seed)
    words = ["".join(draw.choice("abcdeéèhilmnoœrst") for _ in range(draw.randint(1, 8))) for _ in range(300)]

    def sentence() -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(2, 9)))

    english = [sentence() for _ in range(count)]
    return [(english[i if i % 10 else i // 2], f"{sentence()} {i}.") for i in range(count)]


def put(folder: Path, name: str, pairs: list[tuple[str, str]], end: str = "\n") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".tsv"):
        (folder / name).write_bytes("".join("\t".join(pair) + end for pair in pairs).encode("utf-8"))
        return
    for side, ending in enumerate(("en", "fr")):
        (folder / f"{name}.{ending}").write_bytes("".join(pair[side] + end for pair in pairs).encode("utf-8"))


def sentence_of_the_end(capsys, name: str, data: Path, tmp: Path) -> str:
    """What datagen says when it ends with status 2, having left nothing that looks like data."""
    with pytest.raises(SystemExit) as ended:
        generate(name, data, tmp)
    assert ended.value.code == 2
    assert not data.exists() or not list(data.iterdir())
    printed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(printed) == 1
    return printed[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of data, its pairs) with all three problems, the smallest first."""
    root = tmp_path_factory.mktemp("pairs")
    pairs = sentences(4000)
    put(root / "tmp", "pairs.tsv", pairs)
    for name in reversed(NAMES):
        generate(name, root / "data", root / "tmp")
    return root / "data", pairs


def test_every_pair_is_in_one_split_and_no_english_sentence_in_two(made):
    data, pairs = made
    splits = [decoded(NAMES[0], data, split) for split in (TRAIN, DEV, TEST)]
    assert sorted(sum(splits, [])) == sorted(pairs)
    english = [{pair[0] for pair in split} for split in splits]
    assert not english[0] & english[1]
    assert not english[0] & english[2]
    assert not english[1] & english[2]
    for held_out in splits[1:]:  # about 100 of 4,000; a sentence brings its other translations along
        assert 50 < len(held_out) < 150


def test_subsamples_are_nested_and_share_dev_test_and_vocabulary(made):
    data, _ = made
    whole, five, one = (set(decoded(name, data, TRAIN)) for name in NAMES)
    assert one < five < whole
    assert abs(len(five) - 0.05 * len(whole)) < 4 * (0.05 * len(whole)) ** 0.5
    assert abs(len(one) - 0.01 * len(whole)) < 4 * (0.01 * len(whole)) ** 0.5
    for split in (DEV, TEST):
        assert decoded(NAMES[0], data, split) == decoded(NAMES[1], data, split) == decoded(NAMES[2], data, split)
    assert {registry.problem(name).vocab_filename for name in NAMES} == {"vocab.translate_enfr_pairs.subwords"}
    assert len(list(data.glob("vocab.*"))) == 1


def test_plain_dev_and_test_are_in_the_order_of_the_shards(made):
    data, _ = made
    for split, tag in ((DEV, "dev"), (TEST, "test")):
        english, french = (
            (data / f"translate_enfr_pairs.{tag}.{ending}").read_text(encoding="utf-8").split("\n")[:-1]
            for ending in ("en", "fr")
        )
        assert list(zip(english, french)) == decoded(NAMES[0], data, split)


def test_the_vocabulary_is_learnt_from_train_alone(tmp_path):
    pairs = [(english, french) for english, french in sentences(1500)]
    put(tmp_path / "tmp", "pairs", pairs)
    put(tmp_path / "tmp", "pairs.dev", [("ж", "щ")])
    generate(NAMES[0], tmp_path / "data", tmp_path / "tmp")
    vocabulary = (tmp_path / "data" / "vocab.translate_enfr_pairs.subwords").read_text(encoding="utf-8")
    assert "é" in vocabulary
    assert "ж" not in vocabulary
    assert decoded(NAMES[0], tmp_path / "data", DEV) == [("ж", "щ")]
    assert len(decoded(NAMES[0], tmp_path / "data", TRAIN)) + len(decoded(NAMES[0], tmp_path / "data", TEST)) == 1500


def test_the_users_own_splits_in_two_files_with_dos_line_ends(tmp_path):
    train, dev, test = sentences(30), sentences(5, seed=1), sentences(7, seed=2)
    put(tmp_path / "tmp", "pairs", train + [("alone", "")], end="\r\n")
    put(tmp_path / "tmp", "pairs.dev.tsv", dev)
    put(tmp_path / "tmp", "pairs.test", test)
    generate(NAMES[0], tmp_path / "data", tmp_path / "tmp")
    assert sorted(decoded(NAMES[0], tmp_path / "data", TRAIN)) == sorted(train)
    assert decoded(NAMES[0], tmp_path / "data", DEV) == dev
    assert decoded(NAMES[0], tmp_path / "data", TEST) == test


@pytest.mark.parametrize(("suffix", "english"), [("", "inputs"), ("_rev", "targets")])
def test_t2t_reads_the_data_as_it_does_its_own_both_ways(made, suffix, english):
    data, _ = made
    enfr = registry.problem(NAMES[0] + suffix)
    dataset = enfr.dataset(tf.estimator.ModeKeys.EVAL, data_dir=str(data))
    with tf.Session() as session:
        first = session.run(tf.data.make_one_shot_iterator(dataset).get_next())
    encoder = enfr.feature_encoders(str(data))[english]
    assert encoder.decode(first[english].flatten()[:-1]) == decoded(NAMES[0], data, DEV)[0][0]


def test_nothing_there(tmp_path, capsys):
    said = sentence_of_the_end(capsys, NAMES[0], tmp_path / "data", tmp_path / "tmp")
    assert str(tmp_path / "tmp") in said
    for name in ("pairs.tsv", "pairs.en", "pairs.fr"):
        assert name in said


def test_both_forms_at_once(tmp_path, capsys):
    put(tmp_path / "tmp", "pairs.tsv", sentences(5))
    put(tmp_path / "tmp", "pairs", sentences(5))
    said = sentence_of_the_end(capsys, NAMES[0], tmp_path / "data", tmp_path / "tmp")
    assert "pairs.tsv" in said
    assert "pairs.en are both there" in said


def test_one_file_of_two(tmp_path, capsys):
    put(tmp_path / "tmp", "pairs", sentences(5))
    (tmp_path / "tmp" / "pairs.fr").unlink()
    said = sentence_of_the_end(capsys, NAMES[0], tmp_path / "data", tmp_path / "tmp")
    assert said.endswith(f"pairs.en is there without {tmp_path / 'tmp' / 'pairs.fr'}.")


@pytest.mark.parametrize("own_dev", [False, True])
def test_too_few_to_hold_any_out(tmp_path, capsys, own_dev):
    put(tmp_path / "tmp", "pairs.tsv", sentences(999))
    if own_dev:
        put(tmp_path / "tmp", "pairs.dev.tsv", sentences(5))
    said = sentence_of_the_end(capsys, NAMES[0], tmp_path / "data", tmp_path / "tmp")
    assert "999 pairs are too few" in said
    assert "pairs.test.*" in said


def test_a_subsample_of_nothing(tmp_path, capsys):
    for stem in ("pairs", "pairs.dev", "pairs.test"):
        put(tmp_path / "tmp", stem, [("one", "un")])
    assert "no pair for train" in sentence_of_the_end(capsys, NAMES[2], tmp_path / "data", tmp_path / "tmp")


def test_one_english_sentence_for_all_cannot_be_split(tmp_path, capsys):
    put(tmp_path / "tmp", "pairs.tsv", [("the same", f"la même {i}") for i in range(1200)])
    assert "leaves no pair for" in sentence_of_the_end(capsys, NAMES[0], tmp_path / "data", tmp_path / "tmp")


@pytest.mark.parametrize("stem", ["pairs", "pairs.dev", "pairs.test"])
@pytest.mark.parametrize(
    ("addition", "sentence"),
    [("été\n".encode("latin-1"), "{stem}.fr: line 6 is not UTF-8"), (b"un\ndeux\n", "{stem}.fr has 7")],
)
def test_bad_files_of_any_split_are_named(tmp_path, capsys, stem, addition, sentence):
    for good in ("pairs", "pairs.dev", "pairs.test"):
        put(tmp_path / "tmp", good, sentences(5))
    with (tmp_path / "tmp" / f"{stem}.fr").open("ab") as file:
        file.write(addition)
    said = sentence_of_the_end(capsys, NAMES[0], tmp_path / "data", tmp_path / "tmp")
    assert sentence.format(stem=stem) in said


@settings(deadline=None, max_examples=200)
@given(pairs=st.integers(1000, 10**8))
def test_held_out_shares_leave_most_for_training(pairs):
    share = plugin.held_out_share(pairs)
    assert 99 < share * pairs < 2001
    assert share <= 0.1


@settings(deadline=None, max_examples=200)
@given(characters=st.integers(0, 10**11))
def test_vocabulary_sizes_are_powers_of_two_with_text_enough_for_each_piece(characters):
    size = plugin.vocabulary_size(characters)
    assert size in [2**k for k in range(8, 16)]
    assert size == 256 or characters >= 1500 * size
    assert size == 2**15 or characters < 1500 * 2 * size or size == 256


def test_forty_thousand_pairs_get_four_thousand_pieces():
    assert plugin.vocabulary_size(40000 * 2 * 100) == 4096


def test_data_is_kept_when_its_text_is_the_same_and_made_anew_when_not(tmp_path):
    put(tmp_path / "tmp", "pairs.tsv", sentences(1000))
    generate(NAMES[0], tmp_path / "data", tmp_path / "tmp")
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()}
    generate(NAMES[0], tmp_path / "data", tmp_path / "tmp")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()} == shards
    others = sentences(1100, seed=5)
    put(tmp_path / "tmp", "pairs.tsv", others)
    generate(NAMES[0], tmp_path / "data", tmp_path / "tmp")
    assert sorted(sum((decoded(NAMES[0], tmp_path / "data", split) for split in (TRAIN, DEV, TEST)), [])) == sorted(
        others
    )


def test_other_text_for_one_share_makes_the_shards_of_the_others_unreadable(tmp_path, capsys):
    put(tmp_path / "tmp", "pairs.tsv", sentences(1000))
    generate(NAMES[0], tmp_path / "data", tmp_path / "tmp")
    put(tmp_path / "tmp", "pairs.tsv", sentences(1100, seed=5))
    generate(NAMES[1], tmp_path / "data", tmp_path / "tmp")
    assert decoded(NAMES[1], tmp_path / "data", TRAIN)
    with pytest.raises(SystemExit):
        decoded(NAMES[0], tmp_path / "data", TRAIN)
    assert "is not the vocabulary that the shards were made with" in capsys.readouterr().err
    os.unlink(str(tmp_path / "data" / "vocab.translate_enfr_pairs.subwords"))
    with pytest.raises(SystemExit):
        decoded(NAMES[1], tmp_path / "data", TRAIN)
    assert "run t2t-datagen --problem=translate_enfr_pairs_5pc first" in capsys.readouterr().err


def test_a_small_corpus_has_few_shards(tmp_path):
    put(tmp_path, "pairs.tsv", sentences(1200))
    assert plugin.TranslateEnfrPairs().sources(tmp_path).train_shards == 10
