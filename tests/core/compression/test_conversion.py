from __future__ import annotations

import errno
import json
import math
import os
import random
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from formula import BITS, paper, same_bits
from torch import Tensor

from train_large.compression import conversion
from train_large.compression.checkpoint import _namespaces_allowed, read_checkpoint
from train_large.compression.conversion import Method, files_of, pack_checkpoint, quantize_checkpoint, unpack_checkpoint
from train_large.compression.inspection import inspect
from train_large.compression.packed import read_packed
from train_large.compression.quantization import dequantize, quantize_state, quantize_tensor
from train_large.compression.storage import storage
from train_large.data import folder
from train_large.data.dictionary import digest
from train_large.data.documents import digest as file_digest
from train_large.errors import UserError

PLUGIN = Path(__file__).parents[3] / "fairseq_plugins"


def loaded(path):
    """What may be written to the same file: it is read whole."""
    with _namespaces_allowed():
        return torch.load(path, weights_only=True)


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint in fairseq's form, with a tie, a pruned weight and an optimizer's state."""
    embedding = torch.randn(30, 8)
    embedding[5] = 0
    state = {
        "args": None,
        "cfg": {
            "model": Namespace(arch="roberta_base", _name="roberta_base", lr=[0.1]),
            "task": {"_name": "masked_lm", "data": "somewhere"},
            "criterion": {"_name": "masked_lm", "tpu": False},
        },
        "model": {
            "encoder.version": torch.tensor([3.0]),
            "embed_tokens.weight": embedding,
            "fc.weight": torch.randn(8, 8),
            "lm_head.weight": embedding,
        },
        "optimizer_history": [
            {"criterion_name": "MaskedLmLoss", "num_updates": 3, "lr_scheduler_state": {"best": 1.5}}
        ],
        "extra_state": {"train_iterator": {"epoch": 2}, "metrics": []},
        "last_optimizer_state": {"state": {0: {"exp_avg": torch.randn(1000)}}},
    }
    torch.save(state, tmp_path / "in.pt")
    return tmp_path / "in.pt"


def test_quantize_checkpoint_writes_the_grid_the_record_and_no_optimizer(checkpoint):
    target = checkpoint.with_name("out.pt")
    before = read_checkpoint(checkpoint)["model"]
    summary = quantize_checkpoint(checkpoint, target, Method(4, "row"))
    written = torch.load(target, weights_only=True)
    for name in ("embed_tokens.weight", "fc.weight", "lm_head.weight"):
        rows = np.stack([paper(row, 4) for row in before[name].numpy()])
        assert same_bits(written["model"][name], rows), name
    assert written["model"]["embed_tokens.weight"].data_ptr() == written["model"]["lm_head.weight"].data_ptr()
    assert written["model"]["encoder.version"].tolist() == [3.0]
    assert "last_optimizer_state" not in written
    # 64 weights, and 30 x 8 of which 8 are zero: their mask is 240 bits, their positions 256
    assert (summary.parameters, summary.nonzero) == (304, 296)
    assert summary.bytes == (64 * 4 // 8 + 8 * 8) + ((240 + 232 * 4) // 8 + 30 * 8)
    assert summary.bytes_paper == 296 * 4 // 8
    [record] = written["compression"]
    assert (record["bits"], record["granularity"], record["bytes"]) == (4, "row", summary.bytes)
    assert sorted(os.listdir(target.parent)) == ["in.pt", "out.pt"]


def test_the_output_may_replace_the_input(checkpoint):
    other = checkpoint.with_name("other.pt")
    quantize_checkpoint(checkpoint, other, Method(6))
    quantize_checkpoint(checkpoint, checkpoint, Method(6))
    here, there = read_checkpoint(checkpoint), read_checkpoint(other)
    assert all(torch.equal(here["model"][name], there["model"][name]) for name in there["model"])
    quantize_checkpoint(checkpoint, checkpoint, Method(4))
    assert [record["bits"] for record in read_checkpoint(checkpoint)["compression"]] == [6, 4]


@pytest.mark.parametrize(("bits", "granularity"), [(5.5, "tensor"), (9, "tensor"), (4, "column")])
def test_bad_flags_write_nothing(checkpoint, bits, granularity):
    with pytest.raises(UserError, match="--bits|--granularity"):
        quantize_checkpoint(checkpoint, checkpoint.with_name("out.pt"), Method(bits, granularity))
    assert os.listdir(checkpoint.parent) == ["in.pt"]


def run_fairseq(module: str, folder: Path, arguments: str) -> str:
    """The output of one of fairseq's programs, run in `folder`, where nothing of this checkout is found by chance."""
    command = [sys.executable, "-m", f"fairseq_cli.{module}", *arguments.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


QUIET = "--cpu --no-progress-bar --log-format json --num-workers 0 --required-batch-size-multiple 1"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a text whose lines repeat one word, in `data`, and this project's model trained on it, in `run`."""
    pytest.importorskip("fairseq")
    folder = tmp_path_factory.mktemp("trained")
    rng = random.Random(0)
    for split, lines in (("train", 300), ("valid", 60)):
        starts = [rng.randrange(40) for _ in range(lines)]
        text = "".join(" ".join([f"w{start}"] * 12) + "\n" for start in starts)
        (folder / f"{split}.txt").write_text(text)
    texts = "--only-source --trainpref train.txt --validpref valid.txt"
    run_fairseq("preprocess", folder, f"{texts} --destdir data --workers 1")
    size = "--encoder-layers 2 --encoder-embed-dim 32 --encoder-ffn-embed-dim 64 --encoder-attention-heads 2"
    model = f"--user-dir {PLUGIN} --arch prenorm_roberta --max-positions 40 {size}"
    task = "--task masked_lm --tokens-per-sample 32 --save-dir run --disable-validation --no-epoch-checkpoints"
    budget = "--criterion budgeted_masked_lm --budget 1h --lr-scheduler budget_linear --warmup-fraction 0"
    steps = "--optimizer adam --lr 5e-3 --batch-size 16 --max-update 400"
    run_fairseq("train", folder, f"data {task} {model} {budget} {steps} {QUIET}")
    return folder


def stock_loss(folder: Path, checkpoint: Path) -> float:
    """What `fairseq-validate`, without any --user-dir, prints (bits per token, three decimals)."""
    output = run_fairseq("validate", folder, f"data --task masked_lm --path {checkpoint} --batch-size 8 {QUIET}")
    [line] = [line for line in output.splitlines() if "valid_loss" in line]
    return float(json.loads(line[line.index("{") :])["valid_loss"])


def loss_in_process(checkpoint: dict, model_state: dict[str, Tensor], data: Path) -> float:
    """The same loss, of these weights in a stock model built here by hand from the checkpoint's own sizes."""
    from fairseq.criterions.masked_lm import MaskedLmConfig, MaskedLmLoss
    from fairseq.models.roberta.model import RobertaModel
    from fairseq.tasks.masked_lm import MaskedLMConfig, MaskedLMTask

    task = MaskedLMTask.setup_task(MaskedLMConfig(data=str(data), tokens_per_sample=32, seed=1))
    model = RobertaModel.build_model(checkpoint["cfg"]["model"], task).eval()
    model.load_state_dict(model_state)
    criterion = MaskedLmLoss(MaskedLmConfig(tpu=False), task)
    task.load_dataset("valid", epoch=1)
    batches = task.get_batch_iterator(task.dataset("valid"), max_sentences=8).next_epoch_itr(shuffle=False)
    with torch.no_grad():
        outputs = [criterion(model, sample)[2] for sample in batches]
    total = sum(float(output["loss"]) for output in outputs)
    return total / sum(int(output["sample_size"]) for output in outputs) / math.log(2)


@pytest.mark.slow
def test_stock_fairseq_validates_what_the_converter_writes(trained):
    source, data = trained / "run" / "checkpoint_last.pt", trained / "data"
    checkpoint = read_checkpoint(source)
    assert checkpoint["cfg"]["model"]._name.startswith("prenorm_roberta")
    for name, tensor in checkpoint["model"].items():
        for bits in BITS:
            assert same_bits(dequantize(quantize_tensor(tensor, bits)), paper(tensor.numpy(), bits)), (name, bits)
    losses = {}
    for bits in (32, 2):
        target = source.with_name(f"out{bits}.pt")
        quantize_checkpoint(source, target, Method(bits))
        losses[bits] = stock_loss(trained, target)
        ours = loss_in_process(checkpoint, quantize_state(checkpoint["model"], bits), data)
        assert losses[bits] == pytest.approx(ours, abs=6e-4)  # stock prints three decimals
    assert losses[32] == pytest.approx(loss_in_process(checkpoint, dict(checkpoint["model"]), data), abs=6e-4)
    assert losses[2] > losses[32] + 0.01  # 3 bits can make so small a model better, by chance


METHODS = [
    *(Method(bits) for bits in (*BITS, 32)),
    Method(4, "row"),
    Method(4, "group:5"),
    Method(3, clip=True),
    Method(target_error=0.1),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_unpack_gives_what_quantize_gives(checkpoint, method):
    packed, unpacked, expected = (checkpoint.with_name(name) for name in ("p.safetensors", "u.pt", "q.pt"))
    size = pack_checkpoint(checkpoint, packed, method)
    unpack_checkpoint(packed, unpacked)
    assert size == packed.stat().st_size
    ours = torch.load(unpacked, weights_only=True)
    quantize_checkpoint(checkpoint, expected, method)
    theirs = torch.load(expected, weights_only=True)
    assert list(ours["model"]) == list(theirs["model"])
    for name, tensor in theirs["model"].items():
        assert tensor.dtype == ours["model"][name].dtype
        assert same_bits(ours["model"][name], tensor.numpy()), name
    assert ours["model"]["embed_tokens.weight"].data_ptr() == ours["model"]["lm_head.weight"].data_ptr()
    assert (ours["model"]["embed_tokens.weight"][5] == 0).all()
    assert {**ours, "model": 0} == {**theirs, "model": 0}


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ({}, "--bits"),
        ({"bits": 4, "target_error": 0.1}, "one of"),
        ({"target_error": 0.1, "granularity": "row"}, "belong to --bits"),
        ({"target_bytes": 9, "clip": True}, "belong to --bits"),
        ({"bits": 4, "trellis": True}, "--trellis belongs to --target-error"),
        ({"bits": 32, "granularity": "row"}, "for 2 to 8 bits"),
        ({"bits": 32, "clip": True}, "for 2 to 8 bits"),
    ],
)
def test_methods_that_contradict_themselves(flags, match):
    with pytest.raises(UserError, match=match):
        Method(**flags)


