"""What `python -m xla.pretrain` and `python -m xla.finetune` refuse, each with one sentence and before anything is
compiled."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from launching import COMMON, MLM, ROOT, SIZE, environment
from torch_xla._internal import tpu

from train_large.errors import UserError
from xla import device, launch

BATCH = ["--batch-size", "16"]
CLASSIFY = ["--task", "sentence_prediction", "--criterion", "sentence_prediction", "--num-classes", "2"]
CLASSIFY += ["--arch", "prenorm_roberta", *SIZE, *COMMON]
TRANSLATE = ["--task", "translation", "--arch", "transformer", *COMMON]
TRANSLATE += ["--criterion", "label_smoothed_cross_entropy"]


@pytest.fixture(autouse=True)
def no_device_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch_xla  # noqa: F401  (sets some variables itself)

    for name in ("PJRT_DEVICE", "CPU_NUM_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def sentence(refused: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(refused.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


# -- the device --


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (None, "no TPU was found on this machine"),
        ("TPU", "PJRT_DEVICE=TPU, but no TPU was found"),
        ("GPU", "PJRT_DEVICE=GPU: give TPU, or CPU"),
        ("", "PJRT_DEVICE=: give TPU, or CPU"),
    ],
)
def test_no_device(monkeypatch, asked, said):
    if asked is not None:
        monkeypatch.setenv("PJRT_DEVICE", asked)
    with pytest.raises(SystemExit) as refused:
        launch.main("pretrain", ["data"])
    assert sentence(refused).startswith("error: ")
    assert said in sentence(refused)


@pytest.mark.parametrize(
    ("devices", "flags", "said"),
    [
        ("x", [], "CPU_NUM_DEVICES=x: give a number"),
        ("0", [], "CPU_NUM_DEVICES=0: give a number"),
        ("2", ["--mode", "spawn"], "--mode spawn"),
        ("1", ["--projected-positions", "0"], "--projected-positions 0: give auto, all, or a number"),
        ("1", ["--projected-positions", "x"], "--projected-positions x: give auto, all, or a number"),
    ],
)
def test_numbers_and_modes(monkeypatch, devices, flags, said):
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    monkeypatch.setenv("CPU_NUM_DEVICES", devices)
    with pytest.raises(SystemExit) as refused:
        launch.main("pretrain", ["data", *flags])
    assert said in sentence(refused)


@pytest.mark.parametrize(
    ("asked", "devices", "mode"),
    [(None, "1", "single"), (None, "4", "spmd"), ("single", "4", "single"), ("spmd", "1", "spmd")],
)
def test_several_devices_are_used_as_one(monkeypatch, asked, devices, mode):
    monkeypatch.setenv("CPU_NUM_DEVICES", devices)
    assert device.choose_mode(asked, "CPU") == mode


# -- fairseq's flags --


def configuration(*flags: str) -> Any:
    parser = options.get_training_parser()
    arguments = [*flags, "--user-dir", str(launch.PLUGIN)]
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, arguments))


@pytest.mark.parametrize(
    ("kind", "flags", "said"),
    [
        ("pretrain", [*MLM, "--max-tokens", "256"], "--max-tokens makes batches of many shapes"),
        ("pretrain", [*MLM, *BATCH, "--max-tokens-valid", "256"], "give --batch-size-valid instead"),
        ("pretrain", MLM, "give --batch-size, the sequences of one batch."),
        ("pretrain", [*MLM, "--batch-size", "18"], "--batch-size 18 does not divide by the 4 devices: give 20."),
        ("pretrain", [*MLM, "--batch-size", "2"], "--batch-size 2 does not divide by the 4 devices: give 4."),
        ("pretrain", [*MLM, *BATCH, "--batch-size-valid", "6"], "--batch-size-valid 6 does not divide"),
        ("pretrain", [*MLM, *BATCH, "--cpu"], "--cpu is not for XLA devices: set PJRT_DEVICE=CPU"),
        ("pretrain", [*MLM, *BATCH, "--fp16"], "--fp16 is not for XLA devices: give --bf16"),
        ("pretrain", [*MLM, *BATCH, "--amp"], "--amp is not for XLA devices: give --bf16"),
        ("finetune", [*MLM, *BATCH], "--task masked_lm is not for xla.finetune: take python -m xla.pretrain."),
        ("pretrain", [*CLASSIFY, *BATCH], "--task sentence_prediction is not for xla.pretrain: take python -m xla.fi"),
        ("finetune", [*TRANSLATE[2:], *BATCH, "--task", "language_modeling"], "give one of sentence_prediction"),
        ("finetune", [*TRANSLATE, *BATCH, "--eval-bleu"], "--eval-bleu generates sentences of any length"),
        ("finetune", [*TRANSLATE, *BATCH, "--report-accuracy"], "--report-accuracy takes all predictions off"),
        ("finetune", [*TRANSLATE, *BATCH, "--sentence-avg"], "--sentence-avg would count the rows"),
        ("finetune", [*CLASSIFY, *BATCH, "--report-mcc"], "--report-mcc takes all predictions off the device"),
        ("pretrain", [*MLM, *BATCH, "--distributed-world-size", "2"], "--distributed-world-size 2: --mode says how"),
        ("finetune", [*TRANSLATE, *BATCH, "--required-seq-len-multiple", "8"], "--required-seq-len-multiple is of no"),
    ],
)
def test_flags(monkeypatch, kind, flags, said):
    monkeypatch.setenv("CPU_NUM_DEVICES", "4")
    with pytest.raises(UserError) as refused:
        launch.check(kind, configuration("data", *flags), "CPU", "spmd")
    assert said in sentence(refused)


@pytest.mark.parametrize(("hosts", "asked"), [(4, "steps.csv"), (4, "0.5"), (4, None), (1, "steps.csv")])
def test_a_table_of_one_host_is_not_for_a_pod(monkeypatch, tmp_path, hosts, asked):
    monkeypatch.setattr(device, "hosts", lambda which: hosts)
    (tmp_path / "dict.txt").touch()
    flags = [*MLM, *BATCH, "--budget", "1h", "--budget-clock", "calibrated"]
    cfg = configuration(str(tmp_path), *flags, *(["--seconds-per-update", asked] if asked else []))
    if (hosts, asked) == (4, "steps.csv"):
        with pytest.raises(UserError) as refused:
            launch.check("pretrain", cfg, "CPU", "spmd")
        assert sentence(refused).startswith("--seconds-per-update steps.csv: a table holds the times of one host")
        assert sentence(refused).endswith("this pod has 4: give a number, the seconds of one update on all of them.")
    else:
        launch.check("pretrain", cfg, "CPU", "spmd")


@pytest.mark.parametrize(
    ("kind", "flags", "name"),
    [
        ("pretrain", MLM, "dict.txt"),
        ("finetune", CLASSIFY, "input0/dict.txt"),
        ("finetune", TRANSLATE, "dict.*.txt"),
        ("finetune", [*TRANSLATE, "--source-lang", "en", "--target-lang", "fr"], "dict.en.txt"),
    ],
)
def test_data(tmp_path, kind, flags, name):
    cfg = configuration(f"{tmp_path}:elsewhere", *flags, *BATCH)
    with pytest.raises(UserError) as refused:
        launch.check(kind, cfg, "CPU", "single")
    assert sentence(refused) == f"{tmp_path}: no {name} is there; give a folder that fairseq-preprocess has made."
    dictionary = tmp_path / name.replace("*", "en")
    dictionary.parent.mkdir(exist_ok=True)
    dictionary.touch()
    launch.check(kind, cfg, "CPU", "single")


# -- as a process --


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device_asked", "flags", "said"),
    [
        (None, BATCH, "no TPU was found on this machine; run this on a TPU VM, or set PJRT_DEVICE=CPU"),
        ("CPU", "no arch", "give --arch, such as prenorm_roberta_12l_768h."),
        ("CPU", [*BATCH, "--fp16"], "--fp16 is not for XLA devices: give --bf16 in its place."),
        ("CPU", BATCH, "nowhere: no dict.txt is there; give a folder that fairseq-preprocess has made."),
    ],
)
def test_a_refused_run_ends_with_one_line_and_leaves_nothing(tmp_path, device_asked, flags, said):
    env = environment()
    env.pop("PJRT_DEVICE")
    env.pop("PJRT_SELECT_DEFAULT_DEVICE", None)
    if device_asked:
        env["PJRT_DEVICE"] = device_asked
    flags = ["--task", "masked_lm"] if flags == "no arch" else [*MLM, *flags]
    command = [sys.executable, "-m", "xla.pretrain", "nowhere", *flags, "--save-dir", str(tmp_path / "run")]
    result = forked.run(command, cwd=ROOT, env=env, timeout=120)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: {said}")
    assert "Traceback" not in result.stdout + result.stderr
    assert not Path(tmp_path / "run").exists()


def test_without_data_there_is_nothing_to_launch(capsys):
    with pytest.raises(SystemExit) as ending:
        launch.main("pretrain", ["--mode", "spmd"])
    assert ending.value.code == 2
    assert "give DATA" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (["data", "--user-dir", "mine"], True),
        (["data", "--user-dir=mine"], True),
        (["data", "--user-directory", "mine"], False),
        (["--user-dirs=mine", "data"], False),
        ([], False),
    ],
)
def test_an_option_is_found_with_an_equals_sign_too(flags, found):
    assert launch.given(flags, "--user-dir") is found


def test_the_devices_of_other_hosts_are_counted(monkeypatch):
    monkeypatch.setenv("CPU_NUM_DEVICES", "1")
    monkeypatch.setattr(device, "hosts", lambda which: 4)
    assert device.choose_mode(None, "CPU") == "spmd"
    with pytest.raises(UserError, match="--mode single would use one of 4 devices, on one of 4 hosts"):
        device.choose_mode("single", "CPU")


def test_translation_is_not_for_a_pod(monkeypatch, tmp_path):
    (tmp_path / "dict.en.txt").touch()
    cfg = configuration(str(tmp_path), *TRANSLATE, *BATCH)
    launch.check("finetune", cfg, "CPU", "spmd")
    monkeypatch.setattr(device, "hosts", lambda which: 4)
    with pytest.raises(UserError, match="--task translation counts tokens per host"):
        launch.check("finetune", cfg, "CPU", "spmd")


@pytest.mark.parametrize(("version", "devices", "mode"), [(3, 8, None), (4, 4, "spawn"), (4, 1, "single")])
def test_a_process_for_each_device_of_a_tpu(monkeypatch, version, devices, mode):
    monkeypatch.setattr(tpu, "num_available_devices", lambda: devices)
    monkeypatch.setattr(tpu, "num_tpu_workers", lambda: 1)
    monkeypatch.setattr(tpu, "version", lambda: version)
    if mode is None:
        with pytest.raises(UserError, match="a TPU v3 runs two threads in every process"):
            device.choose_mode("spawn", "TPU")
    else:
        assert device.choose_mode("spawn", "TPU") == mode


def test_another_torch_xla_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "2.8.1")
    with pytest.raises(UserError, match="torch_xla 2.8.1 is not 2.9"):
        device._check_versions()
