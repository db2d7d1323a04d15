from __future__ import annotations

import csv
import dataclasses
import statistics
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import forked
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train_large import runlog, step_times
from train_large.errors import UserError
from train_large.sizes import Size
from train_large.step_times import (
    FairseqTrain,
    StepTime,
    Trial,
    fitting_micro_batches,
    read_step_times,
    seconds_per_update,
    settled_at,
    time_steps,
)

ROOT = Path(__file__).parents[2]
TINY, SMALL = Size(1, 16), Size(2, 16)


# -- when it has settled --


def test_steady_from_the_start():
    assert settled_at([1.0] * 19) is None
    assert settled_at([1.0] * 20) == 20
    assert settled_at([1.0] * 500) == 20


def test_waits_for_a_slow_start_to_pass():
    """Ten updates of 2 s, then 1 s: the first two windows of ten that agree both lie after the slow ones (11 to 30).

    Medians of ten, so a window still counts as fast with up to four slow updates in it: 26 is the first to agree.
    """
    durations = [2.0] * 10 + [1.0] * 60
    done = settled_at(durations)
    assert done == 26
    assert statistics.median(durations[done - 20 : done - 10]) == 1.0


def test_one_slow_update_is_no_trend():
    assert settled_at([1.0] * 7 + [50.0] + [1.0] * 20) == 20


def test_five_per_cent_is_too_much():
    assert settled_at([1.0] * 10 + [1.0499] * 10) == 20
    assert settled_at([1.0] * 10 + [1.0501] * 10) is None
    assert settled_at([1.0501] * 10 + [1.0] * 10) == 20  # 4.8 % of what was before


def test_patience_ends():
    falling = [0.98**i for i in range(300)]  # windows ten apart differ by 18 % for ever
    assert settled_at(falling[:99]) is None
    assert settled_at(falling) == 100


@given(st.lists(st.floats(0.01, 10), max_size=150))
def test_settling_is_not_taken_back(durations):
    """Later updates do not change when it had settled, so the updates measured are the ones that were waited for."""
    done = settled_at(durations)
    if done is not None:
        assert 20 <= done <= 100
        assert settled_at(durations[:done]) == done
        assert settled_at(durations + [99.0]) == done


# -- the search --


@given(st.integers(1, 400), st.integers(0, 500), st.none() | st.integers(1, 500), st.integers(1, 8))
def test_the_search_finds_the_largest_divisor_that_fits(batch, room, limit, devices):
    tried = []

    def fits(micro_batch: int) -> bool:
        tried.append(micro_batch)
        return micro_batch <= room

    found = fitting_micro_batches(batch, fits, limit, devices)
    divisors = [d for d in range(1, batch + 1) if batch % d == 0 and d % devices == 0]
    expected = [d for d in divisors if d <= room and d <= (limit or d)]
    assert found[-1:] == expected[-1:]
    assert set(found) <= set(expected)
    assert found == sorted(found)
    assert len(tried) == len(set(tried))
    assert sum(1 for micro_batch in tried if micro_batch > room) <= 1 + 4  # halving a gap of few divisors


def test_the_search_doubles_and_stops_at_the_first_that_fails():
    tried = []
    fitting_micro_batches(8192, lambda micro_batch: tried.append(micro_batch) or micro_batch < 40)
    assert tried == [1, 2, 4, 8, 16, 32, 64]


def test_memory_of_a_device_is_read_off_what_fairseq_prints():
    gpu = "rank   0: capabilities =  7.0  ; total memory = 15.782 GB ; name = V100\n"
    steps = '{"gb_free": "9.5", "wall": "3"}\n{"gb_free": "8.5", "wall": "4"}\n'
    assert step_times._device_memory(gpu + steps) == int((15.782 - 8.5) * 2**30)
    tpu = '{"gb_free": "5.5", "gb_total": "15.7", "wall": "3"}\n{"gb_free": "6.5", "gb_total": "15.7", "wall": "4"}\n'
    assert step_times._device_memory(tpu) == int((15.7 - 5.5) * 2**30)
    assert step_times._device_memory("nothing of it") is None


