"""Keys of a Hydra configuration that nothing reads: a slip of the pen would otherwise be a setting that does nothing.

fairseq-train refuses a flag that it does not know. Hydra refuses what is not in the YAML file, but not what the file
itself has wrong, nor what is added by a plus.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any

from fairseq.dataclass.configs import FairseqConfig
from fairseq.models import ARCH_MODEL_NAME_REGISTRY, MODEL_REGISTRY
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from fairseq_plugins.models.prenorm_roberta import PrenormRobertaModel
from train_large.errors import UserError

_OF_HYDRA = "job_logging_cfg"  # what fairseq-hydra-train adds, for workers too


def refuse_unknown(root: DictConfig) -> None:
    """Raise UserError for the first key of a run by Hydra that no program reads.

    Sections that are a task's, a criterion's and so on are left to fairseq, which refuses what their dataclass has not,
    and the arguments of other models than ours cannot be known. Single values beside the sections may be there for
    interpolation.
    """
    if not (HydraConfig.initialized() or _OF_HYDRA in root):
        return
    sections = {field.name: field.default for field in dataclasses.fields(FairseqConfig)}
    mappings = [key for key in root if isinstance(root._get_node(key), DictConfig)]
    _check("", mappings, [*sections, _OF_HYDRA])
    for name, default in sections.items():
        if dataclasses.is_dataclass(default) and isinstance(root.get(name), DictConfig):
            known = [field.name for field in dataclasses.fields(default)]
            _check(f"{name}.", root[name], known)
    if isinstance(root.get("model"), DictConfig):
        _check("model.", root.model, _arguments(root.model) or root.model)


def _arguments(model: DictConfig) -> list[str]:
    """The arguments of this project's model; none of another."""
    name = model.get("_name") or model.get("arch")
    kind: Any = MODEL_REGISTRY.get(ARCH_MODEL_NAME_REGISTRY.get(name, name))
    if not (isinstance(kind, type) and issubclass(kind, PrenormRobertaModel)):
        return []
    parser = argparse.ArgumentParser(add_help=False)
    kind.add_args(parser)
    return ["_name", "arch", *(action.dest for action in parser._actions)]


def _check(prefix: str, keys: Iterable[Any], known: Iterable[Any]) -> None:
    names = [str(name) for name in known]
    for key in map(str, keys):
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            way = f"did you mean {prefix}{near[0]}?" if near else "take it out of the config or the command line."
            raise UserError(f"{prefix}{key}: nothing reads this key; {way}")
