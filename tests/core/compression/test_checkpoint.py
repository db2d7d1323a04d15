from __future__ import annotations

import argparse
import errno
import os
import pickle
import random
import resource
import struct
import zipfile
from argparse import Namespace
from dataclasses import fields

import numpy as np
import pytest
import torch

from train_large.compression import checkpoint as module
from train_large.compression.checkpoint import plain, read_checkpoint, stock_form, write_checkpoint
from train_large.errors import UserError


def small_checkpoint(**changes):
    """The least that is a checkpoint of fairseq, with its Namespace."""
    return {
        "args": None,
        "cfg": {
            "_name": None,
            "common": {"user_dir": "fairseq_plugins", "seed": 1},
            "model": Namespace(
                _name="roberta_base", arch="roberta_base", betas=(0.9, 0.98), user_dir="fairseq_plugins"
            ),
            "task": {"_name": "masked_lm", "data": "data-bin"},
            "criterion": {"_name": "masked_lm", "tpu": False},
            "lr_scheduler": {"_name": "fixed", "lr": [0.1]},
        },
        "model": {"embed.weight": torch.randn(200, 10), "bias": torch.zeros(10)},
        "criterion": None,
        "optimizer_history": [
            {"criterion_name": "MaskedLmLoss", "optimizer_name": "A", "lr_scheduler_state": {}, "num_updates": 7}
        ],
        "task_state": {},
        "extra_state": {
            "train_iterator": {"epoch": 3},
            "best": 1.5,
            "val_loss": 1.6,
            "metrics": [],
            "ema": torch.ones(1),
        },
        "last_optimizer_state": {"state": {}},
        **changes,
    }


@pytest.fixture
def good(tmp_path):
    torch.save(small_checkpoint(), tmp_path / "good.pt")
    return tmp_path / "good.pt"


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reads_both_formats_in_every_precision(tmp_path, zipped, dtype):
    state = small_checkpoint(model={"w": torch.randn(5, 3).to(dtype), "n": torch.tensor(3), "empty": torch.empty(0)})
    torch.save(state, tmp_path / "c.pt", _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(tmp_path / "c.pt")
    assert torch.equal(read["model"]["w"], state["model"]["w"])
    assert read["model"]["w"].dtype == dtype
    assert read["cfg"] == state["cfg"]


def test_reading_neither_leaves_namespaces_allowed_nor_forbids_them(good):
    before = torch.serialization.get_safe_globals()
    try:
        torch.serialization.clear_safe_globals()
        read_checkpoint(good)
        assert torch.serialization.get_safe_globals() == []
        torch.serialization.add_safe_globals([argparse.Namespace])  # as fairseq_plugins does, to let fairseq resume
        read_checkpoint(good)
        assert torch.serialization.get_safe_globals() == [argparse.Namespace]
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def test_scores_may_be_numbers_of_numpy(tmp_path):
    """As fairseq saves them with --report-acc-and-f1 or --report-pearson-and-spearman."""
    extra = {"best": np.float64(0.75), "val_loss": np.float32(0.5), "train_iterator": {"epoch": np.int64(3)}}
    torch.save(small_checkpoint(extra_state=extra), tmp_path / "scored.pt")
    stock = stock_form(read_checkpoint(tmp_path / "scored.pt"))["extra_state"]
    assert (stock["best"], stock["val_loss"], stock["train_iterator"]["epoch"]) == (0.75, 0.5, 3)
    assert {type(stock["best"]), type(stock["val_loss"])} == {float}


def refusal(path) -> str:
    """The one sentence that `read_checkpoint` has for the file at `path`."""
    with pytest.raises(UserError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    assert message.endswith(".")
    assert "\n" not in message
    return message.replace(str(path), "FILE")


def test_what_is_no_file_is_refused(tmp_path):
    assert "does not exist" in refusal(tmp_path / "none.pt")
    assert "is a directory" in refusal(tmp_path)
    (tmp_path / "empty.pt").touch()
    assert "is empty" in refusal(tmp_path / "empty.pt")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"Not a checkpoint, but some text.\n" * 50, "is not a checkpoint"),
        (bytes(range(256)) * 20, "is not a checkpoint"),
        (b"\x80\x02" + random.Random(1).randbytes(3000), "is not a checkpoint"),
        (b"\x80", "is not a checkpoint"),
        (b"PK\x03\x04", "is cut short"),
        (pickle.dumps({"model": {}}), "is not a checkpoint"),
        (
            struct.pack("<Q", 60) + b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(60) + b"\0" * 4,
            "safetensors",
        ),
    ],
)
def test_other_content_is_refused(tmp_path, content, reason):
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    assert reason in refusal(path)


