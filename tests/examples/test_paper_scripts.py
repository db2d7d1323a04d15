"""The experiments at the paper's scale: what their scripts would run is parsed by the programs that would run it, and
held against the paper. Nothing is trained."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from train_large import cli
from train_large.sizes import LEARNING_RATES, ROBERTA, TRANSLATION, Size
from train_large.step_times import FairseqTrain

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "user_dir_examples"
EXPERIMENTS = (
    *("batch_size", "compression", "convergence", "dataset_size", "depth", "finetuning", "flops", "layer_sharing"),
    *("sst2_grid", "translation", "weight_error", "width"),
)
DEPTHS = {f"{layers}l_768h" for layers in (3, 6, 12, 18, 24)}
WIDTHS = {f"12l_{hidden}h" for hidden in (256, 512, 768, 1024, 1536)}
SCALE = {"DATA": "/data", "OUT": "/out", "MICRO": "32", "GPUS": "8"}


def script(name: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """paper.sh of an experiment, with nothing else of ours in its environment."""
    plain = {"PATH": os.environ["PATH"], **environment}
    command = ["bash", str(EXAMPLES / name / "paper.sh"), *arguments]
    return subprocess.run(command, env=plain, capture_output=True, text=True, timeout=100)


def dry_run(name: str, **environment: str) -> list[list[str]]:
    """The words of each command that it prints."""
    done = script(name, {**SCALE, "DRY_RUN": "1", **environment})
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    commands = [words[: words.index(">")] if ">" in words else words for words in commands]
    return [words[2:] if words[0] == "env" else words for words in commands]


@functools.cache
def commands(name: str) -> list[list[str]]:
    return dry_run(name)


def of(program: str, name: str) -> list[list[str]]:
    return [words for words in commands(name) if words[0] == program]


def value(words: list[str], flag: str) -> str:
    assert words.count(flag) == 1, f"{flag} in {words}"
    return words[words.index(flag) + 1]


def pretrainings(name: str) -> list[list[str]]:
    return [words for words in of("fairseq-train", name) if value(words, "--task") == "masked_lm"]


def size_of(words: list[str]) -> str:
    return value(words, "--arch").removeprefix("prenorm_roberta_")


def batch_of(words: list[str]) -> int:
    """Sequences per update."""
    return int(
        functools.reduce(
            lambda product, flag: product * int(value(words, flag)),
            ("--batch-size", "--update-freq", "--distributed-world-size"),
            1,
        )
    )


@functools.cache
def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"paper_scale_{name}", EXAMPLES / "paper_scale" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # dataclasses look there
    spec.loader.exec_module(found)
    return found


# ------------------------------------------------------------------------------------------- the programs' own parsers


def distinct(found: list[list[str]]) -> list[list[str]]:
    """Commands that differ in more than in paths and the size: a parser does not look at what is in a path."""
    seen: dict[tuple[str, ...], list[str]] = {}
    for words in found:
        seen.setdefault(tuple(re.sub(r"^/.*|\d+l_\d+h$", "", word) for word in words), words)
    return list(seen.values())


_configured: set[tuple[str, ...]] = set()


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != "translation"])
def test_fairseq_takes_every_command(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    train = of("fairseq-train", name)
    assert {size_of(words) for words in train} <= {size.name for size in ROBERTA}
    for words in distinct(train):
        namespace = options.parse_args_and_arch(options.get_training_parser(), words[1:])
        flags = tuple(word for word in words if word.startswith("--"))
        if flags not in _configured:  # fairseq's own configuration of it: slow, so once for each set of flags
            _configured.add(flags)
            convert_namespace_to_omegaconf(namespace)
    for words in distinct(of("fairseq-validate", name)):
        options.parse_args_and_arch(options.get_validation_parser(), words[1:])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_train_large_takes_every_command(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    found = of("train-large", name)
    assert found
    for words in distinct(found):
        given, passed_on = cli._split_at_dashes(words[1:])
        parsed = cli._parser().parse_args(given)
        if parsed.command == "time-steps":
            assert (parsed.length, parsed.updates) == (128, 100)
            trial = FairseqTrain(parsed.data, parsed.user_dir, parsed.length, 1, tuple(passed_on))
            timed = trial.command(Size.parse(parsed.sizes[0]), 1, 1, 1, "/save")
            options.parse_args_and_arch(options.get_training_parser(), timed[3:])
        else:
            assert not passed_on


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_no_other_program_is_called_but_our_own(name):
    known = {"fairseq-train", "fairseq-validate", "train-large", "mkdir", "rm", "touch"}
    for words in commands(name):
        if words[0] in known:
            continue
        assert words[0] in ("python", ".venv-t2t/bin/python"), words
        if words[1] != "-m":
            path = Path(words[1])
            if (ROOT / path).parent == EXAMPLES / "pocket_mt":
                assert (path.name, len(words)) == ("score.py", 5)
                continue
            assert (ROOT / path).parent == EXAMPLES / "paper_scale"
            module(path.stem).parser().parse_args(words[2:])


# ------------------------------------------------------------------------------------------------- what the paper says


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != "translation"])
@pytest.mark.parametrize(("micro", "gpus"), [("32", "8"), ("512", "1"), ("4", "2")])
def test_an_update_has_the_papers_batch_at_table_1s_rate(name, micro, gpus):
    if name in ("compression", "sst2_grid") and micro != "32":
        pytest.skip("its pretrainings are those of depth and width")
    found = commands(name) if micro == "32" else dry_run(name, MICRO=micro, GPUS=gpus)
    runs = [words for words in found if words[0] == "fairseq-train" and value(words, "--task") == "masked_lm"]
    batches = {batch_of(words) for words in runs}
    assert batches == (set(LEARNING_RATES) if name in ("batch_size", "flops") else {8192})
    for words in runs:
        batch = batch_of(words)
        assert int(value(words, "--batch-size")) == min(int(micro), batch // int(gpus))
        assert float(value(words, "--lr")) == LEARNING_RATES[batch]
        assert value(words, "--tokens-per-sample") == "128"
        assert (value(words, "--budget"), value(words, "--budget-clock")) == ("1000000", "calibrated")


def test_every_pretraining_is_timed_before_it_runs():
    for name in EXPERIMENTS:
        timed = set()
        for words in commands(name):
            if words[:2] == ["train-large", "time-steps"]:
                given, extra = cli._split_at_dashes(words[1:])
                parsed = cli._parser().parse_args(given)
                share = value(extra, "--share-layers") if "--share-layers" in extra else "none"
                timed |= {(str(parsed.out), size, parsed.batch, share) for size in parsed.sizes}
            elif words[0] == "fairseq-train" and "--budget" in words:
                table = value(words, "--seconds-per-update")
                assert (table, size_of(words), batch_of(words), value(words, "--share-layers")) in timed


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("depth", DEPTHS),
        ("width", WIDTHS),
        ("batch_size", {"12l_768h"}),
        ("flops", DEPTHS | WIDTHS),
        ("dataset_size", DEPTHS),
        ("layer_sharing", {"12l_768h"}),
        ("finetuning", {"12l_768h", "18l_768h", "24l_768h", "12l_1024h", "12l_1536h"}),
        ("compression", DEPTHS | WIDTHS),
        ("sst2_grid", DEPTHS | WIDTHS),
        ("convergence", {"6l_768h", "12l_768h", "24l_768h"}),
        ("weight_error", {"6l_768h", "12l_768h", "24l_768h"}),
    ],
)
def test_the_sizes(name, sizes):
    assert {size_of(words) for words in pretrainings(name)} == sizes
    saved = [value(words, "--save-dir") for words in pretrainings(name)]
    assert len(saved) == len(set(saved))


def test_dataset_size_trains_on_all_and_on_both_subsets():
    data = {Path(words[1]).name for words in pretrainings("dataset_size")}
    assert data == {"data-bin", "data-bin-5pct", "data-bin-1pct"}


def test_layer_sharing_trains_all_three_and_measures_memory_at_32():
    assert [value(words, "--share-layers") for words in pretrainings("layer_sharing")] == ["none", "all", "attention"]
    memory = [words for words in of("train-large", "layer_sharing") if "--max-micro-batch" in words]
    assert [value(words, "--share-layers") for words in memory] == ["none", "all", "attention"]
    assert {(value(words, "--batch"), value(words, "--max-micro-batch")) for words in memory} == {("32", "32")}


def test_finetuning_stops_at_table_2s_perplexities():
    table = {"12l_768h": 4.3, "18l_768h": 4.1, "24l_768h": 4.0, "12l_1024h": 3.9, "12l_1536h": 4.3}
    assert {size_of(words): float(value(words, "--target-ppl")) for words in pretrainings("finetuning")} == table
    alike = [words for words in dry_run("finetuning", TARGET_PPL="5") if "--target-ppl" in words]
    assert {value(words, "--target-ppl") for words in alike} == {"5"}


def test_finetuning_has_robertas_setting():
    for words in of("fairseq-train", "finetuning"):
        if value(words, "--task") == "sentence_prediction":
            task = Path(words[1]).name
            total, warmup, classes = {"mnli": (123873, 7432, 3), "sst-2": (20935, 1256, 2)}[task]
            assert int(value(words, "--total-num-update")) == total
            assert int(value(words, "--warmup-updates")) == warmup
            assert int(value(words, "--num-classes")) == classes
            assert float(value(words, "--lr")) == 1e-5
            assert int(value(words, "--batch-size")) == 32


@pytest.mark.parametrize(("name", "tasks"), [("compression", {"mnli", "sst-2"}), ("sst2_grid", {"sst-2"})])
def test_compression_prunes_and_quantizes_at_every_level(name, tasks):
    sizes = DEPTHS | WIDTHS
    ladders = [w for w in of("fairseq-train", name) if value(w, "--task") == "pruning_sentence_prediction"]
    assert {(Path(words[1]).name, size_of(words)) for words in ladders} == set(itertools.product(tasks, sizes))
    for words in ladders:
        levels = [float(level) for level in value(words, "--sparsity-levels").split(",")]
        assert levels == [0.15, 0.30, 0.45, 0.60, 0.75, 0.90]
        assert (value(words, "--recovery"), value(words, "--recovery-epochs")) == ("0.995", "1")
    quantized = [words for words in of("train-large", name) if words[1] == "quantize"]
    of_ladder = {
        (str(Path(w[2]).parent), Path(w[2]).stem.rpartition("_")[2], value(w, "--bits"))
        for w in quantized
        if "sparsity_" in w[2]
    }
    saved = [value(words, "--save-dir") for words in ladders]
    assert of_ladder == set(itertools.product(saved, ("15", "30", "45", "60", "75", "90"), ("32", "8", "6", "4")))
    assert len(quantized) == len(saved) * 7 * 4  # and the model that was not pruned
    assert len(of("fairseq-validate", name)) == len(quantized)


def test_the_grid_is_appendix_ds():
    grids: dict[str, set[tuple[str, ...]]] = {}
    for words in of("fairseq-train", "sst2_grid"):
        if value(words, "--task") == "sentence_prediction":
            point = tuple(value(words, flag) for flag in ("--batch-size", "--lr", "--seed", "--dropout"))
            grids.setdefault(size_of(words), set()).add(point)
            updates = int(value(words, "--max-update")) * int(point[0])
            assert abs(updates / (20935 * 32) - 1) < 1e-4  # the same epochs for every batch
    grid = {("16", "32", "64"), ("5e-4", "3e-4", "1e-4"), ("100", "300", "500"), ("0.1", "0.2", "0.3")}
    axes = sorted(grid, key=lambda axis: ["16", "5e-4", "100", "0.1"].index(axis[0]))
    assert grids == {size: set(itertools.product(*axes)) for size in DEPTHS | WIDTHS}


def test_convergence_finetunes_the_epochs_that_pretraining_keeps():
    kept = {int(value(words, "--save-interval")) for words in pretrainings("convergence")}
    assert kept == {3}
    starts = [w for w in of("fairseq-train", "convergence") if "--finetune-from-model" in w]
    names = {Path(value(words, "--finetune-from-model")).name for words in starts}
    assert names == {f"checkpoint{epoch}.pt" for epoch in (3, 6, 9, 12)}
    assert not any("--no-epoch-checkpoints" in words for words in pretrainings("convergence"))
    bits = {value(words, "--bits") for words in of("train-large", "convergence") if words[1] == "quantize"}
    assert bits == {"32", "4"}


def test_what_two_experiments_ask_for_is_one_run():
    """With one OUT nothing is trained twice, so the same folder must mean the same command."""
    by_folder: dict[str, set[tuple[str, ...]]] = {}
    for name in EXPERIMENTS:
        for words in of("fairseq-train", name):
            by_folder.setdefault(value(words, "--save-dir"), set()).add(tuple(words))
    assert all(len(found) == 1 for found in by_folder.values())
    standard = [{value(w, "--save-dir") for w in pretrainings(name)} for name in ("depth", "width", "compression")]
    assert standard[0] | standard[1] == standard[2]


# -------------------------------------------------------------------------------------------------------- translation


def t2t(found: list[list[str]], program: str) -> list[dict[str, str]]:
    """The flags of each run of one of Tensor2Tensor's programs."""
    runs = [words for words in found if words[1:4] == ["-m", "t2t_problems.launch", program]]
    return [dict(word.removeprefix("--").split("=", 1) for word in words[4:] if "=" in word) for words in runs]


