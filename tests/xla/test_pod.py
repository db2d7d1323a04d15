"""`python -m xla.pod` on hosts that are folders of this machine, reached by a gcloud that runs what it is given."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from xla import pod
from xla.jobs import Job

ROOT = Path(__file__).resolve().parent.parent.parent

# As gcloud does: the command reaches a shell in the home folder of that worker, standard input goes through, what
# gcloud itself has to say is on standard error, and a command whose connection was lost (255) is repeated.
GCLOUD = """\
import json, os, pathlib, subprocess, sys, time

root = pathlib.Path({root!r})
words = sys.argv[1:]
with (root / "calls").open("a") as calls:
    calls.write(json.dumps(words) + "\\n")
assert words[:3] == ["compute", "tpus", "tpu-vm"], words
verb, name, flags = words[3], words[4], dict(word.lstrip("-").split("=", 1) for word in words[5:])
if name != "slice" or flags["zone"] != "here-1a":
    print("Some advice first.", file=sys.stderr)
    sys.exit(f"ERROR: (gcloud.compute.tpus.tpu-vm.{{verb}}) NOT_FOUND: Resource {{name!r}} was not found")
if verb == "describe":
    assert flags["format"] == "json"
    print((root / "node.json").read_text())
    sys.exit(0)
assert verb == "ssh"
home = root / f"worker-{{flags['worker']}}"
environment = {{**os.environ, "HOME": str(home), "TMPDIR": str(home / "tmp"), "WORKER": flags["worker"]}}
print("SSH: Attempting to connect to worker", flags["worker"] + "...", file=sys.stderr)
shell = ["bash", "-c", " ".join(flags["command"].split(" "))]
if (home / "lose-connection").exists() and " run " in flags["command"]:
    remote = subprocess.Popen(shell, cwd=home, env=environment, stdin=subprocess.PIPE)
    while not (home / "pid").exists():
        time.sleep(0.01)
    remote.communicate()
    print("Retrying: SSH command error: [/usr/bin/ssh] exited with return code [255].", file=sys.stderr, flush=True)
try:
    sys.exit(subprocess.run(shell, cwd=home, env=environment).returncode)
except KeyboardInterrupt:
    (home / "cut").touch()
"""

# Stands where xla/pretrain.py is on a host, and does as the test says for that worker.
PRETRAIN = """\
import json, os, pathlib, sys

home = pathlib.Path(os.environ["HOME"])
(home / "arguments").write_text(json.dumps(sys.argv[1:]))
(home / "environment").write_text(json.dumps(dict(os.environ)))
(home / "new-pid").write_text(str(os.getpid()))
(home / "new-pid").rename(home / "pid")
print("training on", os.environ["WORKER"])
exec((home / "behaviour").read_text())
"""

FOREVER = "import time\ntime.sleep(1000)"
SAVES = f"""
import signal
def save(*_):
    (home / "saved").touch()
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
(home / "ready").touch()
{FOREVER}
"""
DIES_WHEN_ALL_RUN = """
import time
while len(list(home.parent.glob("worker-*/pid"))) < 3:
    time.sleep(0.01)
