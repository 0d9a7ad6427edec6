"""The page of a run: all that it is given is on it, whatever its names; a browser shows it at any width."""

import io
import re

import numpy as np
import pytest
from html_pages import CHROMIUM, Page, shown
from matplotlib.figure import Figure

from planar_vae_jax.runs._charts import line_chart
from planar_vae_jax.runs.page import Link, Picture, Setting, render
from planar_vae_jax.statistics import Table

NASTY = """<script>alert("x")</script>&amp;'"><img src=x>"""


def png(width, height):
    file = io.BytesIO()
    Figure(figsize=(width / 100, height / 100), dpi=100).savefig(file, format="png")
    return file.getvalue()


def page(**given):
    content = {
        "title": "run",
        "command": ["python", "toy.py", "--seed=0"],
        "facts": {"device": "cpu"},
        "settings": [Setting("seed", 0, 0, "of all"), Setting("rate", 0.5, 0.1, "of learning")],
        "summary": {},
        "tables": {},
        "lines": [],
        "pictures": [],
        "usage": "run = load_run(1)",
    }
    return Page(render(**content | given))


SUMMARY = {
    "name": "bars",
    "epochs": 3,
    "nothing": None,
    "flag": True,
    "classes": [3, 8],
    "loss": 101.234,
    "loss_se": 0.25,
    "plain": 1.5,
    "count": 5,
    "count_se": 0.5,
    "seconds": 12.5,
    "test": {"nll": 90.111, "nll_se": 0.5, "images": 30, "kl": None, "kl_se": None},
    "by_samples": {"1": 95.5, "2": 94.25},
    "by_samples_se": {"1": 0.5, "2": 0.125},
    "per_class": {"0": {"images": 9, "nll": 88.5, "nll_se": 1.5}, "7": {"images": 21, "nll": 91.5, "nll_se": None}},
    "rows": [{"flows": 0, "nll": 77.5}, {"flows": 5, "nll": 76.5}],
    "units": {"count": 2, "kl": [0.625, 1.125], "variance": [0.5, 0.875]},
}


def test_every_figure_of_a_summary_is_on_the_page_with_its_error():
    found = page(summary=SUMMARY)
    for words in (
        "loss 101.23 ± 0.25",
        "plain 1.5",
        "count 5.00 ± 0.50",
        "nll 90.11 ± 0.50",
        "images 30",
        "kl -",
        "1 95.50 ± 0.50 2 94.25 ± 0.12",
        "name bars",
        "nothing -",
        "flag True",
        "classes 3, 8",
        "seconds 12.5",
        "count 2",
    ):
        assert words in found.text
    for row in (
        ["images", "nll"],
        ["0", "9", "88.5 ± 1.5"],
        ["7", "21", "91.5"],
        ["flows", "nll"],
        ["1", "5", "76.5"],
        ["no.", "kl", "variance"],
        ["1", "1.125", "0.875"],
    ):
        assert row in found.rows
    assert "_se" not in found.text


def test_flags_are_shown_once_and_those_that_differ_stand_out():
    html = render(
        title="run",
        command=[],
        facts={},
        settings=[Setting("seed", 0, 0, "of all"), Setting("rate", 0.5, 0.1, "of learning")],
        summary={"seed": 0, "rate": 0.25},
        tables={},
        lines=[],
        pictures=[],
        usage="",
    )
    found = Page(html)
    assert found.rows[1:] == [["--rate", "0.5", "0.1", "of learning"], ["--seed", "0", "of all"]]
    assert html.count("<tr class=differs>") == 1
    assert "rate 0.25" in found.text  # the summary says something else
    assert "seed 0" not in found.text.replace("--seed 0", "")


def test_names_and_texts_are_escaped_wherever_they_stand():
    found = page(
        title=NASTY,
        command=[NASTY],
        facts={NASTY: NASTY, "device": NASTY, "link": Link(NASTY, "a&b/'<>")},
        settings=[Setting(NASTY, NASTY, [NASTY], NASTY)],
        summary={NASTY: 1.5, "group": {NASTY: 2.5}, "table": {NASTY: {NASTY: 1}}, "replaced": 0},
        tables={"replaced": [Table(NASTY, [[NASTY, NASTY], [Link(NASTY, "x"), NASTY]])]},
        lines=[{"epoch": 1, NASTY: 1.0}, {"epoch": 2, NASTY: 2.0}],
        pictures=[Picture(f"{NASTY}.png", png(20, 10), NASTY)],
        usage=NASTY,
    )
    assert not found.tags & {"script", "x", "b"}
    assert found.images[0]["alt"] == NASTY
    assert set(found.links) >= {"x", "a&b/'<>"}
    assert found.text.count("<script>alert") >= 20
    assert "&lt;" not in found.text


def test_pictures_are_inside_with_their_titles_and_sizes():
    pictures = [Picture("a.png", png(30, 20), "Two  digits\n(mnist)"), Picture("b.png", png(400, 100), "")]
    found = page(pictures=pictures)
    assert [found.png(number) for number in (0, 1)] == [picture.png for picture in pictures]
    assert [image["alt"] for image in found.images] == ["Two digits (mnist)", "b.png"]
    assert [(image["width"], image["height"]) for image in found.images] == [("30", "20"), ("400", "100")]