# -- the table, with a runner that computes instead of training --


class Machine:
    """A runner with memory for `room` hidden units x sequences, on which an update takes as long as it is large."""

    def __init__(self, room: float, fails_late: Sequence[int] = ()) -> None:
        self.room, self.fails_late = room, fails_late
        self.runs: list[tuple[str, int, int, int]] = []

    def __call__(
        self,
        size: Size,
        micro_batch: int,
        update_freq: int,
        max_updates: int,
        enough: Callable[[Sequence[float]], bool],
    ) -> Trial:
        self.runs.append((size.name, micro_batch, update_freq, max_updates))
        memory = size.hidden * size.layers * micro_batch
        long = max_updates > step_times.TRIAL_UPDATES
        durations: list[float] = []
        while not enough(durations):
            slow_start = 5 if len(durations) < 10 else 1
            durations.append(slow_start * update_freq * (1 + len(durations) % 2))
        return Trial(tuple(durations), memory, memory <= self.room and not (long and micro_batch in self.fails_late))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "dict.txt").write_text("".join(f"w{i} 1\n" for i in range(95)))
    (folder / "train.bin").write_bytes(b"")
    return folder


def timed(data: Path, sizes: Sequence[Size], machine: Machine, **settings) -> list[StepTime]:
    options = {"batch": 16, "length": 32, "user_dir": ROOT / "fairseq_plugins", "say": lambda _: None} | settings
    return time_steps(data, sizes, data.parent / "table.csv", run=machine, **options)


def test_a_row_says_what_was_measured(data):
    machine = Machine(room=8 * 16)
    (row,) = timed(data, [TINY], machine, updates=30)
    assert machine.runs == [("1l_16h", n, 2, 3) for n in (1, 2, 4, 8)] + [
        ("1l_16h", 16, 1, 3),
        ("1l_16h", 8, 2, 130),
    ]
    assert row.shape == TINY
    assert (row.vocabulary, row.length, row.batch, row.micro_batch, row.update_freq) == (100, 32, 16, 8, 2)
    # The slow start (5 x) is not in the mean: after it an update takes 2 and 4 seconds in turn.
    assert (row.seconds_per_update, row.updates) == (3.0, 30)
    assert row.standard_deviation == pytest.approx(statistics.stdev([2, 4] * 15))
    assert row.settled_after == settled_at([10, 20] * 5 + [2, 4] * 50)
    assert row.peak_memory_bytes == 128
    assert row.torch.split(".")[0].isdigit()
    assert "threads" in row.machine
    assert read_step_times(data.parent / "table.csv") == [row]
    assert seconds_per_update(data.parent / "table.csv", TINY, 16, 32) == 3.0


def test_larger_models_have_smaller_micro_batches(data):
    rows = timed(data, [TINY, SMALL, Size(4, 32)], Machine(room=256))
    assert [(row.micro_batch, row.update_freq) for row in rows] == [(16, 1), (8, 2), (2, 8)]
    assert timed(data, [Size(1, 32)], Machine(room=10**6), max_micro_batch=4)[0].micro_batch == 4


def test_the_next_smaller_one_if_the_largest_fails_later(data):
    (row,) = timed(data, [TINY], Machine(room=256, fails_late=[16]))
    assert (row.micro_batch, row.update_freq) == (8, 2)


