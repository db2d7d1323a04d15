"""The documentation's commands of Tensor2Tensor: each program takes its flags, and knows the names they give."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHELL = re.compile(r"^```sh[^\n]*\n(.*?)^```$", re.M | re.S)
MODULE = re.compile(r"python -m (t2t_problems\.\w+) ")

# In a process of its own, since flags are defined once in a process. It does what the program does before it starts.
TAKES = """
import importlib, sys
from t2t_problems import launch, tensorflow_two
tensorflow_two.behave_as_one()
program, given = sys.argv[1], sys.argv[2:]
importlib.import_module("tensor2tensor.bin.t2t_" + program)
from absl import flags
FLAGS = flags.FLAGS
rest = FLAGS([program] + launch.arguments(program, given))[1:]
assert not rest, rest
from tensor2tensor.utils import decoding, registry, usr_dir
del sys.modules["t2t_problems"]  # as launch does
usr_dir.import_usr_dir(FLAGS.t2t_usr_dir)
registry.problem(FLAGS.problem)
if program != "datagen":
    registry.model(FLAGS.model)
    registry.hparams(FLAGS.hparams_set).parse(FLAGS.hparams)
    decoding.decode_hparams(FLAGS.decode_hparams)
"""


def commands():
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for block in SHELL.findall(page.read_text(encoding="utf-8")):
            found += [line for line in block.replace("\\\n", " ").splitlines() if MODULE.match(line)]
    return found


def run(*words):
    done = subprocess.run(
        [sys.executable, *words],
        cwd=str(ROOT),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr[-2000:]


def test_the_pages_have_such_commands():
    assert {MODULE.match(command).group(1) for command in commands()} == {"t2t_problems.launch", "t2t_problems.bleu"}


@pytest.mark.parametrize("command", commands())
def test_its_program_takes_its_flags(command):
    _, _, module, *flags = shlex.split(command, comments=True)
    if module == "t2t_problems.bleu":
        from t2t_problems import bleu

        bleu._parser().parse_args(flags)
    else:
        code, error = run("-c", TAKES, *flags)
        assert code == 0, error


@pytest.mark.parametrize("wrong", ["no_such_flag=1", "hparams_set=transformer_enfr_6l_513h", "hparams=budget_hours=1"])
def test_what_no_program_takes_is_noticed(wrong):
    flags = ["trainer", "--problem=translate_enfr_wmt14", "--model=transformer_budgeted"]
    code, error = run("-c", TAKES, *flags, "--hparams_set=transformer_enfr_6l_512h", "--" + wrong)
    assert code != 0
    assert wrong.split("=")[-2] in error or wrong.split("=")[-1] in error
