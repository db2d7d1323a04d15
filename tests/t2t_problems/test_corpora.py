from __future__ import annotations

import gzip
import io
import logging
import random
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t2t_problems import corpora
from train_large.errors import UserError

PAIRS = [("The cat sleeps.", "Le chat dort."), ("It rains.", "Il pleut."), ("Où?", "Hélas, œuvre n° 1 à 5 €.")]
SEPARATORS = "\x0b\x0c\x1c\x85\u2028\u2029\r"  # what str.splitlines would also split at


def written(folder: Path, name: str, lines: list[str], end: str = "\n") -> Path:
    path = folder / name
    path.write_bytes("".join(line + end for line in lines).encode("utf-8"))
    return path


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(str(path), "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sides(pairs: list[tuple[str, str]]) -> tuple[list[str], list[str]]:
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


sentence = st.text(
    st.one_of(st.sampled_from("ab é" + SEPARATORS), st.characters(blacklist_categories=("Cs",))), max_size=12
).map(lambda text: text.replace("\n", "").replace("\t", "").replace("\ufeff", "").strip())
pairs_of_text = st.lists(st.tuples(sentence, sentence), max_size=8)


@settings(deadline=None, max_examples=60)
@given(pairs=pairs_of_text, end=st.sampled_from(["\n", "\r\n"]))
def test_only_line_ends_divide_text_and_the_rest_is_kept(pairs, end):
    english, french = sides(pairs)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        two = corpora.two_files(written(folder, "x.en", english, end), written(folder, "x.fr", french, end))
        assert list(two.read()) == pairs
        tsv = corpora.tsv_file(written(folder, "x.tsv", ["\t".join(pair) for pair in pairs], end))
        assert list(tsv.read()) == pairs
        assert list(tsv.read()) == pairs  # as often as one likes


def test_a_last_line_without_end_and_a_byte_order_mark(tmp_path):
    tsv = tmp_path / "pairs.tsv"
    tsv.write_bytes(b"\xef\xbb\xbfone\tun\r\ntwo\tdeux")
    assert list(corpora.tsv_file(tsv).read()) == [("one", "un"), ("two", "deux")]


@pytest.mark.parametrize(("english", "french"), [(5, 3), (3, 5), (0, 1)])
def test_files_of_unequal_length_are_refused_with_both_counts(tmp_path, english, french):
    two = corpora.two_files(
        written(tmp_path, "pairs.en", ["a"] * english), written(tmp_path, "pairs.fr", ["b"] * french)
    )
    with pytest.raises(UserError) as error:
        corpora.census(two)
    assert f"pairs.en has {english} lines" in str(error.value)
    assert f"pairs.fr has {french}:" in str(error.value)


def test_what_is_not_utf8_is_named_by_file_line_and_byte(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_bytes(b"good\tbon\n" + "tea\tthé\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"pairs\.tsv: line 2 is not UTF-8 \(byte 7 of the line is 0xe9\)"):
        corpora.census(corpora.tsv_file(path))


@pytest.mark.parametrize(("line", "tabs"), [("no tab", 0), ("two\ttabs\there", 2)])
def test_a_line_needs_one_tab(tmp_path, line, tabs):
    path = written(tmp_path, "pairs.tsv", ["good\tbon", "", line])
    with pytest.raises(UserError, match=rf"pairs\.tsv line 3 has {tabs} tabs instead of one"):
        corpora.census(corpora.tsv_file(path))


def test_lines_with_an_empty_side_are_left_out_and_counted(tmp_path, caplog):
    tsv = corpora.tsv_file(written(tmp_path, "pairs.tsv", ["one\tun", "two\t", "\tdeux", "", "three\ttrois", " \t "]))
    with caplog.at_level(logging.WARNING):
        assert corpora.census(tsv) == corpora.Census(pairs=2, characters=len("oneunthreetrois"))
    assert "4 of 6 lines have an empty side and are left out; the first is line 2" in caplog.text
    assert list(corpora.full(tsv.read())) == [("one", "un"), ("three", "trois")]


def test_a_file_of_empty_lines_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"pairs\.tsv: no line has both"):
        corpora.census(corpora.tsv_file(written(tmp_path, "pairs.tsv", ["a\t", "", "\tb"])))


@pytest.mark.parametrize("name", ["x.tgz", "x.tar"])
@pytest.mark.parametrize("packed", [False, True])
def test_archives_are_read_without_unpacking(tmp_path, name, packed):
    ending, wrap = (".gz", gzip.compress) if packed else ("", bytes)
    english, french = ("".join(line + "\n" for line in side).encode("utf-8") for side in sides(PAIRS))
    members = {"./d/x.fr" + ending: wrap(french), "d/other.en": b"no", "d/x.en" + ending: wrap(english)}
    path = archive(tmp_path / name, members)
    assert list(corpora.archived(path, "d/x.en" + ending, "d/x.fr" + ending).read()) == PAIRS
    assert list(tmp_path.iterdir()) == [path]


SGM = """<srcset setid="newstest" srclang="any">
<doc sysid="ref" docid="a" genre="news" origlang="en">
<hl>
<seg id="1">A  headline &amp; more </seg>
</hl>
<p>
<seg id="2">L'eau, "c'est" <i>bien</i>.</seg>
<seg id="3">Prices < 5 > 3</seg>
</p>
</doc>
</srcset>
"""


def test_segments_are_those_that_sacrebleu_reads(tmp_path):
    fake_sgml = pytest.importorskip("sacrebleu.dataset.fake_sgml")
    source, plain = tmp_path / "x.sgm", tmp_path / "plain"
    source.write_text(SGM, encoding="utf-8")
    reader = fake_sgml.FakeSGMLDataset.__new__(fake_sgml.FakeSGMLDataset)
    reader._convert_format(str(source), str(plain))
    theirs = plain.read_text(encoding="utf-8").splitlines()
    assert len(theirs) == 3
    assert list(corpora.segments(SGM.split("\n"))) == theirs
    path = archive(tmp_path / "x.tgz", {"x.en.sgm": SGM.encode("utf-8"), "x.fr.sgm": SGM.encode("utf-8")})
    assert list(corpora.archived(path, "x.en.sgm", "x.fr.sgm").read()) == list(zip(theirs, theirs))


@pytest.mark.parametrize("name", ["x.tgz", "x.tar"])
def test_an_archive_cut_short_is_refused(tmp_path, name):
    noise = random.Random(0)
    text = "".join(f"{noise.getrandbits(400):x}\n" for _ in range(2000)).encode("utf-8")
    path = archive(tmp_path / name, {"x.en": text, "x.fr": text})
    whole = path.read_bytes()
    for part in (0.3, 0.8):
        path.write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(UserError, match="damaged"):
            corpora.census(corpora.archived(path, "x.en", "x.fr"))
    path.write_bytes(b"<html>404</html>")
    with pytest.raises(UserError, match="damaged"):
        corpora.census(corpora.archived(path, "x.en", "x.fr"))
    path.write_bytes(whole)
    assert corpora.census(corpora.archived(path, "x.en", "x.fr")).pairs == 2000


def test_an_archive_without_the_member_is_refused(tmp_path):
    path = archive(tmp_path / "dev.tgz", {"dev/x.en": b"one\n"})
    with pytest.raises(UserError, match=r"dev\.tgz holds no dev/x\.fr"):
        corpora.census(corpora.archived(path, "dev/x.en", "dev/x.fr"))


@settings(deadline=None, max_examples=30)
@given(
    pairs=st.lists(st.tuples(sentence, sentence), max_size=40),
    low=st.floats(0, 1),
    high=st.floats(0, 1),
    seed=st.randoms(use_true_random=False),
)
def test_subsamples_are_nested_and_do_not_depend_on_order(pairs, low, high, seed):
    low, high = sorted([low, high])
    small, large = (set(corpora.subsample(pairs, share)) for share in (low, high))
    assert small <= large <= set(pairs)
    seed.shuffle(pairs)
    assert set(corpora.subsample(pairs, low)) == small
    assert list(corpora.subsample(pairs, 1.0)) == pairs


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5])
def test_a_subsample_has_about_its_share(share):
    pairs = [(f"sentence {i}", f"phrase {i}") for i in range(20000)]
    expected = share * len(pairs)
    assert abs(len(list(corpora.subsample(pairs, share))) - expected) < 4 * expected**0.5


@settings(deadline=None, max_examples=60)
@given(pairs=st.lists(st.tuples(sentence, sentence), max_size=30, unique=True), characters=st.integers(1, 200))
def test_a_sample_is_the_smallest_subsample_of_so_many_characters(pairs, characters):
    by_rank = sorted(pairs, key=lambda pair: corpora.fraction("\t".join(pair), "subsample"))
    expected, held = [], 0
    for pair in by_rank:
        if held >= characters:
            break
        expected.append(pair)
        held += len(pair[0]) + len(pair[1])
    drawn = corpora.sample(pairs, characters)
    assert [pair for pair in drawn if any(pair)] == [pair for pair in expected if any(pair)]
    assert drawn == corpora.sample(pairs[::-1], characters)