def test_translation_has_the_papers_sizes_and_tensor2tensors_names():
    source = (ROOT / "t2t_problems" / "hparams.py").read_text()
    (prefix,) = re.findall(r'^PREFIX = "(\w+)"', source, re.MULTILINE)
    hparams = set(re.findall(r'add_hparam\("(\w+)"', source))
    registered = [prefix + size.name for size in TRANSLATION]
    trainers = t2t(commands("translation"), "trainer")
    long = [flags for flags in trainers if "budget_seconds" in flags["hparams"]]
    assert [flags["hparams_set"] for flags in long] == registered
    assert {flags["hparams_set"] for flags in t2t(commands("translation"), "decoder")} == set(registered)
    for flags in trainers:
        assert {pair.partition("=")[0] for pair in flags["hparams"].split(",")} <= hparams
        assert flags["model"] == "transformer_budgeted"
        assert flags["worker_gpu"] == "8"
    for flags in long:
        values = dict(pair.split("=") for pair in flags["hparams"].split(","))
        assert (values["budget_seconds"], values["budget_clock"]) == ("1000000", "calibrated")
    problems = (ROOT / "t2t_problems" / "enfr.py").read_text()
    named = {re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower() for name in re.findall(r"^class (\w+)\(", problems, re.M)}
    assert {flags["problem"] for flags in trainers} <= named


