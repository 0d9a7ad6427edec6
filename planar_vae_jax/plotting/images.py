"""Images side by side, grey or in colour."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from planar_vae_jax.plotting.layout import axes_at, set_title
from planar_vae_jax.plotting.text import plain, points_wide

# Inches: the height of an image, the width of all; around them, above for captions.
TILE, WIDEST = 0.75, 24.0
MARGIN, CAPTIONS = 0.1, 0.25
SIZE = 9  # points, of names and captions


def image_rows(rows: Mapping[str, np.ndarray], *, title: str, columns: Sequence[str] = ()) -> Figure:
    """Rows of images, each row with its name at the left (figures 3 and 4).

    Args:
        rows: name -> ``[N, H, W]``, or in colour ``[N, H, W, 3]``, with values in [0, 1], the same N in each row.
        columns: a caption over each column.
    """
    images = np.concatenate(list(rows.values()))
    count = len(images) // len(rows)
    names, style = plain(rows)
    left = 0.2 + _widest(names, style) / 72
    figure, axes, (height, width) = _tiles(images, count, title, left=left, above=CAPTIONS if columns else MARGIN)
    axes.set_yticks([height * (line + 0.5) for line in range(len(rows))], names, fontsize=SIZE, **style)
    captions, style = plain(columns)
    room = 0.9 * 72 * figure.get_figwidth() * axes.get_position().width / count
    size = SIZE * min(1.0, room / max(1.0, _widest(captions, style)))
    axes.set_xticks([width * (column + 0.5) for column in range(len(columns))], captions, fontsize=size, **style)
    return figure


def image_grid(images: np.ndarray, *, columns: int, title: str, subtitle: str = "") -> Figure:
    """A grid of images ``[N, H, W]`` or ``[N, H, W, 3]``, values in [0, 1], row after row; ``subtitle``: a remark."""
    return _tiles(images, columns, f"{title}\n{subtitle}".rstrip("\n"), left=MARGIN, above=MARGIN)[0]


def _widest(texts: Sequence[str], style: Mapping[str, Any]) -> float:
    """In points."""
    return max((points_wide(text, SIZE, style["fontfamily"]) for text in texts), default=0.0)


def _tiles(
    images: np.ndarray, columns: int, title: str, *, left: float, above: float
) -> tuple[Figure, Axes, tuple[int, int]]:
    """One picture of all images with a line between them; also the size of a tile, line included."""
    border = max(1, images.shape[1] // 14)
    height, width = images.shape[1] + border, images.shape[2] + border
    canvas = _canvas(images, columns, border)[:-border, :-border]
    inches = min(TILE / height, WIDEST / canvas.shape[1])  # of a pixel
    high, wide = inches * canvas.shape[0], inches * canvas.shape[1]
    across = max(4.5, left + wide + MARGIN)
    figure = Figure(figsize=(across, MARGIN + high + above), dpi=120)
    set_title(figure, title, size=10)
    axes = axes_at(figure, left + (across - left - MARGIN - wide) / 2, MARGIN, wide, high)
    # A unit a pixel, whatever the pixels' number in the file.
    axes.imshow(canvas, cmap="gray", vmin=0.0, vmax=1.0, extent=(0, canvas.shape[1], canvas.shape[0], 0), aspect="auto")
    axes.set(xticks=[], yticks=[])
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    return figure, axes, (height, width)


def _canvas(images: np.ndarray, columns: int, border: int) -> np.ndarray:
    """The images, row after row, each with a white line below and to the right."""
    lines = -(-len(images) // columns)
    empty = np.ones((lines * columns - len(images), *images.shape[1:]))
    around = ((0, 0), (0, border), (0, border), *[(0, 0)] * (images.ndim - 3))
    padded = np.pad(np.concatenate([images, empty]), around, constant_values=1.0)
    height, width, *channels = padded.shape[1:]
    return padded.reshape(lines, columns, height, width, -1).swapaxes(1, 2).reshape(lines * height, -1, *channels)
