"""The study of the paper's experiments: its settings, its jobs, and a miniature of each experiment from end to end."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import about
import experiments
import jobs
import measurements
import psutil
import pytest
import step_times
import study as study_program
from experiments import Finetuning, Grid, Measuring, Pretraining, Pruning, Translation
from omegaconf import OmegaConf

from train_large.errors import UserError

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "user_dir_examples" / "study" / "study.py"
MINIATURE = STUDY.with_name("miniature.yaml")
WORDS = (  # noqa: SIM905
    "the a one red green old new house tree river goes comes stands good bad fine poor"
).split()
FRENCH = (  # noqa: SIM905
    "le un une rouge vert vieux neuf maison arbre fleuve va vient reste bon mauvais fin pauvre"
).split()


@pytest.fixture
def settings():
    return experiments.load(None, ["step_times=0.02"])


def of_kind(runs, kind):
    return [run for run in runs if type(run) is kind]


# ------------------------------------------------------------------------------------------------ settings


def test_every_experiment_of_the_paper_has_its_runs(settings):
    assert experiments.names(settings) == sorted(
        [
            *("batch_size", "compression", "convergence", "dataset_size", "depth", "finetuning", "flops"),
            *("layer_sharing", "sst2_grid", "translation", "weight_error", "width"),
        ]
    )
    for name in experiments.names(settings):
        runs = experiments.runs_of(settings, name)
        seeds = {run.seed for run in runs if isinstance(run, (Pretraining, Translation))}
        assert seeds == ({1} if name == "sst2_grid" else {1, 2, 3})


def test_a_misspelt_experiment_in_the_settings():
    changes = ["step_times=0.02", "experiments.dpeth.pretrain.size=[1l_16h]"]
    settings = experiments.load(None, changes)
    with pytest.raises(UserError, match=r"experiments\.dpeth: there is no such experiment, but depth; write that"):
        experiments.names(settings, "depth")
    assert experiments.names(settings, "depth,dpeth") == ["depth", "dpeth"]
    mine = experiments.load(None, ["step_times=0.02", "experiments.mine.pretrain.size=[1l_16h]"])
    assert experiments.names(mine, "depth") == ["depth"]
    assert "mine" in experiments.names(mine)


def test_a_grid_is_every_combination(settings):
    runs = experiments.runs_of(settings, "sst2_grid")
    pretrained, finetuned = of_kind(runs, Pretraining), of_kind(runs, Finetuning)
    assert len(finetuned) == len(pretrained) * 2 * 2 * 2 * 2
    assert {(run.batch, run.rate, run.dropout, run.seed) for run in finetuned} == {
        (batch, rate, dropout, seed)
        for batch in (16, 32)
        for rate in (1e-3, 5e-4)
        for dropout in (0.1, 0.2)
        for seed in (100, 300)
    }
    grids = of_kind(runs, Grid)
    assert [grid.pretraining for grid in grids] == pretrained
    assert all({run.pretraining for run in grid.finetunings} == {grid.pretraining} for grid in grids)
    assert [run.start for run in of_kind(runs, Pruning)] == grids
    assert [run.pruning.start for run in of_kind(runs, Measuring)] == grids


def test_experiments_share_the_runs_that_they_have_in_common(settings):
    apart = [set(jobs.all_jobs(settings, [name])) for name in ("depth", "compression", "weight_error")]
    together = set(jobs.all_jobs(settings, ["depth", "compression", "weight_error"]))
    assert together == set.union(*apart)
    assert {path for path in apart[2] if path.startswith("pretrain/")} <= apart[1]


def test_other_settings_are_other_jobs(settings):
    for change in ("seed", "batch", "share", "data", "target"):
        a = Pretraining("2l_64h", 32, "none", 100, None, 1)
        other = {"seed": 2, "batch": 8, "share": "all", "data": 5, "target": 60.0}[change]
        assert a.name != Pretraining(**{**vars(a), change: other}).name


def test_a_budget_is_updates_by_the_table(settings, tmp_path):
    run = Pretraining("2l_64h", 32, "none", 100, None, 1)
    assert experiments.updates_of(settings, run) == 300 / 0.02
    table = tmp_path / "times.csv"
    table.write_text(",".join(experiments.COLUMNS) + "\npretrain,2l_64h,32,none,16,1000,16,0.4,0.03,x\n")
    timed = experiments.load(None, [f"step_times={table}"])
    assert experiments.updates_of(timed, run) == 10000
    with pytest.raises(UserError, match="study-times"):
        experiments.updates_of(timed, Pretraining("3l_64h", 32, "none", 100, None, 1))
    for other in ("pretrain.length=128", "text.vocabulary=8192", "model.head_width=64", "pretrain.masked=0.15"):
        with pytest.raises(UserError, match="study-times"):
            experiments.updates_of(experiments.load(None, [f"step_times={table}", other]), run)


def test_a_translation_is_timed_by_its_own_settings():
    run = Translation("2l_64h", 1)
    assert experiments.seconds_per_update(experiments.load(None, ["pretrain.length=128"]), run) == 0.05284
    for other in ("translate.batch_tokens=2048", "translate.most_words=20", "translate.head_width=64"):
        with pytest.raises(UserError, match="study-times"):
            experiments.seconds_per_update(experiments.load(None, [other]), run)


def test_a_table_of_step_times_is_of_one_processor(tmp_path, monkeypatch):
    table = tmp_path / "times.csv"
    own = [f"step_times={table}", f"out={tmp_path}/out", f"translate.python={sys.executable}"]
    settings = experiments.load(None, own)
    monkeypatch.setattr(step_times.job, "run", lambda *_: None)
    monkeypatch.setattr(step_times, "_seconds_per_update", lambda *_: 0.03)
    monkeypatch.setattr(step_times.machine, "processor", lambda: "Cray-1")
    step_times.measure(settings, experiments.names(settings))
    rows = experiments.read_step_times(table)
    runs = [run for name in experiments.names(settings) for run in experiments.runs_of(settings, name)]
    timed = [run for run in runs if isinstance(run, (Pretraining, Translation))]
    assert {experiments.seconds_per_update(settings, run) for run in timed} == {0.03}
    assert {row["processor"] for row in rows} == {"Cray-1"}
    monkeypatch.setattr(step_times.machine, "processor", lambda: "Cray-2")
    step_times.measure(settings, experiments.names(settings))  # nothing is missing
    longer = experiments.load(None, [*own, "pretrain.length=32"])
    with pytest.raises(UserError, match="Cray-1.*Cray-2") as error:
        step_times.measure(longer, experiments.names(longer))
    assert "\n" not in str(error.value)
    assert experiments.read_step_times(table) == rows


def test_times_are_measured_of_the_experiments_that_are_asked_for(tmp_path, monkeypatch):
    table = tmp_path / "times.csv"
    settings = experiments.load(None, [f"step_times={table}", f"out={tmp_path}/out", "text.subsets=[]"])
    monkeypatch.setattr(step_times.job, "run", lambda *_: None)
    monkeypatch.setattr(step_times, "_seconds_per_update", lambda *_: 0.03)
    step_times.measure(settings, ["width"])
    assert {row["size"] for row in experiments.read_step_times(table)} == {
        run.size for run in experiments.runs_of(settings, "width")
    }


def test_settings_that_another_experiment_cannot_have_do_not_matter(tmp_path):
    settings = experiments.load(None, ["text.subsets=[]", "step_times=0.02"])
    with pytest.raises(UserError, match="text.subsets"):
        jobs.all_jobs(settings, ["dataset_size"])
    for path, found in jobs.all_jobs(settings, ["depth"]).items():
        assert jobs.find(settings, path) == found
    with pytest.raises(UserError, match="no such job"):
        jobs.find(settings, "pretrain/1l_1h-batch32-seed1")


def test_a_table_of_other_columns_is_refused(tmp_path):
    (tmp_path / "times.csv").write_text("work,size,batch,share,seconds_per_update,processor\n")
    with pytest.raises(UserError, match="times.csv.*head_width"):
        experiments.read_step_times(tmp_path / "times.csv")


def test_the_committed_times_are_of_every_run():
    settings = experiments.load()
    for name in experiments.names(settings):
        for run in experiments.runs_of(settings, name):
            if isinstance(run, (Pretraining, Translation)):
                assert 0 < experiments.seconds_per_update(settings, run) < 10


def plan(changes):
    settings = experiments.load(None, ["step_times=0.02", *changes])
    return jobs.all_jobs(settings, experiments.names(settings))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["budgets=3s"], "budgets"),
        (["pretrain.rate=1"], "rate"),
        (["budget=soon"], "soon"),
        (["seeds=[1,1]"], "seeds"),
        (["pretrain.validations=6"], "validations"),
        (["prune.levels=[0.9,0.15]"], "prune.levels: '0.9,0.15': 0.15 comes after 0.9"),
        (["prune.levels=[0.5,1.5]"], "prune.levels: .* 1.5 is not between 0 and 1"),
        (["measure.bits=[32,99]"], "measure.bits: 99: give a whole number"),
        (["experiments.mine={memory: {share: some}}"], "experiments.mine.memory.share: 'some' is none of none, "),
        (["experiments.depth.pretrain.sizes=[1l_16h]"], "sizes"),
        (["experiments.depth.pretrain.size=[big]"], "big"),
        (["experiments.depth.pretrain.batch=33"], "33"),
        (["experiments.depth.pretrain.share=some"], "some"),
        (["experiments.dataset_size.pretrain.data=50"], "50"),
        (["experiments.convergence.finetune.checkpoint=0.3"], "0.3"),
        (["experiments.depth.tune=1"], "tune"),
        (["seeds=1"], r"seeds: 1 .* list"),
        (["seeds=[a]"], "seeds"),
        (["seeds=[1.5]"], r"seeds: \[1.5\]"),
        (["seeds=[-1]"], r"seeds: \[-1\]"),
        (["step_times=0"], "step_times: 0 .* above 0"),
        (["step_times=-1"], "step_times: -1 .* above 0"),
        (["pretrain.rates.32=-0.001"], "pretrain.rates"),
        (["pretrain.masked=3"], "pretrain.masked: 3 .* share"),
        (["finetune.batch=1.5"], "finetune.batch: 1.5 .* whole"),
        (["experiments.depth.pretrain.size=[1l_65h]"], "65 does not divide into 4"),
        (["experiments.depth.prune=true"], "experiments.depth.prune: .* add finetune"),
        (["experiments.mine={finetune: {rate: 0.1}}"], "experiments.mine.finetune: .* add pretrain"),
        (["pretrain.rates.foo=1"], "pretrain.rates: .*foo"),
        (["pretrain.rates.32=null"], "pretrain.rates"),
        (["pretrain.validations=few"], "pretrain.validations: few"),
        (["pretrain=null"], "pretrain: None"),
        (["text.files=my.txt"], "text.files: my.txt .* list"),
        (["task.source=5"], "task.source: 5"),
        (["experiments=null"], "experiments: None"),
        (["experiments.depth=null"], "experiments.depth: None"),
        (["experiments.depth.pretrain=5"], "experiments.depth.pretrain"),
        (["experiments.depth.pretrain.size=5"], "pretrain.size: 5"),
        (["experiments.depth.pretrain.target=low"], "pretrain.target: low"),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(changes, named):
    with pytest.raises(UserError, match=named) as error:
        plan(changes)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_yaml_is_one_sentence(tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(UserError, match="bad.yaml"):
        experiments.load(tmp_path / "bad.yaml")
    with pytest.raises(UserError, match="nowhere.yaml"):
        experiments.load(tmp_path / "nowhere.yaml")


def test_keys_take_the_place_of_a_list_of_keys_and_a_list_that_of_keys():
    flops = experiments.load(None, ["experiments.flops.pretrain.size=[1l_16h]", "seeds=[1]"])
    assert [run.size for run in experiments.runs_of(flops, "flops")] == ["1l_16h"]
    parts = "[{size: 1l_16h}, {size: 2l_16h, batch: 8}]"
    depth = experiments.load(None, [f"experiments.depth.pretrain={parts}", "seeds=[1]"])
    assert [(run.size, run.batch) for run in experiments.runs_of(depth, "depth")] == [("1l_16h", 32), ("2l_16h", 8)]


def test_a_budget_without_a_unit_is_of_seconds():
    settings = experiments.load(None, ["step_times=0.02", "budget=60", "translate.budget=30.5"])
    run = Pretraining("2l_64h", 32, "none", 100, None, 1)
    assert experiments.updates_of(settings, run) == 60 / 0.02
    command = jobs.command(settings, run)
    assert command[command.index("--budget") + 1] == "60"
    assert settings.translate.budget == "30.5"


def test_paths_are_from_the_root_of_the_checkout(tmp_path, monkeypatch):
    """The jobs run in other folders than the settings were read in."""
    monkeypatch.chdir(tmp_path)
    changes = ["text.files=[my.txt,/their.txt]", "task.source=data/my.tsv", "translate.pairs=pairs.tsv"]
    settings = experiments.load(None, changes)
    assert list(settings.text.files) == [str(ROOT / "my.txt"), "/their.txt"]
    assert settings.task.source == str(ROOT / "data" / "my.tsv")
    assert settings.translate.pairs == str(ROOT / "pairs.tsv")
    assert (experiments.load().task.source, experiments.load().translate.pairs) == (None, None)


@pytest.mark.parametrize(
    ("name", "key"), [("text", "text.files=[{}]"), ("task", "task.source={}"), ("pairs", "translate.pairs={}")]
)
def test_data_depends_on_what_is_in_the_files_of_a_user(tmp_path, name, key):
    path = tmp_path / "mine"

    def told(*changes):
        return jobs.settings_of(experiments.load(None, changes), jobs.Data(name))

    with pytest.raises(UserError, match=str(path)):
        told(key.format(path))
    path.write_text("one")
    before = told(key.format(path))
    assert told(key.format(path)) == before
    path.write_text("two")
    assert told(key.format(path)) != before
    path.unlink()
    path.mkdir()
    (path / "train.tsv").write_text("one")
    before = told(key.format(path))
    (path / "train.tsv").rename(path / "dev.tsv")
    assert told(key.format(path)) != before


def test_data_of_the_pocket_study_is_what_it_was(settings):
    """Studies that were made before files of a user were looked into stay valid."""
    for name, part in (("text", settings.text), ("task", settings.task), ("pairs", settings.translate)):
        told = json.dumps(OmegaConf.to_container(part), sort_keys=True)
        assert jobs.settings_of(settings, jobs.Data(name)) == told


def test_what_a_job_depends_on(settings):
    pretraining = Pretraining("2l_64h", 32, "none", 100, None, 1)

    def told(*changes):
        return jobs.settings_of(experiments.load(None, ["step_times=0.02", *changes]), pretraining)

    same = told()
    for change in (
        "budget=200s",
        "step_times=0.03",
        "pretrain.masked=0.2",
        "model.head_width=8",
        "pretrain.rates.32=1e-3",
    ):
        assert told(change) != same, change
    for change in ("prune.rate=1e-3", "pretrain.rates.8=1e-3", "translate.budget=10s", "seeds=[1]"):
        assert told(change) == same, change


# ------------------------------------------------------------------------------------------------ runs


@pytest.fixture
def own(tmp_path: Path) -> list[str]:
    """Settings with a text, a task and pairs of a user, and a folder for the study."""
    rng = random.Random(1)
    lines = [" ".join(rng.choice(WORDS) for _ in range(12)) for _ in range(2400)]
    (tmp_path / "text.txt").write_text("\n".join(lines) + "\n")
    rows = [f"{' '.join(rng.choice(WORDS[:13]) for _ in range(4))} {word}\t{word}" for word in ("good", "bad") * 120]
    (tmp_path / "task.tsv").write_text("sentence\tlabel\n" + "\n".join(rows) + "\n")
    chosen = [[rng.randrange(len(WORDS)) for _ in range(5)] for _ in range(1500)]
    pairs = ["\t".join(" ".join(words[i] for i in line) for words in (WORDS, FRENCH)) for line in chosen]
    (tmp_path / "pairs.tsv").write_text("\n".join(dict.fromkeys(pairs)) + "\n")
    files = {"text.files": f"[{tmp_path}/text.txt]", "task.source": f"{tmp_path}/task.tsv"}
    files |= {"translate.pairs": f"{tmp_path}/pairs.tsv", "out": f"{tmp_path}/out"}
    return [f"{key}={value}" for key, value in files.items()]


def command(own: list[str], *flags: str) -> list[str]:
    return [sys.executable, str(STUDY), "--config", str(MINIATURE), *flags, "--set", *own]


def study(own: list[str], *flags: str, status: int = 0) -> str:
    done = subprocess.run(command(own, *flags), capture_output=True, text=True, timeout=1500, cwd=ROOT)
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def measured(folder: Path) -> dict[str, bytes]:
    """The measurements, without the date."""
    found = [path for path in sorted(folder.glob("*/*.csv")) if path.name != about.NAME]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.slow
def test_a_miniature_of_every_experiment(own, tmp_path):
    settings = experiments.load(MINIATURE, own)
    names = experiments.names(settings)
    if not (ROOT / settings.translate.python).exists():
        names.remove("translation")
    study(own, "--experiment", ",".join(names))
    results = tmp_path / "out" / "results"
    assert measurements.experiments(results) == names
    points = {name: measurements.read(results / name, measurements.Point) for name in names}
    for name in set(names) - {"sst2_grid", "compression", "weight_error", "convergence", "finetuning", "translation"}:
        runs = {run.name for run in experiments.runs_of(settings, name) if isinstance(run, Pretraining)}
        assert {point.run for point in points[name]} == runs
        ends = {point.run: point.updates for point in points[name]}
        assert set(ends.values()) == {20}, "a second at 0.05 s an update"
    assert {point.data for point in points["dataset_size"]} == {1, 5, 100}
    assert {(p.batch, p.rate) for p in points["batch_size"]} == {(8, 0.0015), (32, 0.003)}
    memory = measurements.read(results / "layer_sharing", measurements.Memory)
    assert sorted(row.share for row in memory) == ["all", "attention", "none"]
    for name, levels in (("compression", 3), ("sst2_grid", 3), ("convergence", 1), ("weight_error", 1)):
        rows = measurements.read(results / name, measurements.Accuracy)
        by_model = {}
        for row in rows:
            assert 0 <= row.accuracy <= 1
            assert row.examples == 48
            by_model.setdefault((row.run, row.checkpoint), set()).add((row.sparsity, row.bits))
        assert all(len(entries) == 4 * levels for entries in by_model.values()), name
    halves = measurements.read(results / "convergence", measurements.Accuracy)
    assert {(row.checkpoint, row.updates) for row in halves} == {(0.5, 10), (1.0, 20)}
    page = (tmp_path / "out" / "report" / "index.html").read_text()
    assert "cannot be told" in page  # one seed
    with open(tmp_path / "out" / "report" / "claims.csv", newline="") as file:
        claims = list(csv.DictReader(file))
    assert {row["verdict"] for row in claims if row["comparison"]} == {"cannot be told"}
    assert {row["verdict"] for row in claims if not row["comparison"]} <= {"not measured"}
    # Again: nothing is run, and the figures stay.
    before = measured(results)
    assert "Nothing to be done" in study(own, "--experiment", ",".join(names))
    assert measured(results) == before
    # Published, one experiment keeps what is there of the others.
    others = tmp_path / "docs" / "pocket" / "beyond"
    others.mkdir(parents=True)
    (others / "curves.csv").write_bytes((results / "depth" / "curves.csv").read_bytes())
    (tmp_path / "docs" / "pocket" / "depth").mkdir()
    (tmp_path / "docs" / "pocket" / "depth" / "memory.csv").write_text("old")
    study(own, "--report-only", "--experiment", "depth", "--publish", str(tmp_path / "docs"))
    published = measured(tmp_path / "docs" / "pocket")
    assert set(published) == {"beyond/curves.csv", "depth/curves.csv"}
    assert published["depth/curves.csv"] == before["depth/curves.csv"]
    assert about.read(tmp_path / "docs" / "pocket") == about.read(results)
    assert "Deeper models" in (tmp_path / "docs" / "report" / "index.html").read_text()


@pytest.mark.slow
def test_killed_anywhere_it_comes_to_the_same_figures(own, tmp_path):
    """The study, Snakemake and job.py are killed at once; a pretraining is left behind, as where a terminal goes."""
    longer = [*own, "budget=4s", "step_times=0.02", "experiments.compression.pretrain.size=[1l_16h]"]
    study([*longer, f"out={tmp_path}/whole"], "--experiment", "compression")
    for made in ("pretrain/*/checkpoint_1_*.pt", "finetune/*/*/checkpoint_last.pt", "prune/*/*/ladder.jsonl"):
        process = subprocess.Popen(
            command(longer, "--experiment", "compression"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            start_new_session=True,
        )
        wait_for(lambda made=made: list((tmp_path / "out").glob(made)), process)
        left = kill_all_but_the_training(process.pid)
        process.wait()
        if "pretrain" in made:
            assert left
            continue
        for trainer in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                trainer.kill()
    assert not (tmp_path / "out" / "results").exists()
    study(longer, "--experiment", "compression")
    assert measured(tmp_path / "out" / "results") == measured(tmp_path / "whole" / "results")


@pytest.fixture
def training(own, tmp_path):
    """A study in whose folder `out` a model is trained; and what it has started, as soon as it does."""
    process = subprocess.Popen(
        command([*own, "budget=300s"], "--experiment", "depth"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as of `&` in a script
    )
    started = []
    try:
        wait_for(lambda: list((tmp_path / "out").glob("pretrain/*/run.jsonl")), process)
        started = psutil.Process(process.pid).children(recursive=True)
        yield process, started
    finally:
        for each in [*started, process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_end_it_ends_with_all_that_it_started(training, tmp_path, number):
    """Alone, as by `kill`: a terminal's Ctrl-C goes to its children too."""
    process, started = training
    process.send_signal(number)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "run the same command again" in said
    assert not any(each.is_running() for each in started)
    for log in (tmp_path / "out").glob("pretrain/*/run.jsonl"):
        assert "SIGTERM" in log.read_text()


