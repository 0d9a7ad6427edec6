"""Figures show the arrays and names that they are given; texts lie inside the figure and do not overlap."""

import functools
import itertools
from typing import NamedTuple

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from planar_vae_jax.plotting import _text as text
from planar_vae_jax.plotting.curves import class_losses, kl_curve, loss_curves
from planar_vae_jax.plotting.density import density_fit, layer_densities
from planar_vae_jax.plotting.images import image_grid, image_rows
from planar_vae_jax.plotting.latent import aggregate_histograms, aggregate_plane
from planar_vae_jax.plotting.pairs import point_pairs
from planar_vae_jax.plotting.posteriors import _mass_levels, posterior_rows

RNG = np.random.default_rng(0)
IMAGES = RNG.random((10, 28, 28))
SIDE = np.linspace(-3, 3, 20)
BELL = np.exp(-0.5 * (SIDE[:, None] ** 2 + SIDE**2)) / (2 * np.pi)
POINTS = RNG.normal(size=(50, 2))
MANY = RNG.normal(size=(50, 6))
CURVES = {
    "train (mean over each epoch)": np.array([9.0, 3.0, 2.0]),
    "test (after each epoch)": np.array([8.0, 4.0, 1.0]),
}


class Panels(NamedTuple):
    """What ``posterior_rows`` reads of an image."""

    near: tuple[float, float, float, float]
    truth: np.ndarray
    approximation: np.ndarray
    far: tuple[float, float, float, float]
    layers: dict[int, np.ndarray]
    kl: dict[int, float]


