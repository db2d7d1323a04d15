import math
import re
from dataclasses import dataclass
from html.parser import HTMLParser

import pytest
import study_figures
import study_page
import study_results
import verdicts
from test_study_figures import change  # noqa: E402
from verdicts import Verdict

from train_large.errors import UserError


@dataclass(frozen=True)
class Comparison:
    what: str
    unit: str
    values: tuple
    mean: float = 0.0
    low: float = 0.0
    high: float = 0.0


RATIO = Comparison(
    "updates of small / large", "ln ratio", (0.1, 0.3, 0.5), math.log(1.32), math.log(1.2), math.log(1.45)
)
POINTS = Comparison("lost <b> & more", "points", (1.0, 1.2, 1.4), 1.2, -0.31, 2.09)
SHARE = Comparison("memory saved", "share", (0.37,), 0.374, -math.inf, math.inf)
CLAIMS = (
    Verdict("Larger needs fewer updates.", "3", "Figure 3", "Each is faster.", True, (RATIO,)),
    Verdict("Sharing <saves> memory.", "C", "Figure 11", "It takes less.", None, (SHARE,)),
    Verdict("Shape matters little.", "beyond the paper", "", "Nothing.", False, (POINTS, RATIO)),
    Verdict("Nobody measured this.", "5.1", "Figure 14", "Nothing.", None, ()),
)
ABOUT = {"Machine": "2 cores & <little> memory", "Date": "2020-05-01"}
SOME = ("depth", "batch_size", "layer_sharing", "finetuning", "convergence")


class Page(HTMLParser):
    """The rows of all tables as text, and whether every element that was opened was closed."""

    EMPTY = ("meta", "link", "br", "path", "use", "rect", "circle")

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.ids, self.links = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes["href"]] if tag == "a" else []
        if tag not in self.EMPTY:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.rows[-1][-1] = self.rows[-1][-1].rstrip()

    def handle_data(self, data):
        if any(tag in ("td", "th") for tag in self.open):
            self.rows[-1][-1] = re.sub(r"\s+", " ", self.rows[-1][-1] + data).lstrip()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return study_results.write(tmp_path_factory.mktemp("results"), *SOME)


@pytest.fixture(scope="module")
def text(results, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "index.html"
    study_page.write_page(results, CLAIMS, path, ABOUT)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_the_page_stands_alone(text):
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"<script|\bon\w+=|@import|<img|<iframe", text)
    assert set(re.findall(r'(?:src|href)="([^"#][^"]*)"', text)) == {"data:,"}
    assert "prefers-color-scheme: dark" in text
    assert "#010203" not in text  # what stands for a colour until the SVG is written out


def test_the_claims_come_first_with_what_was_measured(text, page):
    assert page.rows[0] == ["Claim", "Test", "Measured", "Verdict"]
    first, second, third, fourth = page.rows[1:5]
    assert first == [
        "Larger needs fewer updates. Section 3, Figure 3",
        "Each is faster.",
        "updates of small / large: × 1.32 (1.20 to 1.45)",
        "holds",
    ]
    assert second[0].endswith("Appendix C, Figure 11")
    assert second[2:] == ["memory saved: +37.4 % (one seed: no interval)", "cannot be told"]
    assert third[0].endswith("beyond the paper")
    assert third[2].startswith("lost <b> & more: +1.20 points (−0.31 to +2.09)")
    assert third[3] == "does not hold"
    assert fourth[2:] == ["–", "not measured"]
    assert "1 claim holds, 1 does not hold, 1 cannot be told at this scale; 1 is not measured." in text
    assert text.index("Larger needs fewer updates.") < text.index("Deeper models")


def test_names_are_escaped(text):
    assert "Sharing &lt;saves&gt; memory." in text
    assert "2 cores &amp; &lt;little&gt; memory" in text
    assert "<saves>" not in text
    assert "<little>" not in text


def test_each_experiment_has_its_figures_tables_and_the_paper_s_numbers(results, text, page):
    assert len(page.ids) == len(set(page.ids))
    for drawing in study_figures.draw_experiment(results, "layer_sharing"):
        assert drawing.svg in text
        assert f"figure-{drawing.name}" in page.ids
    assert ["12-layer, 1536H", "4.3", "85.1", "93.8"] in page.rows
    assert ["16,384", "0.001875"] in page.rows
    assert {link.removeprefix("#") for link in page.links} == set(SOME)
    assert set(SOME) <= set(page.ids)
    assert "Not measured: Figure 4, Figure 10, Figure 14, Figures 6 and 7, Figure 12, Figure 9, Figure 5." in text


