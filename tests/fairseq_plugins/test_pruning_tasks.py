"""The pruning ladder: real runs of fairseq-train on data made here, and the parts that a run cannot show."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from fairseq.logging import metrics
from fairseq.models import BaseFairseqModel
from fairseq.models.transformer import TransformerConfig
from fairseq.models.transformer.transformer_config import EncDecBaseConfig
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase
from fairseq.optim.fp16_optimizer import FP16Optimizer, MemoryEfficientFP16Optimizer
from fairseq.tasks import FairseqTask
from omegaconf import OmegaConf
from torch import Tensor, nn

from fairseq_plugins.tasks import ladder
from fairseq_plugins.tasks.ladder import Ladder
from train_large.compression.shrink import shrink_checkpoint
from train_large.errors import UserError

PLUGIN = Path(__file__).parents[2] / "fairseq_plugins"

# -- real runs --

UPDATES_PER_EPOCH = 40
SIZE = "--arch roberta_prenorm --encoder-layers 2 --encoder-embed-dim 32 --encoder-ffn-embed-dim 64"
SIZE += " --encoder-attention-heads 2 --max-positions 32"
QUIET = "--cpu --seed 3 --no-progress-bar --num-workers 0 --log-interval 20 --no-epoch-checkpoints"
BATCHES = "--batch-size 16 --required-batch-size-multiple 1"
CLASSIFY = f"{SIZE} --num-classes 2 --criterion sentence_prediction --optimizer adam --lr 2e-3"
PRUNE = "--task pruning_sentence_prediction"


def command(tool: str, *words: str | Path) -> list[str]:
    return [sys.executable, "-m", f"fairseq_cli.{tool}", *(part for word in words for part in str(word).split())]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(tool: str, *words: str | Path, status: int = 0) -> str:
    """What the run printed; `words` are split at blanks."""
    done = forked.run(command(tool, *words), env=environment(), timeout=300)
    output = done.stdout + done.stderr
    assert done.returncode == status, output[-4000:]
    return output


def train(data: Path, save_dir: Path, *words: str | Path, status: int = 0) -> str:
    return run("train", data, "--save-dir", save_dir, BATCHES, QUIET, "--user-dir", PLUGIN, *words, status=status)


def preprocess(folder: Path, destination: Path, *words: str) -> None:
    prefixes = (f"--{split}pref {folder / split}" for split in ("train", "valid"))
    run("preprocess", *prefixes, "--destdir", destination, "--workers 1", *words)


def sentences(seed: int, count: int) -> Iterator[tuple[str, int]]:
    """Sentences of 40 words, most of them of the first or of the last twenty, and which it is."""
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(40)]
    for _ in range(count):
        label = rng.randrange(2)
        own = words[20 * label :][:20]
        yield " ".join(rng.choice(own if rng.random() < 0.7 else words) for _ in range(rng.randint(6, 12))), label


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data for sentence prediction."""
    folder = tmp_path_factory.mktemp("data")
    for split, seed, count in (("train", 1, 16 * UPDATES_PER_EPOCH), ("valid", 2, 200)):
        lines = list(sentences(seed, count))
        for part, column in (("input0", 0), ("label", 1)):
            (folder / part).mkdir(exist_ok=True)
            (folder / part / split).write_text("".join(f"{line[column]}\n" for line in lines))
    for part in ("input0", "label"):
        preprocess(folder / part, folder / "bin" / part, "--only-source")
    return folder / "bin"


