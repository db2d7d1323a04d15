"""A small BPE with its dictionary, and small random models that fairseq itself has built and that are saved as it saves
them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import options
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks.masked_lm import MaskedLMConfig, MaskedLMTask
from omegaconf import OmegaConf
from tokenizers import Tokenizer

import fairseq_plugins.models  # noqa: F401
from train_large.data.bpe import load_bpe, train_bpe, write_dictionary
from train_large.export.packages import need

need("transformers")  # before any test imports it: see there

TEXT = [
    "The film is a delight, and the film's ending isn't what they'd expect; they've said so 1,234 times.",
    "This is the thing that the others would have wanted, this is the thing that the others said they wanted.",
    "naïve café Straße 東京都 東京都 привет привет 👩‍👩‍👧 🇺🇳 l’été e\u0301 \u200b zero\u200bwidth ﷽ ½ ①",
    "  leading and trailing  \tspaces\u00a0and\u2028separators  ",
]
SIZE = ("--encoder-layers", "3", "--encoder-embed-dim", "32", "--encoder-attention-heads", "4", "--max-positions", "20")


@dataclass(frozen=True)
class Prepared:
    """bpe/encoder.json and bpe/vocab.bpe, and dict.txt in data-bin/."""

    folder: Path
    dictionary: Path

    def symbols(self) -> Dictionary:
        result = Dictionary.load(str(self.dictionary))
        result.add_symbol("<mask>")
        return result

    def encode(self, sentence: str) -> list[int]:
        """fairseq's ids, </s> included: the BPE's ids as words, looked up in the dictionary."""
        tokenizer, symbols = _loaded(self)
        line = " ".join(map(str, tokenizer.encode(sentence).ids))
        return symbols.encode_line(line, add_if_not_exist=False, append_eos=True).tolist()


@lru_cache
def _loaded(prepared: Prepared) -> tuple[Tokenizer, Dictionary]:
    bpe = prepared.folder / "bpe"
    return load_bpe(bpe / "encoder.json", bpe / "vocab.bpe"), prepared.symbols()


def prepare(folder: Path) -> Prepared:
    files = train_bpe(TEXT * 3, 400)
    (folder / "bpe").mkdir()
    (folder / "data-bin").mkdir()
    for name, content in files.items():
        (folder / "bpe" / name).write_text(content)
    entries = len(json.loads(files["encoder.json"]))
    dictionary = folder / "data-bin" / "dict.txt"
    write_dictionary(dictionary, [(7 * index) % 50 for index in range(entries)])
    return Prepared(folder, dictionary)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def text() -> list[str]:
    return TEXT


@pytest.fixture
def build(prepared: Prepared) -> Callable[..., tuple[Any, dict]]:
    """Give (model, checkpoint) for `--arch ARCH FLAGS`, every weight drawn at random."""

    def build(arch: str, *flags: str, heads: dict[str, int] | None = None, task: dict | None = None):
        args = options.parse_args_and_arch(
            options.get_training_parser("masked_lm"), ["data", "--task", "masked_lm", "--arch", arch, *SIZE, *flags]
        )
        config = convert_namespace_to_omegaconf(args)
        masked_lm = MaskedLMTask(MaskedLMConfig(data="data", tokens_per_sample=20), prepared.symbols())
        model = masked_lm.build_model(config.model)
        for name, classes in (heads or {}).items():
            model.register_classification_head(name, num_classes=classes)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.normal_(std=0.2, generator=generator)
                if "norm" in name and name.endswith("weight"):
                    weight.add_(1)
        cfg = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
        cfg["model"] = model.args  # a Namespace, as in fairseq's own checkpoints
        if task is not None:
            cfg["task"] = {"_name": "sentence_prediction", "init_token": 0, "separator_token": 2, **task}
        history = {
            "criterion_name": "MaskedLmLoss",
            "optimizer_name": "FairseqAdam",
            "lr_scheduler_state": {},
            "num_updates": 1234,
        }
        extra = {"train_iterator": {"epoch": 1}, "val_loss": 3.25, "best": 3.0, "previous_training_time": 61.2}
        return model.eval(), {
            "args": None,
            "cfg": cfg,
            "model": model.state_dict(),
            "optimizer_history": [history],
            "extra_state": extra,
        }

    return build


@pytest.fixture
def save(tmp_path: Path) -> Callable[[dict], Path]:
    def save(checkpoint: dict) -> Path:
        path = tmp_path / "checkpoint_best.pt"
        torch.save(checkpoint, path)
        return path

    return save
