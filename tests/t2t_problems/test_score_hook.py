"""What an evaluation translates: which sentences, and where the run trains on several devices."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
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


def test_the_first_sentences_are_translated_on_one_device_of_several(data: Path, tmp_path: Path) -> None:
    small = "hidden_size=64,filter_size=64,num_heads=1,num_hidden_layers=1"
    hparams = trainer_lib.create_hparams("transformer_enfr_2l_128h", small, data_dir=str(data), problem_name=PROBLEM)
    hparams.add_hparam("warm_start_from", None)
    # As --worker_gpu=2; without GPUs the two devices are this processor.
    config = trainer_lib.create_run_config("transformer_budgeted", model_dir=str(tmp_path), num_gpus=2)
    decode_hparams = decoding.decode_hparams("beam_size=1,extra_length=2")
    estimator = trainer_lib.create_estimator("transformer_budgeted", hparams, config, decode_hparams=decode_hparams)
    no_checkpoint = None  # the weights are drawn

    translations, references = translate(estimator, hparams, no_checkpoint, DatasetSplit.EVAL, SENTENCES)

    assert Counter(references) == Counter(french for _, french in DEV[:SENTENCES])
    assert len(translations) == SENTENCES
    assert estimator.config.data_parallelism.n == 2  # training goes on with both
