"""What the planner reads of a finished study."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from collections import defaultdict
from pathlib import Path
from statistics import mean

import pytest
from pilot_logs import SIZES, TRUTH, write_logs
from report.conftest import make_value
from report.invented import make_translation_value

from train_large import cli, studies
from train_large.errors import UserError
from train_large.report import results

PUBLISHED = Path(__file__).parents[2] / "docs" / "results" / "pocket" / "compression" / studies.CSV


@pytest.fixture
def lines():
    with open(PUBLISHED, newline="") as file:
        return list(csv.DictReader(file))


def write(path, lines):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return path


def test_a_demos_results(tmp_path):
    demo = results.parse(make_value())
    results.save(demo, tmp_path / "results.json")
    study = studies.read(tmp_path / "results.json")
    assert study == studies.read(tmp_path)
    assert study.examples == demo.task.valid
    for found, model in zip(study.sizes, demo.models, strict=True):
        assert (found.name, found.parameters) == (model.name, model.parameters_without_embeddings)
        assert (found.perplexity, found.accuracy) == (model.perplexity, model.finetuned.accuracy)
        for entry in model.compressed:
            told = found.at(entry.sparsity, entry.bits)
            assert (told.accuracy, told.file_bytes) == (entry.accuracy, entry.file_bytes)
        assert found.at(0.5, 3) is None


def test_a_studys_means_over_its_seeds(lines):
    study = studies.read(PUBLISHED)
    accuracies, seeds = defaultdict(list), defaultdict(dict)
    for line in lines:
        accuracies[line["size"], float(line["sparsity"]), int(line["bits"])].append(float(line["accuracy"]))
        seeds[line["size"]][line["seed"]] = math.log(float(line["perplexity"]))
    assert {size.name for size in study.sizes} == set(seeds)
    assert [size.parameters for size in study.sizes] == sorted(size.parameters for size in study.sizes)
    for size in study.sizes:
        assert math.log(size.perplexity) == pytest.approx(mean(seeds[size.name].values()))
        assert size.accuracy == pytest.approx(mean(accuracies[size.name, 0.0, 32]))
        assert len(size.compressed) == 28
        for entry in size.compressed:
            assert entry.accuracy == pytest.approx(mean(accuracies[size.name, entry.sparsity, entry.bits]))
            assert entry.file_bytes is None  # the study writes none
    assert study.examples == 2013


@pytest.mark.parametrize("place", studies.PLACES[1:])
def test_it_is_found_in_its_folder(tmp_path, place):
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(PUBLISHED, tmp_path / place)
    assert studies.read(tmp_path) == studies.read(PUBLISHED)


def test_models_of_half_trained_checkpoints_do_not_count(tmp_path, lines):
    early = [{**line, "checkpoint": "0.5", "accuracy": "0.1"} for line in lines]
    assert studies.read(write(tmp_path / "a.csv", early + lines)) == studies.read(PUBLISHED)


COLUMNS = ("layers", "hidden", "layer_parameters", "batch", "rate", "share", "data", "target")


@pytest.mark.parametrize("column", [*COLUMNS, "finetune_batch", "finetune_rate", "finetune_dropout"])
def test_one_size_trained_in_several_ways(tmp_path, lines, column):
    other = {**lines[-1], column: "1", "seed": "9", "run": "another"}
    with pytest.raises(UserError, match=f"{lines[-1]['size']} of several shapes or recipes"):
        studies.read(write(tmp_path / "a.csv", [*lines, other]))


def test_a_row_that_is_there_twice(tmp_path, lines):
    with pytest.raises(UserError, match=f"{lines[5]['run']}, finetuned with seed 1, twice at 6 bits and sparsity 0.15"):
        studies.read(write(tmp_path / "a.csv", [*lines, lines[5]]))


def test_a_loss_is_of_the_same_models_as_what_it_is_lost_from(tmp_path, lines):
    """Seed 2 is not pruned yet and seed 3 not measured whole; a number in other words is the same."""
    size = lines[0]["size"]
    own = [line for line in lines if line["size"] == size]
    left = [
        {**line, "rate": "3e-3"}
        for line in own
        if line["seed"] == "1"
        or (line["seed"] == "2" and float(line["sparsity"]) == 0)
        or (line["seed"] == "3" and line["bits"] != "32")
    ]
    (found,) = studies.read(write(tmp_path / "a.csv", left)).sizes
    assert {(each.sparsity, each.bits) for each in found.compressed} == {(0.0, bits) for bits in (4, 6, 8, 32)}
    for each in found.compressed:
        told = [line for line in left if (float(line["sparsity"]), int(line["bits"])) == (0.0, each.bits)]
        assert each.accuracy == pytest.approx(mean(float(row["accuracy"]) for row in told if row["seed"] in "12"))


@pytest.mark.parametrize(
    ("column", "cell"),
    [
        *[("accuracy", cell) for cell in ("high", "nan", "1.5", "-0.1", "")],
        *[("perplexity", cell) for cell in ("inf", "0.5", "nan")],
        *[("sparsity", "1.5"), ("checkpoint", "2"), ("checkpoint", "nan")],
        *[("bits", "4.0"), ("bits", "0"), ("examples", "0"), ("layers", "0"), ("hidden", "-1")],
        *[("layer_parameters", "-5"), ("seed", "one")],
    ],
)
def test_bad_cells_are_named(tmp_path, lines, column, cell):
    told = re.escape(f"a.csv, line 2: {column} is {cell or 'empty'}, which it cannot be; give the accuracies.csv")
    with pytest.raises(UserError, match=told):
        studies.read(write(tmp_path / "a.csv", [{**lines[0], column: cell}, *lines[1:]]))


def test_a_line_that_is_cut_off(tmp_path, lines):
    write(tmp_path / "a.csv", lines)
    (tmp_path / "a.csv").write_text((tmp_path / "a.csv").read_text()[:-60])
    with pytest.raises(UserError, match=r"line 589: \w+ is \w*"):
        studies.read(tmp_path / "a.csv")


def test_what_is_no_study(tmp_path, lines):
    results.save(results.parse(make_translation_value()), tmp_path / "mt.json")
    with pytest.raises(UserError, match=r"mt.json is a study of translation"):
        studies.read(tmp_path / "mt.json")
    with pytest.raises(UserError, match=r"there is no results.json and no accuracies.csv .* in it"):
        studies.read(tmp_path)
    with pytest.raises(UserError, match=r"--study .*nowhere.csv does not exist: give the folder"):
        studies.read(tmp_path / "nowhere.csv")
    lacking = [{name: cell for name, cell in line.items() if name != "checkpoint"} for line in lines]
    with pytest.raises(UserError, match=r"b.csv has no column checkpoint: give the accuracies.csv"):
        studies.read(write(tmp_path / "b.csv", lacking))
    with pytest.raises(UserError, match=r"no model as it was finetuned"):
        studies.read(write(tmp_path / "c.csv", [line for line in lines if line["bits"] != "32"]))
    (tmp_path / "d.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"d.csv is not CSV"):
        studies.read(tmp_path / "d.csv")


def test_a_plan_by_the_published_study(tmp_path, capsys):
    """Its pilots' sizes and vocabulary are those of the invented logs."""
    logs = write_logs(tmp_path, TRUTH, SIZES[:3])
    flags = ["--budget", "450s", "--memory-limit", "80kB", "--study", str(PUBLISHED.parents[1]), "--json"]
    assert cli.main(["plan", *map(str, logs), *flags]) == 0
    made = json.loads(capsys.readouterr().out)
    by_size = {size.name: size for size in studies.read(PUBLISHED).sizes}
    option = next(option for option in made["options"] if option["size"] == "2l_64h")
    chosen, studied = option["compression"], by_size["2l_64h"]
    entry = studied.at(chosen["sparsity"], chosen["bits"])
    assert chosen["bytes"] <= 80_000
    assert not chosen["measured"]  # a forecast, as of sizes that are not in the study
    assert chosen["loss"] == pytest.approx(max(0.0, studied.accuracy - entry.accuracy))
    assert 0.6 < made["pick"]["accuracy"] < 0.75