def test_what_the_table_holds_is_not_timed_again(data):
    first = timed(data, [TINY], Machine(room=256))
    machine = Machine(room=64)
    again = timed(data, [TINY, SMALL], machine)
    assert again[0] == first[0]
    assert {name for name, *_ in machine.runs} == {"2l_16h"}
    assert len(read_step_times(data.parent / "table.csv")) == 2
    # Another batch, length, shape or flag is another row.
    for change in ({"batch": 8}, {"length": 16}, {"extra": ["--cpu"]}):
        timed(data, [TINY], Machine(room=64), **change)
    timed(data, [Size(1, 16, ffn=32)], Machine(room=64))
    assert len(read_step_times(data.parent / "table.csv")) == 6
    forced = timed(data, [TINY], Machine(room=64), force=True)
    assert forced[0].micro_batch == 4
    rows = read_step_times(data.parent / "table.csv")
    assert len(rows) == 6
    assert forced[0] in rows
    assert first[0] not in rows


def test_a_size_that_does_not_fit_leaves_the_rows_before_it(data):
    with pytest.raises(UserError, match="4l_32h does not fit .* --memory-limit"):
        timed(data, [TINY, Size(4, 32)], Machine(room=100))
    assert [row.size for row in read_step_times(data.parent / "table.csv")] == ["1l_16h"]
    assert [path.name for path in data.parent.iterdir() if path.name.startswith(".")] == []


def test_a_table_of_another_machine_is_left_alone(data):
    (row,) = timed(data, [TINY], Machine(room=256))
    step_times._write(data.parent / "table.csv", [dataclasses.replace(row, machine="Cray-1")])
    with pytest.raises(UserError, match="Cray-1"):
        timed(data, [SMALL], Machine(room=256))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch": 0}, "--batch 0"),
        ({"length": -1}, "--length -1"),
        ({"updates": 0}, "--updates 0"),
        ({"max_micro_batch": 0}, "--max-micro-batch 0"),
        ({"memory_limit": 0}, "--memory-limit 0"),
        ({"user_dir": Path("nowhere")}, "nowhere"),
    ],
)
def test_bad_settings_are_refused(data, change, named):
    with pytest.raises(UserError, match=named):
        timed(data, [TINY], Machine(room=256), **change)
    assert not (data.parent / "table.csv").exists()


def test_one_host_of_a_pod_is_refused(data, monkeypatch):
    where = {"device": "XLA v3 x 8", "devices": 8, "hosts": 4, "own_memory": True, "machine": "a, b", "torch": "2.9"}
    monkeypatch.setattr(step_times, "_machine", lambda *asked: where)
    machine = Machine(room=256)
    with pytest.raises(UserError, match=r"one of 4 hosts of a pod.* run it on a TPU of one host, or give .* a number"):
        timed(data, [TINY], machine, device="xla")
    assert not machine.runs
    assert not (data.parent / "table.csv").exists()
    where["hosts"] = 1
    assert timed(data, [TINY], machine, device="xla")[0].device == "XLA v3 x 8"


def test_the_limit_is_of_what_the_machine_has_available(data, monkeypatch):
    limits = []

    def runner(data, user_dir, length, memory_limit, *rest):
        limits.append(memory_limit)
        return Machine(room=256)

    monkeypatch.setattr(step_times.machine, "available_memory", lambda: 1000)
    monkeypatch.setattr(step_times, "FairseqTrain", runner)
    timed(data, [TINY], None)
    timed(data, [SMALL], None, memory_limit=77)
    assert limits == [800, 77]


@pytest.mark.parametrize("missing", ["dict.txt", "train.bin"])
def test_a_folder_that_is_no_data_is_refused(data, missing):
    (data / missing).unlink()
    with pytest.raises(UserError, match=f"{data}.*{missing}"):
        timed(data, [TINY], Machine(room=256))


