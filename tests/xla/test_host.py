"""What one host tells of itself, and how it runs a command that others depend on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from train_large.errors import UserError
from xla import host

ROOT = Path(__file__).resolve().parent.parent.parent


def start(tmp_path: Path, code: str, launch: str = "one") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "xla.host", "run", launch, sys.executable, "-c", code, "--", "-x", "a b"]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)}, text=True, **streams)


def finish(tmp_path: Path, code: str) -> tuple[int, str, str]:
    """Status, output and errors, with somebody there until the end."""
    process = start(tmp_path, code)
    status = process.wait(60)
    output, errors = process.communicate()
    return status, output, errors


def test_facts_name_versions_source_and_data(tmp_path):
    (tmp_path / "dict.txt").write_text("a 1\n")
    (tmp_path / "train.bin").write_bytes(b"12345")
    (tmp_path / "input0").mkdir()
    (tmp_path / "input0" / "valid.idx").write_bytes(b"1")
    (tmp_path / "notes").write_text("not data")
    told = host.facts(f"{tmp_path}:{tmp_path / 'nowhere'}")
    assert told["versions"]["python"] == platform.python_version()
    assert set(told["versions"]) == {"python", "torch", "torch_xla", "libtpu", "fairseq-fixed"}
    assert {name.split("/")[0] for name in told["source"]} == {"train_large", "fairseq_plugins", "xla"}
    assert "xla/host.py" in told["source"]
    data = {str(Path(name).relative_to(tmp_path)): value for name, value in told["data"].items()}
    assert set(data) == {"dict.txt", "train.bin", "input0/valid.idx"}
    assert data["train.bin"] == "5 bytes"
    assert told["missing"] == [str(tmp_path / "nowhere")]


def test_it_is_asked_without_torch(tmp_path):
    """Else asking would take long, and could take the TPU."""
    code = "import sys\nfrom xla import host\nhost.main(['facts', '--data', '.'])\nassert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


def test_a_token_is_written_read_and_forgotten(tmp_path, capsys):
    save_dir = tmp_path / "a" / "b"
    words = ["--save-dir", str(save_dir), "--token", "t"]
    assert host.main(["facts", "--data", str(tmp_path), *words, "--write-token"]) == 0
    assert json.loads(capsys.readouterr().out)["token"] == "t"
    assert host.main(["facts", "--data", str(tmp_path), *words]) == 0
    assert json.loads(capsys.readouterr().out)["token"] == "t"
    assert host.main(["forget", *words]) == 0
    assert list(save_dir.iterdir()) == []
    assert host.main(["facts", "--data", str(tmp_path), *words]) == 0
    assert json.loads(capsys.readouterr().out)["token"] is None


def test_a_host_that_only_reads_makes_no_save_directory(tmp_path):
    assert host.read_token(tmp_path / "new", "t") is None
    assert not (tmp_path / "new").exists()


def test_a_save_directory_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--save-dir .*file/below cannot be written to"):
        host.write_token(tmp_path / "file" / "below", "t")


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("pass", 0),
        ("raise SystemExit(3)", 3),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137),
        ("raise SystemExit(255)", 254),  # ssh's own
    ],
)
def test_the_status_is_the_commands(tmp_path, code, status):
    assert finish(tmp_path, code)[0] == status
    assert list(tmp_path.iterdir()) == []


def test_the_command_gets_its_arguments_and_no_input(tmp_path):
    status, output, _ = finish(tmp_path, "import sys; print(sys.argv[1:], repr(sys.stdin.read()))")
    assert status == 0
    assert output == "['--', '-x', 'a b'] ''\n"


def test_a_line_of_input_is_sigterm(tmp_path):
    process = start(
        tmp_path,
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "print('ready', flush=True)\n"
        "time.sleep(1000)",
    )
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("end\n")
    process.stdin.flush()
    assert process.wait(60) == 7
    process.communicate()


def test_the_end_of_input_ends_the_command_and_all_it_started(tmp_path):
    process = start(
        tmp_path,
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])\n"
        "print('ready', flush=True)\n"
        "time.sleep(1000)",
    )
    assert process.stdout.readline() == "ready\n"
    process.stdin.close()
    assert process.stdout.read() == ""  # which comes when the last of them has closed it
    assert process.wait(60) == 143


def test_a_command_that_ignores_sigterm_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "GRACE", 0.2)
    child = subprocess.Popen(
        [sys.executable, "-c", "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint()\ntime.sleep(1000)"],
        stdout=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
    )
    monkeypatch.setattr(host.os, "read", lambda *_: b"")
    abandoned = host.threading.Event()
    host._obey(child, abandoned)
    assert child.wait(60) in (-9, -15)
    assert abandoned.is_set()
    child.stdout.close()


def test_a_launch_whose_connection_was_lost_does_not_run_again(tmp_path):
    process = start(tmp_path, "print('ready', flush=True)\nimport time\ntime.sleep(1000)")
    assert process.stdout.readline() == "ready\n"
    process.stdin.close()
    process.wait(60)
    status, output, errors = finish(tmp_path, "print('again')")
    assert (status, output) == (1, "")
    assert errors.startswith("error: the connection to this host was lost")