def test_every_colour_of_a_figure_is_given(text):
    for of, block in re.findall(r'<figure id="[^"]+" class="of-(\d+)">(.*?)</figure>', text, re.S):
        used = {int(place) for place in re.findall(r"var\(--size-(\d+)\)", block)}
        light, dark = re.findall(rf"\.of-{of} {{([^}}]*)}}", text)
        for rule in (light, dark):
            assert used == {int(place) for place in re.findall(r"--size-(\d+):", rule)}


def test_a_changed_number_changes_its_table(tmp_path, text):
    study_results.write(tmp_path, "finetuning")
    before = study_page.render(tmp_path, (), {})
    change(
        tmp_path,
        "finetuning",
        "accuracies.csv",
        lambda row: row.update(accuracy="0.9876") if row["size"] == "2l_64h" and row["bits"] == "32" else None,
    )
    after = study_page.render(tmp_path, (), {})
    cells = [row for row in Page(after).rows if row[0] == "2l_64h"][0]
    assert cells[2] == "98.8"
    assert "98.8" not in before


def test_the_same_measurements_give_the_same_bytes(results, text):
    assert study_page.render(results, CLAIMS, ABOUT) == text


def test_nothing_measured_and_nothing_claimed_is_a_page(tmp_path):
    rows = Page(study_page.render(tmp_path, (), {})).rows
    assert rows == []


def test_an_experiment_of_ones_own_is_on_the_page(tmp_path):
    study_results.write(tmp_path, "depth", seeds=(1,))
    (tmp_path / "depth").rename(tmp_path / "my_own")
    page = Page(study_page.render(tmp_path, (), {}))
    assert "my_own" in page.ids
    assert "my own" in study_page.render(tmp_path, (), {})


@pytest.mark.slow
def test_the_page_of_a_whole_study_with_the_real_verdicts(tmp_path):
    results = study_results.write(tmp_path / "results")
    found = verdicts.judge(results)
    study_page.write_page(results, found, tmp_path / "index.html", {})
    page = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    words = {"holds", "does not hold", "cannot be told", "not measured"}
    assert len([row for row in page.rows if row[-1:] and row[-1] in words]) == len(found)
    assert set(study_results.ALL) <= set(page.ids)


def test_the_page_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(UserError, match="index"):
        study_page.write_page(tmp_path, (), tmp_path / "nowhere" / "index.html", {})
    page = tmp_path / "index.html"
    page.write_text("before")
    (tmp_path / "depth").mkdir()
    (tmp_path / "depth" / "curves.csv").write_text("a\n")
    with pytest.raises(UserError, match="columns"):
        study_page.write_page(tmp_path, (), page, {})
    assert page.read_text() == "before"


def test_figures_are_written_as_png_and_svg(tmp_path):
    study_results.write(tmp_path / "results", "finetuning", "batch_size")
    files = study_page.write_figures(tmp_path / "results", tmp_path / "a" / "figures")
    names = ["batch_size-perplexity-updates", "batch_size-perplexity-time", "finetuning-perplexity-time"]
    assert [path.name for path in files] == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    assert sorted(path.name for path in (tmp_path / "a" / "figures").iterdir()) == sorted(p.name for p in files)
    assert files[0].read_bytes().startswith(b"\x89PNG")


def test_no_figure_is_written_if_one_fails(tmp_path, monkeypatch):
    study_results.write(tmp_path / "results", "finetuning", "batch_size")
    folder = tmp_path / "figures"
    folder.mkdir()
    (folder / "batch_size-perplexity-time.svg").write_text("before")
    save = study_figures.Drawing.save

    def fail(drawing, png, svg):
        if drawing.experiment == "finetuning":
            raise OSError(28, "No space left on device")
        save(drawing, png, svg)

    monkeypatch.setattr(study_figures.Drawing, "save", fail)
    with pytest.raises(UserError, match="No space left"):
        study_page.write_figures(tmp_path / "results", folder)
    assert [path.name for path in folder.iterdir()] == ["batch_size-perplexity-time.svg"]
    assert (folder / "batch_size-perplexity-time.svg").read_text() == "before"


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        study_page.write_figures(tmp_path, tmp_path / "file" / "figures")
