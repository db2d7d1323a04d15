"""Run the experiments of the paper at pocket scale, or by settings of yours; `make study` calls it.

What is done already is not done again: after Ctrl-C, a kill or a failed job, the same command does what is missing. At
the end everything measured so far is gathered as CSV, judged against the paper's claims, and drawn.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import agreement
import experiments
import gather
import jobs
import measurements
import study_report
from omegaconf import DictConfig

from train_large.errors import UserError
from train_large.files import alone
from train_large.machine import usable_cores
from train_large.processes import started

HERE = Path(__file__).resolve().parent


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on from here", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--experiment", default="", help="one or several, separated by commas; all unless given")
    parser.add_argument("--config", type=Path, help="a YAML file with what differs from study/pocket.yaml")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings, such as budget=60s")
    parser.add_argument("--jobs", type=int, default=usable_cores(), help="processes at a time, one thread each")
    parser.add_argument("--report-only", action="store_true", help="run nothing, only gather and draw what is there")
    parser.add_argument("--publish", type=Path, metavar="FOLDER", help="copy what is finished to FOLDER, with a report")
    parser.add_argument("--against", type=Path, metavar="RESULTS", help="say whether this is what RESULTS say too")
    parser.add_argument("snakemake", nargs="*", help="flags for Snakemake, behind --: -- --executor slurm")
    return parser


def run(options: argparse.Namespace) -> int:
    """The jobs, then the report; 1 if a job failed. Raises UserError for settings that cannot be."""
    if options.jobs < 1:
        raise UserError(f"--jobs {options.jobs} is too few: give 1 or more.")
    if options.against and not measurements.experiments(options.against):
        raise UserError(
            f"--against {options.against}: no measurements are there; give the results of a study, as "
            "docs/results/pocket."
        )
    settings = experiments.load(options.config, options.set)
    names = experiments.names(settings, options.experiment)
    plan = jobs.all_jobs(settings, names)
    for job in plan.values() if not options.report_only else ():  # before anything is run
        jobs.settings_of(settings, job.work)
    out = jobs.study_folder(settings)
    status = 0
    with alone(out, "study", "SET=out=FOLDER") as lock:  # Snakemake goes on where only this process is killed
        if not options.report_only:
            status = _run_jobs(settings, names, out, options, lock)
        missing = gather.gather(settings, names, out / "results")
        # What other experiments have measured with other settings is not to be in the report.
        others = [name for name in measurements.experiments(out / "results") if name not in names]
        for name in (name for name in others if name in settings.experiments):
            try:
                gather.gather(settings, [name], out / "results")
            except UserError:  # with these settings it cannot be
                shutil.rmtree(out / "results" / name)
    for name, paths in missing.items():
        print(f"{name}: {len(paths)} jobs are not done, such as {paths[0]}", file=sys.stderr)
    study_report.write(out / "results", out / "report")
    print(f"wrote {out / 'report' / 'index.html'} and the measurements below {out / 'results'}")
    if options.against:
        print(agreement.told(agreement.compare(options.against, out / "results")))
    if options.publish:
        publish(out / "results", [name for name in names if name not in missing], options.publish)
    return 1 if status else 0


def publish(results: Path, finished: Sequence[str], folder: Path) -> None:
    """Put these experiments' measurements below `folder`/pocket, in place of what is there of the same experiments, and
    a report of all that is there into `folder`/report. Raises UserError where there are none."""
    if not finished:
        raise UserError("no experiment is finished, so there is nothing to publish; `make study` does what is missing.")
    published = folder / "pocket"
    published.mkdir(parents=True, exist_ok=True)
    for name in finished:
        aside, place = published / f".{name}", published / name
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(results / name, aside)
        shutil.rmtree(place, ignore_errors=True)
        aside.rename(place)
    study_report.write(published, folder / "report")
    print(f"published {', '.join(finished)} in {folder}")


def _run_jobs(settings: DictConfig, names: Sequence[str], out: Path, options: argparse.Namespace, lock: int) -> int:
    jobs.save_settings(settings)
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(HERE / "Snakefile"), "--directory", str(out)]
    # The first is for this machine; an executor of a cluster asks for the second.
    command += ["--cores", str(options.jobs), "--jobs", str(options.jobs)]
    command += ["--keep-going", "--rerun-incomplete", "--nolock"]
    command += ["--rerun-triggers", "mtime", "params", "input", "--scheduler", "greedy", "--quiet", "host", "reason"]
    command += [
        *options.snakemake,
        "--config",
        f"settings={jobs.settings_file(settings)}",
        f"experiments={','.join(names)}",
    ]
    # A group of its own, which has all signals from here, and each once.
    with started(command, _interrupt, start_new_session=True, pass_fds=(lock,)) as (process, asked):
        status = process.wait()
    if asked:
        raise KeyboardInterrupt
    return status


def _interrupt(snakemake: int) -> None:
    """As Ctrl-C does: Snakemake starts nothing more and cancels what is on a cluster, and its jobs here save."""
    os.killpg(snakemake, signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