def test_a_file_of_a_target_size_is_as_good_as_it_can_be(checkpoint):
    errors = {}
    for target in (1050, 1250):
        packed = checkpoint.with_name(f"{target}.safetensors")
        assert 0.8 * target < pack_checkpoint(checkpoint, packed, Method(target_bytes=target)) <= target
        errors[target] = inspect(packed, read_checkpoint(checkpoint)["model"]).total.relative_error
    assert errors[1250] < errors[1050] < 0.5
    with pytest.raises(UserError, match="--target-bytes"):
        quantize_checkpoint(checkpoint, checkpoint.with_name("q.pt"), Method(target_bytes=1600))


def test_a_target_that_cannot_be_met_writes_nothing(checkpoint):
    with pytest.raises(UserError, match="in.pt"):
        pack_checkpoint(checkpoint, checkpoint.with_name("p.safetensors"), Method(target_bytes=100))
    assert os.listdir(checkpoint.parent) == ["in.pt"]


def test_the_dictionary_and_the_bpe_go_with_it(checkpoint):
    data = checkpoint.parent / "data"
    for name, text in {
        "input0/dict.txt": "5 1\n",
        "label/dict.txt": "good 1\nbad 1\n",
        "text/encoder.json": "{}",
        "text/vocab.bpe": "#version: é\n",
    }.items():
        path = data / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    files = files_of(checkpoint, data, data / "text")
    assert files == {
        "dict.txt": "5 1\n",
        "labels.txt": "good 1\nbad 1\n",
        "encoder.json": "{}",
        "vocab.bpe": "#version: é\n",
    }
    pack_checkpoint(checkpoint, checkpoint.with_name("p.safetensors"), Method(8), files)
    assert read_packed(checkpoint.with_name("p.safetensors")).files == files
    assert files_of(checkpoint) == {}  # the folder that it was trained on is gone
    with pytest.raises(UserError, match="the dictionary that goes with it is not known: give --data"):
        files_of(checkpoint, bpe=data / "text")
    (data / "text").rename(data / "bpe")
    assert files_of(checkpoint, data, data) == files  # a folder that holds bpe/
    (data / "bpe").rename(data / "text")
    with pytest.raises(UserError, match="dict.txt"):
        files_of(checkpoint, data / "text")
    with pytest.raises(UserError, match=r"encoder\.json"):
        files_of(checkpoint, data, data / "label")


