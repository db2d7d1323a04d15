"""Tensor2Tensor's programs with this plugin loaded, on TensorFlow 1 and 2.

    python -m t2t_problems.launch trainer|datagen|decoder|eval|bleu|avg_all|translate_all [FLAGS]

The flags are those of t2t-trainer and so on; --t2t_usr_dir is this plugin unless given.
"""

from __future__ import annotations

import os
import runpy
import sys

PROGRAMS = ("trainer", "datagen", "decoder", "eval", "bleu", "avg_all", "translate_all")
_USR_DIR = os.path.dirname(os.path.abspath(__file__))
_TAKE_A_USR_DIR = ("trainer", "datagen", "decoder", "eval", "translate_all")


def arguments(program: str, given: list) -> list:
    """What the program is called with: what was given, and what it needs besides."""
    names = {argument.lstrip("-").split("=")[0] for argument in given if argument.startswith("-")}
    added = []
    if program in _TAKE_A_USR_DIR and "t2t_usr_dir" not in names:
        added.append("--t2t_usr_dir=" + _USR_DIR)
    if program == "translate_all" and "decoder_command" not in names:
        # Its own, t2t-decoder, is the one of the environment that happens to be active, if any.
        added.append(f"--decoder_command={sys.executable} -m t2t_problems.launch decoder {{params}}")
    if "use_tpu_estimator" in names and not names & {"use_tpu", "master", "cloud_tpu_name"}:
        # TPUEstimator without a TPU; upstream would look for one named after the user (bin/t2t_trainer.py:110, 1.15.7).
        added.append("--cloud_tpu_name=")
    return added + list(given)


def main() -> None:
    """Run the program named first on the command line, in this process."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__.strip())
        sys.exit(0 if len(sys.argv) > 1 else 2)
    if sys.argv[1] not in PROGRAMS:
        print("error: {!r} is none of {}".format(sys.argv[1], ", ".join(PROGRAMS)), file=sys.stderr)
        sys.exit(2)
    program, given = sys.argv[1], sys.argv[2:]
    try:
        from t2t_problems import tensorflow_two
    except ImportError as error:
        print(f"error: {error}; run it in the environment that `make env-t2t` makes.", file=sys.stderr)
        sys.exit(2)
    tensorflow_two.behave_as_one()
    module = "tensor2tensor.bin.t2t_" + program
    sys.argv = [module.rpartition(".")[2]] + arguments(program, given)
    # The programs import the plugin themselves, by the name that this package has; let it be imported anew.
    del sys.modules["t2t_problems"]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