@pytest.fixture(scope="module")
def finetuned(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model finetuned by stock fairseq alone."""
    folder = tmp_path_factory.mktemp("finetuned")
    words = (CLASSIFY, "--task sentence_prediction --max-epoch 3 --disable-validation", BATCHES, QUIET)
    run("train", data, "--save-dir", folder, *words)
    return folder / "checkpoint_last.pt"


def log(save_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (save_dir / "ladder.jsonl").read_text().splitlines()]


def load(path: Path) -> dict[str, Any]:
    """Without any class: `weights_only` and no global at all."""
    assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == []
    return torch.load(path, weights_only=True)


def weights(state: dict[str, Any]) -> dict[str, Tensor]:
    """The prunable weights of a checkpoint, told by their names."""
    inner = {name: tensor for name, tensor in state["model"].items() if "classification_heads" not in name}
    chosen = {name: tensor for name, tensor in inner.items() if tensor.dim() == 2}
    if "encoder.lm_head.weight" in chosen:  # the tied embedding
        assert torch.equal(chosen.pop("encoder.lm_head.weight"), chosen["encoder.sentence_encoder.embed_tokens.weight"])
    return chosen


def zeros(path: Path) -> tuple[int, int]:
    tensors = weights(torch.load(path, weights_only=True)).values()
    return sum(int((tensor == 0).sum()) for tensor in tensors), sum(tensor.numel() for tensor in tensors)


@pytest.fixture(scope="module", autouse=True)
def namespace_is_safe() -> None:
    """What fairseq's own checkpoints hold, and the plugin's patch allows too."""
    torch.serialization.add_safe_globals([Namespace])


@pytest.mark.slow
def test_levels_that_do_no_harm_take_no_updates(data: Path, finetuned: Path, tmp_path: Path) -> None:
    output = train(data, tmp_path, CLASSIFY, PRUNE, "--finetune-from-model", finetuned, "--recovery 0.01")
    records = log(tmp_path)
    assert [record["sparsity"] for record in records] == [0, 0.15, 0.30, 0.45, 0.60, 0.75, 0.90]
    assert [record["level"] for record in records] == list(range(7))
    assert all(record["recovered"] and record["updates"] == 0 for record in records)
    assert "no model to prune" not in output
    for record in records[1:]:
        path = tmp_path / f"checkpoint_sparsity_{round(100 * record['sparsity'])}.pt"
        count, total = zeros(path)
        assert count == round(record["sparsity"] * total) == record["zeros"]
        assert total == record["prunable"]
        state = load(path)
        assert state["extra_state"]["pruning"] == record
        assert "last_optimizer_state" not in state
        # Nothing else has changed: what is left are the finetuned weights, the smallest of which are gone.
        before = torch.load(finetuned, weights_only=True)
        for name, tensor in state["model"].items():
            assert torch.equal(torch.where(tensor == 0, tensor, before["model"][name]), tensor)
        kept = torch.cat([tensor[tensor != 0].abs() for tensor in weights(state).values()])
        gone = torch.cat([before["model"][name][tensor == 0].abs() for name, tensor in weights(state).items()])
        assert gone.max() <= kept.min()
    assert not list(tmp_path.glob("*.tmp"))
    assert (tmp_path / "checkpoint_last.pt").exists()  # fairseq ends the run in its own way

    # fairseq's own validation, of the file, comes to the score that was measured in the run.
    words = ("--user-dir", PLUGIN, "--path", path, BATCHES, "--cpu --no-progress-bar --valid-subset valid", PRUNE)
    validation = run("validate", data, *words, "--num-classes 2 --criterion sentence_prediction")
    found = next(line for line in validation.splitlines() if "| accuracy " in line)
    assert float(found.split("| accuracy ")[1].split()[0]) == pytest.approx(100 * records[-1]["score"], abs=0.051)

    # Once more: everything is there, nothing is done.
    stamps = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    output = train(data, tmp_path, CLASSIFY, PRUNE, "--finetune-from-model", finetuned, "--recovery 0.01")
    assert "reached already" in output
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stamps


@pytest.fixture(scope="module")
def hard(data: Path, finetuned: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[Any, ...]]:
    """A ladder that never recovers, so that every level takes its epoch, and the flags that it was run with."""
    return climb(data, finetuned, tmp_path_factory.mktemp("hard"))


def climb(data: Path, finetuned: Path, folder: Path, *more: str) -> tuple[Path, tuple[Any, ...]]:
    flags = (CLASSIFY, PRUNE, "--sparsity-levels 0.30,0.60 --recovery 2 --recovery-epochs 1.5 --recovery-interval 25")
    flags += ("--save-interval-updates 10 --finetune-from-model", finetuned, *more)
    train(data, folder, *flags)
    return folder, flags


@pytest.fixture(scope="module")
def structured(data: Path, finetuned: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[Any, ...]]:
    """The same ladder of whole heads and rows, with the optimizer that holds them at zero itself."""
    folder = tmp_path_factory.mktemp("structured")
    return climb(data, finetuned, folder, "--prune-structure heads+ffn --weight-decay 0.1 --optimizer fused_adam")


@pytest.mark.slow
def test_levels_that_do_not_recover_take_their_epochs(hard: tuple[Path, tuple[Any, ...]]) -> None:
    records = log(hard[0])
    assert [record["updates"] for record in records] == [0, 60, 60]
    assert [record["recovered"] for record in records] == [True, False, False]
    assert {record["baseline"] for record in records} == {records[0]["score"]}
    for level in (30, 60):
        count, total = zeros(hard[0] / f"checkpoint_sparsity_{level}.pt")
        assert count == round(level / 100 * total)
        assert load(hard[0] / f"checkpoint_sparsity_{level}.pt")["optimizer_history"][-1]["num_updates"] == level * 2
    # The run ends with the update that ended the ladder.
    last = torch.load(hard[0] / "checkpoint_last.pt", weights_only=True)["model"]
    assert all(torch.equal(last[name], w) for name, w in load(hard[0] / "checkpoint_sparsity_60.pt")["model"].items())


@pytest.mark.slow
@pytest.mark.parametrize("whole", ["hard", "structured"])
def test_a_killed_ladder_goes_on_where_it_was(
    data: Path, whole: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder, flags = request.getfixturevalue(whole)
    words = command("train", data, "--save-dir", tmp_path, BATCHES, QUIET, "--user-dir", PLUGIN, *flags)
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(words, stdout=output, stderr=output, env=environment())
    deadline = time.monotonic() + 200
    while not (tmp_path / "checkpoint_2_70.pt").exists():
        assert process.poll() is None, (tmp_path / "output").read_text()[-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [record["sparsity"] for record in log(tmp_path)] == [0, 0.3], "it should have died in the second level"
    first = (tmp_path / "checkpoint_sparsity_30.pt").stat().st_mtime_ns
    if whole == "structured":  # by fused_adam
        above = "at sparsity 60 %, above the next of --sparsity-levels, 45 %"
        assert above in train(data, tmp_path, *flags, "--sparsity-levels 0.30,0.45", status=1)
    else:
        shutil.copytree(tmp_path, tmp_path / "other")
        alone = [part.replace("--finetune-from-model", "") for part in flags if isinstance(part, str)]
        anew = train(data, tmp_path / "other", *alone, "--reset-dataloader --max-update 1")
        assert "going on at sparsity 60 %" in anew
        assert [record["sparsity"] for record in log(tmp_path / "other")] == [0, 0.3]

    assert "going on at sparsity 60 %" in train(data, tmp_path, *flags)
    assert (tmp_path / "checkpoint_sparsity_30.pt").stat().st_mtime_ns == first
    ours, uninterrupted = log(tmp_path), log(folder)
    for record in (*ours, *uninterrupted):
        assert record.pop("seconds") > 0
    assert ours == uninterrupted
    # Not only as many zeros: the weights of the run that was never killed, to the last bit.
    resumed, uninterrupted = (load(path / "checkpoint_sparsity_60.pt")["model"] for path in (tmp_path, folder))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in uninterrupted.items())


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "fused_adam"])
def test_what_is_zero_stays_zero_through_another_epoch(
    data: Path, hard: tuple[Path, tuple[Any, ...]], tmp_path: Path, optimizer: str
) -> None:
    start = hard[0] / "checkpoint_sparsity_30.pt"
    flags = (CLASSIFY, PRUNE, "--finetune-from-model", start, "--sparsity-levels 0.30 --recovery 2 --weight-decay 0.1")
    flags += ("--optimizer", optimizer)
    train(data, tmp_path, *flags)
    assert [(record["sparsity"], record["updates"]) for record in log(tmp_path)] == [(0, 0), (0.3, UPDATES_PER_EPOCH)]
    before, after = (weights(load(path)) for path in (start, tmp_path / "checkpoint_sparsity_30.pt"))
    for name, tensor in before.items():
        assert torch.equal(tensor == 0, after[name] == 0)
    assert any(not torch.equal(tensor, after[name]) for name, tensor in before.items())


def structures(state: dict[str, Tensor], attentions: dict[str, int]) -> list[Tensor]:
    """The weights of every head of `attentions` and of every FFN row, each in one vector, cut out by hand."""
    found = []
    for name, heads in attentions.items():
        rows = len(state[f"{name}.q_proj.bias"]) // heads
        for own in (slice(head * rows, (head + 1) * rows) for head in range(heads)):
            cut = [state[f"{name}.{x}_proj.{kind}"][own] for x in "qkv" for kind in ("weight", "bias")]
            found.append(torch.cat([part.flatten() for part in (*cut, state[f"{name}.out_proj.weight"][:, own])]))
    for name in (name.removesuffix(".fc1.bias") for name in state if name.endswith(".fc1.bias")):
        first, bias, second = (state[f"{name}.{part}"] for part in ("fc1.weight", "fc1.bias", "fc2.weight"))
        found += [torch.cat([first[row], bias[row : row + 1], second[:, row]]) for row in range(len(bias))]
    return found


LAYERS = "encoder.sentence_encoder.layers"
ATTENTIONS = {f"{LAYERS}.{layer}.self_attn": 2 for layer in (0, 1)}  # as SIZE has them


@pytest.mark.slow
def test_whole_heads_and_rows(structured: tuple[Path, tuple[Any, ...]], finetuned: Path) -> None:
    before = structures(load(finetuned)["model"], ATTENTIONS)
    total = sum(len(weights) for weights in before)
    records = log(structured[0])
    assert [(record["structure"], record["updates"]) for record in records] == [
        ("heads+ffn", updates) for updates in (0, 60, 60)
    ]
    gone: list[bool] = [False] * len(before)
    for record in records[1:]:
        state = load(structured[0] / f"checkpoint_sparsity_{round(100 * record['sparsity'])}.pt")["model"]
        after = structures(state, ATTENTIONS)
        zero = [bool((weights == 0).all()) for weights in after]  # biases too, after 60 updates with momentum
        count = sum(len(weights) for weights, is_zero in zip(after, zero) if is_zero)
        assert record["zeros"] == count
        assert record["prunable"] == total
        row = len(before[-1])
        assert round(record["sparsity"] * total) - row < count <= round(record["sparsity"] * total)
        assert all(is_zero for is_zero, was in zip(zero, gone) if was)  # what is zero stays zero
        # Nothing else is: whatever is left is finetuned.
        left = torch.cat([weights for weights, is_zero in zip(after, zero) if not is_zero])
        assert (left == 0).float().mean() < 0.001
        gone = zero
    smallest = min(weights.square().mean() for weights, is_zero in zip(before, zero) if not is_zero)
    assert any(weights.square().mean() < smallest for weights, is_zero in zip(before, zero) if is_zero)


def validated(data: Path, path: Path) -> dict[str, str]:
    words = ("--user-dir", PLUGIN, "--path", path, BATCHES, "--cpu --no-progress-bar --valid-subset valid")
    words += ("--task sentence_prediction --num-classes 2 --criterion sentence_prediction",)
    line = next(line for line in run("validate", data, *words).splitlines() if "| accuracy " in line)
    return dict(part.split() for part in line.split(" | ")[3:] if len(part.split()) == 2)


@pytest.mark.slow
def test_a_shrunk_level_scores_the_same_and_is_trained_further(
    data: Path, structured: tuple[Path, tuple[Any, ...]], tmp_path: Path
) -> None:
    level = structured[0] / "checkpoint_sparsity_60.pt"
    summary = shrink_checkpoint(level, tmp_path / "small.pt")
    record = log(structured[0])[-1]
    assert summary.parameters_before - summary.parameters == record["zeros"]
    assert (tmp_path / "small.pt").stat().st_size < level.stat().st_size - 4 * record["zeros"] + 10_000
    right, found = (validated(data, path) for path in (level, tmp_path / "small.pt"))
    assert found["accuracy"] == right["accuracy"]
    assert float(found["accuracy"]) == pytest.approx(100 * record["score"], abs=0.051)
    assert float(found["loss"]) == pytest.approx(float(right["loss"]), abs=0.001)

    # The first measurement of another ladder is the score of what it starts from.
    words = (CLASSIFY.replace("roberta_prenorm", "prenorm_roberta --no-embedding-norm"), summary.flags, PRUNE)
    words += ("--finetune-from-model", tmp_path / "small.pt", "--prune-structure ffn --sparsity-levels 0.2")
    train(data, tmp_path / "on", *words, "--recovery 0.01")
    first, last = log(tmp_path / "on")
    assert first["score"] == record["score"]
    assert last["prunable"] == sum(summary.ffn) * 65
    again = shrink_checkpoint(tmp_path / "on" / "checkpoint_sparsity_20.pt", tmp_path / "smaller.pt")
    assert again.heads == summary.heads
    assert sum(again.ffn) == sum(summary.ffn) - last["zeros"] / 65


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--fp16 --fp16-no-flatten-grads", "--memory-efficient-fp16"])
def test_half_precision(data: Path, finetuned: Path, tmp_path: Path, flags: str) -> None:
    """What is zero stays zero in the masters in single precision too, through a resume."""
    words = (CLASSIFY, PRUNE, "--finetune-from-model", finetuned, "--sparsity-levels 0.30,0.60 --recovery 2", flags)
    words += ("--fp16-init-scale 4 --recovery-epochs 0.5 --disable-validation",)
    train(data, tmp_path, *words, "--max-update 30")  # in the middle of the second level
    total = zeros(tmp_path / "checkpoint_sparsity_30.pt")[1]
    assert zeros(tmp_path / "checkpoint_last.pt")[0] == round(0.6 * total)
    assert "going on at sparsity 60 % after 10 updates" in train(data, tmp_path, *words)
    assert [record["updates"] for record in log(tmp_path)] == [0, 20, 20]
    for level in (30, 60):
        assert zeros(tmp_path / f"checkpoint_sparsity_{level}.pt")[0] == round(level / 100 * total)


@pytest.mark.slow
def test_two_workers_decide_alike(data: Path, finetuned: Path, tmp_path: Path) -> None:
    """One validation batch for both workers: the second has none. If they did not agree, one would wait for ever."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = (CLASSIFY, PRUNE, "--finetune-from-model", finetuned, "--sparsity-levels 0.30,0.97 --batch-size-valid 200")
    words += (f"--distributed-world-size 2 --distributed-init-method tcp://localhost:{port} --distributed-no-spawn",)
    words += ("--distributed-backend gloo --ddp-backend legacy_ddp --recovery-interval 3",)
    arguments = ("train", data, "--save-dir", tmp_path, BATCHES, QUIET, "--user-dir", PLUGIN, *words)
    workers = [
        subprocess.Popen(
            command(*arguments, f"--distributed-rank {rank}"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
        )
        for rank in (0, 1)
    ]
    outputs = [worker.communicate(timeout=250)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    records = log(tmp_path)
    assert [record["sparsity"] for record in records] == [0, 0.3, 0.97]
    assert records[-1]["updates"] > 0  # a real level
    assert (
        zeros(tmp_path / "checkpoint_sparsity_97.pt")[0]
        == records[-1]["zeros"]
        == round(0.97 * records[-1]["prunable"])
    )
    # The score is that of all of the validation sentences, each once: one worker alone finds the same.
    alone = ("--max-update 1 --sparsity-levels 0.30 --disable-validation --no-save --finetune-from-model", finetuned)
    train(data, tmp_path / "alone", CLASSIFY, PRUNE, *alone)
    assert log(tmp_path / "alone")[0]["score"] == records[0]["score"]
    assert not list((tmp_path / "alone").glob("*.pt"))


@pytest.mark.slow
def test_masked_lm(data: Path, tmp_path: Path) -> None:
    """The score is the inverse of the perplexity that fairseq's own validation comes to; and the model is random."""
    words = (SIZE, "--task pruning_masked_lm --criterion masked_lm --optimizer adam --lr 1e-3 --tokens-per-sample 16")
    words += ("--sample-break-mode eos --sparsity-levels 0.5 --recovery 1.02 --prune-scope layer",)
    output = train(data / "input0", tmp_path, *words)
    assert "no model to prune" in output
    records = log(tmp_path)
    assert [record["metric"] for record in records] == ["inverse_perplexity"] * 2
    assert records[1]["updates"] > 0
    assert records[1]["recovered"]
    assert records[1]["score"] >= 1.02 * records[0]["baseline"]
    for name, tensor in weights(load(tmp_path / "checkpoint_sparsity_50.pt")).items():
        assert int((tensor == 0).sum()) == round(0.5 * tensor.numel()), name
    validation = next(line for line in output.splitlines() if "valid on 'valid' subset" in line and "ppl" in line)
    assert float(validation.split("| ppl ")[1].split()[0]) == pytest.approx(1 / records[1]["score"], abs=0.01)


def translation(tmp_path: Path, *more: str) -> str:
    """A ladder on reversed sentences, in the folder `out`."""
    for split, seed, count in (("train", 1, 160), ("valid", 2, 30)):
        for language, order in (("en", 1), ("fr", -1)):
            lines = (" ".join(line.split()[::order]) + "\n" for line, _ in sentences(seed, count))
            (tmp_path / f"{split}.{language}").write_text("".join(lines))
    preprocess(tmp_path, tmp_path / "bin", "--source-lang en --target-lang fr --joined-dictionary")
    words = ("--arch transformer_iwslt_de_en --encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 16",)
    words += ("--decoder-embed-dim 16 --encoder-ffn-embed-dim 32 --decoder-ffn-embed-dim 32 --share-all-embeddings",)
    words += ("--encoder-attention-heads 2 --decoder-attention-heads 2 --optimizer adam --lr 1e-3",)
    words += ("--criterion label_smoothed_cross_entropy --label-smoothing 0.1 --task pruning_translation",)
    return train(tmp_path / "bin", tmp_path / "out", *words, "--sparsity-levels 0.4,0.5", *more)


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "metric"), [("", "inverse_perplexity"), ("--eval-bleu", "bleu")])
def test_translation(tmp_path: Path, flags: str, metric: str) -> None:
    output = translation(tmp_path, "--recovery 0.5", flags)
    records = log(tmp_path / "out")
    assert [record["metric"] for record in records] == [metric] * 3
    state = load(tmp_path / "out" / "checkpoint_sparsity_50.pt")
    tensors = {tensor.data_ptr(): tensor for tensor in state["model"].values() if tensor.dim() == 2}
    count = sum(int((tensor == 0).sum()) for tensor in tensors.values())
    assert count == round(0.5 * sum(tensor.numel() for tensor in tensors.values())) == records[-1]["zeros"]
    if metric == "inverse_perplexity":  # without the smoothing, as nll_loss is
        nll = float(output.split("valid on 'valid' subset")[-1].split("nll_loss ")[1].split()[0])
        assert 2**-nll == pytest.approx(records[-1]["score"], rel=0.02)


@pytest.mark.slow
def test_heads_of_a_translation_model(tmp_path: Path) -> None:
    """Those of the encoder, of the decoder and of what is between them; and shrinking says that it cannot."""
    translation(tmp_path, "--recovery 2 --recovery-epochs 0.5 --prune-structure heads+ffn --prune-scope layer")
    path = tmp_path / "out" / "checkpoint_sparsity_50.pt"
    state = load(path)["model"]
    attentions = ("encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.encoder_attn")
    found = structures(state, dict.fromkeys(attentions, 2))
    zero = [bool((weights == 0).all()) for weights in found]
    assert [sum(zero[start : start + 2]) for start in (0, 2, 4)] == [1, 1, 1]
    assert [sum(zero[start : start + 32]) for start in (6, 38)] == [16, 16]
    assert log(tmp_path / "out")[-1]["zeros"] == sum(len(w) for w, is_zero in zip(found, zero) if is_zero)
    with pytest.raises(UserError, match=f"{path}: .*transformer_iwslt_de_en"):
        shrink_checkpoint(path, tmp_path / "small.pt")


# -- flags --


def settings(**changed: Any) -> Any:
    return OmegaConf.merge(OmegaConf.structured(ladder.LadderConfig()), changed)


@pytest.mark.parametrize(
    ("changed", "flag"),
    [
        ({"sparsity_levels": "0.3,0.2"}, "--sparsity-levels"),
        ({"recovery": 0.0}, "--recovery 0"),
        ({"recovery": -1.0}, "--recovery -1"),
        ({"recovery": float("nan")}, "--recovery nan"),
        ({"recovery_epochs": -1.0}, "--recovery-epochs -1"),
        ({"recovery_interval": -1}, "--recovery-interval -1"),
        ({"prune_structure": "heads", "prune_head": True}, "--prune-head"),
    ],
)
def test_bad_flags_end_the_run_with_one_sentence(changed: dict[str, Any], flag: str) -> None:
    with pytest.raises(SystemExit) as ending:
        Ladder.setup_task(settings(**changed))
    assert flag in str(ending.value)
    assert "\n" not in str(ending.value)


@pytest.mark.parametrize(
    "changed",
    [{"distributed_training": {"ddp_backend": "fully_sharded"}}, {"common": {"model_parallel_size": 2}}]
    + [{"optimization": {"use_bmuf": True}}],
)
def test_models_that_cannot_be_seen_whole_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(SystemExit):
        Ladder.setup_task(root(**changed).task)


# -- parts --


def root(**changed: Any) -> Any:
    """A run's configuration, as far as a ladder looks."""
    plain = {
        "task": OmegaConf.to_container(settings()),
        "common": {"seed": 1, "model_parallel_size": 1, "fp16_scale_window": 1, "fp16_init_scale": 4, "bf16": False},
        "dataset": {"train_subset": "train", "valid_subset": "valid", "fixed_validation_seed": None},
        "optimization": {"update_freq": [1], "skip_remainder_batch": False, "use_bmuf": False, "max_update": 0},
        "checkpoint": {"save_dir": "", "no_save": True, "finetune_from_model": "x", "restore_file": "x"},
        "distributed_training": {"distributed_world_size": 1, "ddp_backend": "pytorch_ddp"},
        "optimizer": {"_name": "adam", "lr": [0.1], "adam_betas": "(0.9, 0.98)", "adam_eps": 1e-8, "tpu": False}
        | {"weight_decay": 0.1, "use_old_adam": True, "fp16_adam_stats": False},
    }
    plain["common"] |= {"fp16_scale_tolerance": 0.0, "threshold_loss_scale": None, "min_loss_scale": 1e-4}
    plain["common"] |= {"fp16_no_flatten_grads": False}
    return OmegaConf.merge(OmegaConf.create(plain), changed)


class Model(BaseFairseqModel):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Scores(Ladder, FairseqTask):
    """A ladder whose scores are given, to see what it decides."""

    scores = {"loss": "given"}

    def give(self, *scores: float) -> Scores:
        self._given = iter(scores)
        self._metric = "given"
        return self

    def _measure(self) -> float:
        return next(self._given)


def ladder_of(tmp_path: Path, batches: int, **task: Any) -> tuple[Scores, Any]:
    cfg = root(task=task, checkpoint={"save_dir": str(tmp_path)})
    made = Scores.setup_task(cfg.task)
    made._batches_per_epoch = batches
    return made, cfg


def begin(task: Scores, optimizer: Any = None, model: nn.Module | None = None) -> Any:
    task._masked = []
    task._model, task._criterion, task._optimizer = model or Model(), None, optimizer
    task._start(0)
    return task._model


class NoStep:
    def step(self) -> None:
        pass


def steps(task: Scores, count: int) -> None:
    for _ in range(count):
        task.optimizer_step(NoStep(), task._model, 0)


def test_a_level_is_measured_at_every_interval_and_ends_when_it_has_recovered(tmp_path: Path) -> None:
    task, cfg = ladder_of(tmp_path, 100, sparsity_levels="0.2,0.5,0.8", recovery=0.9, recovery_interval=7)
    # Unpruned 1.0. At 20 % recovered at once; at 50 % after two measurements; at 80 % never, so after 100 updates.
    begin(task.give(1.0, 0.91, 0.5, 0.89, 0.9, *[0.1] * 100))
    steps(task, 13)
    assert [record["sparsity"] for record in log(tmp_path)] == [0, 0.2]
    steps(task, 1 + 99)
    assert [record["sparsity"] for record in log(tmp_path)] == [0, 0.2, 0.5]
    assert cfg.optimization.max_update == 0
    steps(task, 1)
    assert [record["updates"] for record in log(tmp_path)] == [0, 0, 14, 100]
    assert [record["recovered"] for record in log(tmp_path)] == [True, True, True, False]
    assert [record["zeros"] for record in log(tmp_path)] == [0, 10, 25, 40]
    assert cfg.optimization.max_update == 1  # fairseq ends the run


@pytest.mark.parametrize(
    ("task", "optimization", "expected"),
    [
        ({}, {}, (95, 10)),
        ({"recovery_epochs": 0.5}, {}, (48, 10)),
        ({"recovery_epochs": 0.001}, {}, (1, 10)),
        ({"recovery_epochs": 0}, {}, (0, 10)),
        ({}, {"update_freq": [4]}, (24, 3)),
        ({}, {"update_freq": [4], "skip_remainder_batch": True}, (23, 3)),
        ({"recovery_interval": 5}, {"update_freq": [4, 1]}, (24, 5)),
    ],
)
def test_the_length_of_a_level(tmp_path: Path, task: Any, optimization: Any, expected: tuple[int, int]) -> None:
    made, cfg = ladder_of(tmp_path, 95, **task)
    cfg.optimization.update(optimization)
    assert (made._limit(), made._interval()) == expected


def test_no_epochs_at_all_prune_without_finetuning(tmp_path: Path) -> None:
    task, cfg = ladder_of(tmp_path, 10, sparsity_levels="0.2,0.5", recovery_epochs=0)
    begin(task.give(1.0, 0.5, 0.4))
    assert [(record["score"], record["updates"]) for record in log(tmp_path)] == [(1.0, 0), (0.5, 0), (0.4, 0)]
    assert cfg.optimization.max_update == 1


def test_state_is_plain_and_goes_on(tmp_path: Path) -> None:
    task, _ = ladder_of(tmp_path, 100, sparsity_levels="0.2,0.5", recovery_interval=10)
    model = begin(task.give(1.0, 0.5, 0.6))
    steps(task, 12)
    state = json.loads(json.dumps(task.get_checkpoint_dict()))["Scores"]

    again, cfg = ladder_of(tmp_path, 100, sparsity_levels="0.2,0.5", recovery_interval=10)
    again.set_checkpoint_dict(state)
    kept = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    begin(again.give(*[0.7] * 9, 0.4, 1.0), model=model)  # nothing is measured anew at the start
    assert all(torch.equal(kept[name], weight) for name, weight in model.named_parameters())
    steps(again, 88 + 10)
    assert [record["updates"] for record in log(tmp_path)] == [0, 100, 10]
    assert cfg.optimization.max_update == 1

    done, cfg = ladder_of(tmp_path, 100, sparsity_levels="0.2,0.5")
    done.set_checkpoint_dict(again.get_checkpoint_dict()["Scores"])
    assert cfg.optimization.max_epoch < 0  # fairseq has nothing to train


def test_other_levels_at_a_resume(tmp_path: Path) -> None:
    task, _ = ladder_of(tmp_path, 100, sparsity_levels="0.2,0.5")
    model = begin(task.give(1.0, 1.0, 0.5))
    steps(task, 5)
    again, _ = ladder_of(tmp_path, 100, sparsity_levels="0.1,0.4,0.9", recovery_interval=10)
    again.set_checkpoint_dict(task.get_checkpoint_dict()["Scores"])
    begin(again.give(0.6, 1.0, 1.0), model=model)
    steps(again, 10)
    assert [(record["sparsity"], record["updates"]) for record in log(tmp_path)] == [
        (0, 0),
        (0.2, 0),
        (0.4, 10),
        (0.9, 0),
    ]


def test_a_level_lost_in_a_kill_stands_in_the_log_once(tmp_path: Path) -> None:
    task, _ = ladder_of(tmp_path, 100, sparsity_levels="0.2,0.5", recovery_interval=10)
    model = begin(task.give(1.0, 0.5, 1.0, 0.5))
    saved = json.loads(json.dumps(task.get_checkpoint_dict()))["Scores"]
    steps(task, 10)
    assert len(log(tmp_path)) == 2
    again, _ = ladder_of(tmp_path, 100, sparsity_levels="0.2,0.5", recovery_interval=10)
    again.set_checkpoint_dict(saved)
    begin(again.give(0.5, 1.0, 0.7), model=model)
    steps(again, 20)
    assert [(record["sparsity"], record["updates"]) for record in log(tmp_path)] == [(0, 0), (0.2, 20)]


def masters_of(optimizer: Any, model: nn.Module) -> dict[str, Tensor]:
    """The copies in single precision, found by their place and not by their name."""
    flat = optimizer.fp32_params
    flat = torch.cat([tensor.data.view(-1) for tensor in (flat.values() if isinstance(flat, dict) else flat)])
    sizes = [parameter.numel() for parameter in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, flat.split(sizes)))


