"""What one host of a pod tells of itself, and how it runs training: `xla.pod` calls `python -m xla.host` on each.

It imports neither torch nor torch-xla, so that it is quick and leaves the TPU alone.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from train_large.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ("train_large", "fairseq_plugins", "xla")
PACKAGES = ("torch", "torch_xla", "libtpu", "fairseq-fixed")
DATA_FILES = ("dict*.txt", "*.bin", "*.idx")

GRACE = 20  # seconds between SIGTERM and SIGKILL when nobody is there any more to wait for a checkpoint


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] == ["run"]:  # not through argparse: what follows is another program's command line
            return run(words[1], words[2:])
        return _answer(words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _answer(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m xla.host", allow_abbrev=False)
    parser.add_argument("request", choices=["facts", "forget"])
    parser.add_argument("--data", help="one folder, or several joined by a colon")
    parser.add_argument("--save-dir", type=Path)
    parser.add_argument("--token", help="a file of this content, aside in the save directory")
    parser.add_argument("--write-token", action="store_true")
    options = parser.parse_args(words)
    if options.request == "forget":
        _token_path(options.save_dir, options.token).unlink(missing_ok=True)
        return 0
    told = facts(options.data)
    if options.token:
        if options.write_token:
            write_token(options.save_dir, options.token)
        told["token"] = read_token(options.save_dir, options.token)
    print(json.dumps(told))
    return 0


def facts(data: str) -> dict[str, Any]:
    """What has to be the same on all hosts, as names and what is to be said of them.

    `versions` of Python and packages (None: not installed), `source` the digests of this project's files, `data` the
    sizes of the data's files, with a digest for dictionaries, and `missing` the parts of `data` that are no folders.
    """
    folders = [Path(part) for part in data.split(os.pathsep)]
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "source": {str(path.relative_to(ROOT)): _digest(path) for path in _source_files()},
        "data": {str(path): _size(path) for folder in folders for path in _data_files(folder)},
        "missing": [str(folder) for folder in folders if not folder.is_dir()],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _source_files() -> Iterator[Path]:
    return (path for folder in SOURCE for path in sorted((ROOT / folder).rglob("*.py")))


def _data_files(folder: Path) -> list[Path]:
    """In the folder itself and in those below it, where fairseq's classification tasks have theirs."""
    return sorted(path for name in DATA_FILES for depth in ("", "*/") for path in folder.glob(depth + name))


def _size(path: Path) -> str:
    size = f"{path.stat().st_size} bytes"
    return f"{size} ({_digest(path)})" if path.suffix == ".txt" else size


def _digest(path: Path) -> str:
    return "sha256 " + hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def _token_path(save_dir: Path, token: str) -> Path:
    return save_dir / f".pod-{token}"


def write_token(save_dir: Path, token: str) -> None:
    """Leave `token` in the save directory, which is made if there is none. Raises UserError where that cannot be."""
    try:
        save_dir.mkdir(parents=True, exist_ok=True)
        _token_path(save_dir, token).write_text(token)
    except OSError as error:
        raise UserError(f"--save-dir {save_dir} cannot be written to ({error.strerror}): give another.") from None


def read_token(save_dir: Path, token: str) -> str | None:
    """What another host may have left in this directory, if it is the same one."""
    try:
        return _token_path(save_dir, token).read_text()
    except OSError:
        return None


def run(launch: str, command: Sequence[str]) -> int:
    """Run `command` for as long as somebody holds the other end of standard input; return its status, at most 254.

    A line on standard input passes on SIGTERM, at which a budgeted run saves and ends. The end of standard input ends
    the command: whoever started it is gone, and the other hosts of the pod with it. ssh without a terminal has no
    other way of telling.

    gcloud takes status 255 for ssh's own, and repeats a command whose connection was lost: hence no 255, and `launch`,
    a name under which a host runs once. Raises UserError the second time.
    """
    mark = Path(tempfile.gettempdir()) / f"xla-pod-{launch}"
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        raise UserError(
            "the connection to this host was lost, which ended training here; start the same again, and it goes on "
            "from the last checkpoint."
        ) from None
    abandoned = threading.Event()
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    threading.Thread(target=_obey, args=(child, abandoned), daemon=True).start()
    status = child.wait()
    with contextlib.suppress(ProcessLookupError):  # a loader that is left would keep the connection open
        os.killpg(child.pid, signal.SIGKILL)
    if not abandoned.is_set():
        mark.unlink(missing_ok=True)
    return min(status if status >= 0 else 128 - status, 254)


def _obey(child: subprocess.Popen[bytes], abandoned: threading.Event) -> None:
    # Only the main process: loaders that die of SIGTERM would make it fail before it has saved. And not sys.stdin:
    # this thread is still reading when the interpreter ends, which must not find a buffer locked.
    while os.read(0, 4096):
        child.terminate()
    abandoned.set()
    child.terminate()
    try:
        child.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
