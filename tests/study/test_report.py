"""The report page: every number with its run, no photograph unasked, readable in a browser."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from tests import browser
from tests.study.test_figures import DrawnSplit
from tests.study.test_tables import write_run
from xmask import files
from xmask.cli import main
from xmask.study import figures, report, tables

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """What a page holds; unbalanced tags are an error."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.rows, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text.append(data)
            if {"td", "th"} & set(self.open):
                self.rows[-1][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


class FourImages(DrawnSplit):
    def __init__(self, synthetic=True):
        super().__init__(synthetic, counts=(6, 0, 2, 12))


COUNTS = ((6, 6), (0, 3), (2, 1), (12, 4))  # errors 0, +3, -1, -8


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "results" / "demo"
    for percent in (5, 40):
        for seed in (1, 2):
            write_run(folder, "sha", percent, seed, mae=10.0 + seed, counts=COUNTS,
                      config={"loss": {"tau": 0.625}})
        write_run(folder, "qnrf", percent, 1, mae=20.0, counts=COUNTS)
    write_run(folder, "sha", 40, 1, "supervised-only", mae=30.0, counts=COUNTS)
    write_run(folder, "sha", 40, 1, "without-nnec", mae=15.0, counts=COUNTS)
    FourImages().predict_into(folder / "runs" / "sha-40-s1")
    figures.write_figures(folder, folder.parents[1] / "figures",
                          lambda name: FourImages() if name == "sha" else None)
    return folder


@pytest.fixture(scope="module")
def path(study):
    return report.write_report(study, study / "report.html", datasets=lambda name: FourImages(),
                             figures_folder=study.parents[1] / "figures")


@pytest.fixture(scope="module")
def page(path):
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A study of real photographs, with predictions and a picture on disk."""
    folder = tmp_path_factory.mktemp("real") / "results" / "paper"
    run = write_run(folder, synthetic=False, profile="paper", mean_iou=None, disc=None,
                    counts=COUNTS)
    FourImages(synthetic=False).predict_into(run)
    figures.write_figures(folder, folder.parents[1] / "figures",
                          lambda name: FourImages(synthetic=False))
    assert (run / "pictures" / "predictions_sha.png").exists()
    (run / "pictures" / "mine.png").write_bytes(b"of the user's, and no picture of ours")
    return folder


def test_the_page_asks_nothing_of_the_network(path, page):
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", path.read_text(encoding="utf-8"))
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "base", "form")
        for name in ("src", "href", "srcset", "action", "data"):
            if name in attributes:
                assert attributes[name].startswith(("data:image/", "#")), (tag, name)
    policy = [a["content"] for a in page.all("meta") if a.get("http-equiv")]
    assert policy and policy[0].startswith("default-src 'none'; img-src data:")


def test_every_picture_has_a_text_and_is_one(page):
    pictures = [a for a in page.all("img") if a["src"] != report._EMPTY]
    assert len(pictures) > 8
    for attributes in pictures:
        assert len(attributes["alt"]) > 15
        kind, _, data = attributes["src"].partition(";base64,")
        assert base64.b64decode(data).startswith(
            b"\x89PNG" if kind == "data:image/png" else b"\xff\xd8")
    assert all("figcaption" not in a for a in page.all("figure"))
    assert len(page.all("figure")) == len(page.all("figcaption"))


def test_links_and_labels_lead_somewhere(page):
    names = [a["id"] for _, a in page.tags if "id" in a]
    assert len(names) == len(set(names))
    links = [a["href"][1:] for a in page.all("a")]
    assert links and set(links) <= set(names)
    assert all(a["for"] in names for a in page.all("label"))


def test_every_cell_of_every_table_is_on_the_page_with_its_runs(study, page):
    rows = {tuple(row) for row in page.rows}
    for table in tables.all_tables(tables.load_runs(study)):
        for text, runs in zip(table.text.itertuples(index=False), table.numbers["runs"]):
            assert (*text, ", ".join(runs.split()) or "—") in rows
    assert "Counting" in "".join(page.text)


def test_images_are_sorted_by_error_and_signed(page):
    wanted = [["IMG_4", "12", "4", "-8", "8", "0.500"], ["IMG_2", "0", "3", "+3", "3", "0.500"],
              ["IMG_3", "2", "1", "-1", "1", "0.500"], ["IMG_1", "6", "6", "+0", "0", "0.500"]]
    rows = [row[:6] for row in page.rows]
    starts = [i for i, row in enumerate(rows) if row and row[0] == "IMG_4"]
    assert len(starts) == 8  # runs
    assert all(rows[start:start + 4] == wanted for start in starts)


def test_every_run_says_where_its_numbers_come_from(study, page):
    facts = {tuple(row) for row in page.rows if len(row) == 2}
    for run in (study / "runs").iterdir():
        assert ("folder", str(run)) in facts
        assert ("metrics.json, sha256", files.sha256(run / "metrics.json")) in facts
    assert ("data.checksum", "sum-of-sha") in facts and ("loss.tau", "0.625") in facts
    assert ("data.labelled", "1: IMG_1") in facts and ("backbone.name", "vgg16_bn") in facts


def test_names_cannot_break_the_page(study, tmp_path):
    folder = tmp_path / "results"
    run = write_run(folder, counts=COUNTS, data={
        "checksum": "<script>alert(1)</script>", "labelled": ["a\"b'&<i>"]})
    metrics = files.read_json(run / "metrics.json")
    metrics["per_image"][0]["name"] = "</td><b onclick=x>&amp;"
    files.write_json(run / "metrics.json", metrics)
    page = Page(report.write_report(folder, tmp_path / "r.html").read_text())
    assert len(page.all("script")) == 1 and not page.all("b") and not page.all("i")
    assert any(row and row[0] == "</td><b onclick=x>&amp;" for row in page.rows)


def test_the_page_is_a_function_of_the_run_folders(study, path, tmp_path):
    again = report.write_report(study, tmp_path / "again.html", datasets=lambda name: FourImages(),
                              figures_folder=study.parents[1] / "figures")
    assert again.read_bytes() == path.read_bytes()


def test_photographs_are_shown_only_when_asked_for(photographs, tmp_path):
    def pictures(**options):
        page = Page(report.write_report(
            photographs, tmp_path / "r.html", figures_folder=photographs.parents[1] / "figures",
            datasets=lambda name: FourImages(synthetic=False), **options).read_text())
        return page, [a for a in page.all("img") if a["src"].startswith("data:image/jpeg")]

    page, shown = pictures()
    assert not shown and "only numbers are shown" in "".join(page.text)
    assert any(row[:5] == ["IMG_4", "12", "4", "-8", "8"] for row in page.rows)
    page, shown = pictures(pictures=True)
    assert len(shown) == 1 + 4 and "only numbers" not in "".join(page.text)
    more = write_run(photographs, percent=40, synthetic=False, profile="paper", mean_iou=None,
                     disc=None, counts=COUNTS)
    FourImages(synthetic=False).predict_into(more)
    figures.write_figures(photographs, photographs.parents[1] / "figures",
                          lambda name: FourImages(synthetic=False))
    _, shown = pictures(pictures=True)
    assert sum("predicted with each percentage" in one["alt"] for one in shown) == 1
    assert "Measured on real photographs" in " ".join("".join(page.text).split())


def test_a_page_without_predictions_says_why_it_has_no_pictures(study, page, tmp_path):
    without = Page(report.write_report(study, tmp_path / "r.html").read_text())
    assert "no run has its predictions on disk" in "".join(without.text)
    assert "no run has its predictions on disk" not in "".join(page.text)


def test_pictures_that_cannot_be_had_are_said_to_be_missing(photographs, tmp_path):
    with pytest.warns(UserWarning, match="no run has both its predictions on disk and its data"):
        report.write_report(photographs, tmp_path / "r.html", pictures=True)


def test_only_the_worst_images_get_a_picture(study, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MOST_PICTURES", 2)
    page = Page(report.write_report(study, tmp_path / "r.html",
                                  datasets=lambda name: FourImages()).read_text())
    alts = [a["alt"] for a in page.all("img") if a["src"].startswith("data:image/jpeg")]
    assert alts == ["IMG_4: left 12 true heads, right 12 predicted",
                    "IMG_2: left 0 true heads, right 0 predicted"]
    assert "the 2 images with the largest error" in "".join(page.text)


def test_the_command_writes_the_committed_demo_results(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(report.Path(__file__).parents[2])
    out = tmp_path / "page.html"
    assert main(["report", "--profile", "demo", "--out", str(out)]) == 0
    page = Page(out.read_text(encoding="utf-8"))
    # where `make reproduce` has run there are pictures of single test images, too
    shown = [a for a in page.all("img")
             if a["src"].startswith("data:image/jpeg") and ": left " not in a["alt"]]
    pictures = [*report.Path("figures/demo").glob("pred*.png"),
                *report.Path("figures/demo").glob("percents_*.png")]
    assert len(shown) == len(pictures) == 6
    assert {"run-sha-5-s1", "run-sha-40-s1"} <= {a.get("id") for _, a in page.tags}


# In a real browser

needs_browser = pytest.mark.skipif(bool(browser.missing()), reason=browser.missing() or "-")


@pytest.fixture(scope="module")
def window(path):
    if browser.missing():
        pytest.skip(browser.missing())
    with browser.Browser() as window:
        yield window


@pytest.fixture
def opened(window, path):
    window.resize(1280)
    window.dark(False)
    window.open(path.as_uri())
    return window


@needs_browser
def test_the_page_opens_without_a_complaint_and_all_images_load(opened):
    assert opened.run("return document.title") == "XMask, profile demo: results"
    images = opened.run("return Promise.all([...document.images].map(i => i.decode().then("
                        "() => i.naturalWidth > 0, () => false)))")
    assert len(images) > 10 and all(images)
    assert opened.log() == []
    assert not [name for name in opened.run("return performance.getEntriesByType('resource')"
                                            ".map(e => e.name)") if not name.startswith("data:")]


@needs_browser
@pytest.mark.parametrize("width, phone", [(375, True), (1280, False)])
def test_nothing_runs_over_the_side(opened, width, phone):
    opened.resize(width, phone=phone)
    opened.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    seen = opened.run("const e = document.documentElement;"
                      "return [innerWidth, e.clientWidth, e.scrollWidth,"
                      "document.body.scrollWidth]")
    assert seen[0] == width and max(seen[1:]) <= width
    wide = opened.run("return [...document.images].filter(i => i.offsetParent && !i.closest("
                      "'.scroll, dialog') && i.getBoundingClientRect().right > innerWidth).length")
    assert wide == 0


COLUMN = """const part = document.querySelector('[data-images-of]:not([hidden])');
return [...part.querySelectorAll('tbody tr')].map(r => r.cells[arguments[0]].textContent)"""
CLICK = """document.querySelector('[data-images-of]:not([hidden])')
.querySelectorAll('th button')[arguments[0]].click()"""


@needs_browser
def test_sorting_works(opened):
    assert opened.run(COLUMN, 4) == ["8", "3", "1", "0"]
    opened.run(CLICK, 1)
    assert opened.run(COLUMN, 1) == ["12", "6", "2", "0"]
    opened.run(CLICK, 1)
    assert opened.run(COLUMN, 1) == ["0", "2", "6", "12"]
    opened.run(CLICK, 3)
    assert opened.run(COLUMN, 3) == ["+3", "+0", "-1", "-8"]
    opened.run(CLICK, 0)
    assert opened.run(COLUMN, 0) == ["IMG_1", "IMG_2", "IMG_3", "IMG_4"]
    state = opened.run("return [...document.querySelector('[data-images-of]:not([hidden]) tr')"
                       ".cells].map(c => c.getAttribute('aria-sort'))")
    assert state == ["ascending", None, None, None, None, None, None]


@needs_browser
def test_unknown_values_sort_last_both_ways(opened):
    heading = opened.run("""const t = document.querySelector('#table-counting table');
        window.t = t; return [...t.tHead.rows[0].cells].map(c => c.textContent)""")
    column = heading.index("MAE, real (published)")
    for _ in range(2):
        opened.run("t.tHead.rows[0].cells[arguments[0]].firstChild.click()", column)
        values = opened.run("return [...t.tBodies[0].rows].map(r => r.cells[arguments[0]]"
                            ".textContent)", column)
        known = [value for value in values if value != "—"]
        assert 5 < len(known) < len(values)
        assert values == known + ["—"] * (len(values) - len(known))


@needs_browser
def test_the_browser_of_images_shows_the_chosen_run(opened):
    shown = """return [...document.querySelectorAll('[data-images-of]')]
        .filter(p => p.offsetParent).map(p => p.dataset.imagesOf)"""
    assert opened.run(shown) == ["sha-40-s1"]  # the one with pictures
    opened.run("const c = document.getElementById('run-choice'); c.value = 'qnrf-5-s1';"
               "c.dispatchEvent(new Event('change'))")
    assert opened.run(shown) == ["qnrf-5-s1"]


@needs_browser
def test_a_small_picture_opens_large_and_closes(opened):
    opened.run("document.querySelector('button.open').click()")
    state = """const d = document.getElementById('large');
        return [d.open, d.querySelector('img').alt]"""
    assert opened.run(state) == [True, "IMG_4: left 12 true heads, right 12 predicted"]
    opened.run("document.querySelector('#large button').click()")
    assert opened.run(state)[0] is False


@needs_browser
@pytest.mark.parametrize("width, phone", [(390, True), (1280, False)])
def test_pictures_of_images_can_be_seen_without_scrolling_sideways(opened, width, phone):
    opened.resize(width, phone=phone)
    seen = opened.run("""return [...document.querySelectorAll('.pictured td img')]
        .filter(i => i.offsetParent).map(i => i.getBoundingClientRect())
        .map(r => [r.left, r.right])""")
    assert len(seen) == 4
    assert all(0 <= left and right <= width and right - left > 300 for left, right in seen)


def test_only_the_summary_is_unfolded_and_our_rows_stand_out_from_published_ones(page):
    folds = [a for a in page.all("details") if a.get("class") == "table"]
    assert len(folds) > 3 and ["open" in a for a in folds] == [True] + [False] * (len(folds) - 1)
    marked = sum(a.get("class") == "ours" for a in page.all("tr"))
    assert 0 < marked < len(page.rows) / 2


@needs_browser
def test_a_link_to_a_run_opens_its_details(opened):
    state = "return document.getElementById('run-sha-5-s1').closest('details').open"
    assert opened.run(state) is False
    opened.run("document.querySelector('td.runs a[href=\"#run-sha-5-s1\"]').click()")
    opened.run("return new Promise(done => setTimeout(done, 200))")
    assert opened.run(state) is True


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_text_is_readable_in_light_and_dark(opened, dark):
    """WCAG contrast of at least 4.5 for all text, and white ground under every figure."""
    opened.dark(dark)
    colours = opened.run("""const rgb = c => c.match(/[\\d.]+/g).map(Number);
        const ground = e => { for (; e; e = e.parentElement) {
          const c = rgb(getComputedStyle(e).backgroundColor);
          if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
        return [...document.querySelectorAll('body, p, a, td, th, summary, figcaption, .note')]
          .map(e => [e.tagName, rgb(getComputedStyle(e).color), ground(e)])""")
    assert (sum(colours[0][2][:3]) < 150) == dark

    def luminance(colour):
        c = np.array(colour[:3]) / 255
        c = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        return c @ [0.2126, 0.7152, 0.0722]

    for tag, text, ground in colours:
        high, low = sorted((luminance(text), luminance(ground)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (tag, text, ground)
    grounds = opened.run("return [...document.querySelectorAll('figure img')]"
                         ".map(i => getComputedStyle(i).backgroundColor)")
    assert set(grounds) == {"rgb(255, 255, 255)"}