@pytest.mark.slow
def test_where_only_the_study_was_killed_there_is_no_second_one(own, training):
    process, (snakemake, *_) = training
    process.kill()
    process.wait()
    assert "a study, or what is left of a killed one, is at work" in study(own, "--experiment", "depth", status=2)
    os.killpg(snakemake.pid, signal.SIGINT)
    snakemake.wait(600)
    assert "a study" not in study(own, "--experiment", "depth", "--report-only")


def kill_all_but_the_training(pid: int) -> list[psutil.Process]:
    """SIGKILL to a process and its children, those that train excepted, which are given back."""
    study = psutil.Process(pid)
    left = []
    for process in [study, *study.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            if "fairseq_cli.train" in process.cmdline():
                left.append(process)
            else:
                process.kill()
    return left


def wait_for(happens, process) -> None:
    for _ in range(6000):
        if happens():
            return
        assert process.poll() is None, "the study ended before it could be killed"
        time.sleep(0.1)
    raise AssertionError("it never happened")


def test_what_was_measured_with_other_settings_is_not_in_the_report(own, tmp_path):
    results = tmp_path / "out" / "results"
    shutil.copytree(ROOT / "docs" / "results" / "pocket" / "width", results / "width")
    assert "jobs are not done" in study(own, "--report-only", "--experiment", "depth")
    assert measured(results) == {}
    assert about.read(results) == {}


@pytest.mark.slow
def test_a_job_that_fails_takes_no_other_down(own, tmp_path):
    """A pretraining is made to fail by a folder that lies where its lock is to be."""
    name = Pretraining("1l_16h", 32, "none", 100, None, 1).name
    lock = tmp_path / "out" / "locks" / f"pretrain.{name}"
    lock.mkdir(parents=True)
    output = study(own, "--experiment", "depth", status=1)
    other = Pretraining("2l_16h", 32, "none", 100, None, 1).name
    results = tmp_path / "out" / "results"
    assert {point.run for point in measurements.read(results / "depth", measurements.Point)} == {other}
    assert f"pretrain/{name}" in output
    output = study(own, "--report-only", "--experiment", "depth", "--publish", str(tmp_path / "docs"), status=2)
    assert "no experiment is finished" in output.splitlines()[-1]
    assert not (tmp_path / "docs").exists()
    before = (tmp_path / "out" / "pretrain" / other / "run.jsonl").read_bytes()
    lock.rmdir()
    study(own, "--experiment", "depth")
    assert {point.run for point in measurements.read(results / "depth", measurements.Point)} == {name, other}
    assert (tmp_path / "out" / "pretrain" / other / "run.jsonl").read_bytes() == before


def test_a_cluster_is_told_how_many_jobs_at_a_time(own, tmp_path, monkeypatch):
    """An executor of a cluster does nothing without --jobs; --cores is for this machine."""
    settings = experiments.load(MINIATURE, own)
    started = []
    monkeypatch.setattr(study_program, "started", lambda words, *_, **__: started.append(words) or ended())
    options = study_program._parser().parse_args(["--jobs", "50", "--", "--executor", "slurm"])
    study_program._run_jobs(settings, ["depth"], tmp_path, options, lock=0)
    (words,) = started
    assert [words[words.index(flag) + 1] for flag in ("--jobs", "--cores", "--executor")] == ["50", "50", "slurm"]


@contextlib.contextmanager
def ended():
    """What `processes.started` gives, of a process that came to its end."""
    yield SimpleNamespace(wait=lambda: 0), []


@pytest.mark.parametrize(
    ("flags", "changes", "named"),
    [
        (("--experiment", "dept"), [], "dept"),
        ((), ["budget=never"], "never"),
        (("--experiment", "depth"), ["text.files=[nowhere.txt]"], "nowhere.txt"),
        (("--experiment", "depth"), ["step_times=nowhere.csv"], "nowhere.csv"),
        (("--config", "nowhere.yaml"), [], "nowhere.yaml"),
        (("--against", "nowhere"), [], "--against nowhere"),
        (("--against", "docs/results"), [], "--against docs/results"),
        (("--jobs", "-2"), [], "--jobs -2"),
    ],
)
def test_bad_flags_are_one_sentence(own, flags, changes, named):
    output = study([*own, *changes], *flags, status=2)
    assert named in output.splitlines()[-1]
    assert "Traceback" not in output
