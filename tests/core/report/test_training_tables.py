"""The table of a translation study and of run logs, and the sentences about it."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from train_large.report import training_tables as module
from train_large.report.claims import judge_claims
from train_large.report.runs import read_runs
from train_large.report.tables import print_report, training_table


def printed(study, **console):
    file = io.StringIO()
    print_report(study, console=Console(file=file, highlight=False, **console))
    return file.getvalue()


def cells(study):
    """The table as printed: each row's words, with the headings as one row."""
    file = io.StringIO()
    Console(file=file, width=80).print(training_table(study))
    above, below = file.getvalue().split("──", 1)
    return above.split()[above.split().index("model") :], [
        line.split() for line in below.splitlines()[1:] if line.strip()
    ]


def test_the_table_holds_what_was_measured(translation, t2t_runs):
    heading, rows = cells(translation)
    assert heading == ["model", "parameters", "BLEU", "BLEU", "sacreBLEU", "perplexity", "updates", "seconds"]
    assert rows == [
        ["2l_64h", "760k", "9.41", "10.52", "9.10", "21.0", "5,400", "180.0"],
        ["2l_128h", "1.94M", "14.91", "16.02", "14.60", "14.2", "3,300", "180.0"],
        ["2l_256h", "5.70M", "17.61", "18.72", "17.30", "12.9", "1,400", "180.0"],
        ["6l_256h", "13.1M", "6.31", "7.42", "6.00", "31.0", "520", "180.0"],
    ]
    heading, rows = cells(read_runs(t2t_runs))
    assert rows[0] == ["2l_64h", "760k", "9.10", "21.0", "5,400", "180.0"]  # the dev set's BLEU


@pytest.mark.parametrize("names", [("2l_1024h", "8l_2048h"), ("2l_64h", "2l_128h")])
def test_80_columns_hold_large_models(translation, names):
    models = [
        replace(model, name=name, parameters=838_000_000 + i, updates=345_678, train_seconds=993_600.0)
        for i, (model, name) in enumerate(zip(translation.models, names))
    ]
    text = printed(replace(translation, models=tuple(models)))
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "993,600 " in text


def test_everything_is_said(translation, t2t_runs):
    text = " ".join(printed(translation).split())
    assert "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.4.3" in text
    assert "1,000 sentences, beam size 4, alpha 0.6, the last 4 checkpoints averaged" in text
    assert "Standard error of the paper’s BLEU: 0.41 or less (bootstrap)" in text
    assert "Train this: 2l_256h, BLEU 17.61" in text
    for claim in judge_claims(translation):
        assert claim.measured in text
    single = " ".join(printed(read_runs(t2t_runs[:1])).split())
    assert single.startswith("train 1 run of Tensor2Tensor’s problem translate_enfr_pairs, read from the run logs.")
    assert "claims" not in single


def test_what_was_used_on_another_clock_has_a_column(translation):
    models = tuple(replace(model, used_seconds=993_600.0 + i) for i, model in enumerate(translation.models))
    study = replace(translation, models=models)
    columns = [column for column in module.columns_of(study, on_page=False) if column.heading == "budget seconds"]
    assert [column.of(model) for column in columns for model in models] == [993_600.0 + i for i in range(4)]
    text = printed(study)
    assert "budget seconds are by the clock of the budget" in " ".join(text.split())
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "budget seconds" not in " ".join(printed(translation).split())


def test_the_best_of_each_kind_is_marked(translation, t2t_runs):
    for column in module.columns_of(translation, on_page=True):
        marked = [model.name for model in translation.models if module.is_best(translation, column, model)]
        assert marked == (["2l_256h"] if column.best else []), column.heading
    alone = read_runs(t2t_runs[:1])
    assert not any(module.is_best(alone, c, alone.models[0]) for c in module.columns_of(alone, on_page=True))
    coloured = printed(translation, force_terminal=True, color_system="standard", width=80)
    assert len(re.findall(r"\x1b\[1m *(?:17\.61|18\.72|17\.30|12\.9)\x1b", coloured)) == 4


def test_columns_that_no_run_knows_are_left_out(t2t_runs):
    runs = read_runs(t2t_runs)
    run = replace(runs.models[0], parameters=None, learning_rate=0.2)
    headings = [column.heading for column in module.columns_of(replace(runs, models=(run,)), on_page=True)]
    assert headings == ["dev BLEU", "perplexity", "updates", "seconds", "cost", "learning rate"]
    run = replace(run, curve=tuple(replace(point, bleu=None) for point in run.curve))
    headings = [column.heading for column in module.columns_of(replace(runs, models=(run,)), on_page=True)]
    assert headings[0] == "approx_bleu"
    (told,) = [told for name, told in module.about_curves(replace(runs, models=(run,))) if name == "approx_bleu"]
    assert "of no translation" in told


def test_a_mixture_shows_what_is_not_known_as_a_dash(t2t_runs):
    runs = read_runs(t2t_runs)
    begun = replace(runs.models[3], curve=(), perplexity=None)
    _, rows = cells(replace(runs, models=(*runs.models[:3], begun)))
    assert rows[3] == ["6l_256h", "13.1M", "–", "–", "520", "180.0"]


def test_runs_that_translated_differently_say_so(t2t_runs):
    runs = read_runs(t2t_runs)
    other = replace(runs.decodings[0], beam_size=1)
    (told,) = module.about_scores(replace(runs, decodings=(*runs.decodings, other)))
    assert "250 sentences, beam size 4, alpha 0.6; or 250 sentences, beam size 1, alpha 0.6" in told
