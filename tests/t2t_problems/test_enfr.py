from __future__ import annotations

import contextlib
import gzip
import io
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from shards import decoded, generate

from t2t_problems import tensorflow_two

tensorflow_two.behave_as_one()

from tensor2tensor.data_generators import generator_utils, problem  # noqa: E402
from tensor2tensor.utils import registry  # noqa: E402

from t2t_problems import enfr as plugin  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TRAIN, DEV, TEST = problem.DatasetSplit.TRAIN, problem.DatasetSplit.EVAL, problem.DatasetSplit.TEST
WHOLE, FIVE, ONE = "translate_enfr_wmt14", "translate_enfr_wmt14_5pc", "translate_enfr_wmt14_1pc"
# Archive, members, pairs, as on statmt.org; the other languages beside them are left out here but for one.
ARCHIVES = [
    ("training-parallel-commoncrawl.tgz", "commoncrawl.fr-en.en", "commoncrawl.fr-en.fr", 400),
    ("training-parallel-europarl-v7.tgz", "training/europarl-v7.fr-en.en", "training/europarl-v7.fr-en.fr", 300),
    (
        "training-parallel-nc-v9.tgz",
        "training/news-commentary-v9.fr-en.en",
        "training/news-commentary-v9.fr-en.fr",
        100,
    ),
    ("training-giga-fren.tar", "giga-fren.release2.fixed.en.gz", "giga-fren.release2.fixed.fr.gz", 700),
    ("training-parallel-un.tgz", "un/undoc.2000.fr-en.en", "un/undoc.2000.fr-en.fr", 500),
    ("dev.tgz", "dev/newstest2013.en", "dev/newstest2013.fr", 20),
    ("test-full.tgz", "test-full/newstest2014-fren-src.en.sgm", "test-full/newstest2014-fren-ref.fr.sgm", 15),
]


def sentences(label: str, count: int) -> list[tuple[str, str]]:
    draw = random.Random(label)
    words = ["".join(draw.choice("abcdeéèhilmnoœrst") for _ in range(draw.randint(1, 7))) for _ in range(80)]

    def sentence() -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(2, 8)))

    return [(f"{sentence()} {label} {i}.", f"{sentence()} {label} {i}.") for i in range(count)]


def sgm(side: list[str]) -> str:
    segments = "".join(f'<seg id="{i}">{text}</seg>\n' for i, text in enumerate(side, 1))
    return f'<srcset setid="newstest2014" srclang="any">\n<doc docid="a">\n<p>\n{segments}</p>\n</doc>\n</srcset>\n'


