"""`train-large SUBCOMMAND`: the one module of argument parsing. What it does lies in the modules it imports."""

from __future__ import annotations

import argparse
import codecs
import io
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from train_large import __version__, runlog
from train_large.errors import UserError
from train_large.files import keep_apart
from train_large.machine import usable_cores
from train_large.processes import ended_by_signals
from train_large.sizes import HEAD_WIDTH

if TYPE_CHECKING:
    from train_large.compression.conversion import Method

PAPER_BATCH = 8192
ROBERTA_VOCABULARY = 50_265


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand. Returns the exit status: 0, or 2 with one sentence on standard error; 1 is doctor's, for what
    could not be told."""
    program = "train-large"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal of another encoding cannot show
    try:
        words, passed_on = _split_at_dashes(list(sys.argv[1:] if arguments is None else arguments))
        parser = _parser()
        options, unknown = parser.parse_known_args(words)
        if unknown:  # argparse would show the usage of train-large, which has none of the subcommand's flags
            options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        program += f" {options.command}"
        if passed_on and options.command not in ("time-steps", "plan"):
            parser.error("only time-steps and plan pass flags on to fairseq-train, behind --")
        options.extra = passed_on
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        with ended_by_signals():  # what is half written goes
            status: int | None = options.run(options)
        sys.stdout.flush()
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "train_large":
            raise
        way_out = "run make env in a checkout, or install this package with its extras, '.[fairseq,pack,hf,report]'"
        print(f"{program}: error: it needs {error.name}: {way_out}.", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `train-large ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is not None:
            print(f"{program}: error: {error.filename}: {error.strerror}", file=sys.stderr)
            return 2
        print(f"{program}: error: what it prints: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the rest has nowhere to go
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    return status or 0


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def _split_at_dashes(words: list[str]) -> tuple[list[str], list[str]]:
    """What stands before `--`, and what stands behind it."""
    where = words.index("--") if "--" in words else len(words)
    return words[:where], words[where + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train-large", description="Train large, then compress.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"train-large {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="SUBCOMMAND", required=True)

    def command(name, run, help):
        sub = commands.add_parser(
            name,
            help=help,
            description=help,
            allow_abbrev=False,
            formatter_class=_Formatter,
        )
        sub.set_defaults(run=run, parser=sub)
        return sub

    sub = command("sizes", _sizes, "print the sizes: parameters, FLOPs per update and learning rate")
    sub.add_argument("sizes", nargs="*", metavar="SIZE", help="such as 12l_768h; the paper's 25 if none is given")
    sub.add_argument("--vocabulary", type=int, default=ROBERTA_VOCABULARY, help="entries of the dictionary")
    sub.add_argument("--length", type=int, default=128, help="tokens per sequence")
    sub.add_argument("--batch", type=int, default=PAPER_BATCH, help="sequences per update")

    sub = command("prepare-text", _prepare_text, "turn plain text into fairseq's data for pretraining")
    sub.add_argument("inputs", nargs="+", type=Path, metavar="FILE", help="UTF-8 text")
    sub.add_argument("--out", type=Path, required=True, help="folder to make")
    sub.add_argument("--valid", type=Path, help="validation text; otherwise documents are held out")
    sub.add_argument("--documents", default="auto", help="how documents are told apart: auto, line, blank or wikitext")
    sub.add_argument("--encoder-json", type=Path, help="GPT-2's encoder.json; a BPE is trained if it is not given")
    sub.add_argument("--vocab-bpe", type=Path, help="GPT-2's vocab.bpe")
    sub.add_argument("--vocabulary-size", type=int, default=8192, help="entries of the BPE to train")
    sub.add_argument("--valid-fraction", type=float, default=0.005, help="share of the documents to hold out")
    sub.add_argument(
        "--subsets", default="0.05,0.01", help="shares of the rest to make data of too (paper, section 5.1)"
    )
    sub.add_argument("--seed", type=int, default=1, help="of the choice of what is held out")
    sub.add_argument("--workers", type=int, default=usable_cores(), help="processes at a time")

    sub = command(
        "prepare-task", _prepare_task, "turn GLUE's TSV files, or your own, into fairseq's data for finetuning"
    )
    sub.add_argument("source", type=Path, help="GLUE's folder of the task, or a TSV file")
    sub.add_argument("--task", required=True, choices=("sst-2", "mnli", "tsv"))
    sub.add_argument(
        "--text", type=Path, required=True, help="folder made by prepare-text: its BPE and dictionary are used"
    )
    sub.add_argument("--out", type=Path, required=True, help="folder to make")
    sub.add_argument("--valid", type=Path, help="validation TSV, for --task tsv; otherwise rows are held out")
    sub.add_argument("--valid-fraction", type=float, default=0.1, help="share of the rows to hold out, for --task tsv")
    sub.add_argument("--seed", type=int, default=1, help="of the choice of what is held out")
    sub.add_argument("--workers", type=int, default=usable_cores(), help="processes at a time")

    sub = command("time-steps", _time_steps, "measure the seconds per update of each size (paper, section 2.2)")
    sub.add_argument("data", type=Path, help="fairseq's data for pretraining (a data-bin)")
    sub.add_argument("sizes", nargs="+", metavar="SIZE", help="such as 12l_768h")
    sub.add_argument("--out", type=Path, required=True, help="the table, a CSV file; sizes are added to it")
    sub.add_argument("--batch", type=int, required=True, help="sequences per update, reached by accumulation")
    sub.add_argument("--length", type=int, default=128, help="tokens per sequence")
    sub.add_argument(
        "--memory-limit", help="such as 16GB; otherwise 80 percent of what is free now, or what the GPU has"
    )
    sub.add_argument("--updates", type=int, default=100, help="updates to take the mean of, once they have settled")
    sub.add_argument("--user-dir", type=Path, default=Path("fairseq_plugins"), help="this project's plugin")
    sub.add_argument("--force", action="store_true", help="time again what the table has already")
    sub.add_argument("--max-micro-batch", type=int, help="try no more sequences at a time than these")
    sub.add_argument(
        "--device",
        choices=("torch", "xla"),
        default="torch",
        help="torch: fairseq-train, on a GPU or, with -- --cpu, the CPU; xla: python -m xla.pretrain, on a TPU",
    )
    sub.epilog = "Flags behind -- are passed on to fairseq-train: train-large time-steps ... -- --fp16"

    sub = command(
        "quantize", _quantize, "quantize a fairseq checkpoint so that stock fairseq loads it (paper, section 4.2)"
    )
    sub.add_argument("source", type=Path, metavar="IN")
    sub.add_argument("target", type=Path, metavar="OUT")
    _method_flags(sub)

    sub = command("pack", _pack, "pack a fairseq checkpoint into a file as small as its information")
    sub.add_argument("source", type=Path, metavar="IN")
    sub.add_argument("target", type=Path, metavar="OUT.safetensors")
    _method_flags(sub)
    sub.add_argument("--data", type=Path, help="fairseq's data, for its dictionary; otherwise where it was trained")
    sub.add_argument("--bpe", type=Path, help="folder of encoder.json and vocab.bpe; otherwise looked for by the data")

    sub = command("unpack", _unpack, "make of a packed file the checkpoint that quantize gives")
    sub.add_argument("source", type=Path, metavar="IN.safetensors")
    sub.add_argument("target", type=Path, metavar="OUT")

    sub = command("inspect", _inspect, "what a packed file holds: counts, bits, bytes, and how near to their entropy")
    sub.add_argument("file", type=Path, metavar="FILE")
    sub.add_argument("--against", type=Path, metavar="CHECKPOINT", help="what it was made of, for the weights' errors")
    sub.add_argument("--csv", type=Path, help="CSV file to write, a row for each tensor")

    sub = command("predict", _predict, "labels, or words for <mask>, for the sentences on standard input")
    sub.add_argument("file", type=Path, metavar="FILE.safetensors", help="a packed file; pairs have a tab between them")
    sub.add_argument(
        "--activations",
        choices=("auto", "int8", "int16", "int24", "bfloat16", "float32"),
        default="auto",
        help="auto takes the fastest that this processor has; close calls are decided again in finer numbers",
    )
    sub.add_argument("--batch", type=int, default=32, help="sentences at a time")
    sub.add_argument("--top", type=int, default=1, help="labels or words for each sentence")
    sub.add_argument("--head", help="classification head, where there are several")

    sub = command("shrink", _shrink, "remove the heads and FFN rows that structured pruning has set to zero")
    sub.add_argument("source", type=Path, metavar="IN")
    sub.add_argument("target", type=Path, metavar="OUT")

    sub = command("export-hf", _export_hf, "write a Hugging Face folder: config, safetensors, tokenizer, model card")
    sub.add_argument("source", type=Path, metavar="IN", help="a checkpoint or a packed file")
    sub.add_argument("target", type=Path, metavar="FOLDER")
    sub.add_argument("--dictionary", type=Path, help="dict.txt, or the data that has it; otherwise as the model knows")
    sub.add_argument("--bpe", type=Path, help="folder of encoder.json and vocab.bpe")
    sub.add_argument("--labels", help="names of the classes in order, such as negative,positive")
    sub.add_argument("--head", help="classification head, where there are several")
    sub.add_argument("--score", action="append", default=[], metavar="NAME=VALUE", help="measured, for the model card")
    sub.add_argument("--onnx", action="store_true", help="write model.onnx too, checked in onnxruntime")

    sub = command("report", _report, "the tables, and the page with the figures, of a results.json or of run logs")
    sub.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a results.json; or folders of runs, by fairseq (--save-dir) or Tensor2Tensor (--output_dir)",
    )
    sub.add_argument("--page", type=Path, help="HTML file to write")
    sub.add_argument(
        "--csv", type=Path, help="CSV file to write, a row for each size, sparsity and bit width, or each validation"
    )
    sub.add_argument("--weight-error-csv", type=Path, help="CSV file to write, a row for each size, module and method")
    sub.add_argument("--memory-limit", help="the memory at inference, such as 2MB: says what to ship")

    sub = command("plan", _plan, "what to train for a budget and a limit of bytes, by the run logs of short pilot runs")
    sub.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders (--save-dir) or logs of budgeted runs")
    sub.add_argument("--budget", help="time to train, such as 8h, on the clock of the pilots' logs")
    sub.add_argument("--memory-limit", help="the memory at inference, such as 2MB: says how to compress")
    sub.add_argument("--sizes", default="", help="sizes to consider, such as 2l_64h,4l_128h; with --pilot, to run")
    sub.add_argument(
        "--study",
        type=Path,
        help="a finished demo or study of the same data (its folder, results.json or accuracies.csv), for what "
        "compression costs there",
    )
    sub.add_argument("--max-positions", type=int, help="of the model to train; otherwise the pilots' sequence length")
    sub.add_argument(
        "--pilot", help="run pilots of --sizes first, for so long each, such as 5m; needs --data and --out"
    )
    sub.add_argument(
        "--head-width", type=int, help=f"dimensions of the pilots' attention heads (default: {HEAD_WIDTH})"
    )
    sub.add_argument("--data", type=Path, help="fairseq's data for the pilots (a data-bin)")
    sub.add_argument("--out", type=Path, help="folder for the pilots; those that are done there are not run again")
    sub.add_argument("--user-dir", type=Path, help="this project's plugin, for the pilots (default: fairseq_plugins)")
    sub.add_argument("--hold-out", choices=("size", "time"), help="also fit on a part of the logs and predict the rest")
    sub.add_argument("--json", action="store_true", help="print the plan, or the hold-out, as JSON")
    sub.add_argument("--figure", type=Path, help="picture to write (.png, .svg, .pdf): predictions and pilots' points")
    sub.epilog = "Flags behind -- are for the pilots: train-large plan --pilot 5m ... -- --lr 1e-3 --batch-size 32"

    sub = command("doctor", _doctor, "which speed features work on this machine, and why the others do not")
    sub.add_argument("--json", action="store_true", help="print a list of what, active, why, off_by instead of a table")
    sub.add_argument("--user-dir", type=Path, help="this project's plugin, if it is not found beside this package")
    return parser


def _method_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--bits", help="4, 6 or 8 (any from 2 to 8), or 32")
    sub.add_argument("--granularity", default="tensor", help="one range per tensor, row or group:N")
    sub.add_argument(
        "--range",
        choices=("minmax", "mse"),
        default="minmax",
        help="from the smallest to the largest weight, or clipped",
    )
    sub.add_argument(
        "--target-error", type=float, metavar="E", help="instead of --bits: |w - w'| / |w|, in the fewest bytes"
    )
    sub.add_argument(
        "--target-bytes", metavar="SIZE", help="instead of --bits: the packed file's size, such as 2MB; of pack only"
    )
    sub.add_argument(
        "--trellis",
        action="store_true",
        help="with a target: weights rounded together, some per cent smaller and slower",
    )


def _sizes(options: argparse.Namespace) -> None:
    from train_large.sizes import ROBERTA, Size, size_rows

    sizes = [Size.parse(name) for name in options.sizes] or list(ROBERTA)
    rows = list(size_rows(sizes, options.vocabulary, options.length, options.batch))
    print("size        parameters  without embeddings  FLOPs per update  learning rate")
    for row in rows:
        print(
            f"{row.name:<10}{row.parameters / 1e6:>11.1f}M{row.parameters_without_embeddings / 1e6:>19.1f}M"
            f"{row.flops_per_update:>18.3g}{row.learning_rate:>15.3g}"
        )
    print(
        f"\n{options.vocabulary:,} entries; an update is {options.batch:,} sequences of {options.length} tokens; "
        "FLOPs by Clark et al."
    )


def _prepare_text(options: argparse.Namespace) -> None:
    from train_large.data.text import prepare_text

    summary = prepare_text(
        options.inputs,
        options.out,
        valid=options.valid,
        documents=options.documents,
        encoder_json=options.encoder_json,
        vocab_bpe=options.vocab_bpe,
        vocabulary_size=options.vocabulary_size,
        valid_fraction=options.valid_fraction,
        subsets=_fractions(options.subsets, "--subsets"),
        seed=options.seed,
        workers=options.workers,
    )
    print(
        f"{options.out}: a BPE of {summary.bpe_entries:,} entries ({summary.bpe}), "
        f"a dictionary of {summary.dictionary_entries:,}"
    )
    for name, split in summary.splits.items():
        print(f"  {name}: {split.documents:,} documents, {split.tokens:,} tokens")


def _prepare_task(options: argparse.Namespace) -> None:
    from train_large.data.glue import prepare_task

    summary = prepare_task(
        options.task,
        options.source,
        options.out,
        text=options.text,
        valid=options.valid,
        valid_fraction=options.valid_fraction,
        seed=options.seed,
        workers=options.workers,
    )
    sentences = "sentences" if summary.inputs == 1 else "pairs of sentences"
    print(f"{options.out}: {sentences} of {len(summary.labels)} classes")
    for name, counts in summary.splits.items():
        shares = ", ".join(f"{label} {counts[label]:,}" for label in summary.labels)
        print(f"  {name}: {sum(counts.values()):,} rows ({shares})")
    if summary.left_out:
        print(f"  left out: {summary.left_out:,} rows without a class")


def _time_steps(options: argparse.Namespace) -> None:
    from train_large.report.units import parse_bytes
    from train_large.sizes import Size
    from train_large.step_times import time_steps

    time_steps(
        options.data,
        [Size.parse(name) for name in options.sizes],
        options.out,
        batch=options.batch,
        length=options.length,
        memory_limit=parse_bytes(options.memory_limit) if options.memory_limit else None,
        updates=options.updates,
        extra=options.extra,
        max_micro_batch=options.max_micro_batch,
        user_dir=options.user_dir,
        force=options.force,
        device=options.device,
    )


def _method(options: argparse.Namespace) -> Method:
    from train_large.compression.conversion import Method
    from train_large.compression.levels import parse_bits
    from train_large.report.units import parse_bytes

    return Method(
        bits=parse_bits(options.bits) if options.bits is not None else None,
        granularity=options.granularity,
        clip=options.range == "mse",
        target_error=options.target_error,
        target_bytes=parse_bytes(options.target_bytes) if options.target_bytes else None,
        trellis=options.trellis,
    )


def _quantize(options: argparse.Namespace) -> None:
    from train_large.compression.conversion import quantize_checkpoint

    summary = quantize_checkpoint(options.source, options.target, _method(options))
    cost = f", {summary.bytes:,} bytes to store at {options.bits} bits" if options.bits else ""
    paper = f" ({summary.bytes_paper:,} by the paper's accounting)" if options.bits else ""
    print(f"{options.target}: {summary.parameters:,} parameters, {summary.nonzero:,} not zero{cost}{paper}")


def _pack(options: argparse.Namespace) -> None:
    from train_large.compression.conversion import files_of, pack_checkpoint
    from train_large.compression.inspection import inspect

    keep_apart([options.source], out=options.target)
    method = _method(options)
    files = files_of(options.source, options.data, options.bpe)
    pack_checkpoint(options.source, options.target, method, files)
    found = inspect(options.target)
    print(
        f"{options.target}: {found.bytes_whole:,} bytes for {found.total.parameters:,} parameters, "
        f"{found.total.nonzero:,} not zero; weights {found.total.bytes_file:,} (entropy "
        f"{found.total.bytes_bound:,.0f}), {', '.join(['configuration', *files])} {found.bytes_beside:,}"
    )
    missing = [
        what
        for name, what in (("dict.txt", "dictionary (--data)"), ("encoder.json", "BPE (--bpe)"))
        if name not in files
    ]
    if missing:
        print(f"without a {' and a '.join(missing)} it cannot predict from text", file=sys.stderr)


def _unpack(options: argparse.Namespace) -> None:
    from train_large.compression.conversion import unpack_checkpoint

    keep_apart([options.source], out=options.target)
    summary = unpack_checkpoint(options.source, options.target)
    print(f"{options.target}: {summary.parameters:,} parameters, {summary.nonzero:,} not zero")


def _inspect(options: argparse.Namespace) -> None:
    from train_large.compression.checkpoint import read_checkpoint
    from train_large.compression.inspection import inspect, print_inspection, write_csv

    keep_apart([options.file, *filter(None, [options.against])], csv=options.csv)
    original = read_checkpoint(options.against)["model"] if options.against else None
    found = inspect(options.file, original)
    print_inspection(found)
    if options.csv:
        write_csv(found, options.csv)
        print(f"wrote {options.csv}")


def _predict(options: argparse.Namespace) -> None:
    from train_large.compression.runtime import predict_lines

    if sys.stdin is None:
        raise UserError("standard input is closed: give the sentences there.")
    found = predict_lines(options.file, _sentences(), options.activations, options.batch, options.top, options.head)
    for line in found:
        print(line, flush=True)


def _sentences() -> Iterator[str]:
    """The lines of standard input. A byte order mark is no text here either (read_lines, train_large/data)."""
    number = 0
    try:
        for number, line in enumerate(sys.stdin.buffer, start=1):
            yield (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"line {number}: standard input is not UTF-8 text ({error}): convert it first.") from None
    except OSError as error:
        raise UserError(f"standard input cannot be read ({error.strerror}): give the sentences there.") from None


def _shrink(options: argparse.Namespace) -> None:
    from train_large.compression.shrink import describe, shrink_checkpoint

    print(describe(shrink_checkpoint(options.source, options.target)))


def _export_hf(options: argparse.Namespace) -> None:
    from train_large.export.huggingface import export_hf

    scores = {}
    for text in options.score:
        name, _, value = text.partition("=")
        try:
            scores[name] = float(value)
            if not name or not math.isfinite(scores[name]):
                raise ValueError
        except ValueError:
            raise UserError(f"--score {text!r}: give a name and a number, such as accuracy=0.69.") from None
    export = export_hf(
        options.source,
        options.target,
        dictionary=options.dictionary,
        bpe=options.bpe,
        labels=options.labels.split(",") if options.labels is not None else None,
        head=options.head,
        scores=scores,
        onnx=options.onnx,
    )
    print(f"{options.target}: {export.architecture}, {sum(export.files.values()):,} bytes in {len(export.files)} files")


def _report(options: argparse.Namespace) -> None:
    from train_large.report.page import write_page
    from train_large.report.results import Results
    from train_large.report.runs import load_study
    from train_large.report.spreadsheet import write_csv, write_weight_errors
    from train_large.report.tables import print_report
    from train_large.report.units import parse_bytes

    read = [path / runlog.NAME if path.is_dir() else path for path in options.runs]
    keep_apart(read, page=options.page, csv=options.csv, weight_error_csv=options.weight_error_csv)
    limit = parse_bytes(options.memory_limit) if options.memory_limit else None
    study = load_study(options.runs)
    if not isinstance(study, Results):
        for flag, given in (("--memory-limit", limit), ("--weight-error-csv", options.weight_error_csv)):
            if given:
                raise UserError(f"{flag}: nothing was compressed in {options.runs[0]}; leave the flag out.")
    print_report(study, memory_limit=limit)
    if options.page:
        write_page(study, options.page, limit)
        print(f"wrote {options.page}")
    if options.csv:
        write_csv(study, options.csv)
        print(f"wrote {options.csv}")
    if options.weight_error_csv and isinstance(study, Results):
        write_weight_errors(study, options.weight_error_csv)
        print(f"wrote {options.weight_error_csv}")


def _plan(options: argparse.Namespace) -> None:
    from train_large import hold_out, pilots, planner, studies
    from train_large.budget import parse_duration
    from train_large.report import plans
    from train_large.report.units import format_seconds, parse_bytes
    from train_large.sizes import Size

    if options.head_width is not None and options.head_width < 1:
        raise UserError(f"--head-width {options.head_width}: give the dimensions of a head, 1 at least.")
    # Of sizes without a pilot the planner makes the heads as wide as the nearest pilot's: here any width will do.
    width = (options.head_width or HEAD_WIDTH) if options.pilot else 1
    sizes = [Size.parse(name.strip(), width) for name in options.sizes.split(",") if name.strip()]
    if options.figure:
        plans.check_picture(options.figure)
    seconds = parse_duration(options.budget, "--budget") if options.budget else None
    limit = parse_bytes(options.memory_limit) if options.memory_limit else None
    study = studies.read(options.study) if options.study else None
    if seconds is None and (options.hold_out is None or options.figure or limit):
        raise UserError("--budget: give the time there is to train, such as --budget 8h.")
    of_plan = {"--sizes": sizes and not options.pilot, "--study": study, "--max-positions": options.max_positions}
    unused = [flag for flag, given in of_plan.items() if given]
    if seconds is None and unused:
        raise UserError(f"{', '.join(unused)}: of use for a plan only; add --budget, or leave it out.")
    runs = list(options.runs)
    if options.pilot:
        if options.data is None or options.out is None or not sizes:
            raise UserError("--pilot needs --data, --out and --sizes: what to train on, where, and which sizes.")
        user_dir = options.user_dir or Path("fairseq_plugins")
        first = parse_duration(options.pilot, "--pilot") / pilots.VALIDATIONS
        if seconds is not None and seconds < first:
            raise UserError(
                f"a budget of {format_seconds(seconds)} is below the pilots' first validation, at about "
                f"{format_seconds(first)}: give more, or shorter pilots."
            )
        recipe = pilots.Recipe(options.data, options.pilot, tuple(options.extra), user_dir)
        runs += pilots.run_pilots(recipe, sizes, options.out, say=lambda line: print(line, file=sys.stderr))
    elif options.extra or options.data or options.out or options.head_width or options.user_dir:
        raise UserError(
            "--data, --out, --head-width, --user-dir and flags behind -- are for pilots: add --pilot and how long each "
            "may take."
        )
    found: list[planner.Plan | hold_out.HoldOut] = []
    if options.hold_out:
        found.append(hold_out.hold_out(runs, options.hold_out))
    if seconds is not None:
        found.append(planner.plan(runs, seconds, limit, candidates=sizes, study=study, positions=options.max_positions))
    print(plans.as_json(*found) if options.json else "\n".join(map(plans.told, found)))
    if options.figure and seconds is not None:
        plans.draw(runs, seconds, options.figure, sizes)
        print(f"wrote {options.figure}", file=sys.stderr)


def _doctor(options: argparse.Namespace) -> int:
    from train_large import doctor

    rows = doctor.examine(options.user_dir)
    print(doctor.as_json(rows) if options.json else doctor.as_table(rows))
    return doctor.status(rows)


def _fractions(text: str, flag: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UserError(f"{flag} {text!r}: give shares separated by commas, such as 0.05,0.01, or nothing.") from None


if __name__ == "__main__":
    sys.exit(main())
