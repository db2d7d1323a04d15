"""What `python -m xla.pretrain` and `python -m xla.finetune` have in common: check, patch, and call fairseq-train."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from train_large.errors import UserError
from xla import device

PLUGIN = Path(__file__).resolve().parent.parent / "fairseq_plugins"

TASKS = {
    "pretrain": ("masked_lm",),
    "finetune": (
        "sentence_prediction",
        "pruning_sentence_prediction",
        "pruning_masked_lm",
        "translation",
        "pruning_translation",
    ),
}


def main(kind: str, arguments: list[str] | None = None) -> None:
    """`kind` is pretrain or finetune. Ends the process with one sentence where something cannot be right."""
    options, flags = _parse(kind, sys.argv[1:] if arguments is None else arguments)
    import fairseq_cli.train  # noqa: F401  (sets up the log, if nothing else has: torch-xla does when it is imported)

    try:
        which = device.choose_device()
        mode = device.choose_mode(options.mode, which)
        _check_projected_positions(options.projected_positions)
        _launch(kind, flags, which, mode, options)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


def _parse(kind: str, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog=f"python -m xla.{kind}",
        usage="%(prog)s DATA [--mode MODE] [--projected-positions N] [--checkpoint-activations] [fairseq-train flags]",
        description=f"fairseq-train on torch-xla, for --task {', '.join(TASKS[kind])}.",
        epilog="All other flags are fairseq-train's: see `fairseq-train --help` and docs/tpu.md.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--mode",
        choices=device.MODES,
        help="one device; all devices as one (SPMD); or a process for each. Default: spmd where there are several",
    )
    parser.add_argument(
        "--projected-positions",
        default="auto",
        metavar="N",
        help="positions of each sequence that the masked LM head projects: auto (as many as can be masked), all, or a "
        "number; the loss is the same",
    )
    parser.add_argument(
        "--checkpoint-activations",
        action="store_true",
        help="keep only the input of each layer and compute the rest again in the backward pass: saves memory",
    )
    own, flags = parser.parse_known_args(arguments)
    if not flags:
        parser.error("give DATA, a folder that fairseq-preprocess has made, and fairseq-train's flags")
    return own, flags


def _check_projected_positions(text: str) -> None:
    if text not in ("auto", "all") and not (text.isdigit() and int(text) > 0):
        raise UserError(f"--projected-positions {text}: give auto, all, or a number of at least 1.")


def _launch(kind: str, flags: list[str], which: str, mode: str, options: argparse.Namespace) -> None:
    from fairseq_cli import train

    from xla import spawn, spmd
    from xla.patches import Options, apply

    # fairseq's parser has tracebacks for these.
    for flag in ("--fp16", "--memory-efficient-fp16"):
        if flag in flags:
            raise UserError(f"{flag} is not for XLA devices: give --bf16 in its place.")
    if not given(flags, "--arch", "-a"):
        raise UserError("give --arch, such as prenorm_roberta_12l_768h.")
    own = Options(mode, options.projected_positions, options.checkpoint_activations)
    apply(own)
    if not given(flags, "--user-dir"):
        flags = [*flags, "--user-dir", str(PLUGIN)]
    if not given(flags, "--distributed-world-size"):  # else fairseq counts GPUs
        workers = device.local_devices(which) * device.hosts(which) if mode == "spawn" else 1
        flags = [*flags, "--distributed-world-size", str(workers)]
    sys.argv = [f"xla.{kind}", *flags, "--tpu"]

    def before_training(cfg: Any) -> None:
        check(kind, cfg, which, mode)
        if mode == "spmd":
            spmd.start()
            spmd.take_rank(cfg)

    spawn.listen(own, before_training)
    train.cli_main()


def given(flags: list[str], *names: str) -> bool:
    """Whether one of the options `names` is among `flags`, as two words or, with an equals sign, as one."""
    return any(flag.partition("=")[0] in names for flag in flags)


def check(kind: str, cfg: Any, which: str, mode: str) -> None:
    """Refuse what cannot work, before anything is compiled. Raises UserError, which names the flag."""
    task = cfg.task._name
    if task not in TASKS[kind]:
        other = next((name for name, tasks in TASKS.items() if task in tasks), None)
        way_out = f"take python -m xla.{other}" if other else f"give one of {', '.join(TASKS[kind])}"
        raise UserError(f"--task {task} is not for xla.{kind}: {way_out}.")
    if cfg.common.cpu or cfg.common.fp16 or cfg.common.amp:
        flag = "--cpu" if cfg.common.cpu else "--fp16" if cfg.common.fp16 else "--amp"
        way_out = "set PJRT_DEVICE=CPU" if flag == "--cpu" else "give --bf16"
        raise UserError(f"{flag} is not for XLA devices: {way_out} in its place.")
    data = cfg.dataset
    for flag, value in (("--max-tokens", data.max_tokens), ("--max-tokens-valid", data.max_tokens_valid)):
        if value is not None:
            instead = flag.replace("max-tokens", "batch-size")
            raise UserError(f"{flag} makes batches of many shapes, each of which XLA compiles: give {instead} instead.")
    devices = device.local_devices(which) if mode == "spmd" else 1
    for flag, rows in (("--batch-size", data.batch_size), ("--batch-size-valid", data.batch_size_valid)):
        if rows is None:
            raise UserError(f"give {flag}, the sequences of one batch" + " of a host" * (device.hosts(which) > 1) + ".")
        if rows % devices:
            raise UserError(
                f"{flag} {rows} does not divide by the {devices} devices: give {rows // devices * devices + devices}."
            )
    workers = device.local_devices(which) * device.hosts(which) if mode == "spawn" else 1
    if cfg.distributed_training.distributed_world_size != workers:
        given = cfg.distributed_training.distributed_world_size
        raise UserError(f"--distributed-world-size {given}: --mode says how the devices are used: leave it out.")
    if getattr(cfg.task, "required_seq_len_multiple", 1) != 1:
        raise UserError("--required-seq-len-multiple is of no use where all batches are padded alike: leave it out.")
    if task.endswith("translation") and cfg.task.eval_bleu:
        raise UserError("--eval-bleu generates sentences of any length, each of which XLA compiles: leave it out.")
    if task.endswith("translation") and device.hosts(which) > 1:
        raise UserError(f"--task {task} counts tokens per host, so a pod would weigh them wrongly: take one host.")
    if device.hosts(which) > 1 and _is_a_table(getattr(cfg.criterion, "seconds_per_update", None)):
        raise UserError(
            f"--seconds-per-update {cfg.criterion.seconds_per_update}: a table holds the times of one host, and this "
            f"pod has {device.hosts(which)}: give a number, the seconds of one update on all of them."
        )
    if task.endswith("translation") and cfg.optimization.sentence_avg:
        raise UserError("--sentence-avg would count the rows that only fill up a batch: leave it out.")
    criterion = cfg.criterion
    if getattr(criterion, "report_accuracy", False):
        raise UserError("--report-accuracy takes all predictions off the device: leave it out.")
    for name in ("report_mcc", "report_acc_and_f1", "report_pearson_and_spearman"):
        if getattr(criterion, name, False):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} takes all predictions off the device: leave it out, and score the checkpoint.")
    _check_data(task, cfg.task)


def _is_a_table(seconds_per_update: str | None) -> bool:
    """Whether it is not a number, as `BudgetedRun` sees it."""
    if seconds_per_update is None:
        return False
    try:
        float(seconds_per_update)
    except ValueError:
        return True
    return False


def _check_data(task: str, section: Any) -> None:
    """fairseq meets a missing dictionary with a traceback. The first of several folders has it."""
    from fairseq.utils import split_paths

    folder = split_paths(section.data)[0]
    if task.endswith("sentence_prediction"):
        name = "input0/dict.txt"
    elif task.endswith("translation"):
        name = f"dict.{section.source_lang or '*'}.txt"
    else:
        name = "dict.txt"
    if "://" not in folder and not any(Path(folder).glob(name)):
        raise UserError(f"{folder}: no {name} is there; give a folder that fairseq-preprocess has made.")