print("about to fail")
sys.exit("RuntimeError: out of memory")
"""


class Slice:
    """Three hosts with the same source and data, and one save directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.here = root / "here"
        (self.here / "bin").mkdir(parents=True)
        gcloud = self.here / "bin" / "gcloud"
        gcloud.write_text(f"#!{sys.executable}\n{GCLOUD.format(root=str(root))}")
        gcloud.chmod(0o755)
        self.describe(3)
        self.shared = root / "shared"
        for worker in range(3):
            self.make_host(worker)

    def describe(self, hosts: int, **more: object) -> None:
        endpoints = [{"ipAddress": f"10.0.0.{host}", "port": 8470} for host in range(hosts)]
        node = {"state": "READY", "networkEndpoints": endpoints, **more}
        (self.root / "node.json").write_text(json.dumps(node))

    def home(self, worker: int) -> Path:
        return self.root / f"worker-{worker}"

    def project(self, worker: int) -> Path:
        return self.home(worker) / "my project"

    def make_host(self, worker: int) -> None:
        project = self.project(worker)
        (self.home(worker) / "tmp").mkdir(parents=True)
        for package in ("xla", "train_large"):
            (project / package).mkdir(parents=True)
        for name in ("xla/__init__.py", "xla/host.py", "train_large/__init__.py", "train_large/errors.py"):
            shutil.copy(ROOT / name, project / name)
        (project / "xla" / "pretrain.py").write_text(PRETRAIN)
        data = project / "data"
        (data / "label").mkdir(parents=True)
        for name in ("dict.txt", "train.bin", "train.idx", "label/dict.txt"):
            (data / name).write_text(f"this is {name}")
        self.behave(worker, "")
        self.install(worker, "torch_xla", "2.9.0")

    def behave(self, worker: int, code: str) -> None:
        (self.home(worker) / "behaviour").write_text(code)

    def install(self, worker: int, package: str, version: str) -> None:
        for old in self.project(worker).glob(f"{package}-*.dist-info"):
            shutil.rmtree(old)
        info = self.project(worker) / f"{package}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")

    def command(self, *flags: str, options: Sequence[str] = (), name: str = "slice") -> list[str]:
        place = ["--zone", "here-1a", "--directory", "my project", "--python", sys.executable]
        return [sys.executable, "-m", "xla.pod", name, *place, *options, "pretrain", *flags]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "PATH": f"{self.here / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def run(self, *flags: str, options: Sequence[str] = (), name: str = "slice") -> subprocess.CompletedProcess[str]:
        flags = flags or ("data", "--save-dir", str(self.shared))
        command = self.command(*flags, options=options, name=name)
        return subprocess.run(
            command, cwd=self.here, env=self.environment(), capture_output=True, text=True, timeout=100
        )

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command("data", "--save-dir", str(self.shared)),
            cwd=self.here,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def log(self, worker: int) -> str:
        return (self.here / "pod-logs" / "slice" / f"worker-{worker}.log").read_text()

    def calls(self) -> list[list[str]]:
        file = self.root / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def pids(self) -> list[int]:
        return [int(file.read_text()) for file in self.root.glob("worker-*/pid")]

    def has_trained(self) -> bool:
        return bool(self.pids())