# -------------------------------------------------------------------------------------- bad input, and running again


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_is_not_given_is_named(name):
    for missing in ("DATA", "OUT", "GPUS") if name == "translation" else SCALE:
        done = script(name, {key: text for key, text in SCALE.items() if key != missing} | {"DRY_RUN": "1"})
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(rf"error: {missing} is not set: .+\n", done.stderr)


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"MICRO": "many"}, "MICRO=many"),
        ({"GPUS": "0"}, "GPUS=0"),
        ({"MICRO": "24"}, "MICRO=24 on GPUS=8 does not divide a batch of 8192"),
        ({"SIZES": "2l_64h"}, "2l_64h is no size of this experiment"),
    ],
)
def test_bad_settings_are_one_sentence(environment, named):
    for name in EXPERIMENTS:
        if name == "translation" and "MICRO" in environment:
            continue
        done = script(name, {**SCALE, "DRY_RUN": "1", **environment})
        assert (done.returncode, done.stdout) == (2, ""), name  # before hours of work
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert named in done.stderr


@pytest.mark.parametrize(
    ("name", "environment", "named"),
    [
        ("batch_size", {"MICRO": "512", "GPUS": "1", "SIZES": "3l_768h"}, "3l_768h is no size"),
        ("batch_size", {"MICRO": "128", "GPUS": "64"}, None),
        ("batch_size", {"MICRO": "64", "GPUS": "128"}, None),
        ("batch_size", {"MICRO": "2", "GPUS": "512"}, "does not divide a batch of 256"),
        ("flops", {"MICRO": "2", "GPUS": "512"}, "does not divide a batch of 256"),
        ("flops", {"MICRO": "2", "GPUS": "512", "SIZES": "3l_768h"}, None),
        ("compression", {"TASKS": "mnli cola"}, "cola is neither"),
        ("translation", {"BUDGET": "2h"}, "BUDGET=2h: give a number of seconds"),
        ("depth", {"SEED": "one"}, "SEED=one"),
    ],
)
def test_settings_of_an_experiment_are_looked_at_first(name, environment, named):
    done = script(name, {**SCALE, "DRY_RUN": "1", **environment})
    assert (done.returncode, done.stdout == "") == ((0, False) if named is None else (2, True))
    assert (named or "") in done.stderr


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_another_seed_shares_nothing_that_was_trained(name):
    def made(found):
        for words in found:
            folders = [word.partition("=")[2] for word in words if word.startswith("--output_dir=")]
            folders += [value(words, flag) for flag in ("--save-dir", "--csv", "--page") if flag in words]
            yield from (folder for folder in folders if "-timed/" not in folder)

    first, second = set(made(commands(name))), set(made(dry_run(name, SEED="2")))
    assert first
    assert {path for path in first & second if "seed1/" not in path} == set()


