"""English-French translation: problems whose data is whole or absent, and WMT14 with T2T's own corpora.

    t2t-datagen --t2t_usr_dir t2t_problems --problem translate_enfr_wmt14 --tmp_dir ARCHIVES --data_dir DATA

Beside T2T's shards a folder of data gets `PROBLEM.json`, the record of what belongs to the problem and what it was made
of, and `PROBLEM.dev.en`, `.dev.fr`, `.test.en` and `.test.fr`, to decode from and to score against.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import hashlib
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import tensorflow.compat.v1 as tf
from tensor2tensor.data_generators import generator_utils, problem, text_encoder, text_problems, translate
from tensor2tensor.data_generators import translate_enfr as upstream
from tensor2tensor.utils import registry

from t2t_problems import corpora
from t2t_problems.corpora import Corpus, Pair
from t2t_problems.failure import user_errors_end_the_process
from train_large.errors import UserError
from train_large.files import whole

TRAIN, DEV, TEST = problem.DatasetSplit.TRAIN, problem.DatasetSplit.EVAL, problem.DatasetSplit.TEST
FILE_TAGS = {TRAIN: "train", DEV: "dev", TEST: "test"}  # T2T's, in the names of shards
FORMAT = 1  # of what datagen writes: raised when the same inputs would give other data
VOCABULARY_CHARACTERS = 10 * 1000 * 1000  # learnt from: 1 MB of each of ten files for WMT's corpora, as T2T does


class Sources(NamedTuple):
    """What to make a problem's data of."""

    train: list[Corpus]
    dev: Corpus
    test: Corpus
    vocabulary_size: int
    """Word pieces to aim at."""
    train_shards: int

    def of(self, split: str) -> list[Corpus]:
        return {TRAIN: self.train, DEV: [self.dev], TEST: [self.test]}[split]


