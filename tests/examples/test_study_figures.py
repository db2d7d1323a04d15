import csv
import math
import re
import statistics
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import matplotlib
import measurements
import pytest
import study_figures
import study_results
import study_series
import study_tables
from PIL import Image

from train_large.errors import UserError

FIGURES = {
    "depth": ["perplexity-updates", "perplexity-time"],
    "width": ["perplexity-updates", "perplexity-time"],
    "flops": ["depth", "width", "batch-size"],
    "batch_size": ["perplexity-updates", "perplexity-time"],
    "dataset_size": ["time-100", "time-5", "time-1"],
    "layer_sharing": ["perplexity-updates", "perplexity-time", "memory"],
    "finetuning": ["perplexity-time"],
    "compression": ["quantization", "pruning", "both"],
    "sst2_grid": ["quantization", "pruning", "both"],
    "convergence": ["accuracy-pretraining", "accuracy-perplexity"],
    "weight_error": ["quantized-mean", "quantized-variance", "pruned-60-mean", "pruned-60-variance"],
    "translation": ["bleu-updates", "bleu-time"],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return study_results.write(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def drawn(results):
    """The drawings of an experiment, by name; each drawn once."""
    known = {}

    def of(experiment):
        if experiment not in known:
            known[experiment] = study_figures.draw_experiment(results, experiment)
        return {drawing.name.removeprefix(f"{experiment}-"): drawing for drawing in known[experiment]}

    return of


def texts(drawing):
    return ["".join(node.itertext()).strip() for node in ElementTree.fromstring(drawing.svg).iter("text")]


def lines_of(drawing, place):
    """The points, in SVG units, of the paths that are lines of this size."""
    paths = re.findall(rf'<path d="([^"]+)"[^>]*stroke: var\(--size-{place}\)', drawing.svg)
    return [[tuple(map(float, p)) for p in re.findall(r"[ML] (\S+) (\S+)", path)] for path in paths]


def straight(values, places):
    """Whether one straight map takes the values to their places."""
    (a, b), (p, q) = (min(values), max(values)), (places[values.index(min(values))], places[values.index(max(values))])
    return places == pytest.approx([p + (q - p) * (value - a) / (b - a) for value in values], abs=0.02)


def change(results, experiment, name, edit):
    """The rows of a CSV file, changed by `edit`, written back."""
    path = results / experiment / name
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        edit(row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def test_experiments_are_in_the_order_of_a_report(results):
    assert study_figures.experiments(results) == list(FIGURES)


@pytest.mark.parametrize("experiment", FIGURES)
def test_every_experiment_has_its_figures(drawn, experiment):
    drawings = drawn(experiment)
    assert list(drawings) == FIGURES[experiment]
    for drawing in drawings.values():
        assert drawing.experiment == experiment
        root = ElementTree.fromstring(drawing.svg)
        assert not re.search(r"#[0-9a-fA-F]{6}\b|http|<script|<image|<metadata", drawing.svg)
        used = {int(place) for place in re.findall(r"var\(--size-(\d+)\)", drawing.svg)}
        assert used == set(range(drawing.sizes))
        assert len(drawing.words) > 30
        assert all("fill: var(--" in node.get("style", "") for node in root.iter("text"))


def test_ids_are_unique_over_all_figures(drawn):
    ids = [
        i for experiment in FIGURES for d in drawn(experiment).values() for i in re.findall(r'\bid="([^"]+)"', d.svg)
    ]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("experiment", "name", "labels"),
    [
        ("depth", "perplexity-time", {"training time (minutes)", "validation perplexity", "1l_64h", "16l_64h"}),
        ("width", "perplexity-updates", {"updates", "2l_32h", "2l_512h"}),
        ("flops", "batch-size", {"floating-point operations (TFLOP)", "batch 8", "batch 512"}),
        ("batch_size", "perplexity-time", {"batch 8", "batch 32", "batch 128", "batch 512"}),
        ("layer_sharing", "perplexity-time", {"nothing shared", "attention shared", "all layers shared"}),
        ("layer_sharing", "memory", {"41 % less: the paper, all layers", "2.40 GB", "memory of training (bytes)"}),
        ("compression", "quantization", {"bytes to store", "accuracy (%)", "4", "32"}),
        ("compression", "pruning", {"parameters that are not zero", "90"}),
        ("compression", "both", {"Pareto frontier", "32 bits", "2l_256h"}),
        ("convergence", "accuracy-pretraining", {"share of the pretraining (%)", "32 bits", "4 bits"}),
        ("convergence", "accuracy-perplexity", {"perplexity of the checkpoint"}),
        ("weight_error", "pruned-60-variance", {"variance of w − w′", "fc1", "8l_64h"}),
        ("translation", "bleu-time", {"validation BLEU", "training time (minutes)", "3l_256h"}),
    ],
)
def test_axes_have_units_and_curves_have_names(drawn, experiment, name, labels):
    assert labels <= set(texts(drawn(experiment)[name]))


def test_curves_are_the_means_over_the_seeds(results, drawn):
    points = measurements.read(results / "width", measurements.Point)
    for place, size in enumerate(study_results.WIDE):
        of_size = measurements.select(points, size=size)
        seconds = sorted({point.seconds for point in of_size})
        logs = [math.log(statistics.fmean(p.perplexity for p in of_size if p.seconds == s)) for s in seconds]
        line = next(path for path in lines_of(drawn("width")["perplexity-time"], place) if len(path) > 2)
        shown = line[-13:]  # what lies above the panel is cut off at its edge
        assert straight(seconds[-13:], [x for x, _ in shown])
        assert straight(logs[-13:], [y for _, y in shown])


def test_the_axis_begins_where_the_curves_part(results, drawn):
    """The highest validation of the widest model is far above the others: it does not flatten them."""
    points = measurements.read(results / "width", measurements.Point)
    ticks = [float(text.replace(",", "")) for text in texts(drawn("width")["perplexity-time"]) if text.isdigit()]
    assert max(p.perplexity for p in points) > 250
    assert max(ticks) < 200


def test_the_band_goes_from_the_least_to_the_most(results):
    points = measurements.read(results / "depth", measurements.Point)
    line = study_series.lines(points, lambda point: point.updates, lambda point: point.perplexity)[0]
    last = [p.perplexity for p in points if p.size == "1l_64h" and p.updates == line.xs[-1]]
    assert line.heights[-1] == study_series.Spread(statistics.fmean(last), min(last), max(last), 3)
    bands = re.findall(
        r"FillBetweenPolyCollection|PolyCollection", study_figures.draw_experiment(results, "depth")[0].svg
    )
    assert len(bands) == 5


def test_seeds_validated_at_different_places_are_joined():
    first, *_ = study_results.curve("2l_64h", 1)
    rows = [replace(first, updates=u, seconds=float(u), perplexity=float(100 - u)) for u in (10, 20, 30)]
    rows += [replace(first, seed=2, updates=u, seconds=float(u), perplexity=float(90 - u)) for u in (10, 25)]
    (line,) = study_series.lines(rows, lambda point: point.seconds, lambda point: point.perplexity)
    assert line.xs == (10, 20, 25, 30)
    assert [height.mean for height in line.heights] == pytest.approx([85, 75, 70, 67.5])  # the second stopped at 65
    assert [height.high for height in line.heights] == pytest.approx([90, 80, 75, 70])


def test_diverged_points_are_left_out(tmp_path):
    study_results.write(tmp_path, "depth")
    change(
        tmp_path, "depth", "curves.csv", lambda row: row.update(perplexity="inf") if row["size"] == "1l_64h" else None
    )
    names = texts(study_figures.draw_experiment(tmp_path, "depth")[0])
    assert "2l_64h" in names
    assert "1l_64h" not in names


def test_flops_panels_are_the_runs_of_the_three_figures(drawn):
    panels = drawn("flops")
    assert set(study_results.DEEP) <= set(texts(panels["depth"]))
    assert set(study_results.WIDE) <= set(texts(panels["width"]))
    assert "2l_512h" not in texts(panels["depth"])
    assert "16l_64h" not in texts(panels["width"])


def test_the_best_of_a_grid_is_drawn(results):
    rows = study_series.chosen(measurements.read(results / "sst2_grid", measurements.Accuracy))
    assert {row.finetune_seed for row in rows} == {100}
    assert {row.finetune_rate for row in rows} == {0.001}
    assert len(rows) == 3 * 7 * 4


def test_the_frontier_is_what_nothing_beats(results):
    measured = study_series.levels(measurements.read(results / "compression", measurements.Accuracy))
    best = study_series.frontier(measured)
    for level in measured:
        beaten = [b for b in best if b.bytes <= level.bytes and b.accuracy.mean >= level.accuracy.mean]
        assert beaten
    assert len(best) < len(measured) / 2


def test_memory_says_what_is_saved(drawn):
    assert any("37 % less" in text for text in re.findall(r"<text[^>]*>([^<]+)", drawn("layer_sharing")["memory"].svg))
    assert "all layers shared 1.50 GB" in drawn("layer_sharing")["memory"].words


@pytest.mark.parametrize("experiment", ["depth", "compression", "layer_sharing", "convergence", "weight_error"])
def test_one_changed_number_changes_the_drawing(results, tmp_path, experiment):
    study_results.write(tmp_path, experiment)
    before = study_figures.draw_experiment(tmp_path, experiment)
    for name, column in (
        ("curves.csv", "perplexity"),
        ("accuracies.csv", "accuracy"),
        ("memory.csv", "peak_bytes"),
        ("weight_errors.csv", "mean_absolute"),
    ):
        if (tmp_path / experiment / name).exists():
            last = [""]

            def edit(row, column=column, last=last):
                if (
                    not last[0]
                    and row.get("kind") != "all"
                    and row.get("bits", "4") == "4"
                    and row.get("sparsity", "0.0") == "0.0"
                ):
                    row[column] = str(type_of(row[column]) * 2)
                    last[0] = "done"

            change(tmp_path, experiment, name, edit)
    after = study_figures.draw_experiment(tmp_path, experiment)
    assert [drawing.name for drawing in after] == [drawing.name for drawing in before]
    assert after[0].svg != before[0].svg
    assert experiment != "layer_sharing" or after[2].svg != before[2].svg


def type_of(text):
    return int(text) if text.isdigit() else float(text)


def test_the_same_measurements_give_the_same_bytes(results, drawn):
    with matplotlib.rc_context({"lines.linewidth": 9, "axes.facecolor": "red", "svg.fonttype": "path"}):
        again = study_figures.draw_experiment(results, "layer_sharing")
    assert again == list(drawn("layer_sharing").values())


@pytest.mark.parametrize("experiment", FIGURES)
def test_one_seed_is_enough(tmp_path, experiment):
    study_results.write(tmp_path, experiment, seeds=(1,))
    drawings = study_figures.draw_experiment(tmp_path, experiment)
    assert [d.name.removeprefix(f"{experiment}-") for d in drawings] == FIGURES[experiment]
    assert all("3 seeds" not in d.caption for d in drawings)
    assert study_tables.tables(tmp_path, experiment)


@pytest.mark.parametrize("experiment", FIGURES)
def test_one_row_of_a_kind_is_drawn(tmp_path, experiment):
    rows = study_results.rows(experiment, (1,))
    first = {type(row): row for row in reversed(rows)}
    measurements.write(list(first.values()), tmp_path / experiment)
    assert study_figures.draw_experiment(tmp_path, experiment)
    assert study_tables.tables(tmp_path, experiment)


def test_fewer_sizes_and_seeds_than_asked(tmp_path):
    rows = [
        row for row in study_results.rows("width") if row.size != "2l_512h" and (row.size, row.seed) != ("2l_64h", 3)
    ]
    measurements.write(rows, tmp_path / "width")
    drawing = study_figures.draw_experiment(tmp_path, "width")[0]
    assert drawing.sizes == 4
    assert drawing.caption.startswith("Mean of 2 to 3 seeds")
    table = study_tables.tables(tmp_path, "width")[0]
    assert [row[-1] for row in table.rows] == ["3", "2", "3", "3"]


def test_nothing_measured_gives_nothing(tmp_path):
    assert study_figures.draw(tmp_path) == []
    (tmp_path / "depth").mkdir()
    assert study_figures.draw_experiment(tmp_path, "depth") == []


def test_an_experiment_of_ones_own_shows_what_it_measured(tmp_path):
    rows = study_results.rows("layer_sharing", (1,)) + study_results.rows("weight_error", (1,))
    rows += study_results.rows("convergence", (1,))
    measurements.write(rows, tmp_path / "mine")
    names = {drawing.name for drawing in study_figures.draw(tmp_path)}
    assert {"mine-perplexity-flops", "mine-memory", "mine-quantization", "mine-accuracy-pretraining"} <= names
    assert "mine-quantized-mean" in names
    assert {"mine-ends", "mine-memory"} <= {table.name for table in study_tables.tables(tmp_path, "mine")}


def test_names_are_text(tmp_path):
    rows = [replace(row, size="$x_2$ <b>") for row in study_results.rows("depth", (1,)) if row.size == "1l_64h"]
    measurements.write(rows, tmp_path / "depth")
    assert "$x_2$ <b>" in texts(study_figures.draw_experiment(tmp_path, "depth")[0])


def test_a_file_of_another_program_is_one_sentence(tmp_path):
    (tmp_path / "depth").mkdir()
    (tmp_path / "depth" / "curves.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"curves\.csv"):
        study_figures.draw(tmp_path)


def test_files_are_drawn_on_white(tmp_path, drawn):
    for name, place in (("once", "layer_sharing"), ("twice", "layer_sharing")):
        drawn(place)["memory"].save(tmp_path / f"{name}.png", tmp_path / f"{name}.svg")
    image = Image.open(tmp_path / "once.png").convert("RGB")
    assert image.size[0] == pytest.approx(3.9 * 200, abs=2)
    assert image.getpixel((0, 0)) == (255, 255, 255)
    colours = {colour for _, colour in image.getcolors(1 << 24)}
    assert (0x1D, 0x21, 0x26) in colours  # ink
    assert not {(1, 2, 3), (0xA0, 0, 0)} & colours  # what stands for the page's variables
    root = ElementTree.parse(tmp_path / "once.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(--" not in (tmp_path / "once.svg").read_text()
    for kind in ("png", "svg"):
        assert (tmp_path / f"once.{kind}").read_bytes() == (tmp_path / f"twice.{kind}").read_bytes()


# ------------------------------------------------------------------------------------------------ tables


def test_table_1_and_2_stand_beside_the_paper_s(results):
    here, paper = study_tables.tables(results, "batch_size")
    assert [row[:2] for row in here.rows] == [("8", "0.0015"), ("32", "0.003"), ("128", "0.006"), ("512", "0.006")]
    assert ("2,048", "0.001") in paper.rows
    assert paper.of_paper
    here, paper = study_tables.tables(results, "finetuning")
    assert len(here.rows) == 5
    assert ("12-layer, 1536H", "4.3", "85.1", "93.8") in paper.rows


def test_tables_hold_means_and_ranges(results):
    rows = measurements.read(results / "finetuning", measurements.Accuracy)
    table = study_tables.tables(results, "finetuning")[0]
    for cells in table.rows:
        whole = [r.accuracy for r in rows if (r.size, r.sparsity, r.bits) == (cells[0], 0.0, 32)]
        told = [float(number) for number in re.findall(r"[\d.]+", cells[table.columns.index("Accuracy (%)")])]
        assert told == pytest.approx([100 * v for v in (statistics.fmean(whole), min(whole), max(whole))], abs=0.051)


def test_what_few_bits_lose_is_paired_by_run(results):
    table = next(t for t in study_tables.tables(results, "convergence"))
    lost = {row[0]: float(row[5].split()[0]) for row in table.rows}
    assert lost["2l_32h"] > lost["2l_64h"] > lost["2l_128h"]  # invented so
    assert len(table.rows) == 12


def test_the_paper_s_saving_stands_beside_ours(results):
    table = next(t for t in study_tables.tables(results, "layer_sharing") if t.name.endswith("memory"))
    assert [(row[0], row[2], row[3]) for row in table.rows][-1] == ("all layers shared", "37.4 %", "41 %")


def test_translation_has_test_bleu_and_its_error(results):
    table = study_tables.tables(results, "translation")[0]
    rows = measurements.read(results / "translation", measurements.Translated)
    first = [row.bleu for row in rows if row.size == "1l_32h"]
    assert table.rows[0][0] == "1l_32h"
    assert table.rows[0][1].startswith(f"{statistics.fmean(first):.2f}")
    assert table.rows[0][2] == "0.35"