def make_archives(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """The pairs of each archive written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for name, english, french, count in ARCHIVES:
        pairs = made[name] = sentences(name.split(".")[0], count)
        with tarfile.open(str(folder / name), "w:gz" if name.endswith("gz") else "w") as tar:
            for member, side in (
                ("README", ["no pairs"]),
                (french, [p[1] for p in pairs]),
                (english, [p[0] for p in pairs]),
            ):
                text = sgm(side) if member.endswith(".sgm") else "".join(line + "\n" for line in side)
                content = text.encode("utf-8")
                if member.endswith(".gz"):
                    content = gzip.compress(content)
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return made


def refusal(capsys, name: str, data: Path, split: str = TRAIN) -> str:
    """The sentence with which training on `data` ends."""
    with pytest.raises(SystemExit) as ended:
        registry.problem(name).filepattern(str(data), split)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of data, folder of archives, the pairs of each archive), the whole generated before its parts."""
    root = tmp_path_factory.mktemp("wmt14")
    pairs = make_archives(root / "tmp")
    for name in (WHOLE, FIVE, ONE):
        generate(name, root / "data", root / "tmp")
    return root / "data", root / "tmp", pairs


def test_train_has_the_five_corpora_and_dev_and_test_are_newstest(made):
    data, _, pairs = made
    train = sorted(sum((pairs[name] for name, _, _, _ in ARCHIVES[:5]), []))
    assert sorted(decoded(WHOLE, data, TRAIN)) == train
    assert len(list(data.glob(f"{WHOLE}-train-*-of-00100"))) == 100
    assert decoded(WHOLE, data, DEV) == pairs["dev.tgz"]
    assert decoded(WHOLE, data, TEST) == pairs["test-full.tgz"]
    assert registry.problem(WHOLE).approx_vocab_size == 32768


def test_archives_and_members_are_those_that_t2t_lists(made):
    """T2T's own 32k problem, whose code is read here as data, names the same archives for train and dev."""
    theirs = registry.problem("translate_enfr_wmt32k")
    for split, ours in ((TRAIN, ARCHIVES[:5]), (DEV, ARCHIVES[5:6])):
        listed = [(os.path.basename(url), *members) for url, members in theirs.source_data_files(split)]
        assert listed == [archive[:3] for archive in ours]


def test_shares_are_nested_and_have_dev_test_and_vocabulary_of_the_whole(made):
    data, _, _ = made
    whole, five, one = (set(decoded(name, data, TRAIN)) for name in (WHOLE, FIVE, ONE))
    assert one < five < whole
    assert abs(len(five) - 0.05 * len(whole)) < 4 * (0.05 * len(whole)) ** 0.5
    assert abs(len(one) - 0.01 * len(whole)) < 4 * (0.01 * len(whole)) ** 0.5
    for split in (DEV, TEST):
        assert decoded(WHOLE, data, split) == decoded(FIVE, data, split) == decoded(ONE, data, split)
    assert [path.name for path in data.glob("vocab.*")] == ["vocab.translate_enfr_wmt14.32768.subwords"]
    assert {registry.problem(name).vocab_filename for name in (WHOLE, FIVE, ONE)} == {
        "vocab.translate_enfr_wmt14.32768.subwords"
    }


def test_a_part_made_alone_has_the_vocabulary_of_the_whole(made, tmp_path):
    data, tmp, _ = made
    generate(ONE, tmp_path / "data", tmp)
    name = "vocab.translate_enfr_wmt14.32768.subwords"
    assert (tmp_path / "data" / name).read_bytes() == (data / name).read_bytes()
    assert sorted(decoded(ONE, tmp_path / "data", TRAIN)) == sorted(decoded(ONE, data, TRAIN))


def test_nothing_is_unpacked_into_the_folder_of_archives(made):
    _, tmp, _ = made
    assert sorted(path.name for path in tmp.iterdir()) == sorted(archive[0] for archive in ARCHIVES)


def test_missing_archives_are_listed_with_place_size_and_address(tmp_path, capsys):
    make_archives(tmp_path / "tmp")
    gone = ["training-giga-fren.tar", "test-full.tgz"]
    for name in gone:
        (tmp_path / "tmp" / name).unlink()
    with pytest.raises(SystemExit) as ended:
        generate(ONE, tmp_path / "data", tmp_path / "tmp")
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "2 archives more (of 7)" in said
    assert f"{tmp_path / 'tmp' / gone[0]} (2.6 GB) from http://www.statmt.org/wmt10/training-giga-fren.tar" in said
    assert f"{tmp_path / 'tmp' / gone[1]} (" in said
    assert "http://www.statmt.org/wmt14/test-full.tgz" in said
    assert all(archive[0] not in said for archive in ARCHIVES if archive[0] not in gone)
    assert not (tmp_path / "data").exists()


def test_a_relative_tmp_dir_is_named_in_full(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        registry.problem(WHOLE).generate_data("data", "archives.gz")
    assert str(tmp_path / "archives.gz" / "dev.tgz") in capsys.readouterr().err


def test_an_archive_cut_short_leaves_no_data(tmp_path, capsys):
    make_archives(tmp_path / "tmp")
    giga = tmp_path / "tmp" / "training-giga-fren.tar"
    giga.write_bytes(giga.read_bytes()[: giga.stat().st_size // 3])
    with pytest.raises(SystemExit):
        generate(WHOLE, tmp_path / "data", tmp_path / "tmp")
    assert f"{giga} " in capsys.readouterr().err
    assert not list((tmp_path / "data").iterdir())


def copied(data: Path, to: Path) -> Path:
    to.mkdir()
    for path in data.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_training_refuses_data_that_is_not_whole(made, tmp_path, capsys):
    copy = copied(made[0], tmp_path / "copy")
    shard = copy / f"{WHOLE}-train-00007-of-00100"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    assert f"{shard.name} has {len(content) - 1} bytes instead of {len(content)}" in refusal(capsys, WHOLE, copy)
    assert decoded(WHOLE, copy, DEV)  # which is whole
    shard.unlink()
    assert f"{shard.name} is missing" in refusal(capsys, WHOLE, copy)
    shard.write_bytes(content)
    assert len(decoded(WHOLE, copy, TRAIN)) == 2000
    stray = copy / f"{WHOLE}-train-00000-of-00010"
    stray.write_bytes(content)
    assert f"{stray.name} does not belong to it" in refusal(capsys, WHOLE, copy)
    stray.unlink()
    (copy / f"{WHOLE}.json").unlink()
    said = refusal(capsys, WHOLE, copy)
    assert f"there is no {WHOLE}.json" in said
    assert f"--problem={WHOLE} --data_dir={copy}" in said


@pytest.mark.parametrize("moment", range(4))
def test_whatever_fails_midway_leaves_nothing_that_training_would_read(made, tmp_path, capsys, monkeypatch, moment):
    """Failing while shards are written, shuffled or moved, or the record is written, over data of other archives."""
    data, tmp = tmp_path / "data", tmp_path / "tmp"
    copied(made[0], data)
    make_archives(tmp)  # the same text, but files with other dates
    os.utime(str(tmp / "dev.tgz"), (1, 1))

    class Killed(BaseException):
        pass

    calls = []

    def killed(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3 or moment == 3:
            raise Killed
        return original(*args, **kwargs)

    owner, name = [
        (generator_utils, "generate_files"),
        (generator_utils, "_shuffle_single"),
        (os, "replace"),
        (plugin, "whole"),
    ][moment]
    original = getattr(owner, name)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, killed)
        with pytest.raises(Killed):
            generate(WHOLE, data, tmp)
    assert calls
    if moment < 2:  # nothing was touched yet: the older data is still whole
        assert len(decoded(WHOLE, data, TRAIN)) == 2000
    else:
        assert f"there is no {WHOLE}.json" in refusal(capsys, WHOLE, data)
    generate(WHOLE, data, tmp)
    assert len(decoded(WHOLE, data, TRAIN)) == 2000
    assert len(list(data.glob(f"{WHOLE}-*"))) == 102
    assert not list(data.glob(".*"))


def test_shards_that_another_datagen_left_are_replaced(made, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for left in (
        f"{WHOLE}-train-00000-of-00007",
        f"{WHOLE}-unshuffled-train-00000-of-00100",
        f"{WHOLE}-dev-00000-of-00001",
    ):
        (data / left).write_bytes(b"half")
    (data / "vocab.translate_enfr_wmt14.32768.subwords").write_text("'half'\n", encoding="utf-8")
    assert "does not hold" in refusal(capsys, WHOLE, data)
    generate(WHOLE, data, made[1])
    assert sorted(decoded(WHOLE, data, TRAIN)) == sorted(decoded(WHOLE, made[0], TRAIN))
    assert len(list(data.glob(f"{WHOLE}-*"))) == 102


def test_two_datagens_do_not_write_to_one_folder(made, tmp_path, capsys):
    with plugin._alone_in(tmp_path / "data"):
        with pytest.raises(SystemExit):
            generate(ONE, tmp_path / "data", made[1])
        assert "Another datagen is writing" in capsys.readouterr().err
    generate(ONE, tmp_path / "data", made[1])
    assert decoded(ONE, tmp_path / "data", TRAIN)


def test_a_data_dir_that_cannot_be_written_is_named(made, tmp_path, capsys):
    (tmp_path / "data").write_bytes(b"a file")
    with pytest.raises(SystemExit):
        generate(ONE, tmp_path / "data", made[1])
    assert f"could not be written to {tmp_path / 'data'} (" in capsys.readouterr().err


def test_remote_folders_are_refused_for_datagen(made, capsys):
    with pytest.raises(SystemExit):
        registry.problem(WHOLE).generate_data("gs://bucket/data", str(made[1]))
    assert "--data_dir=gs://bucket/data" in capsys.readouterr().err


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": ""}


def datagen(name: str, data: Path, tmp: Path) -> list[str]:
    flags = {"t2t_usr_dir": ROOT / "t2t_problems", "problem": name, "data_dir": data, "tmp_dir": tmp}
    return [
        sys.executable,
        "-m",
        "tensor2tensor.bin.t2t_datagen",
        *(f"--{key}={value}" for key, value in flags.items()),
    ]


@pytest.mark.slow
def test_t2t_datagen_makes_the_data_and_fails_with_one_sentence(tmp_path):
    pairs = make_archives(tmp_path / "tmp")
    command = datagen(ONE, tmp_path / "data", tmp_path / "tmp")
    done = subprocess.run(command, env=environment(), stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    assert decoded(ONE, tmp_path / "data", TEST) == pairs["test-full.tgz"]
    (tmp_path / "tmp" / "dev.tgz").unlink()
    done = subprocess.run(command, env=environment(), stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    assert str(tmp_path / "tmp" / "dev.tgz") in done.stderr


@pytest.mark.slow
def test_a_killed_t2t_datagen_leaves_nothing_that_training_would_read(tmp_path, capsys):
    make_archives(tmp_path / "tmp")
    data = tmp_path / "data"
    process = subprocess.Popen(datagen(WHOLE, data, tmp_path / "tmp"), env=environment(), stderr=subprocess.DEVNULL)
    with contextlib.ExitStack() as stack:
        stack.callback(process.wait)
        stack.callback(process.kill)
        while process.poll() is None and not list(data.glob(".*/*train*")):  # its first shards
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not list(data.glob("*-train-*"))
    assert "does not hold the data" in refusal(capsys, WHOLE, data)
    generate(WHOLE, data, tmp_path / "tmp")
    assert len(decoded(WHOLE, data, TRAIN)) == 2000
    assert not list(data.glob(".*"))