def posterior(flow_length):
    layers = dict.fromkeys(sorted({0, flow_length // 2, flow_length}), BELL)
    return Panels((-3, 3, -3, 3), BELL, BELL, (-30, 20, -25, 25), layers, dict.fromkeys(layers, 123.456))


# kind of figure -> function of the title
FIGURES = {
    "rows": lambda title: image_rows({"original": IMAGES, "reconstruction": IMAGES}, title=title),
    "rows with captions": lambda title: image_rows(
        {"original": IMAGES, "reconstruction": IMAGES}, title=title, columns=list("0123456789")
    ),
    "two columns": lambda title: image_rows({"original": IMAGES[:2]}, title=title, columns=["3", "8"]),
    "grid": lambda title: image_grid(IMAGES, columns=4, title=title),
    "grid with subtitle": lambda title: image_grid(
        IMAGES[:4], columns=2, title=title, subtitle="no KL was trained: samples from the prior mean little"
    ),
    "long captions": lambda title: image_rows(
        {"a row with a long name": IMAGES}, title=title, columns=[str(10**9 + i) for i in range(10)]
    ),
    "narrow images": lambda title: image_grid(IMAGES[:, :, :3], columns=5, title=title),
    "colours": lambda title: image_rows({"original": RNG.random((10, 8, 8, 3))}, title=title),
    "wide images": lambda title: image_grid(IMAGES[:, :3], columns=2, title=title),
    "losses": lambda title: loss_curves(np.arange(3), CURVES, title=title, ylabel="free energy (nats)"),
    "one epoch": lambda title: loss_curves(
        np.arange(2), {name: y[:2] for name, y in CURVES.items()}, title=title, ylabel="free energy (nats)"
    ),
    "classes": lambda title: class_losses(
        {"3": 98.5, "8": -12.25}, errors={"3": 0.71, "8": 1.44}, title=title, label="free energy (nats)"
    ),
    "density": lambda title: density_fit(BELL, POINTS, 2 * POINTS, 1.1 * BELL, extent=3, title=title),
    "layers": lambda title: layer_densities(dict.fromkeys(range(0, 18, 3), BELL), extent=3, title=title),
    "a wide plane": lambda title: layer_densities({0: BELL}, extent=1e6, title=title),
    "a small plane": lambda title: density_fit(BELL, POINTS, POINTS, BELL, extent=1e-3, title=title),
    "two layers": lambda title: layer_densities({0: BELL, 1: BELL}, extent=12.5, title=title),
    "pairs": lambda title: point_pairs(
        MANY * [1e-6, 1, 1e6, 3e-3, 0.2, 1e4], MANY[:20] * 1.5, dimensions=list(range(6)), title=title
    ),
    "two pairs": lambda title: point_pairs(1e3 + POINTS, POINTS, dimensions=[0, 1], title=title),
    "one dimension": lambda title: point_pairs(POINTS[:, :1], POINTS[:, :1], dimensions=[0], title=title),
    "posteriors": lambda title: posterior_rows(IMAGES[:2], [posterior(80)] * 2, title=title, names=["3", "8"]),
    "posteriors without a flow": lambda title: posterior_rows(IMAGES[:1, :9], [posterior(0)], title=title),
    "aggregate": lambda title: aggregate_plane(POINTS, np.arange(50) % 12, title=title),
    "aggregate without labels": lambda title: aggregate_plane(1e3 * POINTS, None, title=title),
    "aggregate of many classes": lambda title: aggregate_plane(POINTS, np.arange(50), title=title),
    "histograms": lambda title: aggregate_histograms(
        {f"no. {d}, KL 1.2, mean -0.03, var. 1.02": POINTS[:, 0] for d in range(8)}, title=title
    ),
    "one histogram": lambda title: aggregate_histograms({"$z_1$": 100 * POINTS[:, 0]}, title=title),
    "kl": lambda title: kl_curve(np.arange(15, 1515, 15), np.geomspace(1, 1e-3, 100), title=title),
    "kl, three steps": lambda title: kl_curve(np.arange(1, 4), np.array([0.3, 0.2, 0.1]), title=title),
}
TITLES = {
    "one line": "title",
    "two lines": "Test images and their reconstructions\n(mnist5k, dynamic binarisation, K = 5, 30 epochs)",
    "long": "dynamic binarisation, amortised, classes 3, 8, K = 5, 30 epochs, " * 3 + "a_file_with_a_long_name" * 9,
}


def texts_of(figure) -> dict[Text, Bbox]:
    """The texts that are drawn (not those of ticks beyond the axes) and their boxes in pixels."""
    drawn, draw = [], Text.draw

    def record(self, renderer):
        drawn.append(self)
        draw(self, renderer)

    canvas = FigureCanvasAgg(figure)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", record)
        figure.draw_without_rendering()
    seen = [artist for artist in drawn if artist.get_visible() and artist.get_text().strip()]
    return {artist: artist.get_window_extent(canvas.get_renderer()) for artist in seen}


def is_inside(box, outer) -> bool:
    return outer.x0 <= box.x0 and box.x1 <= outer.x1 and outer.y0 <= box.y0 and box.y1 <= outer.y1


@functools.cache
def drawn(kind, title):
    """A figure with its texts."""
    figure = FIGURES[kind](TITLES[title])
    return figure, texts_of(figure)


@pytest.mark.parametrize("title", ["two lines", "long"])
@pytest.mark.parametrize("kind", FIGURES)
def test_texts_lie_inside_and_clear_of_each_other(kind, title):
    figure, boxes = drawn(kind, title)
    written = "".join(artist.get_text() for artist in boxes).replace("\n", "").replace(" ", "")
    assert TITLES[title].replace("\n", "").replace(" ", "") in written
    for artist, box in boxes.items():
        assert is_inside(box, figure.bbox), artist
    for (one, box), (other, another) in itertools.combinations(boxes.items(), 2):
        assert not box.padded(-1).overlaps(another.padded(-1)), (one, other)


@pytest.mark.parametrize("kind", FIGURES)
def test_titles_stand_close_to_what_they_name(kind):
    """There is no empty band below the title, with captions or without, and nothing lies behind it."""
    figure, boxes = drawn(kind, "one line")
    bottom = boxes[figure._suptitle].y0
    below = [axes.get_tightbbox().y1 for axes in figure.axes]
    gap = (bottom - max(below)) / figure.dpi
    assert 0 < gap < 0.25


@pytest.mark.parametrize("kind", ["density", "layers", "two layers"])
def test_panels_are_squares_of_one_size(kind):
    figure, _ = drawn(kind, "one line")
    sizes = [axes.get_window_extent().size for axes in figure.axes if axes.get_xlabel()]
    np.testing.assert_allclose(sizes, sizes[0][0], rtol=1e-9)


# --- Names ---


@pytest.mark.parametrize("name", ["a$x$_b", "$", r"\frac{a}{b}$$", "a^2_{i}", "100 % <b>&amp;</b>", "été ∑ Ω ß"])
def test_a_name_is_shown_as_it_is(name):
    """pytest turns warnings into errors, so a warning of a missing glyph would fail this test."""
    figure = loss_curves(np.arange(3), {name: np.arange(3.0)}, title=f"Loss ({name})", ylabel="loss")
    shown = {artist.get_text(): artist for artist in texts_of(figure)}
    for wanted in (name, f"Loss ({name})"):
        assert not shown[wanted].get_parse_math()
    figure = image_rows({name: IMAGES}, columns=[name], title=name)
    assert [artist.get_text() for artist in texts_of(figure)].count(name) == 3
    figure = class_losses({name: 1.0}, title="title", label="loss")
    assert name in [artist.get_text() for artist in texts_of(figure)]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("\U00020000 x", "? x"),
        ("\u6570\u5b57.npz", "??.npz"),
        ("a\tb\x07\udcff", "a?b??"),
        ("\u200bzero", "?zero"),
    ],
)
def test_what_cannot_be_drawn_is_replaced(name, shown):
    figure = image_grid(IMAGES, columns=5, title=name, subtitle=name)
    assert [artist.get_text() for artist in texts_of(figure)] == [f"{shown}\n{shown}"]
    figure = aggregate_plane(POINTS, np.array([name] * len(POINTS)), title="title")
    assert shown in [artist.get_text() for artist in texts_of(figure)]


def test_a_second_font_of_the_default_family_is_used(monkeypatch):
    """matplotlib falls back to it, so its characters are drawn."""
    monkeypatch.setitem(matplotlib.rcParams, "font.family", ["DejaVu Sans Display"])
    assert text.drawable("abc") == "???"
    monkeypatch.setitem(matplotlib.rcParams, "font.family", ["DejaVu Sans Display", "DejaVu Sans"])
    assert text.drawable("abc") == "abc"


def test_wrapping_breaks_at_blanks_first():
    def wrap(words):
        return text.wrap(words, lambda line: len(line) <= 8)

    assert wrap("one two three") == ["one two", "three"]
    assert wrap("one\ntwo") == ["one", "two"]
    assert wrap("a seventeenletters z") == ["a", "seventee", "nletters", "z"]
    assert wrap("") == [""]
    assert text.wrap("ab", lambda line: False) == ["a", "b"]  # nothing fits


# --- What the pictures hold ---


def test_images_lie_row_after_row():
    figure = image_grid(IMAGES[:5], columns=3, title="")
    canvas = figure.axes[0].images[0].get_array()
    assert canvas.shape == (2 * 30 - 2, 3 * 30 - 2)
    for i, image in enumerate(IMAGES[:5]):
        row, column = divmod(i, 3)
        np.testing.assert_array_equal(canvas[30 * row :, 30 * column :][:28, :28], image)
    np.testing.assert_array_equal(canvas[30:, 60:], 1.0)  # no sixth image: white
    assert figure.axes[0].images[0].get_clim() == (0.0, 1.0)


def test_images_in_colour_keep_their_colours():
    images = RNG.random((3, 6, 4, 3))
    (picture,) = image_grid(images, columns=2, title="title").axes[0].images
    canvas = np.asarray(picture.get_array())
    np.testing.assert_array_equal(canvas[:6, 5:9], images[1])
    np.testing.assert_array_equal(canvas[7:, :4], images[2])
    np.testing.assert_array_equal(canvas[6], np.ones((9, 3)))


def test_loss_curves_with_and_without_the_first_value():
    left, right = FIGURES["losses"]("title").axes
    for axes, first in ((left, 0), (right, 1)):
        for line, values in zip(axes.lines, CURVES.values(), strict=True):
            np.testing.assert_array_equal(line.get_ydata(), values[first:])
            np.testing.assert_array_equal(line.get_xdata(), np.arange(3)[first:])
    names = [artist.get_text() for artist in FIGURES["losses"]("title").legends[0].get_texts()]
    assert names == list(CURVES)


def test_points_lie_below_the_diagonal_and_samples_above_it():
    figure = point_pairs(MANY, 2 * MANY[:20], dimensions=[0, 2, 5], title="")
    for number, axes in enumerate(figure.axes):
        row, column = divmod(number, 3)
        across, down = ((0, 2, 5)[place] for place in (column, row))
        if row != column:
            (drawn,) = (collection.get_offsets() for collection in axes.collections)
            np.testing.assert_array_equal(drawn, (MANY if row > column else 2 * MANY[:20])[:, [across, down]])
        else:
            for patch, values in zip(axes.patches, (MANY, MANY[:20] * 2), strict=True):
                x, share = np.transpose(patch.get_xy())
                edges = np.unique(x)
                counts = np.histogram(values[:, across], edges)[0]
                assert np.max(share) == pytest.approx(np.max(counts) / len(values))


def test_bars_have_standard_errors():
    figure = class_losses(
        {"3": 98.571, "8": 95.74, "9": 90.0}, errors={"3": 0.71, "8": 1.44, "9": np.nan}, title="t", label="loss"
    )
    shown = [artist.get_text() for artist in texts_of(figure)]
    for wanted in ("98.57 ± 0.71", "95.7 ± 1.4", "90", "loss, ± standard error"):
        assert wanted in shown
    (lines,) = figure.axes[0].collections
    np.testing.assert_allclose(np.array(lines.get_segments()[0])[:, 0], [98.571 - 0.71, 98.571 + 0.71])
    assert "loss" in [artist.get_text() for artist in texts_of(class_losses({"3": 1.0}, title="t", label="loss"))]


def test_density_fit_names_the_share_of_samples_outside():
    figure = density_fit(BELL, POINTS, np.full((50, 2), 4.0), 1.1 * BELL, extent=3, title="title")
    assert "transformed samples (100.0% outside)" in [axes.get_title() for axes in figure.axes]
    assert [axes.images[0].get_clim()[1] for axes in figure.axes if axes.images] == [BELL.max()] * 2  # one scale
    colours = [axes.collections[0].get_array() for axes in figure.axes[1:3]]
    np.testing.assert_array_equal(*colours)


def test_kl_below_zero_is_left_out_of_the_logarithm():
    left, right = kl_curve(np.arange(1, 4), np.array([0.3, -0.1, 0.2]), title="title").axes
    np.testing.assert_array_equal(left.lines[0].get_ydata(), [0.3, -0.1, 0.2])
    np.testing.assert_array_equal(right.lines[0].get_ydata(), [0.3, np.nan, 0.2])
    assert right.get_yscale() == "log"


def test_contours_hold_their_mass():
    axis = np.linspace(-6.0, 6.0, 601)
    bell = np.exp(-0.5 * (axis[:, None] ** 2 + axis**2))
    np.testing.assert_allclose(_mass_levels(bell, (0.5, 0.95)), [0.05, 0.5], rtol=0.01)
    assert _mass_levels(np.eye(1), (0.5, 0.95)) == []