def test_lookups_that_fail_say_what_is_there(data, tmp_path):
    timed(data, [TINY], Machine(room=256))
    table = tmp_path / "table.csv"
    assert seconds_per_update(table, "1l_16h", 16, 32, vocabulary=100, flags="") > 0
    for size, batch, length in ((SMALL, 16, 32), (TINY, 8, 32), (TINY, 16, 64)):
        with pytest.raises(
            UserError, match="it has 1l_16h batch 16 length 32 entries 100: add it by `train-large time-steps"
        ) as error:
            seconds_per_update(table, size, batch, length)
        assert str(table) in str(error.value)
        assert f"{size.name} --batch {batch} --length {length}" in str(error.value)
    timed(data, [TINY], Machine(room=256), extra=["--cpu"])
    with pytest.raises(UserError, match="several rows .*flags '--cpu'"):
        seconds_per_update(table, TINY, 16, 32)
    assert seconds_per_update(table, TINY, 16, 32, flags="--cpu") > 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [lines[0].replace("batch", "bunch"), *lines[1:]],
        lambda lines: [lines[0], lines[1].replace("1l_16h,1,16", "1l_16h,one,16")],
        lambda lines: [lines[0], lines[1][:20]],
        lambda lines: [],
        lambda lines: [lines[0], lines[1].replace(",16,64,1,", ",16,64,0,")],
    ],
)
def test_a_damaged_table_is_refused(data, damage):
    timed(data, [TINY], Machine(room=256))
    table = data.parent / "table.csv"
    table.write_text("".join(f"{line}\n" for line in damage(table.read_text().splitlines())))
    with pytest.raises(UserError, match=str(table)):
        read_step_times(table)
    with pytest.raises(UserError, match="nowhere.csv"):
        read_step_times(data.parent / "nowhere.csv")


@settings(max_examples=20, deadline=None)
@given(st.floats(1e-6, 1e6), st.text("a ,\"'-\n", max_size=8))
def test_a_table_is_read_as_it_was_written(tmp_path_factory, seconds, flags):
    path = tmp_path_factory.mktemp("tables") / "table.csv"
    row = StepTime("1l_16h", 1, 16, 64, 1, 99, 32, 8, 4, 2, seconds, 0.1, 100, 20, 10**9, "cpu", "a, b", "2.6", flags)
    step_times._write(path, [row, row])
    assert read_step_times(path) == [row, row]


# -- watching a process --


class Script(FairseqTrain):
    """Watches a little Python program instead of fairseq-train; `save_dir`, `append` and `time` are there for it."""

    def command(self, size: Size, micro_batch: int, update_freq: int, max_updates: int, save_dir: str) -> list[str]:
        counters = "{'updates': n, 'train_seconds': s, 'wall_seconds': s, 'tokens': t, 'flops': 0}"
        before = f"""
            import os, sys, time
            from train_large import runlog
            save_dir = {save_dir!r}
            def append(kind, n, s, t):
                runlog.append(os.path.join(save_dir, runlog.NAME), kind, {counters})
        """
        return [sys.executable, "-c", textwrap.dedent(before) + textwrap.dedent(self.extra[0])]


def watched(
    program: str, enough: int = 3, memory_limit: int = 2**34, kind: type[Script] | None = None, **settings: object
) -> Trial:
    kind = kind or Script
    runner = kind(Path("DATA"), Path("."), length=10, memory_limit=memory_limit, extra=(program,), **settings)
    return runner(TINY, 2, 2, 50, lambda durations: len(durations) >= enough)


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_whole_updates_are_timed_and_the_process_is_ended():
    """4 sequences of 10 tokens make an update; the second has but 29 (one is missing), the third 35 (one is short)."""
    trial = watched("""
        append("start", 0, 0.0, 0)
        append("train", 1, 1.0, 40)
        append("train", 2, 1.5, 69)
        append("train", 3, 3.5, 104)
        append("train", 4, 7.5, 144)
        time.sleep(30)
    """)
    assert trial.fits
    assert trial.durations == (1.0, 2.0, 4.0)
    assert trial.peak_memory_bytes > 2**20


