import json
import os
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from train_large.errors import UserError
from train_large.report import page as module
from train_large.report.claims import judge_claims
from train_large.report.pareto import frontier_of
from train_large.report.results import load
from train_large.report.runs import read_runs
from train_large.report.tables import memory_limits, ship_line
from train_large.report.units import format_bytes


def tree(text):
    """The page is written so that it is well formed as XML too: every tag closed, every attribute quoted."""
    assert text.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(text)


def words(node):
    return " ".join("".join(node.itertext()).replace("\u00a0", " ").split())


@pytest.fixture(scope="module")
def rendered(results):
    return module.render(results)


@pytest.fixture(scope="module")
def rendered_new(new_results):
    return module.render(new_results)


@pytest.fixture(scope="module")
def rendered_translation(translation):
    return module.render(translation)


@pytest.fixture
def small(results):
    """One model with a few measurements: quick to draw."""
    model = results.models[0]
    return replace(results, models=(replace(model, curve=(), compressed=model.compressed[:8]),))


def test_the_page_says_what_was_measured(results, rendered):
    root = tree(rendered)
    text = words(root.find("body"))
    for limit in memory_limits(results):
        assert ship_line(results, limit) in text
    for claim in judge_claims(results):
        assert claim.claim in text
        assert claim.measured in text
    for part in ("make demo BUDGET=10m", "A processor, 2 cores", "2.13.0", "Invented text: 3.10M tokens", "50.3%"):
        assert part in text
    tables = {words(table.find("caption"))[:12]: table for table in root.iter("table")}
    sizes = [[words(cell) for cell in row] for row in tables["Smallest mod"].find("tbody")]
    assert sizes[0][:5] == ["2l_32h", "131k", "35,800", "419", "58.0%"]
    assert [row[0] for row in sizes] == ["2l_32h", "2l_64h", "3l_128h", "4l_256h"]
    assert len(tables["The Pareto f"].find("tbody")) == len(frontier_of(results))
    everything = [[words(cell) for cell in row] for row in tables["3l_128h, 1.0"].find("tbody")]
    assert len(everything) == 7
    entry = results.models[2].at(0.45, 6)
    assert everything[3][0] == "45%"
    assert everything[3][5] == f"{100 * entry.accuracy:.1f}%"
    assert everything[3][-1] == "40"
    assert everything[-1][-1] == "40 (short)"


def test_the_page_has_real_files_and_weight_errors(new_results, rendered_new, rendered):
    root = tree(rendered_new)
    tables = {words(table.find("caption")): table for table in root.iter("table")}
    frontier = next(table for caption, table in tables.items() if caption.startswith("The Pareto"))
    for row, (_, entry) in zip(frontier.find("tbody"), frontier_of(new_results), strict=True):
        sizes = (entry.file_bytes, entry.bytes, entry.bytes_paper)
        assert [words(cell) for cell in row][-3:] == [format_bytes(size) for size in sizes]

    beside = [
        [words(cell) for cell in row] for row in tables["Bytes of the file, beside the paper’s count."].find("tbody")
    ]
    assert [row[:2] for row in beside] == [[m.name, pruned] for m in new_results.by_size for pruned in ("0%", "60%")]
    entry = new_results.models[1].at(0.6, 4)
    assert beside[3][-2:] == [format_bytes(entry.file_bytes), format_bytes(entry.bytes_paper)]

    for caption, sparsity, bits in (("quantized to 4 bits", 0.0, 4), ("60% pruned", 0.6, 32)):
        table = tables[f"Weights {caption}, by kind of module and size."]
        cells = {words(row[0]): [words(cell) for cell in row][1:] for row in table.find("tbody")}
        errors = [model.weight_errors_at(sparsity, bits)["fc1"] for model in new_results.by_size]
        figures = [(e.mean_absolute, e.variance, e.normalized) for e in errors]
        assert cells["fc1"] == [f"{figure:#.2g}" for statistic in zip(*figures) for figure in statistic]
        assert ("biases" in cells) == (bits == 4)
        assert [words(cell) for cell in table.find("thead")[1]] == 3 * [model.name for model in new_results.by_size]
    # A file without them has nothing of it.
    assert not re.search(r"Bytes of the file|by kind of module|How far compression", rendered)