@pytest.fixture
def hosts(tmp_path: Path):
    slice_ = Slice(tmp_path)
    yield slice_
    for pid in slice_.pids():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def the_error(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 1, result
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_every_host_trains_and_its_log_is_kept(hosts):
    result = hosts.run()
    assert result.returncode == 0, result
    for worker in range(3):
        assert f"training on {worker}\n" in hosts.log(worker)
        assert json.loads((hosts.home(worker) / "arguments").read_text()) == ["data", "--save-dir", str(hosts.shared)]
        environment = json.loads((hosts.home(worker) / "environment").read_text())
        assert environment["PJRT_DEVICE"] == "TPU"
    assert "training on 0\n" in result.stdout
    assert "training on 1\n" not in result.stdout
    assert "torch_xla 2.9.0" in result.stdout
    assert list(hosts.shared.iterdir()) == []  # the token is gone
    assert [list((hosts.home(worker) / "tmp").iterdir()) for worker in range(3)] == [[], [], []]


def test_what_is_run_was_printed(hosts):
    result = hosts.run()
    printed = [shlex.split(line[2:])[1:] for line in result.stdout.splitlines() if line.startswith("+ gcloud")]
    calls = hosts.calls()
    assert all(command in calls for command in printed)
    assert [command for command in printed if any("xla.pretrain" in word for word in command)]
    assert "+ and the same for workers 1-2\n" in result.stdout


def test_logs_are_added_to_where_they_are_wanted(hosts):
    for _ in range(2):
        assert hosts.run(options=["--logs", "my logs"]).returncode == 0
    assert (hosts.here / "my logs" / "worker-2.log").read_text().count("training on 2\n") == 2


def test_any_argument_arrives_as_it_was(hosts):
    odd = ["a  b", "it's", 'say "x"', "$HOME `date` $(date)", "*", "back\\s", "", "new\nline", "--d", "--", "é;&|<>"]
    flags = ["data", "--save-dir", str(hosts.shared), *odd]
    result = hosts.run(*flags, options=["--env", "ODD=$HOME's  =x", "--env", "PJRT_DEVICE=CPU"])
    assert result.returncode == 0, result
    for worker in range(3):
        assert json.loads((hosts.home(worker) / "arguments").read_text()) == flags
        environment = json.loads((hosts.home(worker) / "environment").read_text())
        assert environment["ODD"] == "$HOME's  =x"
        assert environment["PJRT_DEVICE"] == "CPU"


def test_project_is_passed_to_every_gcloud(hosts):
    assert hosts.run(options=["--project", "mine"]).returncode == 0
    assert len(hosts.calls()) == 8
    assert all("--project=mine" in call for call in hosts.calls())


def test_dry_run_prints_commands_that_a_shell_takes_and_runs_none(hosts):
    result = hosts.run("data", "--save-dir", "it's here", options=["--dry-run"])
    assert result.returncode == 0
    assert hosts.calls() == []
    assert not (hosts.here / "pod-logs").exists()
    commands = [shlex.split(line) for line in result.stdout.splitlines() if not line.startswith("#")]
    assert all(command[:4] == ["gcloud", "compute", "tpus", "tpu-vm"] for command in commands)
    assert commands[0][4:] == ["describe", "slice", "--zone=here-1a", "--format=json"]
    by_hand = commands[-1]
    assert "--worker=all" in by_hand
    remote = by_hand[-1].removeprefix("--command=")
    python = shlex.quote(sys.executable)
    assert remote == f"""cd 'my project' && PJRT_DEVICE=TPU {python} -m xla.pretrain data --save-dir 'it'"'"'s here'"""


def test_dry_run_needs_no_gcloud(hosts):
    (hosts.here / "bin" / "gcloud").unlink()
    command = hosts.command("data", options=["--dry-run"])
    result = subprocess.run(command, cwd=ROOT, env={"PATH": str(hosts.here / "bin")}, capture_output=True, text=True)
    assert result.returncode == 0, result


def test_dry_run_of_a_launch_is_what_is_then_run(hosts):
    shown = hosts.run("data", "--save-dir", str(hosts.shared), options=["--dry-run"]).stdout
    assert hosts.run().returncode == 0

    def forms(lines: Iterable[str]) -> set[str]:
        return {re.sub(r"\b[0-9a-f]{12}\b", "TOKEN", line) for line in lines}

    lines = [line for line in shown.splitlines() if not line.startswith("#")]
    shown_forms = forms(line.replace("--worker=N", f"--worker={worker}") for line in lines for worker in range(3))
    run_forms = forms(shlex.join(["gcloud", *call]) for call in hosts.calls())
    assert len(run_forms) == 8
    assert run_forms <= shown_forms


def test_one_host_needs_no_shared_folder(hosts):
    hosts.describe(1)
    assert hosts.run("data").returncode == 0
    assert len(hosts.calls()) == 3
    assert "training on 0\n" in hosts.log(0)


def test_hosts_with_two_networks_are_counted_once(hosts):
    hosts.describe(6, networkConfigs=[{"network": "a"}, {"network": "b"}])
    assert hosts.run().returncode == 0
    assert sorted(path.name for path in (hosts.here / "pod-logs" / "slice").iterdir()) == [
        f"worker-{worker}.log" for worker in range(3)
    ]


def test_different_versions(hosts):
    hosts.install(2, "torch_xla", "2.8.0")
    error = the_error(hosts.run())
    assert "workers 0-1 have torch_xla 2.9.0, worker 2 has torch_xla 2.8.0: install the same" in error
    assert "pip install torch_xla==2.9.0" in error
    assert not hosts.has_trained()
    assert list(hosts.shared.iterdir()) == []


def test_a_package_that_one_host_lacks(hosts):
    for worker in (0, 1):
        hosts.install(worker, "libtpu", "0.0.21")
    assert "workers 0-1 have libtpu 0.0.21, worker 2 has no libtpu: install" in the_error(hosts.run())


def test_different_source(hosts):
    with (hosts.project(1) / "xla" / "host.py").open("a") as file:
        file.write("# changed\n")
    error = the_error(hosts.run())
    assert "of xla/host.py workers 0, 2 have sha256" in error
    assert "worker 1 has sha256" in error
    assert not hosts.has_trained()


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("dict.txt", "of data/dict.txt workers 0, 2 have 16 bytes (sha256 "),
        ("label/dict.txt", "of data/label/dict.txt workers 0, 2 have"),
        ("train.bin", "of data/train.bin workers 0, 2 have 17 bytes, worker 1 has 18 bytes: copy DATA"),
    ],
)
def test_different_data(hosts, name, named):
    file = hosts.project(1) / "data" / name
    # A dictionary of the same size is another dictionary.
    file.write_text(file.read_text().swapcase() if name.endswith(".txt") else file.read_text() + "!")
    assert named in the_error(hosts.run())
    assert not hosts.has_trained()


