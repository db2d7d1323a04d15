"""What the planner reads of a finished study."""

from __future__ import annotations

import csv
import json
import math
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
            assert (told.accuracy, told.bytes) == (entry.accuracy, entry.stored_bytes)
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
    eight, four = (study.sizes[0].at(0.3, bits).bytes for bits in (8, 4))
    assert four < eight


@pytest.mark.parametrize("place", studies.PLACES[1:])
def test_it_is_found_in_its_folder(tmp_path, place):
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(PUBLISHED, tmp_path / place)
    assert studies.read(tmp_path) == studies.read(PUBLISHED)


def test_models_of_half_trained_checkpoints_do_not_count(tmp_path, lines):
    early = [{**line, "checkpoint": "0.5", "accuracy": "0.1"} for line in lines]
    assert studies.read(write(tmp_path / "a.csv", early + lines)) == studies.read(PUBLISHED)


@pytest.mark.parametrize("column", ["batch", "rate", "share", "data", "target", "finetune_rate", "finetune_dropout"])
def test_one_size_trained_in_several_ways(tmp_path, lines, column):
    other = {**lines[-1], column: "7"}
    with pytest.raises(UserError, match=f"{lines[-1]['size']} trained in several ways"):
        studies.read(write(tmp_path / "a.csv", [*lines, other]))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"accuracy": "high"}, "line 2: could not convert string to float"),
        ({"accuracy": "nan"}, "line 2: .* no share"),
        ({"accuracy": "1.5"}, "line 2: .* no share"),
        ({"perplexity": "inf"}, "line 2: a perplexity"),
        ({"perplexity": "0.5"}, "line 2: a perplexity"),
        ({"bits": "4.0"}, "line 2: invalid literal for int"),
        ({"examples": "0"}, "line 2: .* no examples"),
    ],
)
def test_bad_cells_are_named(tmp_path, lines, changes, told):
    with pytest.raises(UserError, match=f"a.csv, {told}.*accuracies.csv that `make study`"):
        studies.read(write(tmp_path / "a.csv", [{**lines[0], **changes}, *lines[1:]]))


def test_what_is_no_study(tmp_path, lines):
    results.save(results.parse(make_translation_value()), tmp_path / "mt.json")
    with pytest.raises(UserError, match=r"mt.json is a study of translation"):
        studies.read(tmp_path / "mt.json")
    with pytest.raises(UserError, match=r"there is no results.json and no accuracies.csv .* in it"):
        studies.read(tmp_path)
    with pytest.raises(UserError, match=r"nowhere.csv \(No such file"):
        studies.read(tmp_path / "nowhere.csv")
    lacking = [{name: cell for name, cell in line.items() if name != "checkpoint"} for line in lines]
    with pytest.raises(UserError, match=r"line 2: there is no column 'checkpoint'"):
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
    assert chosen["bytes"] == entry.bytes <= 80_000
    assert chosen["loss"] == pytest.approx(max(0.0, studied.accuracy - entry.accuracy))
    assert 0.6 < made["pick"]["accuracy"] < 0.75