def test_any_zip_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "letter.docx", "w") as file:
        file.writestr("document.xml", "<hello/>")
    assert "is not a checkpoint" in refusal(tmp_path / "letter.docx")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_cut_anywhere_is_refused(tmp_path, zipped):
    torch.save(small_checkpoint(), tmp_path / "whole.pt", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "whole.pt").read_bytes()
    cut = tmp_path / "cut.pt"
    for length in (1, 3, 10, 20, 100, *range(200, len(whole), len(whole) // 20), len(whole) - 1):
        cut.write_bytes(whole[:length])
        assert ("cut short" if length > 15 else "") in refusal(cut), length


@pytest.mark.parametrize(
    "state",
    [
        {"w": torch.ones(3)},
        [torch.ones(3)],
        torch.ones(3),
        {"model": {}},
        {"model": None},
        {"model": [torch.ones(3)]},
        {"model": {"w": 1.0}},
        {"model": {1: torch.ones(1)}},
    ],
)
def test_a_torch_file_of_something_else_is_refused(tmp_path, state):
    torch.save(state, tmp_path / "other.pt")
    assert "fairseq-train" in refusal(tmp_path / "other.pt")


class Payload:
    """Pickles into code that writes a file as soon as it is unpickled the ordinary way."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return open, (str(self.proof), "w")


class Harmless:
    """A class all the same: loading it would import and build it."""


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("place", ["extra", "cfg", "model"])
def test_no_code_from_a_checkpoint_ever_runs(tmp_path, zipped, place):
    proof = tmp_path / "proof"
    state = small_checkpoint()
    state.setdefault(place, {})["x"] = Payload(proof)
    torch.save(state, tmp_path / "evil.pt", _use_new_zipfile_serialization=zipped)
    assert "pickled code" in refusal(tmp_path / "evil.pt")
    assert not proof.exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)  # and it would have run:
    assert proof.exists()


def test_bare_pickles_and_classes_do_not_run_either(tmp_path):
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Payload(tmp_path / "proof"), protocol=2))
    assert "pickled code" in refusal(tmp_path / "bare.pt")
    assert not (tmp_path / "proof").exists()
    torch.save(small_checkpoint(extra=Harmless()), tmp_path / "class.pt")
    assert "Harmless" in refusal(tmp_path / "class.pt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_by_name(tmp_path, dtype, bad):
    state = small_checkpoint()
    state["model"]["layers.3.fc.weight"] = torch.randn(100, 100).to(dtype)
    state["model"]["layers.3.fc.weight"][57, 31] = bad
    torch.save(state, tmp_path / "diverged.pt")
    assert "layers.3.fc.weight" in refusal(tmp_path / "diverged.pt")


def test_writes_what_it_reads(tmp_path, good):
    read = read_checkpoint(good)
    write_checkpoint(read, good)  # over the file that its tensors are still mapped from
    again = read_checkpoint(good)
    assert all(torch.equal(again["model"][name], read["model"][name]) for name in read["model"])
    assert os.listdir(tmp_path) == ["good.pt"]


@pytest.mark.parametrize("where", ["nowhere/out.pt", "good.pt/out.pt", "."])
def test_places_that_cannot_be_written_are_refused(tmp_path, good, where):
    with pytest.raises(UserError, match="is a directory" if where == "." else "could not be written"):
        write_checkpoint(small_checkpoint(), tmp_path / where)
    assert os.listdir(tmp_path) == ["good.pt"]


def test_a_limit_of_the_disk_leaves_the_previous_file(tmp_path, good):
    before = good.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(UserError) as caught:
            write_checkpoint(small_checkpoint(), good)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(good) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert good.read_bytes() == before
    assert os.listdir(tmp_path) == ["good.pt"]


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 640 vs 534"),
    ],
)
@pytest.mark.parametrize("step", ["torch.save", "os.fsync", "os.replace"])
def test_any_failure_to_write_leaves_the_previous_file(tmp_path, good, monkeypatch, failure, step):
    def fail(*arguments):
        raise failure

    before = good.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(step, fail)
        with pytest.raises(UserError, match=f"{good}.*free some space"):
            write_checkpoint(small_checkpoint(), good)
    assert good.read_bytes() == before
    assert os.listdir(tmp_path) == ["good.pt"]


def test_the_stock_form_is_plain_and_keeps_what_fairseq_needs(tmp_path, good):
    stock = stock_form(read_checkpoint(good))
    write_checkpoint(stock, tmp_path / "stock.pt")
    assert torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / "stock.pt") == []
    assert "last_optimizer_state" not in stock
    assert stock["args"] is None
    assert stock["cfg"]["common"] == {"user_dir": None, "seed": 1}
    assert stock["cfg"]["model"] == {
        "_name": "roberta_base",
        "arch": "roberta_base",
        "betas": [0.9, 0.98],
        "user_dir": None,
    }
    assert stock["optimizer_history"][-1]["num_updates"] == 7
    assert stock["extra_state"] == {"train_iterator": {"epoch": 3}, "best": 1.5, "val_loss": 1.6}


def test_the_input_is_not_changed():
    state = small_checkpoint()
    stock_form(state)
    assert state["cfg"] == small_checkpoint()["cfg"]
    assert "last_optimizer_state" in state


def ours(cfg_model, names, **options):
    """A checkpoint as fairseq writes one with this project's plugin."""
    task, criterion = names
    every = {"task": task, "criterion": criterion, "lr_scheduler": "budget_linear", "budget": "2h", **cfg_model}
    return small_checkpoint(
        cfg={
            "common": {"user_dir": "fairseq_plugins"},
            "model": Namespace(**every),
            "task": {"_name": task, "sparsity_levels": "0.15", "recovery": 0.995, **options},
            "criterion": {"_name": criterion, "budget": "2h", "budget_clock": "train", **options},
            "lr_scheduler": {"_name": "budget_linear", "warmup_fraction": 0.06, "lr": [0.1]},
        },
        task_state={"level": 2},
        criterion={"seconds": torch.zeros(1)},
    )


@pytest.mark.parametrize("name", ["masked_lm", "sentence_prediction", "translation"])
def test_our_names_and_options_become_stock_ones(name):
    criterion = name if name != "translation" else "label_smoothed_cross_entropy"
    known = {
        "masked_lm": {"tpu": False},
        "sentence_prediction": {"classification_head_name": "head"},
        "translation": {"label_smoothing": 0.1},
    }[name]
    model = {"_name": "prenorm_roberta_3l_256h", "arch": "prenorm_roberta_3l_256h", "encoder_layers": 3}
    stock = stock_form(ours(model, (f"pruning_{name}", f"budgeted_{criterion}"), data="d", **known))
    cfg = stock["cfg"]
    assert cfg["criterion"] == {"_name": criterion, **known}
    assert cfg["task"]["_name"] == name
    assert cfg["task"]["data"] == "d"
    assert not {"sparsity_levels", "recovery"} & set(cfg["task"])
    assert cfg["lr_scheduler"]["_name"] == "polynomial_decay"
    assert cfg["model"]["encoder_layers"] == 3
    assert (cfg["model"]["_name"], cfg["model"]["arch"]) == ("roberta_prenorm", "roberta_prenorm")
    assert (cfg["model"]["task"], cfg["model"]["criterion"]) == (name, criterion)
    assert stock["criterion"] is None
    assert stock["task_state"] == {}
    left = repr({key: value for key, value in stock.items() if key != "model"})
    assert not any(
        word in left for word in ("budgeted_", "pruning_", "prenorm_roberta", "fairseq_plugins", "budget_linear")
    )


def test_the_tables_are_fairseqs_own():
    pytest.importorskip("fairseq")
    from fairseq.criterions import CRITERION_DATACLASS_REGISTRY, CRITERION_REGISTRY
    from fairseq.models import ARCH_MODEL_REGISTRY
    from fairseq.optim.lr_scheduler import LR_SCHEDULER_REGISTRY
    from fairseq.tasks import TASK_DATACLASS_REGISTRY

    def options(dataclass):
        return {field.name for field in fields(dataclass)} - {"_name"}

    for name, (class_name, known) in module.STOCK_CRITERIA.items():
        assert CRITERION_REGISTRY[name].__name__ == class_name
        assert options(CRITERION_DATACLASS_REGISTRY[name]) == known
    for name, known in module.STOCK_TASKS.items():
        assert options(TASK_DATACLASS_REGISTRY[name]) == known
    assert set(module.OUR_CRITERIA.values()) <= set(module.STOCK_CRITERIA)
    assert module.STOCK_MODEL in ARCH_MODEL_REGISTRY
    assert module.STOCK_SCHEDULER in LR_SCHEDULER_REGISTRY


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders with dictionaries, which is all that fairseq needs to build its tasks."""
    folder = tmp_path_factory.mktemp("data")
    words = "".join(f"w{i} {100 - i}\n" for i in range(40))
    for name in ("dict.txt", "dict.en.txt", "dict.fr.txt", "input0/dict.txt", "label/dict.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(words)
    return folder


def trained_by_stock(arguments: str, data):
    """What `fairseq-train data ARGUMENTS` would save before its first update, and the output of its model.

    Biases and norms are moved from their first values, which would hide that one is missing or in the wrong place.
    """
    from fairseq import options, tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from omegaconf import OmegaConf

    parser = options.get_training_parser()
    args = options.parse_args_and_arch(parser, [str(data), "--cpu", *arguments.split()])
    cfg = convert_namespace_to_omegaconf(args)
    task = tasks.setup_task(cfg.task)
    model = task.build_model(cfg.model).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    state = small_checkpoint(cfg=OmegaConf.to_container(cfg, resolve=True, enum_to_str=True), model=model.state_dict())
    return state, model


SIZE = "--encoder-layers 3 --encoder-embed-dim 16 --encoder-ffn-embed-dim 48 --encoder-attention-heads 4"
MASKED_LM = f"--task masked_lm --criterion masked_lm --tokens-per-sample 20 --max-positions 30 {SIZE}"
SENTENCES = f"--task sentence_prediction --criterion sentence_prediction --num-classes 3 --max-positions 30 {SIZE}"
TRANSLATION = (
    "--task translation --criterion label_smoothed_cross_entropy --arch transformer --label-smoothing 0.1 -s en -t fr "
    f"--share-all-embeddings {SIZE} --decoder-layers 2 --decoder-embed-dim 16 --decoder-ffn-embed-dim 48 "
    "--decoder-attention-heads 2"
)


@torch.no_grad()
def same_output(one, other) -> bool:
    tokens = torch.tensor([[0, 9, 5, 30, 12, 2]])
    if hasattr(one, "decoder"):
        return torch.equal(*(model(tokens, torch.tensor([6]), tokens)[0] for model in (one, other)))
    heads = [None, *one.classification_heads]
    return all(
        torch.equal(*(model(tokens, classification_head_name=head)[0] for model in (one, other))) for head in heads
    )


def loaded_by_stock(state, path):
    """The model and the configuration as stock fairseq loads them, which may not find any class in the file."""
    from fairseq import checkpoint_utils

    write_checkpoint(stock_form(state), path)
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        [model], cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    finally:
        torch.serialization.add_safe_globals(before)
    task.build_criterion(cfg.criterion)  # as fairseq-validate does
    return model.eval()


def rename_to_ours(state):
    """Make of a stock RoBERTa's checkpoint the one that this project's plugin would have written."""
    cfg = state["cfg"]
    task, criterion = f"pruning_{cfg['task']['_name']}", f"budgeted_{cfg['criterion']['_name']}"
    cfg["task"].update(_name=task, sparsity_levels="0.15,0.3", recovery=0.995, prune_scope="global")
    cfg["criterion"].update(_name=criterion, budget="2h", budget_clock="train", target_ppl=None)
    cfg["lr_scheduler"] = {"_name": "budget_linear", "warmup_fraction": 0.06, "lr": [0.1]}
    cfg["common"]["user_dir"] = "fairseq_plugins"
    vars(cfg["model"]).update(task=task, criterion=criterion, lr_scheduler="budget_linear", budget="2h")
    if cfg["model"].arch.startswith("roberta"):
        vars(cfg["model"]).update(_name="prenorm_roberta", arch="prenorm_roberta", share_layers="none")
        del cfg["model"].layernorm_embedding


@pytest.mark.parametrize(
    "arguments",
    [
        f"--arch roberta_prenorm --layernorm-embedding {MASKED_LM}",
        f"--arch roberta_prenorm {MASKED_LM}",
        f"--arch roberta_prenorm --layernorm-embedding {SENTENCES}",
        TRANSLATION,
    ],
)
@pytest.mark.parametrize("origin", ["stock", "ours", "old"])
def test_stock_fairseq_loads_the_stock_form(arguments, origin, data, tmp_path):
    pytest.importorskip("fairseq")
    state, model = trained_by_stock(arguments, data)
    if origin == "ours":
        rename_to_ours(state)
    if origin == "old":  # releases before 0.10: flat arguments, no configuration
        state.update(args=state["cfg"]["model"], cfg=None)
        del state["args"]._name
    assert same_output(loaded_by_stock(state, tmp_path / "out.pt"), model)


def test_shared_layers_load_as_an_unshared_model(data, tmp_path):
    pytest.importorskip("fairseq")
    state, model = trained_by_stock(f"--arch roberta_prenorm --layernorm-embedding {MASKED_LM}", data)
    layers = model.encoder.sentence_encoder.layers
    layers[1] = layers[2] = layers[0]
    state["model"] = model.state_dict()
    rename_to_ours(state)
    state["cfg"]["model"].share_layers = "all"
    assert same_output(loaded_by_stock(state, tmp_path / "out.pt"), model)


@pytest.mark.parametrize("cfg", [None, "text", 3, torch.ones(1)])
def test_without_a_configuration_there_is_no_stock_form(cfg):
    with pytest.raises(UserError, match="no configuration"):
        stock_form(small_checkpoint(cfg=cfg))


def test_plain_values():
    value = Namespace(a=(1, 2.5), b={"c": None, 3: {True}}, d=torch.tensor([1, 2]), e=Namespace(f="g"))
    assert plain(value) == {"a": [1, 2.5], "b": {"c": None, 3: [True]}, "d": [1, 2], "e": {"f": "g"}}
    with pytest.raises(UserError, match="dtype"):
        plain({"x": torch.float16})


def test_without_an_update_there_is_a_schedule_all_the_same():
    state = ours({"_name": "prenorm_roberta", "arch": "prenorm_roberta"}, ("masked_lm", "budgeted_masked_lm"))
    state["optimizer_history"] = []
    assert stock_form(state)["cfg"]["lr_scheduler"]["total_num_update"] == 1


def test_the_state_of_a_stock_criterion_is_kept():
    state = small_checkpoint(criterion={"weight": 3})
    assert stock_form(state)["criterion"] == {"weight": 3}
