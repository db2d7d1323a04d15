"""What datagen makes, and what training would read of it."""

from __future__ import annotations

from pathlib import Path

import tensorflow.compat.v1 as tf
from tensor2tensor.data_generators import text_encoder
from tensor2tensor.utils import registry


def generate(name: str, data: Path, tmp: Path) -> None:
    registry.problem(name).generate_data(str(data), str(tmp))


def decoded(name: str, data: Path, split: str) -> list[tuple[str, str]]:
    """The pairs in the shards that training would read, put into words by T2T's own encoder."""
    enfr = registry.problem(name)
    encoders = enfr.feature_encoders(str(data))
    found = []
    for path in sorted(tf.gfile.Glob(enfr.filepattern(str(data), split))):
        for record in tf.io.tf_record_iterator(path):
            example = tf.train.Example.FromString(record)
            pair = []
            for feature in ("inputs", "targets"):
                ids = list(example.features.feature[feature].int64_list.value)
                assert ids[-1] == text_encoder.EOS_ID
                pair.append(encoders[feature].decode(ids[:-1]))
            found.append(tuple(pair))
    return found