@pytest.mark.parametrize(
    "says",
    [
        "RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "| WARNING | attempting to recover from OOM in forward/backward pass",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to",
    ],
)
def test_running_out_of_memory_is_seen_though_the_process_goes_on(says):
    assert not watched(f"""
        print({says!r}, file=sys.stderr, flush=True)
        time.sleep(30)
    """).fits


def test_being_killed_counts_as_out_of_memory():
    assert not watched("os.kill(os.getpid(), 9)").fits


def test_resident_memory_is_limited_with_that_of_children():
    hog = """
        import subprocess
        subprocess.run([sys.executable, "-c", "import time; a = b'x' * (400 * 2**20); time.sleep(30)"])
    """
    trial = watched(hog, memory_limit=300 * 2**20)
    assert not trial.fits
    assert trial.peak_memory_bytes > 300 * 2**20


def test_a_run_that_fails_otherwise_is_an_error():
    with pytest.raises(
        UserError, match="fairseq-train on DATA failed for 1l_16h with status 1: ValueError: no such thing"
    ):
        watched("raise ValueError('no such thing')")
    with pytest.raises(UserError, match="DATA gave only 1 whole updates"):
        watched("append('start', 0, 0.0, 0); append('train', 1, 1.0, 40)")


def test_updates_of_more_than_was_asked_are_refused():
    """4 sequences of 10 tokens were asked for; on two GPUs they would be 8."""
    log = """
        append("start", 0, 0.0, 0)
        for n in (1, 2, 3):
            append("train", n, float(n), n * {tokens})
        time.sleep(30)
    """
    assert watched(log.format(tokens=49)).durations == (1.0, 1.0, 1.0)
    with pytest.raises(UserError, match=r"an update on DATA has 80 tokens, and 40 were asked for: .*world-size"):
        watched(log.format(tokens=80))


def test_one_gpu_is_timed_unless_the_user_says_otherwise():
    def words(device, *extra):
        return FairseqTrain(Path("DATA"), Path("."), 10, 2**34, extra, device=device).command(TINY, 2, 2, 50, "saved")

    flag = "--distributed-world-size"
    ours = words("torch", flag, "2")
    assert [ours[i + 1] for i, word in enumerate(ours) if word == flag] == ["1", "2"]  # the last one counts
    assert flag not in words("xla")


# -- the real thing --


@pytest.mark.slow
def test_fairseq_train_is_timed(tmp_path, monkeypatch):
    pytest.importorskip("fairseq")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = tmp_path / "text"
    text.write_text("\n".join(" ".join(f"w{(i * j) % 41}" for j in range(12)) for i in range(400)) + "\n")
    binary, table = tmp_path / "bin", tmp_path / "times" / "table.csv"
    preprocess = [sys.executable, "-m", "fairseq_cli.preprocess", "--only-source", "--workers", "1"]
    splits = ["--trainpref", str(text), "--validpref", str(text), "--destdir", str(binary)]
    forked.run([*preprocess, *splits]).check_returncode()

    said: list[str] = []
    rows = time_steps(
        binary,
        [TINY, SMALL],
        table,
        batch=4,
        length=16,
        user_dir=ROOT / "fairseq_plugins",
        updates=20,
        extra=["--cpu"],
        max_micro_batch=2,
        say=said.append,
    )
    assert [(row.shape, row.micro_batch, row.update_freq, row.updates) for row in rows] == [
        (TINY, 2, 2, 20),
        (SMALL, 2, 2, 20),
    ]
    for row in rows:
        assert 20 <= row.settled_after <= 100
        assert 0 < row.seconds_per_update < 60
        assert 50 * 2**20 < row.peak_memory_bytes < 2**34
        assert (row.device, row.flags) == ("cpu", "--cpu")
    assert read_step_times(table) == rows
    with open(table, newline="") as stream:
        assert len(list(csv.DictReader(stream))) == 2
    assert any("1l_16h: a micro-batch of 2 fits" in line for line in said)
    assert not list(tmp_path.rglob(runlog.NAME))

    with pytest.raises(UserError, match="1l_16h does not fit .*--memory-limit"):
        time_steps(
            binary,
            [TINY],
            tmp_path / "other.csv",
            batch=4,
            length=16,
            user_dir=ROOT / "fairseq_plugins",
            memory_limit=100 * 2**20,
            say=said.append,
        )