def test_a_table_that_the_run_brings_stands_in_place_of_the_entry():
    table = Table("Runs.", [["run", "nll"], [Link("flows=5-seed=0", "flows%3D5-seed%3D0/report.html"), "90.1 ± 0.2"]])
    found = page(summary={"rows": [{"x": 1}], "kl": 2.5}, tables={"rows": [table]})
    assert found.rows[:2] == [["run", "nll"], ["90.1 ± 0.2"]]  # the first cell is a link
    assert "flows%3D5-seed%3D0/report.html" in found.links
    assert "Runs. run nll flows=5-seed=0 90.1 ± 0.2" in found.text


# --- Curves


def drawn(chart):
    """The points of each line of a chart, [T, 2]."""
    return [
        np.array([point.split() for point in path.split("L")], float) for path in re.findall(r'd="M([^"]*)"', chart)
    ]


@pytest.mark.parametrize("values", [[3.0, 1.0, 2.0, 2.5], [-5e3, 0.0, 7e4], [1e-4, 1.0, 3e3, 2.0], [1e140, -1e140]])
def test_a_line_is_its_values_on_a_linear_or_logarithmic_scale(values):
    chart = line_chart("loss", "epoch", {"loss": (range(1, len(values) + 1), values)})
    ((x, y),) = (points.T for points in drawn(chart))
    assert ("logarithmic" in chart) == (values[0] == 1e-4)
    scaled = np.log(values) if values[0] == 1e-4 else np.array(values)
    assert np.all(np.diff(x) > 0)
    np.testing.assert_allclose(np.diff(x), np.diff(x)[0], atol=0.11)  # a digit after the point
    slope, offset = np.polyfit(scaled, y, 1)
    assert slope < 0.0  # up the page
    np.testing.assert_allclose(slope * scaled + offset, y, atol=0.11)


def test_of_many_points_some_are_drawn_and_the_last_is_among_them():
    values = np.linspace(0.0, 1.0, 5001).tolist()
    (points,) = drawn(line_chart("loss", "step", {"loss": (range(5001), values)}))
    assert 200 < len(points) <= 400
    (few,) = drawn(line_chart("loss", "step", {"loss": ([0, 5000], [0.0, 1.0])}))
    assert points[-1].tolist() == few[-1].tolist()


@pytest.mark.parametrize(
    "values",
    [[], [None], [3.0], [0.0, 0.0], [1e10, 1e10], [1.0, 1.0 + 1e-16], [5e-324, 0.0], [1e308, -1e308], [2.0, None, 3.0]],
    ids=str,
)
def test_a_chart_of_any_values_is_drawn(values):
    chart = line_chart("loss", "epoch", {"loss": (range(len(values)), values)})
    numbers = [float(number) for number in re.findall(r' c?[xy]\d?="([^"]*)"', chart)]
    assert all(-1.0 <= number <= 361.0 for number in numbers)


def test_figures_of_several_splits_share_a_chart_and_lines_that_were_lost_are_left_out():
    lines = [
        {
            "epoch": 1,
            "train_loss": 9.0,
            "train_loss_se": 0.5,
            "test_loss": 8.0,
            "kl": 1.0,
            "first_kl": 3.0,
            "seconds": 1,
        },
        {},
        {"epoch": 3, "train_loss": 7.0, "train_loss_se": 0.5, "test_loss": 6.0, "kl": None, "seconds": 1},
    ]
    html = render(
        title="", command=[], facts={}, settings=[], summary={}, tables={}, pictures=[], usage="",
        lines=lines,
    )  # fmt: skip
    found = Page(html)
    charts = [[len(points) for points in drawn(chart)] for chart in re.findall("<svg.*?</svg>", html)]
    assert charts == [[2, 2], [1]]
    assert "train loss 7.00 ± 0.50 test loss 6" in found.text
    assert "first kl" not in found.text


# --- In a browser


@pytest.fixture(scope="module")
def widest(tmp_path_factory):
    """A page with everything that could be too wide."""
    long = "a_name_without_any_space" * 9
    file = tmp_path_factory.mktemp("page") / "report.html"
    row = {f"figure {number}": 1234.5 for number in range(40)}
    file.write_text(
        render(
            title=long,
            command=["python", "-m", long, f"--workdir=/{long}"],
            facts={long: long},
            settings=[Setting(long, long, long, long), Setting("rate", 0.1, 0.1, "of learning " * 30)],
            summary={long: 1e-300, "test": {long: 1.5}, "per_class": {long: row}, "kl": [0.5] * 500, "text": long},
            tables={},
            lines=[{"epoch": 1, long: 1.0, "train_loss": -1e30}, {"epoch": 2, long: 2.0, "test_loss": 1e30}],
            pictures=[Picture("wide.png", png(3000, 60), long), Picture("tall.png", png(60, 900), "")],
            usage=f'run = load_run("{long}")',
        ),
        encoding="utf-8",
    )
    Page(file.read_text(encoding="utf-8"))
    return file


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to open the page in")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_the_page_at_any_width_without_scrolling_sideways(widest, tmp_path, dark):
    frames, console = shown(widest, tmp_path, dark=dark, widths=(320, 768, 1600))
    *frames, too_wide = frames
    assert [frame.window for frame in frames] == [320, 768, 1600]
    assert [frame.width for frame in frames] == [frame.room for frame in frames]
    assert too_wide.width > too_wide.window
    (red,) = {int(re.findall(r"\d+", frame.background)[0]) for frame in frames}
    assert (red < 64) == dark
    assert len(console) == 1, console
    assert "probe" in console[0]
