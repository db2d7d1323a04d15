"""Run logs of either tool, read straight from their folders; and the subcommand that takes them."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report.invented import T2T_FACTS, make_translation_model, write_run_log

from train_large import cli, runlog
from train_large.errors import UserError
from train_large.report import results as results_module
from train_large.report import runs as module
from train_large.report.results import Budget, Decoding


def counters(updates):
    return dict(zip(runlog.COUNTERS, (updates, updates / 10, updates / 5, updates * 64, updates * 1e9)))


def log(folder, *lines):
    """A run log of (kind, updates, fields) lines; returns its folder."""
    for kind, updates, fields in lines:
        runlog.append(str(folder / runlog.NAME), kind, counters(updates), **fields)
    return folder


def test_runs_are_what_their_logs_say(t2t_runs, translation):
    runs = module.read_runs(t2t_runs)
    assert runs.title == "study: 2l_64h, 2l_128h, 2l_256h, 6l_256h"
    assert (runs.problem, runs.budget) == ("translate_enfr_pairs", Budget(180.0, "train"))
    assert runs.decodings == (Decoding(250, 4, 0.6),)
    for run, model, folder in zip(runs.models, translation.models, t2t_runs, strict=True):
        same = ("name", "layers", "hidden", "heads", "parameters", "updates", "train_seconds", "flops", "perplexity")
        assert [getattr(run, name) for name in same] == [getattr(model, name) for name in same]
        assert run.curve == model.curve
        assert run.tokens == 1024 * model.updates
        assert run.run_log == str(folder / "run.jsonl")
        assert (run.learning_rate, run.parameters_without_embeddings) == (None, None)  # not invented


def test_a_run_of_a_study_can_be_made_into_a_model(t2t_runs, translation):
    run, model = module.read_runs(t2t_runs).models[0], translation.models[0]
    besides = {
        name: getattr(model, name) for name in ("learning_rate", "parameters_without_embeddings", "run_log", "scores")
    }
    assert results_module.TranslationModel(**{**vars(run), **besides}) == model


def test_fairseq_logs_do_not_know_everything(tmp_path):
    small, large = (make_translation_model(f"2l_{h}h", 2, h, 1, h, h, 500, 9.0, 5.0) for h in (64, 128))
    for model in (small, large):
        for point in model["curve"]:
            del point["approx_bleu"]
            point.pop("bleu", None)
    facts = {"budget_seconds": None, "budget_clock": "train"}
    folders = [write_run_log(tmp_path / m["name"] / "pretrain", m, facts) for m in (large, small)]
    runs = module.read_runs(folders)
    assert (runs.budget, runs.problem, runs.decodings) == (None, None, ())
    assert {run.parameters for run in runs.models} == {None}
    assert [run.name for run in runs.by_size] == ["2l_64h", "2l_128h"]  # by FLOPs per token
    assert {point.bleu for run in runs.models for point in run.curve} == {None}


@pytest.mark.parametrize("subset", ["valid", "dev"])
def test_the_subset_of_either_tool_counts(tmp_path, subset):
    lines = [("valid", 10, {"subset": name, "perplexity": p}) for name, p in (("test", 2.0), (subset, 3.0))]
    (run,) = module.read_runs([log(tmp_path, *lines)]).models
    assert [point.perplexity for point in run.curve] == [3.0]


def test_a_checkpoint_evaluated_late_does_not_end_the_run(tmp_path):
    measured = {"subset": "dev", "perplexity": 5.0, "bleu": 1.0}
    folder = log(tmp_path, ("start", 0, {}), ("stop", 300, {"reason": "budget"}), ("valid", 200, measured))
    (run,) = module.read_runs([folder]).models
    assert (run.updates, run.train_seconds, run.tokens) == (300, 30.0, 300 * 64)
    assert [point.updates for point in run.curve] == [200]


def test_bleu_and_perplexity_of_two_lines_make_one_point(tmp_path):
    folder = log(
        tmp_path,
        ("valid", 10, {"subset": "dev", "perplexity": 5.0, "bleu": 7.0, "approx_bleu": 9.0}),
        ("valid", 10, {"subset": "dev", "perplexity": 4.5, "bleu": None}),
        ("valid", 20, {"subset": "dev", "perplexity": 4.0}),
    )
    curve = results_module.curve_from_run_log(folder / runlog.NAME, "dev")
    assert [(p.updates, p.perplexity, p.bleu, p.approx_bleu) for p in curve] == [
        (10, 4.5, 7.0, 9.0),
        (20, 4.0, None, None),
    ]


def test_what_a_resume_says_replaces_what_the_start_said(tmp_path):
    facts = {"budget_clock": "train", "problem": "p"}
    folder = log(
        tmp_path,
        ("start", 0, {**facts, "budget_seconds": 60.0, "parameters": 1000.0}),
        ("resume", 50, {**facts, "budget_seconds": 90}),
    )
    runs = module.read_runs([folder])
    assert runs.budget == Budget(90.0, "train")
    assert runs.models[0].parameters == 1000
    assert runs.models[0].perplexity is None
    assert runs.title == tmp_path.name


CALIBRATED = {"budget_seconds": 100.0, "budget_clock": "calibrated", "seconds_per_update": 0.5}


@pytest.mark.parametrize(
    ("budget", "of_point", "clock"),
    [
        ({**CALIBRATED, "budget_clock": "train"}, lambda point: None, "train"),
        ({**CALIBRATED, "budget_clock": "wall"}, lambda point: 7 + 2 * point["train_seconds"], "wall"),
        (CALIBRATED, lambda point: point["updates"] / 2, "calibrated"),
        ({**CALIBRATED, "seconds_per_update": None}, lambda point: None, "train"),
    ],
)
def test_time_is_that_of_the_clock_of_the_budget(tmp_path, budget, of_point, clock):
    model = make_translation_model("2l_64h", 2, 64, 1, 900, 100, 500, 9.0, 5.0)
    study = module.read_runs([write_run_log(tmp_path, model, {**T2T_FACTS, **budget})])
    (run,) = study.models
    expected = [of_point(point) for point in model["curve"]]
    assert [point.used_seconds for point in run.curve] == expected
    assert [point.train_seconds for point in run.curve] == [point["train_seconds"] for point in model["curve"]]
    assert (run.used_seconds, study.clock) == (expected[-1], clock)
    measured = [point["train_seconds"] for point in model["curve"]] if clock == "train" else expected
    assert [point.seconds_on(study.clock) for point in run.curve] == measured


def test_the_wall_clock_after_the_last_update_is_not_time_that_was_trained_for(tmp_path):
    folder = log(tmp_path, ("start", 0, {**CALIBRATED, "budget_clock": "wall"}), ("train", 500, {}))
    measured = {"subset": "valid", "perplexity": 2.0}
    for kind, fields in (("valid", measured), ("stop", {"reason": "budget"})):
        after = {**counters(500), "wall_seconds": 140.0, "train_seconds": 50.1}
        runlog.append(str(folder / runlog.NAME), kind, after, **fields)
    (run,) = module.read_runs([folder]).models
    assert (run.used_seconds, run.curve[0].used_seconds) == (100.0, 140.0)


def test_runs_without_a_budget_in_common_are_told_by_the_training_clock(tmp_path):
    model = make_translation_model("2l_64h", 2, 64, 1, 900, 100, 500, 9.0, 5.0)
    budgets = (CALIBRATED, {**CALIBRATED, "budget_seconds": 50.0})
    study = module.read_runs(
        [write_run_log(tmp_path / str(i), model, {**T2T_FACTS, **b}) for i, b in enumerate(budgets)]
    )
    assert (study.budget, study.clock) == (None, "train")


def test_runs_with_different_budgets_and_decodings(tmp_path):
    model = make_translation_model("2l_64h", 2, 64, 1, 900, 100, 500, 9.0, 5.0)
    folders = [
        write_run_log(
            tmp_path / str(seconds),
            model,
            {**T2T_FACTS, "budget_seconds": seconds, "budget_clock": "train"},
            bleu_sentences=seconds,
            beam_size=1,
            alpha=0,
        )
        for seconds in (60, 90)
    ]
    runs = module.read_runs(folders)
    assert runs.budget is None
    assert runs.decodings == (Decoding(60, 1, 0.0), Decoding(90, 1, 0.0))


@pytest.mark.parametrize(
    ("folders", "parent", "names"),
    [
        (["/a/study/2l_64h/train", "/a/study/2l_128h/train"], "study", ["2l_64h", "2l_128h"]),
        (["/a/one"], "", ["one"]),
        (["/one", "/two"], "", ["one", "two"]),
        (["/a/run", "/a/run/finetune"], "a", ["run", "run/finetune"]),
        (["/a/x/1", "/a/y/2"], "a", ["x/1", "y/2"]),
    ],
)
def test_names(folders, parent, names):
    assert module.names_of([Path(folder) for folder in folders]) == (parent, names)


parts = st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(lambda names: Path("/", *names))


@given(st.lists(parts, min_size=1, max_size=5, unique=True))
def test_names_are_as_different_as_the_folders(folders):
    _, names = module.names_of(folders)
    assert len(set(names)) == len(folders)
    assert all(name and f"/{name}/" in f"{folder}/" for name, folder in zip(names, folders, strict=True))


# ------------------------------------------------------------------------------------------------ bad input


def refused(*paths):
    with pytest.raises(UserError) as caught:
        module.load_study(list(paths))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_reported_is_one_sentence(tmp_path, t2t_runs, translation):
    file = tmp_path / "results.json"
    results_module.save(translation, file)
    assert module.load_study([file]) == translation
    assert f"{file} is not the folder of a run" in refused(file, t2t_runs[0])
    assert f"{tmp_path} holds no run.jsonl" in refused(tmp_path)
    assert f"{tmp_path / 'nowhere'} holds no run.jsonl" in refused(t2t_runs[0], tmp_path / "nowhere")
    assert f"{t2t_runs[0]} is given twice" in refused(t2t_runs[0], t2t_runs[0])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "run.jsonl").write_text("")
    assert "is empty: the run has not begun" in refused(tmp_path / "empty")
    (tmp_path / "empty" / "run.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refused(tmp_path / "empty")
    (tmp_path / "empty" / "run.jsonl").write_text('{"kind": "lunch"}\n')
    assert "line 1: not a line of a run log" in refused(tmp_path / "empty")


def test_a_run_log_may_be_named_itself(t2t_runs):
    assert module.load_study([folder / "run.jsonl" for folder in t2t_runs]) == module.load_study(t2t_runs)


def test_runs_of_different_tools_or_problems_are_not_compared(tmp_path, t2t_runs):
    other = log(tmp_path / "other", ("start", 0, {"problem": "translate_enfr_wmt14"}))
    told = refused(t2t_runs[0], other)
    assert "translate_enfr_pairs" in told
    assert "translate_enfr_wmt14" in told
    fairseq = log(tmp_path / "fairseq", ("start", 0, {"arch": "prenorm_roberta"}))
    assert "of fairseq" in refused(t2t_runs[0], fairseq)


@pytest.mark.parametrize(
    ("kind", "fields", "told"),
    [
        ("start", {"parameters": "many"}, "parameters is 'many', not a whole number"),
        ("start", {"parameters": 0}, "parameters is 0, and must be at least 1"),
        ("start", {"budget_clock": "moon"}, "budget_clock is 'moon'"),
        ("start", {"seconds_per_update": "fast"}, "seconds_per_update is 'fast', not a number"),
        ("valid", {"subset": "dev", "perplexity": 2.0, "bleu": 100.5}, "bleu is 100.5, and must be from 0 to 100"),
        ("valid", {"subset": "dev", "perplexity": None}, "perplexity is None, not a number"),
        ("valid", {"subset": "dev", "bleu": 1.0}, "a validation line has no 'perplexity'"),
        (
            "valid",
            {"subset": "dev", "perplexity": 2.0, "bleu": 1.0, "bleu_sentences": 0, "beam_size": 1, "alpha": 1},
            "sentences is 0, and must be at least 1",
        ),
    ],
)
def test_a_wrong_number_is_named_with_its_log(tmp_path, kind, fields, told):
    message = refused(log(tmp_path, (kind, 10, fields)))
    assert str(tmp_path / "run.jsonl") in message
    assert told in message


# ------------------------------------------------------------------------------------------------ the subcommand


def test_report_of_run_logs(t2t_runs, tmp_path, capsys):
    page, csv = tmp_path / "page.html", tmp_path / "runs.csv"
    assert cli.main(["report", *map(str, t2t_runs), "--page", str(page), "--csv", str(csv)]) == 0
    out = capsys.readouterr().out
    assert "4 runs of Tensor2Tensor’s problem translate_enfr_pairs" in out
    assert f"wrote {page}" in out
    assert "BLEU against time" in page.read_text(encoding="utf-8")
    assert len(csv.read_text().splitlines()) == 1 + 4 * 10


@pytest.mark.parametrize("flag", [["--memory-limit", "2MB"], ["--weight-error-csv", "errors.csv"]])
def test_what_is_for_compressed_models_is_refused(t2t_runs, tmp_path, capsys, monkeypatch, flag):
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir())
    assert cli.main(["report", *map(str, t2t_runs), *flag, "--page", "page.html"]) == 2
    error = capsys.readouterr().err
    assert flag[0] in error
    assert error.count("\n") == 1
    assert sorted(os.listdir()) == before