@pytest.mark.parametrize("kind", ["flat", "list", "memory-efficient"])
def test_momentum_does_not_bring_weights_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """fairseq's own half-precision optimizers; the flat one asks for a CUDA device, so it is told of the CPU."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    task, cfg = ladder_of(tmp_path, 100, sparsity_levels="0.5", recovery_interval=1000)
    cfg.common.fp16_no_flatten_grads = kind == "list"
    model = Model().half()
    made = MemoryEfficientFP16Optimizer if kind == "memory-efficient" else FP16Optimizer
    optimizer = made.build_optimizer(cfg, list(model.parameters()))

    def update() -> None:
        optimizer.zero_grad()
        optimizer.backward(model(torch.ones(3, 6).half()).float().pow(2).sum())
        optimizer.clip_grad_norm(0)
        task.optimizer_step(optimizer, model, 0)

    # Momentum first, then the mask.
    optimizer.zero_grad()
    optimizer.backward(model(torch.ones(3, 6).half()).float().pow(2).sum())
    optimizer.step()
    begin(task.give(1.0, 0.5), optimizer, model)
    gone = {name: weight == 0 for name, weight in model.named_parameters() if weight.dim() == 2}
    assert sum(int(mask.sum()) for mask in gone.values()) == 25
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for _ in range(3):
        update()
    for name, weight in model.named_parameters():
        if name in gone:
            assert torch.equal(weight == 0, gone[name])
        assert not torch.equal(weight, before[name])  # the others are trained
    if kind != "memory-efficient":
        for name, master in masters_of(optimizer, model).items():
            if name in gone:
                assert torch.equal(master == 0, gone[name].view(-1))


class Layers(BaseFairseqModel):
    """Two of fairseq's encoder layers, of `heads` heads and four rows."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        size = {"embed_dim": 4, "ffn_embed_dim": 4, "attention_heads": heads}
        cfg = TransformerConfig(encoder=EncDecBaseConfig(**size), dropout=0.0)
        self.layers = nn.ModuleList(TransformerEncoderLayerBase(cfg) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, None)
        return x