def test_data_that_one_host_lacks(hosts):
    shutil.rmtree(hosts.project(2) / "data")
    assert "there is no folder data on worker 2: copy DATA there" in the_error(hosts.run())


def test_every_part_of_data_is_looked_at(hosts):
    for worker in range(3):
        shutil.copytree(hosts.project(worker) / "data", hosts.project(worker) / "more")
    (hosts.project(2) / "more" / "train.idx").unlink()
    flags = ("data:more", "--save-dir", str(hosts.shared))
    assert "of more/train.idx workers 0-1 have 17 bytes, worker 2 has no" in the_error(hosts.run(*flags))


def test_a_save_directory_that_is_not_shared(hosts):
    error = the_error(hosts.run("data"))  # fairseq's default, in each host's own folder
    assert "--save-dir checkpoints is one folder on worker 0 and another on workers 1-2" in error
    assert not hosts.has_trained()
    assert list((hosts.project(0) / "checkpoints").iterdir()) == []


def test_a_relative_save_directory_that_is_shared(hosts):
    hosts.shared.mkdir()
    for worker in range(3):
        (hosts.project(worker) / "runs").symlink_to(hosts.shared)
    assert hosts.run("data", "--save-dir=runs/one").returncode == 0


def test_a_save_directory_that_cannot_be_written(hosts):
    hosts.shared.write_text("a file")
    error = the_error(hosts.run())
    assert f"worker 0: --save-dir {hosts.shared} cannot be written to (File exists)" in error


def test_everything_that_differs_is_told_at_once(hosts):
    hosts.install(2, "torch_xla", "2.8.0")
    shutil.rmtree(hosts.project(1) / "data")
    lines = hosts.run().stderr.strip().splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: ") for line in lines)


def test_a_wrong_directory(hosts):
    shutil.rmtree(hosts.project(1))
    error = the_error(hosts.run())
    assert "worker 1 could not be asked what it has" in error
    assert "my project: No such file or directory" in error
    assert "--directory" in error


