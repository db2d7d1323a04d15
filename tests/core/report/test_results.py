import copy
import json
import os
import stat
from dataclasses import replace

import pytest

from train_large.errors import UserError
from train_large.report import results as module
from train_large.report.claims import judge_claims


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_what_is_saved_is_loaded(results, value, tmp_path):
    path = tmp_path / "new" / "results.json"
    module.save(results, path)
    assert json.loads(path.read_text(encoding="utf-8")) == value  # no field lost, none invented, none renamed
    assert module.load(path) == results
    judged = replace(results, claims=judge_claims(results))
    module.save(judged, path)
    assert module.load(path) == judged
    assert os.listdir(path.parent) == ["results.json"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_what_newer_files_have_is_optional(results, new_results, new_value, tmp_path):
    path = tmp_path / "results.json"
    module.save(new_results, path)
    assert json.loads(path.read_text(encoding="utf-8")) == new_value
    assert module.load(path) == new_results
    # An older file: no such fields, and none are invented when it is saved again.
    assert {entry.file_bytes for model in results.models for entry in model.compressed} == {None}
    assert {model.weight_errors for model in results.models} == {None}
    module.save(results, path)
    assert "file_bytes" not in path.read_text()
    assert "weight_errors" not in path.read_text()
    assert (results.has_files, new_results.has_files) == (False, True)
    old, new = results.models[2].at(0.45, 6), new_results.models[2].at(0.45, 6)
    assert old.stored_bytes == old.bytes == new.bytes
    assert new.stored_bytes == new.file_bytes != new.bytes


def test_what_was_used_on_another_clock_is_saved_where_it_is_known(results, tmp_path):
    path = tmp_path / "results.json"
    module.save(results, path)
    assert "used_seconds" not in path.read_text()
    models = tuple(
        replace(m, used_seconds=1.5, curve=tuple(replace(p, used_seconds=0.5) for p in m.curve)) for m in results.models
    )
    calibrated = replace(results, models=models, budget=module.Budget(600.0, "calibrated"))
    module.save(calibrated, path)
    assert module.load(path) == calibrated
    assert (results.clock, calibrated.clock) == ("train", "calibrated")
    half = replace(calibrated, models=(*models[:-1], replace(models[-1], curve=results.models[-1].curve)))
    assert half.clock == "train"


def test_a_verdict_left_open_is_saved_as_null(results, tmp_path):
    path = tmp_path / "results.json"
    module.save(replace(results, claims=(module.Claim("c", "3", None, "m"),)), path)
    assert json.loads(path.read_text())["claims"][0]["shows"] is None
    assert module.load(path).claims[0].shows is None


def test_weight_errors_are_found_by_what_was_done(new_results):
    model = new_results.models[1]
    pruned = model.weight_errors_at(0.6, 32)
    assert [error for error in model.weight_errors if error.sparsity == 0.6] == list(pruned.values())
    assert pruned["fc1"].kind == "fc1"
    assert model.weight_errors_at(0.6, 4) == {}
    error = model.weight_errors_at(0.0, 4)["fc2"]
    assert error.normalized == pytest.approx(0.0104 / 0.09)
    assert replace(error, deviation=0.0).normalized is None


def test_a_translation_study_is_saved_and_loaded(translation, translation_value, tmp_path):
    path = tmp_path / "results.json"
    module.save(translation, path)
    assert json.loads(path.read_text(encoding="utf-8")) == translation_value
    assert module.load(path) == translation
    assert isinstance(translation, module.TranslationResults)
    judged = replace(translation, claims=judge_claims(translation))
    module.save(judged, path)
    assert module.load(path) == judged
    # What may be absent, absent.
    bare = replace(
        translation,
        translation=replace(translation.translation, curve_decoding=None),
        models=tuple(
            replace(m, curve=m.curve[:1], scores=replace(m.scores, paper_error=None)) for m in translation.models
        ),
    )
    module.save(bare, path)
    assert "curve_decoding" not in path.read_text()
    assert "paper_error" not in path.read_text()
    assert module.load(path) == bare


TRANSLATION_CHANGES = [
    (("machine", "tensorflow"), 2, "machine.tensorflow is 2, not a text"),
    (("machine", "torch"), "2.13.0", "machine.torch is not a field of this format"),
    (("task",), {}, "task is not a field of this format"),
    (("translation",), None, "translation is not an object"),
    (("translation", "test"), 0, "translation.test is 0, and must be at least 1"),
    (("translation", "decoding", "alpha"), "0.6", "translation.decoding.alpha is '0.6', not a number"),
    (("translation", "decoding", "sentences"), 1001, "translation.decoding.sentences is 1001, more than the 1000"),
    (("translation", "curve_decoding", "sentences"), 901, "translation.curve_decoding.sentences is 901, more than the"),
    (("translation", "curve_measure"), "paper", "translation.curve_measure is not a field of this format"),
    (("models", 1, "scores", "paper"), 100.5, "models[1].scores.paper is 100.5, and must be from 0 to 100"),
    (("models", 1, "scores", "t2t"), None, "models[1].scores.t2t is None, not a number"),
    (("models", 1, "scores", "paper_error"), None, "models give scores.paper_error for some sizes and not for others"),
    (("models", 1, "finetuned"), {}, "models[1].finetuned is not a field of this format"),
    (("models", 1, "parameters"), None, "models[1].parameters is None, not a whole number"),
    (("models", 1, "curve", 1, "bleu"), -1, "models[1].curve[1].bleu is -1, and must be from 0 to 100"),
    (("models", 1, "curve", 1, "updates"), 1, "models[1].curve[1].updates does not rise"),
    (("models", 1, "name"), "2l_64h", "models[1].name '2l_64h' is there twice"),
    (("models",), [], "models is empty"),
    (("created",), "yesterday", "created is 'yesterday', not an ISO"),
]


@pytest.mark.parametrize(("where", "what", "message"), TRANSLATION_CHANGES, ids=[m for _, _, m in TRANSLATION_CHANGES])
def test_a_wrong_field_of_a_translation_study_is_named(translation_value, tmp_path, where, what, message):
    target = translation_value
    for step in where[:-1]:
        target = target[step]
    target[where[-1]] = what
    path = write(tmp_path / "results.json", translation_value)
    with pytest.raises(UserError) as caught:
        module.load(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_bleu_on_a_curve_must_say_how_it_was_made(translation_value):
    del translation_value["translation"]["curve_decoding"]
    with pytest.raises(ValueError, match=r"models\[0\].curve\[1\].bleu is there, but not translation.curve_decoding"):
        module.parse(translation_value)


NEW_CHANGES = [
    (("compressed", 3, "file_bytes"), 0, "models[1].compressed[3].file_bytes is 0, and must be at least 1"),
    (("compressed", 3, "file_bytes"), 5.5, "models[1].compressed[3].file_bytes is 5.5, not a whole number"),
    (("compressed", 3, "file_bytes"), None, "models give file_bytes for some entries of compressed and not for others"),
    (("weight_errors", 2, "mean"), float("nan"), "models[1].weight_errors[2].mean is nan, not a finite number"),
    (("weight_errors", 2, "variance"), -1.0, "models[1].weight_errors[2].variance is -1.0, and must be at least 0"),
    (
        ("weight_errors", 2, "kind"),
        "attention out",
        "models[1].weight_errors[2] repeats 'attention out' at sparsity 0.0",
    ),
    (("weight_errors", 2, "bits"), 5, "models[1].weight_errors[2].bits is 5"),
]


@pytest.mark.parametrize(("where", "what", "message"), NEW_CHANGES, ids=[message for _, _, message in NEW_CHANGES])
def test_a_wrong_new_field_is_named(new_value, where, what, message):
    target = new_value["models"][1]
    for step in where[:-1]:
        target = target[step]
    target[where[-1]] = what
    with pytest.raises(ValueError, match="models") as caught:
        module.parse(new_value)
    assert str(caught.value).startswith(message)


CHANGES = [
    (("format",), 2, "format is 2, not 1"),
    (("format",), True, "format is True"),
    (("created",), "yesterday", "created is 'yesterday', not an ISO"),
    (("models",), [], "models is empty"),
    (("models",), {}, "models is not a list"),
    (("machine",), "fast", "machine is not an object"),
    (("machine", "cores"), 0, "machine.cores is 0, and must be at least 1"),
    (("machine", "cores"), 2.0, "machine.cores is 2.0, not a whole number"),
    (("machine", "cores"), True, "machine.cores is True, not a whole number"),
    (("budget", "clock"), "moon", "budget.clock is 'moon', not 'train' or 'wall' or 'calibrated'"),
    (("budget", "seconds"), "600", "budget.seconds is '600', not a number"),
    (("task", "majority"), 50.3, "task.majority is 50.3, and must be from 0 to 1"),
    (("models", 1, "perplexity"), float("inf"), "models[1].perplexity is inf, not a finite number"),
    (("models", 1, "perplexity"), float("nan"), "models[1].perplexity is nan, not a finite number"),
    (("models", 1, "perplexity"), 0.5, "models[1].perplexity is 0.5, and must be at least 1"),
    (("models", 1, "name"), "2l_32h", "models[1].name '2l_32h' is there twice"),
    (("models", 0, "name"), None, "models[0].name is None, not a text"),
    (("models", 2, "curve", 3, "updates"), 1, "models[2].curve[3].updates does not rise"),
    (("models", 2, "compressed", 5, "bits"), 5, "models[2].compressed[5].bits is 5, not 32 or 8 or 6 or 4"),
    (("models", 2, "compressed", 5, "bits"), 8.0, "models[2].compressed[5].bits is 8.0"),
    (("models", 2, "compressed", 5, "nonzero"), 10**9, "models[2].compressed[5].nonzero is more than its parameters"),
    (("models", 2, "compressed", 4, "sparsity"), 0.0, "models[2].compressed[4] repeats sparsity 0.0 at 32 bits"),
    (("models", 2, "compressed", 5, "recovered"), 1, "models[2].compressed[5].recovered is 1, not true or false"),
    (("models", 0, "finetuned", "acuracy"), 0.5, "models[0].finetuned.acuracy is not a field of this format"),
    (("claims",), [{"claim": "c", "section": "3", "shows": "yes", "measured": ""}], "claims[0].shows is 'yes'"),
]


@pytest.mark.parametrize(("where", "what", "message"), CHANGES, ids=[message for _, _, message in CHANGES])
def test_a_wrong_field_is_named_with_its_file(value, tmp_path, where, what, message):
    target = value
    for step in where[:-1]:
        target = target[step]
    target[where[-1]] = what
    path = write(tmp_path / "results.json", value)
    with pytest.raises(UserError) as caught:
        module.load(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def all_fields(value, where=""):
    """Every (object, key, dotted name) in plain JSON."""
    if isinstance(value, dict):
        for key in value:
            yield value, key, f"{where}.{key}".lstrip(".")
            yield from all_fields(value[key], f"{where}.{key}".lstrip("."))
    elif isinstance(value, list) and value:
        yield from all_fields(value[0], f"{where}[0]")


def test_every_missing_field_is_named(value):
    names = [name for _, _, name in all_fields(value)]
    assert "models[0].compressed[0].bytes_paper" in names
    for name in names:
        broken = copy.deepcopy(value)
        target, key = next((target, key) for target, key, other in all_fields(broken) if other == name)
        del target[key]
        with pytest.raises(ValueError, match="missing") as caught:
            module.parse(broken)
        assert str(caught.value) == f"{name} is missing"


@pytest.mark.parametrize("text", ["", "{", "[1, 2", "\x00"])
def test_what_is_not_json(tmp_path, text):
    path = write(tmp_path / "results.json", text)
    with pytest.raises(UserError, match="is not JSON") as caught:
        module.load(path)
    assert str(path) in str(caught.value)


def test_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match="Cannot read .*nowhere.json"):
        module.load(tmp_path / "nowhere.json")
    with pytest.raises(UserError, match="Cannot read"):
        module.load(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="binary.json is not JSON"):
        module.load(tmp_path / "binary.json")


def test_nothing_wrong_is_saved_over_what_is_there(results, tmp_path):
    path = write(tmp_path / "results.json", "as it was")
    broken = replace(results, budget=replace(results.budget, seconds=float("inf")))
    with pytest.raises(ValueError, match="budget.seconds"):
        module.save(broken, path)
    assert path.read_text() == "as it was"


def test_a_full_disk_leaves_what_was_there(results, tmp_path, monkeypatch):
    path = write(tmp_path / "results.json", "as it was")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="could not be written .*No space left on device"):
        module.save(results, path)
    assert path.read_text() == "as it was"
    assert os.listdir(tmp_path) == ["results.json"]


def log_line(kind, updates, **more):
    counters = {
        "train_seconds": updates / 10,
        "wall_seconds": updates / 5,
        "tokens": updates * 64,
        "flops": updates * 1e9,
    }
    return json.dumps({"kind": kind, "updates": updates, **counters, **more}) + "\n"


def valid(updates, perplexity, subset="valid"):
    return log_line("valid", updates, subset=subset, loss=0.0, perplexity=perplexity)


def test_curve_from_a_run_log(tmp_path):
    path = write(
        tmp_path / "run.jsonl",
        log_line("start", 0)
        + log_line("train", 50, loss=6.0)
        + valid(100, 900.0)
        + valid(100, 1.5, subset="test")
        + log_line("checkpoint", 150)
        + valid(200, 800.0)  # lost by the kill: its point is measured anew at 210
        + log_line("resume", 150)
        + valid(210, 700.0)
        + valid(300, 600.0)
        + valid(300, 599.0)  # the last validation at the stop
        + log_line("stop", 300)
        + valid(400, 500.0)[:-20],
    )
    curve = module.curve_from_run_log(path)
    assert [(p.updates, p.train_seconds, p.flops, p.perplexity) for p in curve] == [
        (100, 10.0, 100e9, 900.0),
        (210, 21.0, 210e9, 700.0),
        (300, 30.0, 300e9, 599.0),
    ]
    assert [p.perplexity for p in module.curve_from_run_log(path, subset="test")] == [1.5]


def test_a_run_log_that_lacks_a_number_is_named(tmp_path):
    path = write(tmp_path / "run.jsonl", log_line("valid", 100, subset="valid", loss=1.0))
    with pytest.raises(UserError, match="run.jsonl: a validation line has no 'perplexity'"):
        module.curve_from_run_log(path)
    write(path, valid(100, 0.2))
    with pytest.raises(UserError, match="run.jsonl: in a validation line, perplexity is 0.2"):
        module.curve_from_run_log(path)
    with pytest.raises(UserError):
        module.curve_from_run_log(tmp_path / "nowhere.jsonl")