def test_labels_of_another_task_are_refused(checkpoint):
    saved = read_checkpoint(checkpoint)
    three, scores = (checkpoint.with_name(name) for name in ("three.pt", "scores.pt"))  # not over what is mapped
    saved["model"]["classification_heads.task.out_proj.weight"] = torch.zeros(3, 4)
    torch.save(saved, three)
    data = checkpoint.parent / "data"
    for name, text in {"input0/dict.txt": "5 1\n", "label/dict.txt": "good 1\nbad 1\n"}.items():
        (data / name).parent.mkdir(parents=True)
        (data / name).write_text(text)
    with pytest.raises(
        UserError, match=r"label/dict\.txt names 2 classes \(good, bad\) and the model has 3: give the data"
    ):
        files_of(three, data)
    (data / "label" / "dict.txt").write_text("good 1\nbad 1\nnone 1\n")
    assert "labels.txt" in files_of(three, data)
    torch.save({**saved, "cfg": {"task": {"regression_target": True}}}, scores)
    assert set(files_of(scores, data)) == {"dict.txt"}  # scores have no names


def test_what_may_not_be_read_is_not_there_unless_it_is_named(checkpoint, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(conversion, "_files_in", lambda data, *_: refuse(data / "dict.txt"))
    assert files_of(checkpoint) == {}
    with pytest.raises(UserError, match=r"dict.txt cannot be read \(Permission denied\)"):
        files_of(checkpoint, checkpoint.parent)


def test_a_dictionary_that_is_no_text(checkpoint):
    (checkpoint.parent / "dict.txt").write_bytes(b"\xff 1\n")
    with pytest.raises(UserError, match="dict.txt is not UTF-8"):
        files_of(checkpoint, checkpoint.parent)


def write_bpe(folder: Path, name: str) -> None:
    folder.mkdir(parents=True)
    for file in ("encoder.json", "vocab.bpe"):
        (folder / file).write_text(f"{file} of {name}")


def test_only_the_bpe_that_encoded_a_task_is_found(checkpoint):
    """By the digests that prepare-task wrote down; a BPE of another text may lie where the task's own usually does."""
    task, text = checkpoint.parent / "task", checkpoint.parent / "text"
    (task / "input0").mkdir(parents=True)
    (task / "input0" / "dict.txt").write_text("5 1\n")
    write_bpe(text / "bpe", "text")
    write_bpe(checkpoint.parent / "bpe", "other")
    assert files_of(checkpoint, task) == {"dict.txt": "5 1\n"}  # nobody says that it is the text of this task
    pieces = [text / "bpe" / "encoder.json", text / "bpe" / "vocab.bpe", task / "input0" / "dict.txt"]
    folder.finish(task, {"text": [file_digest(piece) for piece in pieces]}, {})
    own = {"dict.txt": "5 1\n", "encoder.json": "encoder.json of text", "vocab.bpe": "vocab.bpe of text"}
    assert files_of(checkpoint, task) == own  # past the one that lies nearer
    (text / "bpe" / "vocab.bpe").write_text("vocab.bpe of another")
    assert files_of(checkpoint, task) == {"dict.txt": "5 1\n"}
    assert files_of(checkpoint, task, text / "bpe")["vocab.bpe"] == "vocab.bpe of another"  # as told


def test_only_the_bpe_of_the_same_prepared_text_is_found(checkpoint):
    text = checkpoint.parent / "words"
    data = text / "data-bin-5pct"
    data.mkdir(parents=True)
    (data / "dict.txt").write_text("5 1\n")
    write_bpe(text / "bpe", "words")
    write_bpe(text / "text" / "bpe", "other")
    assert files_of(checkpoint, data) == {"dict.txt": "5 1\n"}
    folder.finish(text, {}, {})
    assert files_of(checkpoint, data)["encoder.json"] == "encoder.json of words"
    (text / "bpe" / "vocab.bpe").write_text("longer than it was when the text was prepared")
    assert files_of(checkpoint, data) == {"dict.txt": "5 1\n"}


@pytest.fixture
def roberta(checkpoint):
    """A checkpoint with a row for each of w0, w1 and fairseq's five symbols; and the folder of its data."""
    data = checkpoint.parent / "data"
    data.mkdir()
    state = loaded(checkpoint)
    state["model"]["encoder.sentence_encoder.embed_tokens.weight"] = torch.randn(7, 8)
    state["cfg"]["task"]["data"] = str(data)
    state["cfg"]["model"].dictionary_digest = digest(["<s>", "<pad>", "</s>", "<unk>", "w0", "w1", "<mask>"])
    torch.save(state, checkpoint)
    return checkpoint, data


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("w0 1\nw1 1\nw2 1\n", r"dict\.txt makes a dictionary of 8 symbols.*embeddings have 7 rows"),
        ("w1 1\nw0 1\n", r"dict\.txt is not the dictionary that the model was trained with"),
    ],
)
def test_the_dictionary_of_another_model_is_refused(roberta, text, match):
    checkpoint, data = roberta
    other = data.with_name("other")
    other.mkdir()
    (data / "dict.txt").write_text("w0 1\nw1 1\n")
    (other / "dict.txt").write_text(text)
    packed = checkpoint.with_name("p.safetensors")
    with pytest.raises(UserError, match=f"other/{match}"):
        files_of(checkpoint, other)
    with pytest.raises(UserError, match=match):
        pack_checkpoint(checkpoint, packed, Method(8), {"dict.txt": text})
    assert not packed.exists()
    pack_checkpoint(checkpoint, packed, Method(8), files_of(checkpoint, data))
    (data / "dict.txt").write_text(text)  # the folder that it was trained on holds something else by now
    with pytest.raises(UserError, match=f"data/{match}"):
        files_of(checkpoint)


