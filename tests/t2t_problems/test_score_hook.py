"""What an evaluation translates: which sentences, and where the run trains on several devices."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import tensorflow.compat.v1 as tf
from programs import pairs
from shards import generate
from tensor2tensor.data_generators.problem import DatasetSplit
from tensor2tensor.utils import decoding, trainer_lib

from t2t_problems import plugin  # noqa: F401
from t2t_problems.score_hook import translate

PROBLEM = "translate_enfr_pairs"
SENTENCES = 10
# Long sentences first: there are as many of the others, and T2T puts those into the first batches.
DEV = [(" ".join([en] * times), " ".join([fr] * times)) for times in (3, 1) for en, fr in pairs(SENTENCES)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("enfr")
    for name, of in (("pairs", pairs(1500)), ("pairs.dev", DEV), ("pairs.test", DEV)):
        (folder / f"{name}.tsv").write_text("".join(f"{en}\t{fr}\n" for en, fr in of), encoding="utf-8")
    generate(PROBLEM, folder / "data", folder)
    return folder / "data"


def hparams(data: Path):
    small = "hidden_size=64,filter_size=64,num_heads=1,num_hidden_layers=1"
    values = trainer_lib.create_hparams("transformer_enfr_2l_128h", small, data_dir=str(data), problem_name=PROBLEM)
    values.add_hparam("warm_start_from", None)
    return values


def config(folder: Path):
    """As --worker_gpu=2; without GPUs the two devices are this processor."""
    return trainer_lib.create_run_config("transformer_budgeted", model_dir=str(folder), num_gpus=2)


NO_CHECKPOINT = None  # the weights are drawn


def test_the_first_sentences_are_translated_on_one_device_of_several(data: Path, tmp_path: Path) -> None:
    decode_hparams = decoding.decode_hparams("beam_size=1,extra_length=2")
    estimator = trainer_lib.create_estimator(
        "transformer_budgeted", hparams(data), config(tmp_path), decode_hparams=decode_hparams
    )

    translations, references = translate(estimator, hparams(data), NO_CHECKPOINT, DatasetSplit.EVAL, SENTENCES)

    assert Counter(references) == Counter(french for _, french in DEV[:SENTENCES])
    assert len(translations) == SENTENCES
    assert estimator.config.data_parallelism.n == 2  # training goes on with both


def test_a_translation_is_beside_its_reference(data: Path, tmp_path: Path) -> None:
    def untranslated(features, mode):
        tf.train.get_or_create_global_step()
        predictions = {"outputs": features["inputs"], "targets": features["infer_targets"]}
        return tf.estimator.EstimatorSpec(mode, predictions=predictions)

    estimator = tf.estimator.Estimator(untranslated, config=config(tmp_path))

    sides = translate(estimator, hparams(data), NO_CHECKPOINT, DatasetSplit.EVAL, SENTENCES + 5)

    assert Counter(zip(*sides)) == Counter(DEV[: SENTENCES + 5])