class EnglishFrench(translate.TranslateProblem):
    """English to French from corpora in tmp_dir. A problem says which files these are, and how to read them.

    Datagen writes aside and moves at the end, the record last; so a run that was killed leaves nothing that training
    would read, and the next one starts afresh. T2T's own leaves shards, a vocabulary and compiled text that look whole
    (data_generators/text_problems.py:328 and generator_utils.py:329, 1.15.7).
    """

    share = 1.0
    """Of the distinct training pairs; the vocabulary, dev and test are those of the whole."""

    def input_files(self, tmp_dir: Path) -> list[Path]:
        """The files that the data is made of. Raises UserError if they are not all there."""
        raise NotImplementedError

    def sources(self, tmp_dir: Path) -> Sources:
        """How to read them. Raises UserError if they do not do."""
        raise NotImplementedError

    def generate_data(self, data_dir: str, tmp_dir: str, task_id: int = -1) -> None:
        """Write shards, vocabulary and plain dev and test text into `data_dir`, or end the process with one sentence.

        Nothing is done if `data_dir` already holds what would be made of the files in `tmp_dir`. Shards of dev and test
        keep the order of the text; those of train are shuffled as T2T does.
        """
        with user_errors_end_the_process():
            if "://" in str(data_dir) + str(tmp_dir):
                raise UserError(
                    f"--data_dir={data_dir} --tmp_dir={tmp_dir}: give local folders and copy the data then."
                )
            folder, tmp = (Path(os.path.abspath(os.path.expanduser(str(path)))) for path in (data_dir, tmp_dir))
            inputs = {"format": FORMAT, "files": _stamps(self.input_files(tmp))}
            try:
                with _alone_in(folder):
                    self._generate(folder, tmp, inputs)
            except (OSError, tf.errors.OpError) as error:
                reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
                raise UserError(
                    f"The data of {self.name} could not be written to {folder} ({reason}): free some space or give "
                    "another --data_dir."
                ) from error

    def feature_encoders(self, data_dir: str) -> dict[str, Any]:
        path = os.path.join(data_dir or "", self.vocab_filename)
        with user_errors_end_the_process():
            if not data_dir or not tf.gfile.Exists(path):
                raise UserError(
                    f"The vocabulary {path} is not there: run t2t-datagen --problem={self.name} first, with the same "
                    "--data_dir."
                )
        return super().feature_encoders(data_dir)

    def filepattern(self, data_dir: str, mode: str, shard: int | None = None) -> str:
        """T2T's pattern of the shards to read, once it is certain that they are whole; or one sentence and the end."""
        pattern = super().filepattern(data_dir, mode, shard)
        with user_errors_end_the_process():
            lack = _what_lacks(data_dir, self.name, os.path.basename(pattern))
            if lack:
                raise UserError(
                    f"{data_dir} does not hold the data of {self.name} whole: {lack}. Run t2t-datagen "
                    f"--problem={self.name} --data_dir={data_dir}, which writes all of it anew."
                )
        return pattern

    def _generate(self, folder: Path, tmp: Path, inputs: dict[str, Any]) -> None:
        record = _record(str(folder), self.name)
        if record and record["inputs"] == inputs and not _what_lacks(str(folder), self.name, "*"):
            tf.logging.info("%s: the data made of these files is already in %s.", self.name, folder)
            return
        aside = folder / f".{self.name}.unfinished"
        shutil.rmtree(str(aside), ignore_errors=True)
        aside.mkdir()
        try:
            sources = self.sources(tmp)
            encoder = self._vocabulary(folder, aside, sources, inputs)
            for split in (DEV, TEST, TRAIN):  # bad dev and test files show before hours of training text
                self._write_shards(aside, sources, split, encoder)
            _publish(folder, aside, self.name, inputs, self.vocab_filename)
        finally:
            shutil.rmtree(str(aside), ignore_errors=True)

    def _vocabulary(
        self, folder: Path, aside: Path, sources: Sources, inputs: dict[str, Any]
    ) -> text_encoder.SubwordTextEncoder:
        """The word pieces, in a file in `aside`: a copy if another share of the same text has them in `folder`."""
        for path in folder.glob("translate_enfr_*.json"):
            record = _record(str(folder), path.name[: -len(".json")])
            if (
                record
                and record["inputs"] == inputs
                and record["vocabulary"] == [self.vocab_filename, _digest(str(folder / self.vocab_filename))]
            ):
                shutil.copy(str(folder / self.vocab_filename), str(aside))
                break
        each = VOCABULARY_CHARACTERS // len(sources.train)
        text = (
            side
            for corpus in sources.train
            for pair in corpora.sample(corpora.full(corpus.read()), each)
            for side in pair
        )
        return generator_utils.get_or_generate_vocab_inner(
            str(aside),
            self.vocab_filename,
            sources.vocabulary_size,
            text,
            max_subtoken_length=self.max_subtoken_length,
            reserved_tokens=text_encoder.RESERVED_TOKENS,
        )

    def _pairs(self, sources: Sources, split: str) -> Iterator[Pair]:
        pairs = corpora.full(itertools.chain.from_iterable(corpus.read() for corpus in sources.of(split)))
        return corpora.subsample(pairs, self.share) if split == TRAIN else pairs

    def _write_shards(
        self, aside: Path, sources: Sources, split: str, encoder: text_encoder.SubwordTextEncoder
    ) -> None:
        shards = sources.train_shards if split == TRAIN else 1
        paths = self.data_filepaths(split, str(aside), shards, shuffled=split != TRAIN)
        if next(self._pairs(sources, split), None) is None:
            raise UserError(
                f"{self.name}: {sources.of(split)[0].name} leaves no pair for {FILE_TAGS[split]}: give more text."
            )
        samples = ({"inputs": english, "targets": french} for english, french in self._pairs(sources, split))
        generator_utils.generate_files(text_problems.text2text_generate_encoded(samples, encoder), paths)
        if split == TRAIN:
            generator_utils.shuffle_dataset(paths)
            return
        stem = f"{self.name}.{FILE_TAGS[split]}"
        with (aside / f"{stem}.en").open("wb") as english, (aside / f"{stem}.fr").open("wb") as french:
            for source, target in self._pairs(sources, split):
                english.write(source.encode("utf-8") + b"\n")
                french.write(target.encode("utf-8") + b"\n")


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold `folder`, made if need be, against another datagen; the system lets go of it when the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(str(folder), os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another datagen is writing to {folder}: wait for its end, or give another --data_dir."
            ) from None
        except OSError:
            tf.logging.warning("%s is on a file system without locks: let no other datagen write to it.", folder)
        yield
    finally:
        os.close(handle)


def _stamps(paths: list[Path]) -> dict[str, list[int]]:
    """Name: [size in bytes, time of the last change in ns]."""
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


