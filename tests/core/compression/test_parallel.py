from __future__ import annotations

import subprocess
import sys

import torch

from train_large.compression.parallel import on_all_cores


def test_results_are_in_order():
    assert on_all_cores(lambda i: i * i, range(100)) == [i * i for i in range(100)]
    assert on_all_cores(str, []) == []


def test_tensors_of_inference_can_be_changed_by_all_cores():
    with torch.inference_mode():
        tensors = [torch.zeros(1) for _ in range(4)]
        on_all_cores(lambda t: t.add_(1), tensors)
    assert [float(t) for t in tensors] == [1] * 4


def test_the_pool_is_on_one_thread_each_and_nobody_else_is():
    """In a process of its own: what the first thread says holds for those that come later."""
    code = (
        "import threading, torch\n"
        "from train_large.compression.parallel import on_all_cores\n"
        "inside = on_all_cores(lambda _: torch.get_num_threads(), range(8))\n"
        "later = []\n"
        "thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))\n"
        "thread.start(); thread.join()\n"
        "print(set(inside), torch.get_num_threads(), later)\n"
    )
    environment = {"OMP_NUM_THREADS": "2", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split("\n")[0] == "{1} 2 [2]"


def test_a_forked_process_makes_a_pool_of_its_own():
    code = (
        "import os, signal\n"
        "from train_large.compression.parallel import on_all_cores\n"
        "on_all_cores(str, range(4))\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    signal.alarm(60)\n"
        "    os._exit(0 if on_all_cores(str, range(4)) == list('0123') else 1)\n"
        "print(os.waitpid(child, 0)[1])\n"
    )
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "0\n"