def test_sizes_divide_the_runs_of_flops():
    whole, part = commands("flops"), dry_run("flops", SIZES="3l_768h 12l_768h")
    trained = [[value(w, "--save-dir") for w in found if w[0] == "fairseq-train"] for found in (whole, part)]
    assert (len(trained[0]), len(trained[1])) == (13, 6)
    assert set(trained[1]) < set(trained[0])


def test_data_that_is_not_there_is_named(tmp_path):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = script("depth", {**SCALE, "DATA": str(tmp_path), "OUT": str(tmp_path / "out"), "PATH": path})
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/corpus/*.txt is not there: ")
    assert done.stderr.count("\n") == 1


def test_folders_may_be_arguments_and_have_blanks(tmp_path):
    out = tmp_path / "of the paper"
    environment = {"MICRO": "32", "GPUS": "8", "DRY_RUN": "1", "SIZES": "12l_768h", "BUDGET": "2h", "SEED": "7"}
    done = script("weight_error", environment, "/raw", str(out))
    assert done.returncode == 0
    train = [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("fairseq-train")]
    assert len(train) == 2
    assert {Path(value(words, "--save-dir")).is_relative_to(out) for words in train} == {True}
    assert (value(train[0], "--budget"), value(train[0], "--seed")) == ("2h", "7")
    assert not out.exists()


def test_a_table_of_step_times_may_be_given():
    found = dry_run("depth", STEPS="/elsewhere/steps.csv")
    assert not [words for words in found if words[:2] == ["train-large", "time-steps"]]
    tables = {value(words, "--seconds-per-update") for words in found if words[0] == "fairseq-train"}
    assert tables == {"/elsewhere/steps.csv"}


def test_runs_that_ended_are_not_entered_again(tmp_path):
    """One that reached a perplexity would go on, and no longer be what was finetuned."""
    before = dry_run("finetuning", OUT=str(tmp_path), SIZES="12l_768h")
    pretraining, *finetunings = (value(words, "--save-dir") for words in before if words[0] == "fairseq-train")
    for folder in (pretraining, finetunings[0]):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "done").touch()
    after = dry_run("finetuning", OUT=str(tmp_path), SIZES="12l_768h")
    assert [value(words, "--save-dir") for words in after if words[0] == "fairseq-train"] == finetunings[1:]
    assert [words for words in after if words[0] == "touch"] == [["touch", f"{finetunings[1]}/done"]]
    assert after[-2:] == before[-2:]


def test_what_is_done_is_left_out(tmp_path):
    """A finetuning of the grid and a measurement that are there are not made again."""
    small = {"OUT": str(tmp_path), "SIZES": "12l_768h"}
    before = dry_run("sst2_grid", **small)
    run = tmp_path / "sst2_grid" / "12l_768h-batch8192-seed1" / "batch16,rate5e-4,seed100,dropout0.1"
    run.mkdir(parents=True)
    (run / "done").touch()
    log = tmp_path / "sst2_grid" / "12l_768h-batch8192-seed1-compressed" / "quantized" / "sparsity45-4bits.log"
    log.parent.mkdir(parents=True)
    log.touch()
    after = dry_run("sst2_grid", **small)
    gone = [words for words in before if words not in after and words[0].startswith(("fairseq", "train-large"))]
    assert [words[0] for words in gone] == ["fairseq-train", "train-large", "train-large", "fairseq-validate"]
    assert value(gone[0], "--save-dir") == str(run)
    assert [value(words, "--bits") for words in gone[1:3]] == ["4", "4"]
    assert {words[2] for words in gone[1:3]} == {str(log.parents[1] / "checkpoint_sparsity_45.pt")}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_another_budget_in_the_same_folder_is_refused(name, tmp_path):
    """The folders of all that is made from a pretraining are named after it, without its budget."""
    here = {**SCALE, "OUT": str(tmp_path), "DRY_RUN": "1", "T2T_PYTHON": sys.executable}
    here["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    if name == "translation":
        folders = [words["output_dir"] for words in t2t(commands(name), "decoder")]
    else:
        folders = [value(words, "--save-dir") for words in pretrainings(name)]
    run = tmp_path / Path(folders[-1]).relative_to("/out")
    log = run_log(run, updates=100, budget_seconds=7200.0)
    done = script(name, here)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {log} was trained with a budget of 7200 s, and BUDGET=1000000 is another: ")
    assert done.stderr.count("\n") == 1
    assert str(run) not in done.stdout
    same = script(name, {**here, "BUDGET": "7200" if name == "translation" else "2h"})
    assert (same.returncode, same.stderr) == (0, "")


# ---------------------------------------------------------------------------------------------------- their own tables


def run_log(
    folder: Path, *accuracies: float, per_update: float = 0.5, updates: int = 0, budget_seconds: float | None = None
) -> Path:
    folder.mkdir(parents=True)
    zero = {"updates": 0, "train_seconds": 0.0, "wall_seconds": 0.0, "tokens": 0, "flops": 0.0}
    lines = [{"kind": "start", **zero, "budget_seconds": budget_seconds}]
    lines += [{**zero, "kind": "valid", "subset": "valid", "accuracy": accuracy} for accuracy in accuracies]
    for done in range(100, updates + 1, 100):  # the first hundred took ten times as long
        lines.append({**zero, "kind": "train", "updates": done, "train_seconds": (900 + done) * per_update})
    (folder / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("checkpoint_best.pt", "checkpoint_last.pt"):
        (folder / name).touch()
    return folder


def test_the_best_of_the_grid_is_kept_and_the_others_checkpoints_go(tmp_path, capsys):
    finetuned = module("finetuned")
    runs = [run_log(tmp_path / name, *found) for name, found in (("a", (0.7, 0.9)), ("b", (0.8,)), ("c", (0.95,)))]
    for run in runs[:2]:
        (run / "done").touch()
    link = tmp_path / "best"
    assert finetuned.main([*map(str, runs), "--best", str(link), "--remove-others"]) == 0
    assert link.readlink() == Path("a")  # c is better so far, but not done
    assert [sorted(path.name for path in run.glob("*.pt")) for run in runs] == [
        ["checkpoint_best.pt", "checkpoint_last.pt"],
        [],
        ["checkpoint_best.pt", "checkpoint_last.pt"],
    ]
    (runs[2] / "done").touch()
    everything = [str(path) for path in sorted(tmp_path.iterdir())]  # the link among them
    table = tmp_path / "accuracies.csv"
    assert finetuned.main([*everything, "--best", str(link), "--csv", str(table)]) == 0
    assert link.readlink() == Path("c")
    rows = table.read_text().splitlines()[1:]
    assert [row.rpartition("/")[2] for row in rows] == ["a,0.9", "b,0.8", "c,0.95"]
    assert (runs[0] / "checkpoint_best.pt").exists()
    assert finetuned.main([str(tmp_path / "none"), "--best", str(link)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'none'}: ")


def test_the_accuracy_of_what_fairseq_validate_printed(tmp_path, capsys):
    compressed = module("compressed")
    log = tmp_path / "sparsity0-4bits.log"
    log.write_text('2026 | INFO | x | {"task": "y"}\n{"epoch": 1, "valid_accuracy": "12.5", "valid_loss": "1.0"}\n')
    assert compressed.accuracy(log) == 0.125
    log.write_text("killed\n")
    (tmp_path / "quantized").mkdir()
    log.rename(tmp_path / "quantized" / log.name)
    (tmp_path / "quantized" / "sparsity0-4bits.safetensors").touch()
    assert compressed.main([str(tmp_path), "--csv", str(tmp_path / "table.csv")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "table.csv").exists()


def test_seconds_per_update_are_those_of_the_last_updates(tmp_path, capsys):
    measured = module("seconds_per_update")
    assert measured.seconds_per_update(run_log(tmp_path / "run", updates=300), 100) == pytest.approx(0.5)
    assert measured.main([str(run_log(tmp_path / "short", updates=100)), "--updates", "200"]) == 2
    assert "fewer than 200 updates" in capsys.readouterr().err


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_readme_opens_with_the_commands(name):
    text = (EXAMPLES / name / "README.md").read_text()
    opening = text.split("\n\n")[1]
    assert f"make study EXPERIMENT={name}" in opening
    assert f"bash user_dir_examples/{name}/paper.sh" in opening
    assert len(text.splitlines()) < 40