def test_one_host_that_fails_ends_the_others(hosts):
    hosts.behave(0, FOREVER)
    hosts.behave(1, DIES_WHEN_ALL_RUN)
    hosts.behave(2, FOREVER)
    result = hosts.run()
    assert result.returncode == 1
    (error,) = result.stderr.strip().splitlines()
    log = Path("pod-logs") / "slice" / "worker-1.log"
    assert error.startswith("error: worker 1 ended with status 1,")
    assert error.endswith(f"its log is {log}, whose last line is: RuntimeError: out of memory")
    assert "about to fail\n" in hosts.log(1)
    assert len(hosts.pids()) == 3
    assert not any(map(is_running, hosts.pids()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_lets_all_hosts_save_and_ends_them(hosts, number):
    for worker in range(3):
        hosts.behave(worker, SAVES)
    process = hosts.start()
    until(lambda: len(list(hosts.root.glob("worker-*/ready"))) == 3)
    if number == signal.SIGINT:  # the terminal sends it to all that run in it
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped" in errors
    assert "Traceback" not in errors
    assert len(list(hosts.root.glob("worker-*/saved"))) == 3
    assert list(hosts.root.glob("worker-*/cut")) == []
    assert not any(map(is_running, hosts.pids()))
    assert all("saved\n" in hosts.log(worker) for worker in range(3))


def test_an_interrupt_during_the_checks(hosts):
    hosts.shared.mkdir()
    endless = hosts.project(1) / "data" / "dict.txt"
    endless.unlink()
    os.mkfifo(endless)  # whoever reads it waits
    process = hosts.start()
    until(lambda: any("--worker=1" in call for call in hosts.calls()))
    assert list(hosts.shared.iterdir()) != []
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert list(hosts.shared.iterdir()) == []
    assert not hosts.has_trained()
    until(lambda: release(endless))


def release(fifo: Path) -> bool:
    try:
        os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:  # nobody has begun to read
        return False
    return True


@pytest.mark.slow
def test_a_second_interrupt_does_not_wait_for_those_who_save(hosts):
    stubborn = "import signal\nsignal.signal(signal.SIGTERM, lambda *_: (home / 'asked').touch())\n"
    for worker in range(3):
        hosts.behave(worker, f"{stubborn}(home / 'ready').touch()\nimport time\nwhile True: time.sleep(1)")
    process = hosts.start()
    until(lambda: len(list(hosts.root.glob("worker-*/ready"))) == 3)
    process.send_signal(signal.SIGINT)
    until(lambda: len(list(hosts.root.glob("worker-*/asked"))) == 3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    until(lambda: not any(map(is_running, hosts.pids())))


def test_hosts_end_when_the_launcher_is_killed(hosts):
    for worker in range(3):
        hosts.behave(worker, FOREVER)
    process = hosts.start()
    until(lambda: len(hosts.pids()) == 3)
    process.kill()
    process.communicate()
    until(lambda: not any(map(is_running, hosts.pids())))


def test_a_lost_connection_ends_all_and_training_is_not_repeated(hosts):
    for worker in range(3):
        hosts.behave(worker, FOREVER)
    (hosts.home(1) / "lose-connection").touch()
    result = hosts.run()
    assert result.returncode == 1
    assert "worker 1 ended with status 1" in result.stderr
    assert "the connection to this host was lost" in result.stderr
    assert hosts.log(1).count("training on 1\n") == 1
    assert not any(map(is_running, hosts.pids()))


def test_a_host_that_does_not_confirm_its_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pod, "TO_END", 0.2)
    ended: queue.SimpleQueue[Job] = queue.SimpleQueue()
    job = Job(2, ["sleep", "1000"], (tmp_path / "log").open("ab"), ended, show=False)
    options = pod._parse(["slice", "--zone", "z", "pretrain", "data"])
    pod._end([job], pod.Pod("slice", "z", None), pod.Launch(options, "token"))
    assert ended.get(timeout=60) is job
    assert job.process.wait() == -signal.SIGTERM
    error = capsys.readouterr().err
    assert error.startswith("worker 2 did not confirm the end; this ends what may run there: gcloud")
    assert "pkill -f" in error


def test_no_gcloud(hosts):
    (hosts.here / "bin" / "gcloud").unlink()
    result = subprocess.run(
        hosts.command("data"), cwd=ROOT, env={"PATH": str(hosts.here / "bin")}, capture_output=True, text=True
    )
    assert "gcloud is not on PATH: install" in the_error(result)


def test_an_unknown_tpu(hosts):
    error = the_error(hosts.run(name="slyce"))
    assert "slyce in here-1a" in error
    assert error.endswith("NOT_FOUND: Resource 'slyce' was not found")


def test_a_tpu_that_is_not_ready(hosts):
    hosts.describe(3, state="STOPPED")
    assert "slice is STOPPED, not READY" in the_error(hosts.run())


def test_logs_that_cannot_be_written(hosts):
    (hosts.here / "logs").write_text("a file")
    assert "--logs logs cannot be written to" in the_error(hosts.run(options=["--logs", "logs"]))
    assert not hosts.has_trained()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["slice", "--zone", "z", "train", "data"], "invalid choice: 'train'"),
        (["slice", "--zone", "z"], "pretrain|finetune"),
        (["slice", "--zone", "z", "pretrain"], "give DATA"),
        (["slice", "--zone", "z", "pretrain", "--arch", "x"], "give DATA"),
        (["slice", "pretrain", "data"], "--zone"),
        (["slice", "--zone", "z", "--env", "A-B=1", "pretrain", "data"], "'A-B=1' is not KEY=VALUE"),
    ],
)
def test_bad_command_lines(hosts, words, named):
    command = [sys.executable, "-m", "xla.pod", *words]
    result = subprocess.run(command, cwd=ROOT, env=hosts.environment(), capture_output=True, text=True)
    assert result.returncode == 2
    assert named in result.stderr
    assert hosts.calls() == []