def test_a_memory_limit_is_answered_first_and_alone(small):
    root = tree(module.render(small, 200_000))
    section = next(node for node in root.iter("section"))
    assert words(section) == f"What to ship {ship_line(small, 200_000)}"


@pytest.mark.parametrize("which", ["rendered", "rendered_translation"])
def test_nothing_is_loaded_and_nothing_runs(which, request):
    text = request.getfixturevalue(which)
    assert "<script" not in text
    assert not re.search(r"\b(?:https?:)?//", text.replace("<!DOCTYPE html>", ""))
    assert not re.search(r"@import|<iframe|<object|<embed|\bon\w+=", text)
    for node in tree(text).iter():
        for name in ("src", "href", "{http://www.w3.org/1999/xlink}href"):
            assert node.get(name, "#").startswith(("#", "data:"))


@pytest.mark.parametrize(("which", "drawn"), [("rendered", 10), ("rendered_new", 14), ("rendered_translation", 6)])
def test_html_is_sound(results, translation, which, drawn, request):
    root = tree(request.getfixturevalue(which))
    assert root.get("lang") == "en"
    assert root.find("head/title").text == (translation if which == "rendered_translation" else results).title
    ids = [node.get("id") for node in root.iter() if node.get("id")]
    assert len(ids) == len(set(ids))
    for node in root.iter():
        for name in ("aria-labelledby", "aria-describedby"):
            assert set(node.get(name, "").split()) <= set(ids)
    for table in root.iter("table"):
        assert table.find("caption") is not None
        wide = sum(int(cell.get("colspan", 1)) for cell in table.find("thead/tr"))
        assert all(cell.get("scope") == "col" for cell in table.find("thead/tr"))
        for row in table.find("tbody"):
            assert sum(int(cell.get("colspan", 1)) for cell in row) == wide
    pictures = [node for node in root.iter("div") if node.get("role") == "img"]
    assert len(pictures) == drawn
    assert all(len(node.get("aria-label")) > 40 and node.find("svg") is not None for node in pictures)
    levels = [int(node.tag[1]) for node in root.iter() if node.tag in ("h1", "h2", "h3")]
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:]))


def test_colours_of_both_modes_are_defined(rendered):
    for name in set(re.findall(r"var\(--([\w-]+)\)", rendered)):
        assert len(re.findall(rf"--{name}: #", rendered)) == 2, name


def test_what_the_file_says_is_text_not_html(small):
    evil = '<img src=x onerror="alert(1)">&amp;\'"'
    odd = replace(
        small,
        title=evil,
        command=evil,
        models=(replace(small.models[0], name=evil, run_log=evil),),
        task=replace(small.task, name=evil),
        machine=replace(small.machine, processor=evil),
    )
    root = tree(module.render(odd, 600_000))
    assert not list(root.iter("img"))
    assert root.find("head/title").text == evil
    assert root.find("body/header/h1").text == evil
    assert words(next(root.iter("tbody"))[0][0]) == evil
    assert f"ship this: {evil}, not pruned" in words(next(root.iter("section")))


def test_odd_results_make_a_page(small):
    bare = replace(small, models=(replace(small.models[0], compressed=()),), claims=())
    assert "Nothing: no model was compressed." in words(tree(module.render(bare)))
    gap = replace(small, models=(replace(small.models[0], compressed=small.models[0].compressed[:6]),))
    cells = [words(cell) for cell in list(tree(module.render(gap)).iter("tbody"))[-1][1]]
    assert cells[0] == "15%"
    assert cells[-3:-1] == ["–", "–"]  # 6 and 4 bits were not measured there
    hopeless = replace(bare, models=small.models, task=replace(small.task, majority=1.0))
    assert "so there is no frontier" in words(tree(module.render(hopeless)))


def sizes_of(root):
    """The rows of the table of sizes, headings first."""
    table = next(root.iter("table"))
    return [[words(cell) for cell in row] for row in (*table.find("thead"), *table.find("tbody"))]


