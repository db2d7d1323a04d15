"""A run on torch-xla is the run on the CPU, whatever the mode: the same loss update by update.

The runs are made side by side. An epoch has 34 updates, so 40 have its end in them, with a short last batch, and two
validations.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from launching import MLM, QUICK_TO_COMPILE, launch, lines, losses, plain, two_processes

from train_large.compression.checkpoint import read_checkpoint

pytestmark = pytest.mark.slow

UPDATES = 40
SHORT = 20
ALL = [*MLM, "--max-update", str(UPDATES)]
FIRST = [*MLM, "--max-update", str(SHORT), "--disable-validation"]
WITHOUT_SCHEDULE = MLM[: MLM.index("--lr-scheduler")] + MLM[MLM.index("--warmup-updates") + 2 :]
BUDGET = [*WITHOUT_SCHEDULE, "--lr-scheduler", "budget_linear", "--warmup-fraction", "0.2", "--disable-validation"]
BUDGET += ["--encoder-layers", "1"]

# By 16 sequences in every update: in one batch, or two, or four.
ONE = ["--batch-size", "16"]
TWO = ["--batch-size", "8"]
FOUR = ["--batch-size", "4"]


# A gradient that is not cut shows by what it was divided.
UNCUT = ["--clip-norm", "100"]


def accumulate(times: int) -> list[str]:
    return ["--update-freq", str(times)]


Make = Callable[[Path, Path], object]
Run = Callable[[str], Path]
A_FEW = 4  # of the tests of this module: who asks for no more is not to wait for all runs
MAKE: dict[str, Make] = {
    "two processes": lambda data, to: two_processes(data, *ALL, *TWO, save_dir=to),
    "two processes, accumulating": lambda data, to: two_processes(
        data, *ALL, *FOUR, *accumulate(2), *UNCUT, save_dir=to
    ),
    "two processes, budget": lambda data, to: two_processes(data, *BUDGET, *ONE, "--budget", "3s", save_dir=to),
    "spmd": lambda data, to: launch("pretrain", data, *ALL, *ONE, save_dir=to, devices=4),
    "spmd, accumulating": lambda data, to: launch("pretrain", data, *ALL, *TWO, *accumulate(2), save_dir=to, devices=4),
    "single": lambda data, to: launch("pretrain", data, *ALL, *ONE, save_dir=to),
    "single, accumulating": lambda data, to: launch("pretrain", data, *ALL, *TWO, *accumulate(2), save_dir=to),
    "bf16": lambda data, to: launch("pretrain", data, *FIRST, *ONE, "--bf16", save_dir=to),
    "recomputed": lambda data, to: launch(
        "pretrain",
        data,
        *FIRST,
        *ONE,
        "--checkpoint-activations",
        save_dir=to,
        env={"XLA_FLAGS": f"{QUICK_TO_COMPILE} --xla_dump_to={to}/programs --xla_dump_hlo_as_text"},
    ),
    "all projected": lambda data, to: launch(
        "pretrain", data, *FIRST, *ONE, "--projected-positions", "all", save_dir=to
    ),
    "plain": lambda data, to: plain(data, *ALL, *ONE, save_dir=to),
    "plain, accumulating": lambda data, to: plain(data, *ALL, *TWO, *accumulate(2), save_dir=to),
    "plain, accumulating four": lambda data, to: plain(data, *ALL, *FOUR, *accumulate(4), *UNCUT, save_dir=to),
}


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The save directory of a run of `MAKE`, by name, when it has ended."""
    folder = tmp_path_factory.mktemp("equality")
    futures: dict[str, Future[object]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def start(name: str) -> Path:
            save_dir = folder / name.replace(",", "").replace(" ", "_")
            if name not in futures:
                futures[name] = pool.submit(MAKE[name], text, save_dir)
            return save_dir

        def run(name: str) -> Path:
            save_dir = start(name)
            futures[name].result()
            return save_dir

        if sum(item.path == request.path for item in request.session.items) > A_FEW:
            for name in MAKE:
                start(name)
        yield run
        for future in futures.values():
            future.cancel()


def difference(mine: list[float], theirs: list[float]) -> float:
    """The greatest relative one."""
    assert len(mine) == len(theirs) > 0
    return max(abs(x - y) / y for x, y in zip(mine, theirs, strict=True))


MODES = {
    "plain": ["single", "spmd"],
    "plain, accumulating": ["single, accumulating", "spmd, accumulating", "two processes"],
    "plain, accumulating four": ["two processes, accumulating"],
}


@pytest.mark.parametrize(("reference", "mode"), [(plain, mode) for plain, modes in MODES.items() for mode in modes])
def test_every_update_and_validation_has_the_loss_that_it_has_without_xla(runs, reference, mode):
    mine, theirs = runs(mode), runs(reference)
    assert len(losses(theirs)) == UPDATES
    assert difference(losses(mine), losses(theirs)) < 1e-5
    assert len(losses(theirs, "valid")) == 2
    assert difference(losses(mine, "valid"), losses(theirs, "valid")) < 1e-5
    # The loss has moved, so that equality says something of the optimizer, and the tokens were counted alike.
    assert min(losses(theirs)) < losses(theirs)[0] - 0.2
    assert [line["tokens"] for line in lines(mine, "train")] == [line["tokens"] for line in lines(theirs, "train")]


def test_the_last_batch_of_an_epoch_is_a_short_one(runs):
    """What the equality above would not be worth much without."""
    tokens = [line["tokens"] for line in lines(runs("plain"), "train")]
    [end] = {line["updates"] for line in lines(runs("plain"), "valid")} - {UPDATES}
    assert end < UPDATES
    each = [after - before for before, after in zip([0, *tokens], tokens, strict=False)]
    assert min(each[:end]) < 0.7 * sum(each[:end]) / end


def seen(save_dir: Path) -> list[dict]:
    return [json.loads((save_dir / f"seen{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", ["two processes", "two processes, accumulating"])
def test_two_processes_go_fairseqs_own_way_and_stay_alike(runs, name):
    save_dir = runs(name)
    for process in seen(save_dir):
        assert process["run"] == "LazyRun"
        assert process["wrapper_is_fairseqs"]
    first, second = (torch.load(save_dir / f"model{rank}.pt", weights_only=True) for rank in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[weight], second[weight]) for weight in first)


@pytest.mark.parametrize("name", ["two processes", "spmd", "single"])
def test_embeddings_and_head_are_one_weight_in_the_end(runs, name):
    """Untied, the loss would be higher, but nothing would say so."""
    model = read_checkpoint(runs(name) / "checkpoint_last.pt")["model"]
    weight, head = model["encoder.sentence_encoder.embed_tokens.weight"], model["encoder.lm_head.weight"]
    assert torch.equal(weight, head)
    if name == "two processes":
        assert all(process["tied"] for process in seen(runs(name)))


def test_a_budget_stops_two_processes_at_the_same_update_and_their_learning_rates_are_the_same(runs):
    save_dir = runs("two processes, budget")
    first, second = (process["rates"] for process in seen(save_dir))
    assert first == second
    stop = lines(save_dir, "stop")[-1]
    assert stop["reason"] == "budget"
    assert stop["updates"] == len(first) > 1
    assert stop["train_seconds"] >= 3
    assert max(first) > first[-1] > 0


def test_bf16_stays_near(runs):
    mine, full = losses(runs("bf16")), losses(runs("single"))[:SHORT]
    assert 0 < difference(mine, full) < 0.02


def test_recomputing_activations_changes_no_loss(runs):
    assert difference(losses(runs("recomputed")), losses(runs("single"))[:SHORT]) < 1e-6
    # It has been done: in the program of an update, a barrier keeps XLA from using what the forward pass had.
    programs = [path.read_text() for path in (runs("recomputed") / "programs").glob("*before_optimizations.txt")]
    assert any("opt-barrier" in program for program in programs)


def test_projecting_only_masked_positions_changes_no_loss(runs):
    assert difference(losses(runs("all projected")), losses(runs("single"))[:SHORT]) < 1e-5
