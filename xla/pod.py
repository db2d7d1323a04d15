"""`python -m xla.pod NAME --zone ZONE pretrain DATA ...`: the same training on every host of a TPU VM, by gcloud.

First every host is asked what it has (`xla.host`): versions, source, data and save directory must agree. Then each
runs training under a gcloud of its own, so that the status and the output of each are known.
"""

from __future__ import annotations

import argparse
import json
import queue
import shlex
import shutil
import signal
import sys
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_large.errors import UserError
from xla.agreement import disagreements, names
from xla.jobs import Job, run_together, wait

KINDS = ("pretrain", "finetune")

# Seconds. To save: what a budgeted run may take from SIGTERM to its end, with a large model's checkpoint. To end: what
# a host may take without saving (`xla.host` waits 20 s), over a slow connection.
TO_SAVE, TO_END = 300, 60


def main(arguments: Sequence[str] | None = None) -> None:
    """Ends the process with status 0 only if training ended with 0 on all hosts."""
    options = _parse(arguments)
    pod = Pod(options.name, options.zone, options.project)
    launch = Launch(options, uuid.uuid4().hex[:12])
    try:
        if options.dry_run:
            return _show_all(pod, launch)
        if shutil.which("gcloud") is None:
            raise UserError("gcloud is not on PATH: install the Google Cloud CLI (https://cloud.google.com/sdk).")
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        count = count_workers(pod)
        check(pod, launch, count)
        train(pod, launch, count)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        print("stopped before the end.", file=sys.stderr)
        raise SystemExit(130) from None


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m xla.pod",
        usage="%(prog)s NAME --zone ZONE [options] pretrain|finetune DATA [flags of xla.pretrain or xla.finetune]",
        description="Train on every host of a TPU VM at once, after a check that the hosts have the same.",
        epilog="All paths of the hosts are relative to DIR there. Ctrl-C lets a budgeted run save, and ends all hosts.",
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help="the TPU VM, as gcloud compute tpus tpu-vm list names it")
    parser.add_argument("--zone", required=True)
    parser.add_argument("--project", help="default: gcloud's own")
    parser.add_argument(
        "--directory",
        metavar="DIR",
        default="train-large",
        help="the folder of this project on the hosts, absolute or relative to the home folder there; "
        "default: %(default)s",
    )
    parser.add_argument(
        "--python", default=".venv-xla/bin/python", help="on the hosts; default: %(default)s, as make env-xla leaves it"
    )
    parser.add_argument(
        "--env",
        metavar="KEY=VALUE",
        action="append",
        type=_variable,
        default=[],
        help="an environment variable for the hosts; may be given again",
    )
    parser.add_argument(
        "--logs", metavar="DIR", type=Path, help="where worker-N.log is written, here; default: pod-logs/NAME"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none of them")
    parser.add_argument("kind", choices=KINDS, metavar="pretrain|finetune")
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="DATA [flags]")
    options = parser.parse_args(arguments)
    if not options.flags or options.flags[0].startswith("-"):
        parser.error(f"give DATA, the folder of the data on the hosts, right after {options.kind}")
    options.logs = options.logs or Path("pod-logs") / options.name
    return options


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return name, value


@dataclass(frozen=True)
class Pod:
    """A TPU VM, and gcloud's commands for it."""

    name: str
    zone: str
    project: str | None

    def gcloud(self, verb: str, *flags: str) -> list[str]:
        place = [f"--zone={self.zone}", *([f"--project={self.project}"] if self.project else [])]
        return ["gcloud", "compute", "tpus", "tpu-vm", verb, self.name, *place, *flags]

    def ssh(self, worker: int | str, command: str, *flags: str) -> list[str]:
        return self.gcloud("ssh", *flags, f"--worker={worker}", f"--command={command}")

    def describe(self) -> list[str]:
        return self.gcloud("describe", "--format=json")

    def run(self, worker: int | str, command: str) -> list[str]:
        # While XLA compiles nothing is printed, and Google's firewall forgets connections that are idle for 10 minutes.
        return self.ssh(worker, command, "--ssh-flag=-oServerAliveInterval=60")


