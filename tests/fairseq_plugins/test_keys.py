"""Keys of a Hydra configuration: what is read is let through, what is not is named."""

from __future__ import annotations

import pytest
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.initialize import add_defaults
from omegaconf import OmegaConf, open_dict

from fairseq_plugins.keys import refuse_unknown
from train_large.errors import UserError


def by_hydra(**changes):
    """A run's configuration as fairseq's `main` has it, with changes: section__key=value, or key=value."""
    cfg = OmegaConf.structured(FairseqConfig)
    with open_dict(cfg):
        cfg.job_logging_cfg = {"version": 1}
        cfg.model = {"_name": "prenorm_roberta_3l_256h", "max_positions": 64, "embedding_std": 0.1}
        cfg.task = {"_name": "masked_lm"}
        for path, value in changes.items():
            section, _, key = path.partition("__")
            holder = cfg[section] if key else cfg
            with open_dict(holder):
                holder[key or section] = value
    return cfg


@pytest.mark.parametrize(
    "changes",
    [{}, {"optimization__max_update": 5}, {"model__share_layers": "all"}, {"width": 64}, {"model__arch": "x"}],
)
def test_what_is_read_is_let_through(changes):
    refuse_unknown(by_hydra(**changes))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"optimization__max_updates": 5}, "optimization.max_updates: .* did you mean optimization.max_update?"),
        ({"model__encoder_layer": 3}, "model.encoder_layer: .* did you mean model.encoder_layers?"),
        ({"model__zzz": 3}, "model.zzz: nothing reads this key; take it out"),
        ({"optimisation": {"max_update": 5}}, "optimisation: .* did you mean optimization?"),
    ],
)
def test_what_nothing_reads_is_named(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        refuse_unknown(by_hydra(**changes))


def test_arguments_of_other_models_cannot_be_known():
    refuse_unknown(by_hydra(model___name="transformer", model__anything=1))


def test_runs_by_flags_are_not_looked_at():
    cfg = by_hydra(optimization__max_updates=5)
    with open_dict(cfg):
        del cfg["job_logging_cfg"]
    refuse_unknown(cfg)


def test_fairseq_still_takes_what_nothing_reads():
    """When it does not, the patch has had its time."""
    cfg = OmegaConf.create(OmegaConf.to_container(by_hydra(optimization__max_updates=5, model__encoder_layer=3)))
    add_defaults(cfg)
    assert (cfg.optimization.max_updates, cfg.model.encoder_layer) == (5, 3)