def test_the_page_of_a_translation_study(translation, rendered_translation):
    root = tree(rendered_translation)
    text = words(root.find("body"))
    data = translation.translation
    for part in (
        "each trained for 3 min to translate English to French: Invented manuals, 60,000 sentence pairs",
        "1,000 sentences, beam size 4, alpha 0.6 (length penalty); 4 checkpoints averaged",
        f"signature {data.signature}",
        "By the paper’s measure, of 250 sentences, beam size 1, alpha 0.6",
        "TensorFlow 2.12.1, Tensor2Tensor 1.15.7",
        "make demo-mt BUDGET=3m",
        "2l_64h/run.jsonl",
        *(claim.measured for claim in judge_claims(translation)),
    ):
        assert part in text
    assert not re.search("compress|prune|quantiz|ship|finetun|ccuracy|guess", text)
    heading, *rows = sizes_of(root)
    assert heading[:8] == (
        ["Model", "Parameters", "Paper’sBLEU", "T2T’sBLEU", "sacreBLEU", "DevBLEU", "Perplexity", "Updates"]
    )
    assert rows[2][:8] == ["2l_256h", "5.70M", "17.61 ± 0.41", "18.72", "17.30", "17.30", "12.9", "1,400"]
    best = [words(cell) for cell in root.iter("td") if cell.get("class") == "best"]
    assert best == ["17.61 ± 0.41", "18.72", "17.30", "17.30", "12.9"]
    assert "Which size to train for 3 min 2l_256h, BLEU 17.61" in text


def test_the_page_of_run_logs_leaves_out_what_they_do_not_know(t2t_runs):
    root = tree(module.render(read_runs(t2t_runs)))
    text = words(root.find("body"))
    assert "4 runs of Tensor2Tensor’s problem translate_enfr_pairs" in text
    heading, *rows = sizes_of(root)
    assert heading == ["Model", "Parameters", "DevBLEU", "Perplexity", "Updates", "Seconds", "Cost"]
    assert rows[0] == ["2l_64h", "760k", "9.10", "21.0", "5,400", "180.0", "25.2 TFLOP"]
    terms = [words(node) for node in root.iter("dt")]
    assert terms == ["Budget", "Perplexity", "BLEU of the dev set", "Run logs"]
    assert "None" not in text

    begun = read_runs(t2t_runs[:1])
    begun = replace(begun, budget=None, problem=None, models=(replace(begun.models[0], curve=(), perplexity=None),))
    root = tree(module.render(begun))
    assert [words(node) for node in root.iter("h2")] == ["The run", "How it was measured"]
    assert [words(node) for node in root.iter("dt")] == ["Run logs"]
    assert not list(root.iter("figure"))


def test_a_translation_study_without_an_error_says_so(translation):
    models = tuple(
        replace(model, curve=(), scores=replace(model.scores, paper_error=None)) for model in translation.models
    )
    root = tree(module.render(replace(translation, models=models)))
    assert "Standard error of the paper’s BLEU: not measured." in words(root)
    assert "±" not in words(root)


def test_what_a_translation_study_says_is_text_not_html(translation):
    evil = '<img src=x onerror="alert(1)">&amp;\'"'
    odd = replace(
        translation,
        title=evil,
        command=evil,
        models=(replace(translation.models[0], name=evil, run_log=evil, curve=()),),
        translation=replace(translation.translation, corpus=evil, source=evil, signature=evil),
    )
    root = tree(module.render(odd))
    assert not list(root.iter("img"))
    assert root.find("head/title").text == evil
    assert sizes_of(root)[1][0] == evil


def test_write_page(value, tmp_path):
    value["models"] = [{**value["models"][0], "curve": []}]
    (tmp_path / "results.json").write_text(json.dumps(value))
    study, page = load(tmp_path / "results.json"), tmp_path / "new" / "page.html"
    module.write_page(study, page, 2_000_000)
    assert "Within 2\u00a0MB" in page.read_text(encoding="utf-8")
    assert os.listdir(page.parent) == ["page.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        module.write_page(study, tmp_path / "file" / "page.html", 2_000_000)