class Launch:
    """What is run on the hosts, as commands for their shell; `token` tells one launch from another."""

    def __init__(self, options: argparse.Namespace, token: str) -> None:
        self.options, self.token = options, token
        self.data = options.flags[0]
        saving = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        saving.add_argument("--save-dir", default="checkpoints")  # fairseq's own default
        self.save_dir = saving.parse_known_args(options.flags)[0].save_dir
        self.module = f"xla.{options.kind}"

    def remote(self, *words: str) -> str:
        """`words` in the project's folder, with the environment."""
        variables = {"PJRT_DEVICE": "TPU", **dict(self.options.env)}
        assignments = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
        folder = self.options.directory.removeprefix("~/")  # quoted, a shell would not expand it
        return f"cd {shlex.quote(folder)} && {assignments} {shlex.join(words)}"

    def facts(self, shared: bool, write: bool) -> str:
        token = [f"--save-dir={self.save_dir}", f"--token={self.token}"] if shared else []
        token += ["--write-token"] if write else []
        return self._host("facts", f"--data={self.data}", *token)

    def forget(self) -> str:
        return self._host("forget", f"--save-dir={self.save_dir}", f"--token={self.token}")

    def training(self) -> list[str]:
        return [self.options.python, "-m", self.module, *self.options.flags]

    def watched_training(self) -> str:
        """Training that ends when the connection does."""
        return self._host("run", self.token, *self.training())

    def _host(self, *words: str) -> str:
        return self.remote(self.options.python, "-m", "xla.host", *words)


def _show_all(pod: Pod, launch: Launch) -> None:
    """What would be run, as a shell takes it. N stands for each host: how many there are, only asking would tell."""
    first, other = launch.facts(shared=True, write=True), launch.facts(shared=True, write=False)
    by_hand = launch.remote(*launch.training())
    for meaning, command in (
        ("how many hosts there are, numbered from 0", pod.describe()),
        ("what worker 0 has; if there are others, it leaves a token in the save directory", pod.ssh(0, first)),
        ("what every other worker N has, all at once, and whether it sees the token", pod.ssh("N", other)),
        ("the token goes", pod.ssh(0, launch.forget())),
        (
            "training on every worker N at once; it ends when the connection does",
            pod.run("N", launch.watched_training()),
        ),
        ("(not run: the same by hand, without checks and logs)", pod.ssh("all", by_hand)),
    ):
        print(f"# {meaning}\n{shlex.join(command)}")


def _show(command: Sequence[str], workers: Sequence[int] = ()) -> None:
    print(f"+ {shlex.join(command)}", flush=True)
    if len(workers) > 1:
        print(f"+ and the same for {names(workers[1:])}", flush=True)


def count_workers(pod: Pod) -> int:
    """How many hosts the TPU VM has. Raises UserError where it is not known or not ready."""
    _show(pod.describe())
    (asked,) = run_together([pod.describe()])
    if asked.returncode:
        raise UserError(f"gcloud does not know the TPU VM {pod.name} in {pod.zone}: {_reason(asked.stderr)}")
    node = json.loads(asked.stdout)
    if node.get("state", "READY") != "READY":
        raise UserError(
            f"{pod.name} is {node['state']}, not READY; gcloud compute tpus tpu-vm start starts one that is STOPPED."
        )
    # One endpoint for each host and network, as gcloud itself counts them.
    return len(node["networkEndpoints"]) // max(1, len(node.get("networkConfigs", [])))


def check(pod: Pod, launch: Launch, count: int) -> None:
    """See to it that all hosts have the same. Raises UserError, a sentence for each thing that differs."""
    shared = count > 1
    # Worker 0 goes first: its token has to be there, and gcloud may have to make SSH keys, which only one can do.
    first, others = pod.ssh(0, launch.facts(shared, write=shared)), range(1, count)
    _show(first)
    facts = _tell([0], [first])
    if shared:
        try:
            commands = [pod.ssh(worker, launch.facts(shared, write=False)) for worker in others]
            _show(commands[0], others)
            facts += _tell(others, commands)
        finally:
            run_together([pod.ssh(0, launch.forget())])
    install = pod.ssh("all", launch.remote(launch.options.python, "-m", "pip", "install", "PACKAGE==VERSION"))
    wrong = disagreements(facts, launch.save_dir, shlex.join(install))
    if wrong:
        raise UserError("\nerror: ".join(wrong))
    versions = ", ".join(f"{name} {version}" for name, version in facts[0]["versions"].items() if version)
    print(f"checked {names(range(count))}: {versions}", flush=True)