@pytest.mark.parametrize(
    ("heads", "task", "words"),
    [
        (1, {"prune_structure": "heads", "sparsity_levels": "0.1"}, "--prune-structure heads: no layer"),
        (2, {"prune_structure": "heads", "sparsity_levels": "0.2,0.75"}, "--sparsity-levels 0.2,0.75: .* 50 %"),
        (2, {"prune_structure": "heads+ffn", "sparsity_levels": "0.9"}, "--sparsity-levels 0.9: .* 58 %"),
    ],
)
def test_structures_that_cannot_be_pruned_are_refused_at_the_start(
    tmp_path: Path, heads: int, task: dict[str, str], words: str
) -> None:
    made, _ = ladder_of(tmp_path, 10, **task)
    with pytest.raises(SystemExit, match=words):
        begin(made.give(), model=Layers(heads))  # nothing is measured before
    assert not list(tmp_path.iterdir())


def test_levels_between_two_numbers_of_heads_are_met_from_below(tmp_path: Path) -> None:
    task, _ = ladder_of(tmp_path, 10, sparsity_levels="0.2,0.3,0.7", prune_structure="heads", recovery_epochs=0)
    begin(task.give(1.0, 1.0, 1.0, 1.0), model=Layers(2))
    assert [record["zeros"] / record["prunable"] for record in log(tmp_path)] == [0, 0, 0.25, 0.5]
    # By layer, each has as much room.
    task, _ = ladder_of(tmp_path, 10, sparsity_levels="0.3,0.5,0.9", prune_structure="heads", recovery_epochs=0)
    task.cfg.prune_scope = "layer"
    begin(task.give(1.0, 1.0, 1.0, 1.0), model=Layers(2))
    assert [record["zeros"] / record["prunable"] for record in log(tmp_path)] == [0, 0, 0.5, 0.5]


