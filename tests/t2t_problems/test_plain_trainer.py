"""Upstream's own `t2t-trainer` with the plugin, and the sizes that it knows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from programs import ROOT, environment, launch, make_data, read, trainer

from t2t_problems import tensorflow_two

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("enfr"))


def test_the_plain_trainer_lists_all_sets() -> None:
    plain = Path(sys.executable).with_name("t2t-trainer")
    done = subprocess.run(
        [str(plain), "--t2t_usr_dir=t2t_problems", "--registry_help"],
        env=environment(),
        cwd=str(ROOT),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    said = done.stdout.decode()
    assert done.returncode == 0, said[-2000:]
    sizes = [f"{layers}l_{hidden}h" for layers in (2, 6, 8) for hidden in (128, 256, 512, 1024, 2048)]
    words = set(said.split())
    assert {f"transformer_enfr_{size}{suffix}" for size in sizes for suffix in ("", "_tpu")} <= words
    assert {"transformer_budgeted", "translate_enfr_wmt14", "translate_enfr_pairs"} <= words


def test_an_environment_without_tensor2tensor_is_one_sentence() -> None:
    program = "import sys; sys.modules['tensorflow'] = None; sys.argv[1:] = ['eval']\n"
    program += "from t2t_problems.launch import main; main()"
    done = subprocess.run([sys.executable, "-c", program], cwd=str(ROOT), stderr=subprocess.PIPE)
    said = done.stderr.decode().strip()
    assert (done.returncode, said.count("\n")) == (2, 0)
    assert said.endswith("run it in the environment that `make env-t2t` makes.")


def test_the_plain_trainer_trains(data: Path, tmp_path: Path) -> None:
    plain = Path(sys.executable).with_name("t2t-trainer")
    arguments = trainer(data, tmp_path / "run", "budget_seconds=1000,bleu_sentences=0", "--schedule=train")[2:]
    done = subprocess.run(
        [str(plain), "--t2t_usr_dir=t2t_problems", *map(str, arguments), "--train_steps=4"],
        env=environment(),
        cwd=str(ROOT),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout.decode()[-3000:]
    assert read(tmp_path / "run", "stop")[0]["updates"] == 4
    # Its weights can be begun with, as is advised where a folder's time is not known.
    arguments = trainer(data, tmp_path / "warm", "budget_seconds=1000,bleu_sentences=0", "--schedule=train")
    said = launch(*arguments, "--train_steps=1", f"--warm_start_from={tmp_path / 'run'}")
    assert "Loading variable from checkpoint" in said


def test_a_tpu_set_trains_on_this_processor(data: Path, tmp_path: Path) -> None:
    # TPUEstimator is in TensorFlow 1 only; without a TPU it runs the same graph here.
    flags = [] if tensorflow_two.is_two() else ["--use_tpu_estimator"]
    arguments = trainer(data, tmp_path / "run", "budget_seconds=1000,bleu_sentences=0", "--schedule=train", *flags)
    arguments = [str(a).replace("_2l_128h", "_2l_128h_tpu") for a in arguments]
    launch(*arguments, "--train_steps=3", "--iterations_per_loop=2")
    assert read(tmp_path / "run", "stop")[0]["updates"] in (3, 4)


def test_an_unknown_size_is_told(data: Path, tmp_path: Path) -> None:
    arguments = trainer(data, tmp_path, "budget_seconds=5", "--schedule=train")
    arguments = [str(argument).replace("2l_128h", "7l_100h") for argument in arguments]
    said = launch(*arguments, status=2)
    assert "transformer_enfr_7l_100h is none of the sizes" in said
    assert "Traceback" not in said