def _tell(workers: Iterable[int], commands: list[list[str]]) -> list[dict[str, Any]]:
    facts = []
    for worker, answer in zip(workers, run_together(commands), strict=True):
        if answer.returncode:
            reason = _reason(answer.stderr)
            if reason.startswith("error: "):
                raise UserError(f"worker {worker}: {reason.removeprefix('error: ')}")
            raise UserError(
                f"worker {worker} could not be asked what it has (status {answer.returncode}: {reason}): see that "
                "gcloud's ssh reaches it, and that --directory and --python are right there."
            )
        try:
            facts.append(json.loads(answer.stdout.splitlines()[-1]))  # a login script may have printed before it
        except (IndexError, ValueError):
            raise UserError(
                f"worker {worker} did not answer what it has, but {answer.stdout.strip()[-100:]!r}: see that a login "
                "prints nothing at its end there."
            ) from None
    return facts


def _reason(stderr: str) -> str:
    """The line of gcloud's that says what went wrong: its last, or its last ERROR where details follow that."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["it did not say why"]
    return next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1])


def train(pod: Pod, launch: Launch, count: int) -> None:
    """Train on all hosts until all have ended. Raises UserError when one fails, and then the others are ended too."""
    logs = launch.options.logs
    try:
        logs.mkdir(parents=True, exist_ok=True)
        files = [(logs / f"worker-{worker}.log").open("ab") for worker in range(count)]
    except OSError as error:
        raise UserError(f"--logs {logs} cannot be written to ({error.strerror}): give another.") from None
    _show(pod.run(0, launch.watched_training()), range(count))
    ended: queue.SimpleQueue[Job] = queue.SimpleQueue()
    jobs: list[Job] = []
    try:
        for worker, file in enumerate(files):
            jobs.append(Job(worker, pod.run(worker, launch.watched_training()), file, ended, show=worker == 0))
        for _ in range(count):
            _judge(ended.get())
    except UserError:
        print("a host has failed: ending the others", flush=True)
        raise
    except KeyboardInterrupt:
        print("ending all hosts, after they have saved if they can; Ctrl-C again ends them now", file=sys.stderr)
        for job in jobs:
            job.ask_to_end()
        wait(jobs, TO_SAVE)
        raise
    finally:
        _end(jobs, pod, launch)
    print(f"all hosts have ended well; their logs are in {logs}")


def _judge(job: Job) -> None:
    if job.failure is not None:
        reason = job.failure.strerror
        raise UserError(f"what worker {job.number} prints could not be shown, or written to {job.log}: {reason}.")
    status = job.process.returncode
    if status:
        raise UserError(
            f"worker {job.number} ended with status {status}, and so all hosts were ended; its log is {job.log}, whose "
            f"last line is: {job.last_line}"
        )


def _end(jobs: list[Job], pod: Pod, launch: Launch) -> None:
    """Hang up, at which hosts end what they run (`xla.host`), and say so where one has not confirmed it."""
    for job in jobs:
        job.hang_up()
    if wait(jobs, TO_END):
        return
    left = [job for job in jobs if job.process.poll() is None]
    if not left:
        return
    for job in left:
        job.process.terminate()
    if not wait(left, 5):
        for job in left:
            job.process.kill()
    # Brackets, or pkill would find the shell that runs it.
    by_hand = pod.ssh("all", f"pkill -f '[x]la[.]{launch.options.kind}'")
    workers = names(job.number for job in left)
    print(f"{workers} did not confirm the end; this ends what may run there: {shlex.join(by_hand)}", file=sys.stderr)


if __name__ == "__main__":
    main()