def test_where_no_digest_is_known_the_number_of_entries_counts(roberta):
    checkpoint, data = roberta
    state = loaded(checkpoint)
    del state["cfg"]["model"].dictionary_digest
    torch.save(state, checkpoint)
    (data / "dict.txt").write_text("w1 1\nw0 1\n")
    assert files_of(checkpoint) == {"dict.txt": "w1 1\nw0 1\n"}
    (data / "dict.txt").write_text("w0 1\n")
    with pytest.raises(UserError, match="6 symbols"):
        files_of(checkpoint)


def test_what_cannot_be_written_is_the_target(checkpoint):
    nowhere = checkpoint.parent / "nowhere" / "p.safetensors"
    with pytest.raises(UserError, match=f"^{nowhere} could not be written"):
        pack_checkpoint(checkpoint, nowhere, Method(8))


def test_inspection_counts_and_measures(checkpoint):
    target = checkpoint.with_name("p.safetensors")
    size = pack_checkpoint(checkpoint, target, Method(4))
    before = read_checkpoint(checkpoint)["model"]
    found = inspect(target, before)
    assert [row.name for row in found.tensors] == ["encoder.version", "embed_tokens.weight", "fc.weight"]
    assert found.bytes_whole == size == found.total.bytes_file + found.bytes_beside
    fc = found.tensors[2]
    error = (before["fc.weight"].double().numpy() - paper(before["fc.weight"].numpy(), 4)).ravel()
    assert fc.error_mean == pytest.approx(error.mean(), abs=1e-9)
    assert fc.error_variance == pytest.approx(error.var(), abs=1e-9)
    assert fc.relative_error == pytest.approx(np.linalg.norm(error) / float(before["fc.weight"].norm()), rel=1e-5)
    codes = quantize_tensor(before["fc.weight"], 4).indices.numpy().ravel()
    shares = np.unique(codes, return_counts=True)[1] / codes.size
    assert fc.bytes_bound == pytest.approx(codes.size * -(shares * np.log2(shares)).sum() / 8 + 8)
    embedding = found.tensors[1]
    assert (embedding.parameters, embedding.nonzero, embedding.bits, embedding.bytes_paper) == (240, 232, 4, 116)
    assert found.total.parameters == 240 + 64 == storage(before, 4).parameters
    assert found.tensors[0].parameters == 0  # a buffer, which is no part of the error either
    norms = [float(before[row.name].norm()) for row in found.tensors[1:]]
    errors = [row.relative_error * norm for row, norm in zip(found.tensors[1:], norms, strict=True)]
    assert found.total.relative_error == pytest.approx(math.hypot(*errors) / math.hypot(*norms), rel=1e-5)
    with pytest.raises(UserError, match=r"fc\.weight"):
        inspect(target, {**before, "fc.weight": torch.zeros(3)})


