"""Grids and rows of images, grey or in colour."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from planar_vae_jax.plotting._layout import axes_at, set_title
from planar_vae_jax.plotting._text import VERBATIM, drawable, points_wide

# Inches: the height of an image, the greatest width of all images; the margin around them, the space for captions.
_TILE, _WIDEST = 0.75, 24.0
_MARGIN, _CAPTIONS = 0.1, 0.25
_SIZE = 9  # points, the font size of names and captions


def image_rows(rows: Mapping[str, np.ndarray], *, title: str, columns: Sequence[str] = ()) -> Figure:
    """Draws rows of images, with the name of each row to its left (figures 3 and 4).

    Args:
        rows: name -> ``[N, H, W]``, or in colour ``[N, H, W, 3]``, with values in [0, 1]; N is the same in each row.
        title: above all rows.
        columns: a caption above each column; may be empty.
    """
    images = np.concatenate(list(rows.values()))
    count = len(images) // len(rows)
    names, captions = [drawable(name) for name in rows], [drawable(caption) for caption in columns]
    left = 0.2 + _widest(names) / 72
    figure, axes, (height, width) = _tiles(images, count, title, left=left, above=_CAPTIONS if columns else _MARGIN)
    axes.set_yticks([height * (line + 0.5) for line in range(len(rows))], names, fontsize=_SIZE, **VERBATIM)
    room = 0.9 * 72 * figure.get_figwidth() * axes.get_position().width / count
    size = _SIZE * min(1.0, room / max(1.0, _widest(captions)))
    axes.set_xticks([width * (column + 0.5) for column in range(len(columns))], captions, fontsize=size, **VERBATIM)
    return figure


def image_grid(images: np.ndarray, *, columns: int, title: str, subtitle: str = "") -> Figure:
    """Draws a grid of images, row after row.

    Args:
        images: ``[N, H, W]``, or in colour ``[N, H, W, 3]``, with values in [0, 1].
        columns: images in a row.
        title: above the grid.
        subtitle: a remark on the line below the title.
    """
    return _tiles(images, columns, f"{title}\n{subtitle}".rstrip("\n"), left=_MARGIN, above=_MARGIN)[0]


def _widest(texts: Iterable[str]) -> float:
    """The width of the widest text, in points."""
    return max((points_wide(text, _SIZE) for text in texts), default=0.0)


def _tiles(
    images: np.ndarray, columns: int, title: str, *, left: float, above: float
) -> tuple[Figure, Axes, tuple[int, int]]:
    """Draws all images as one picture with white lines between them.

    Returns:
        The figure, its axes, and the height and width of an image with its line, in pixels.
    """
    border = max(1, images.shape[1] // 14)
    height, width = images.shape[1] + border, images.shape[2] + border
    canvas = _canvas(images, columns, border)[:-border, :-border]
    inches = min(_TILE / height, _WIDEST / canvas.shape[1])  # the side of a pixel
    high, wide = inches * canvas.shape[0], inches * canvas.shape[1]
    across = max(4.5, left + wide + _MARGIN)
    figure = Figure(figsize=(across, _MARGIN + high + above), dpi=120)
    set_title(figure, title, size=10)
    axes = axes_at(figure, left + (across - left - _MARGIN - wide) / 2, _MARGIN, wide, high)
    # One unit of the axes is one pixel of the images, at any resolution of the file.
    axes.imshow(canvas, cmap="gray", vmin=0.0, vmax=1.0, extent=(0, canvas.shape[1], canvas.shape[0], 0), aspect="auto")
    axes.set(xticks=[], yticks=[])
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    return figure, axes, (height, width)


def _canvas(images: np.ndarray, columns: int, border: int) -> np.ndarray:
    """Returns the images as one array, row after row, each with a white line below and to the right."""
    lines = -(-len(images) // columns)
    empty = np.ones((lines * columns - len(images), *images.shape[1:]))
    around = ((0, 0), (0, border), (0, border), *[(0, 0)] * (images.ndim - 3))
    padded = np.pad(np.concatenate([images, empty]), around, constant_values=1.0)
    height, width, *channels = padded.shape[1:]
    return padded.reshape(lines, columns, height, width, -1).swapaxes(1, 2).reshape(lines * height, -1, *channels)
