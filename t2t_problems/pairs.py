"""English-French translation of a user's own pairs: `pairs.tsv`, or `pairs.en` and `pairs.fr`, in tmp_dir.

    t2t-datagen --t2t_usr_dir t2t_problems --problem translate_enfr_pairs --tmp_dir PAIRS --data_dir DATA

`pairs.dev.*` and `pairs.test.*` in the same forms are used if they are there; if not, pairs are held out of the others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Iterator

from tensor2tensor.utils import registry

from t2t_problems import corpora
from t2t_problems.corpora import Corpus, Pair
from t2t_problems.enfr import EnglishFrench, Sources
from train_large.errors import UserError

HELD_OUT = 0.01  # of the pairs, for each of dev and test, but
HELD_OUT_LEAST, HELD_OUT_MOST = 100, 2000  # pairs, about
LEAST_PAIRS = 10 * HELD_OUT_LEAST  # to hold any out of
PIECE_PER_CHARACTERS = 1500
PIECES_LEAST, PIECES_MOST = 2**8, 2**15
PAIRS_PER_SHARD = 10 * 1000
SHARDS_LEAST, SHARDS_MOST = 10, 100


@registry.register_problem
class TranslateEnfrPairs(EnglishFrench):
    """The user's pairs, with a dev and a test split and word pieces according to their number."""

    @property
    def vocab_filename(self) -> str:
        return "vocab.translate_enfr_pairs.subwords"  # the size depends on the text, which training does not see

    def input_files(self, tmp_dir: Path) -> list[Path]:
        files = find(tmp_dir, "pairs")
        if not files:
            raise UserError(
                f"There are no sentence pairs in {tmp_dir} (--tmp_dir): put there pairs.tsv (English, a tab, French on "
                "each line) or pairs.en and pairs.fr (line n of the one translates line n of the other)."
            )
        return files + find(tmp_dir, "pairs.dev") + find(tmp_dir, "pairs.test")

    def sources(self, tmp_dir: Path) -> Sources:
        pairs = corpus(find(tmp_dir, "pairs"))
        counts = corpora.census(pairs)
        given: list[Corpus | None] = []
        for stem in ("pairs.dev", "pairs.test"):
            files = find(tmp_dir, stem)
            given.append(corpus(files) if files else None)
            if files:
                corpora.census(corpus(files))
        to_hold_out = given.count(None)
        if to_hold_out and counts.pairs < LEAST_PAIRS:
            raise UserError(
                f"{pairs.name}: {counts.pairs} pairs are too few to hold some out for validation and testing; give at "
                f"least {LEAST_PAIRS}, or put pairs.dev.* and pairs.test.* beside them in {tmp_dir}."
            )
        share = held_out_share(counts.pairs)
        return Sources(
            train=[between(pairs, 0, 1 - to_hold_out * share)],
            dev=given[0] or between(pairs, 1 - share, 1),
            test=given[1] or between(pairs, 1 - to_hold_out * share, 1 - (to_hold_out - 1) * share),
            vocabulary_size=vocabulary_size(counts.characters),
            train_shards=min(max(counts.pairs // PAIRS_PER_SHARD, SHARDS_LEAST), SHARDS_MOST),
        )


@registry.register_problem("translate_enfr_pairs_5pc")
class TranslateEnfrPairsFivePercent(TranslateEnfrPairs):
    """About 5 % of the training pairs; dev, test and vocabulary of the whole."""

    share = 0.05


@registry.register_problem("translate_enfr_pairs_1pc")
class TranslateEnfrPairsOnePercent(TranslateEnfrPairs):
    """About 1 %, all of them among the 5 %."""

    share = 0.01


def find(tmp_dir: Path, stem: str) -> list[Path]:
    """[STEM.tsv] or [STEM.en, STEM.fr] or nothing. Raises UserError if both are there, or one without the other."""
    tsv, english, french = (tmp_dir / f"{stem}.{ending}" for ending in ("tsv", "en", "fr"))
    two = [path for path in (english, french) if path.is_file()]
    if tsv.is_file() and two:
        raise UserError(f"{tsv} and {two[0]} are both there: which is meant is not clear, move one of them away.")
    if len(two) == 1:
        raise UserError(f"{two[0]} is there without {french if two[0] == english else english}.")
    return [tsv] if tsv.is_file() else two


def corpus(files: list[Path]) -> Corpus:
    """What `find` found, to be read."""
    return corpora.two_files(*files) if len(files) == 2 else corpora.tsv_file(*files)


def between(pairs: Corpus, low: float, high: float) -> Corpus:
    """The pairs whose English sentence draws a number in [low, high): so one sentence is never on two sides."""

    def read() -> Iterator[Pair]:
        return (pair for pair in pairs.read() if low <= corpora.fraction(pair[0], "held out") < high)

    return Corpus(pairs.name, read)


def held_out_share(pairs: int) -> float:
    """Of the pairs, for each of dev and test: 1 %, but about 100 pairs at least and 2,000 at most."""
    return min(max(HELD_OUT * pairs, HELD_OUT_LEAST), HELD_OUT_MOST) / pairs


def vocabulary_size(characters: int) -> int:
    """Word pieces for a corpus of so many characters (both sides): a power of two, at most one per 1,500 characters.

    At least 256 and at most 32,768: 4,096 for 40,000 pairs of 100 characters a side.
    """
    pieces = max(characters // PIECE_PER_CHARACTERS, 1)
    return min(max(2 ** (pieces.bit_length() - 1), PIECES_LEAST), PIECES_MOST)