def test_the_files_count_in_a_target_size(checkpoint):
    files = {"dict.txt": "".join(f"{i * i} {i}\n" for i in range(200))}
    target, packed = 1500, checkpoint.with_name("p.safetensors")
    assert 0.8 * target < pack_checkpoint(checkpoint, packed, Method(target_bytes=target), files) <= target
    assert packed.stat().st_size <= target


def test_a_criterion_with_weights_has_no_place(checkpoint):
    state = loaded(checkpoint)
    torch.save({**state, "criterion": {"weight": torch.ones(3)}}, checkpoint)
    with pytest.raises(UserError, match="in.pt: its criterion has weights of its own"):
        pack_checkpoint(checkpoint, checkpoint.with_name("p.safetensors"), Method(8))
    assert os.listdir(checkpoint.parent) == ["in.pt"]


def test_the_dictionary_is_that_of_the_first_folder_and_of_its_inputs(checkpoint):
    data = checkpoint.parent / "data"
    (data / "input0").mkdir(parents=True)
    (data / "input0" / "dict.txt").write_text("5 1\n")
    (data / "dict.txt").write_text("6 1\n")
    state = loaded(checkpoint)
    state["cfg"]["task"]["data"] = f"{data}:{data}-more"
    torch.save(state, checkpoint)
    assert files_of(checkpoint) == {"dict.txt": "5 1\n"}