def _digest(path: str) -> str:
    if not tf.gfile.Exists(path):
        return ""
    with tf.gfile.GFile(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def _record(data_dir: str, name: str) -> dict[str, Any] | None:
    """What datagen noted: "inputs", "files" {name: bytes}, "vocabulary" [name, SHA-256]. None if it never finished."""
    path = os.path.join(data_dir, f"{name}.json")
    if not tf.gfile.Exists(path):
        return None
    with tf.gfile.GFile(path) as file, contextlib.suppress(ValueError):
        record = json.loads(file.read())
        if isinstance(record, dict) and {"inputs", "files", "vocabulary"} <= set(record):
            return record
    return None


def _what_lacks(data_dir: str, name: str, pattern: str) -> str:
    """Why the files of problem `name` that match `pattern` are not what datagen finished; "" if they are."""
    record = _record(data_dir, name)
    if record is None:
        return f"there is no {name}.json, which datagen writes when it has finished"
    vocabulary, digest = record["vocabulary"]
    if _digest(os.path.join(data_dir, vocabulary)) != digest:
        return f"{vocabulary} is not the vocabulary that the shards were made with"
    expected = {file: size for file, size in record["files"].items() if fnmatch.fnmatch(file, pattern)}
    found = {os.path.basename(path): path for path in tf.gfile.Glob(os.path.join(data_dir, pattern))}
    for file, size in sorted(expected.items()):
        if file not in found:
            return f"{file} is missing"
        length = tf.gfile.Stat(found[file]).length
        if length != size:
            return f"{file} has {length} bytes instead of {size}"
    stray = sorted(set(found) - set(expected))
    return f"{stray[0]} does not belong to it" if stray and pattern != "*" else ""


def _publish(folder: Path, aside: Path, name: str, inputs: dict[str, Any], vocabulary: str) -> None:
    """Move all files from `aside` to `folder` in place of older ones; without the record nothing counts as whole."""
    record = folder / f"{name}.json"
    made = {path.name: path.stat().st_size for path in aside.iterdir()}
    with contextlib.suppress(FileNotFoundError):
        record.unlink()
    for tag in itertools.chain(FILE_TAGS.values(), ["unshuffled"]):
        for old in folder.glob(f"{name}-{tag}*"):
            old.unlink()
    for file in sorted(made):
        os.replace(str(aside / file), str(folder / file))
    contents = {
        "inputs": inputs,
        "vocabulary": [vocabulary, _digest(str(folder / vocabulary))],
        "files": {file: size for file, size in sorted(made.items()) if file != vocabulary},
    }
    with whole(record) as path:
        path.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")


class Archive(NamedTuple):
    url: str
    english: str
    """Member of the archive."""
    french: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def corpus(self, tmp_dir: Path) -> Corpus:
        return corpora.archived(tmp_dir / self.name, self.english, self.french)


def _upstream_archives(datasets: list[list[Any]]) -> list[Archive]:
    return [Archive(url, *members) for url, members in datasets]


# Tensor2Tensor's lists (data_generators/translate_enfr.py:49-78, 1.15.7).
WMT14_TRAIN = _upstream_archives(upstream._ENFR_TRAIN_LARGE_DATA)
(NEWSTEST2013,) = _upstream_archives(upstream._ENFR_TEST_LARGE_DATA)
NEWSTEST2014 = Archive(  # members as sacreBLEU's wmt14/full has them (sacrebleu/dataset/__init__.py)
    "http://www.statmt.org/wmt14/test-full.tgz",
    "test-full/newstest2014-fren-src.en.sgm",
    "test-full/newstest2014-fren-ref.fr.sgm",
)
# Of the training archives, as TensorFlow Datasets has them (url_checksums/wmt14_translate.txt: 918311367, 657632379,
# 80418416, 2595102720, 2365634246 bytes). The others are upper bounds: WMT19's dev.tgz, which holds all earlier dev
# sets, has 38654961 bytes; test-full.tgz is some twenty files of text of 3,003 sentences.
SIZES = {
    "training-parallel-commoncrawl.tgz": "918 MB",
    "training-parallel-europarl-v7.tgz": "658 MB",
    "training-parallel-nc-v9.tgz": "80 MB",
    "training-giga-fren.tar": "2.6 GB",
    "training-parallel-un.tgz": "2.4 GB",
    "dev.tgz": "less than 40 MB",
    "test-full.tgz": "less than 20 MB",
}


@registry.register_problem
class TranslateEnfrWmt14(EnglishFrench):
    """WMT14: 41M pairs of five corpora, newstest2013 for dev, newstest2014 for test, 32k word pieces.

    Reads the archives in tmp_dir and downloads nothing.
    """

    @property
    def approx_vocab_size(self) -> int:
        return 2**15

    def input_files(self, tmp_dir: Path) -> list[Path]:
        archives = WMT14_TRAIN + [NEWSTEST2013, NEWSTEST2014]
        missing = [archive for archive in archives if not (tmp_dir / archive.name).is_file()]
        if missing:
            raise UserError(
                f"{self.name} needs {_count(missing, len(archives))} in {tmp_dir} (--tmp_dir), where they are "
                "read as they are; nothing is downloaded. Put there:\n"
                + "\n".join(
                    f"  {tmp_dir / archive.name} ({SIZES[archive.name]}) from {archive.url}" for archive in missing
                )
            )
        return [tmp_dir / archive.name for archive in archives]

    def sources(self, tmp_dir: Path) -> Sources:
        return Sources(
            train=[archive.corpus(tmp_dir) for archive in WMT14_TRAIN],
            dev=NEWSTEST2013.corpus(tmp_dir),
            test=NEWSTEST2014.corpus(tmp_dir),
            vocabulary_size=self.approx_vocab_size,
            train_shards=100,
        )


def _count(missing: list[Archive], of: int) -> str:
    return f"{len(missing)} archive{'s' if len(missing) > 1 else ''} more (of {of})"


@registry.register_problem("translate_enfr_wmt14_5pc")
class TranslateEnfrWmt14FivePercent(TranslateEnfrWmt14):
    """About 5 % of the training pairs; dev, test and vocabulary of the whole."""

    share = 0.05

    @property
    def use_vocab_from_other_problem(self) -> TranslateEnfrWmt14:
        return TranslateEnfrWmt14()


@registry.register_problem("translate_enfr_wmt14_1pc")
class TranslateEnfrWmt14OnePercent(TranslateEnfrWmt14FivePercent):
    """About 1 %, all of them among the 5 %."""

    share = 0.01