def test_a_ladder_goes_on_with_the_structures_that_it_was_begun_with(tmp_path: Path) -> None:
    task, _ = ladder_of(tmp_path, 100, sparsity_levels="0.5", prune_structure="ffn")
    begin(task.give(1.0, 0.5), model=Layers(2))
    state = json.loads(json.dumps(task.get_checkpoint_dict()))["Scores"]
    again, _ = ladder_of(tmp_path, 100, sparsity_levels="0.5", prune_structure="heads")
    again.set_checkpoint_dict(state)
    with pytest.raises(SystemExit, match="--prune-structure ffn, not heads"):
        begin(again.give(), model=Layers(2))
    # A ladder of before there were structures is one of weights.
    for record in state["records"]:
        del record["structure"]
    again.set_checkpoint_dict(state)
    with pytest.raises(SystemExit, match="--prune-structure weights, not heads"):
        begin(again.give(), model=Layers(2))


@pytest.mark.parametrize("kind", ["flat", "list", "memory-efficient"])
def test_momentum_does_not_bring_biases_of_structures_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """In half precision, where the optimizer has a copy of its own."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    task, cfg = ladder_of(tmp_path, 100, sparsity_levels="0.5", recovery_interval=1000, prune_structure="heads+ffn")
    cfg.common.fp16_no_flatten_grads = kind == "list"
    model = Layers(2).half()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    made = MemoryEfficientFP16Optimizer if kind == "memory-efficient" else FP16Optimizer
    optimizer = made.build_optimizer(cfg, list(model.parameters()))
    x = torch.randn(3, 2, 4).half()

    def backward() -> None:
        optimizer.zero_grad()
        optimizer.backward(model(x).float().pow(3).sum())
        optimizer.clip_grad_norm(0)

    backward()
    optimizer.step()
    begin(task.give(1.0, 0.5), optimizer, model)
    gone = {name: weight == 0 for name, weight in model.named_parameters() if (weight == 0).any()}
    biases = {name.split(".")[-2] for name in gone if name.endswith(".bias")}
    assert biases >= {"q_proj", "k_proj", "v_proj", "fc1"}
    assert not biases & {"out_proj", "fc2"}
    for _ in range(3):
        backward()
        task.optimizer_step(optimizer, model, 0)
    for name, weight in model.named_parameters():
        if name in gone:
            assert torch.equal(weight == 0, gone[name]), name
    if kind != "memory-efficient":
        for name, master in masters_of(optimizer, model).items():
            if name in gone:
                assert torch.equal(master == 0, gone[name].view(-1)), name


class Measured(Ladder, FairseqTask):
    """A ladder that measures, on validation data that draw random numbers."""

    scores = {"accuracy": "accuracy", "loss": "inverse_perplexity"}

    def _valid_batches(self) -> Iterator[tuple[Any, bool]]:
        for _ in range(3):
            random.random(), np.random.random(), torch.rand(1)
            yield {"x": torch.rand(2, 6)}, False

    def valid_step(self, sample: Any, model: Any, criterion: Any) -> Any:
        assert not model.training
        assert not criterion.training
        assert not torch.is_grad_enabled()
        self.seen.append(sample["x"])
        return 0, 0, {"loss": 2.0}

    def reduce_metrics(self, logging_outputs: Any, criterion: Any) -> None:
        metrics.log_scalar("loss", sum(output["loss"] for output in logging_outputs) / 3, 1, round=0)


def test_measuring_leaves_no_trace() -> None:
    metrics.reset()  # fairseq keeps meters from one run in a process to the next
    task = Measured.setup_task(root().task)
    task.seen = []
    task._model, task._criterion = Model(), nn.Identity()
    with metrics.aggregate("train") as training:
        torch.manual_seed(7), random.seed(7), np.random.seed(7)
        expected = torch.rand(3).tolist(), random.random(), np.random.random()
        torch.manual_seed(7), random.seed(7), np.random.seed(7)
        assert task._measure() == 0.25  # 2 bits
        assert (torch.rand(3).tolist(), random.random(), np.random.random()) == expected
        assert "loss" not in training
    assert task._model.training
    assert task._criterion.training
    first, task.seen = task.seen, []
    task._measure()
    assert all(torch.equal(a, b) for a, b in zip(first, task.seen, strict=True))  # the same measurement


def test_files_appear_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, _ = ladder_of(tmp_path, 95)
    begin(task.give(1.0, 0.5))
    log = tmp_path / ladder.LOG
    before = log.read_bytes()
    assert before

    def half(aside: Path, lines: str, **settings: str) -> None:
        aside.write_bytes(lines.encode()[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(SystemExit, match=r"ladder\.jsonl could not be written \(No space left.*free some space"):
        task._record(0.5, 0.9, True)
    assert [path for path in tmp_path.iterdir() if path.name.startswith((".", "ladder"))] == [log]
    assert log.read_bytes() == before


def test_a_levels_checkpoint_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, cfg = ladder_of(tmp_path, 95)
    cfg.checkpoint.no_save = False
    begin(task.give(1.0, 0.5))
    monkeypatch.setattr(task, "_checkpoint", lambda record, update: {})

    def half(checkpoint: dict[str, Any], aside: Path) -> None:
        Path(aside).write_bytes(b"PK")
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(SystemExit, match=r"checkpoint_sparsity_\d+\.pt could not be written .*free some space"):
        task._end_level(0.9, 1)
    assert [path.name for path in tmp_path.iterdir()] == [ladder.LOG]


def test_the_length_of_a_level_in_a_later_epoch(tmp_path):
    made, cfg = ladder_of(tmp_path, 95)
    cfg.optimization.update_freq = [4, 1]
    made._epoch = 2
    assert (made._limit(), made._interval()) == (95, 10)
    made._epoch = 3
    assert made._limit() == 95


def test_each_level_has_its_own_seconds_and_a_resume_those_before_it(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(ladder.time, "monotonic", lambda: now[0])
    flags = {"sparsity_levels": "0.2,0.5", "recovery_interval": 10}
    task, _ = ladder_of(tmp_path, 100, **flags)
    now[0] += 1000  # loading
    model = begin(task.give(1.0, 0.5, 1.0, 0.5))
    now[0] += 3
    steps(task, 10)  # the first level is over
    now[0] += 4
    state = json.loads(json.dumps(task.get_checkpoint_dict()))["Scores"]
    again, _ = ladder_of(tmp_path, 100, **flags)
    again.set_checkpoint_dict(state)
    now[0] += 1000
    begin(again.give(1.0), model=model)
    now[0] += 5
    steps(again, 10)
    assert [record["seconds"] for record in log(tmp_path)] == [0, 3, 9]


def test_a_ladder_that_is_measured_by_something_else_is_not_gone_on_with(tmp_path):
    flags = {"sparsity_levels": "0.2,0.5", "recovery_interval": 10}
    task, _ = ladder_of(tmp_path, 100, **flags)
    model = begin(task.give(1.0, 0.5))
    state = json.loads(json.dumps(task.get_checkpoint_dict()))["Scores"]
    again, _ = ladder_of(tmp_path, 100, **flags)
    again.set_checkpoint_dict(state)
    begin(again.give(0.9), model=model)
    again._metric = "bleu"
    with pytest.raises(SystemExit, match="measured by given, this run measures bleu"):
        steps(again, 10)


def test_a_model_without_a_score_is_not_pruned(tmp_path):
    task, _ = ladder_of(tmp_path, 100)
    with pytest.raises(SystemExit, match="unpruned model is nan"):
        begin(task.give(float("nan")))