def test_another_dictionary_is_another_row(data):
    timed(data, [TINY], Machine(room=256))
    (data / "dict.txt").write_text("".join(f"w{i} 1\n" for i in range(15)))
    timed(data, [TINY], Machine(room=64))
    table = data.parent / "table.csv"
    assert [(row.vocabulary, row.micro_batch) for row in read_step_times(table)] == [(100, 16), (20, 4)]
    for row in read_step_times(table):
        assert seconds_per_update(table, TINY, 16, 32, vocabulary=row.vocabulary) == row.seconds_per_update
    with pytest.raises(UserError, match="several rows"):
        seconds_per_update(table, TINY, 16, 32)


def test_a_table_of_another_device_is_left_alone(data):
    (row,) = timed(data, [TINY], Machine(room=256))
    step_times._write(data.parent / "table.csv", [dataclasses.replace(row, device="Tesla K80")])
    with pytest.raises(UserError, match="Tesla K80"):
        timed(data, [SMALL], Machine(room=256))


def test_with_cpu_behind_it_the_machine_is_asked_about_its_cpu(data, monkeypatch):
    asked, where = [], step_times._machine
    monkeypatch.setattr(step_times, "_machine", lambda kind, user_dir: asked.append(kind) or where("cpu", user_dir))
    timed(data, [TINY], Machine(room=256), extra=["--cpu"])
    timed(data, [TINY], Machine(room=256))
    assert asked == ["cpu", "torch"]


def test_a_table_that_cannot_be_written_is_told_before_a_size_is_timed(data):
    machine, place = Machine(room=256), data / "dict.txt" / "table.csv"
    with pytest.raises(UserError, match="table.csv cannot be written .*give another --out"):
        time_steps(data, [TINY], place, batch=16, length=32, user_dir=ROOT / "fairseq_plugins", run=machine)
    assert not machine.runs


LOG = """
    append("start", 0, 0.0, 0)
    for n in (1, 2, 3):
        append("train", n, float(n), 40 * n)
    time.sleep(30)
"""


def test_the_peak_is_the_most_there_was(data):
    trial = watched(f"""
    a = b"x" * (300 * 2**20)
    time.sleep(2)
    del a
    time.sleep(1){LOG}""")
    assert trial.peak_memory_bytes > 300 * 2**20


def test_memory_of_what_children_start_counts(data):
    inner = "import time; a = b'x' * (300 * 2**20); time.sleep(30)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    program = f"import subprocess; subprocess.run([sys.executable, '-c', {outer!r}])"
    runner = Script(Path("DATA"), Path("."), length=10, memory_limit=250 * 2**20, extra=(program,))
    assert not runner(TINY, 2, 2, 50, lambda durations: False).fits


def test_there_are_updates_enough_though_some_are_short(data):
    asked = []

    class Told(Script):
        def command(self, size, micro_batch, update_freq, max_updates, save_dir):
            asked.append(max_updates)
            return super().command(size, micro_batch, update_freq, max_updates, save_dir)

    watched(LOG, kind=Told)
    assert asked == [100]


@pytest.mark.parametrize(("limit", "fits"), [(2**20, True), (2**20 - 1, False)])
def test_of_a_device_its_own_memory_counts(data, limit, fits):
    said = '{"gb_free": "15.4990234375", "gb_total": "15.5"}'  # of 1 MiB less: the process itself takes more
    trial = watched(f"\n    print({said!r}, flush=True){LOG}", own_memory=True, memory_limit=limit)
    assert (trial.peak_memory_bytes, trial.fits) == (2**20, fits)
