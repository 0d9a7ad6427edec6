"""Grey images side by side."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from planar_vae_jax.plotting.text import plain, set_title

TILE, WIDEST = 0.75, 40.0  # inches: the height of an image, the width of all


def image_rows(rows: Mapping[str, np.ndarray], *, title: str, columns: Sequence[str] = ()) -> Figure:
    """Rows of grey images, each row with its name at the left (figures 3 and 4).

    Args:
        rows: name -> ``[N, H, W]`` with values in [0, 1], the same N in each row.
        columns: a caption over each column.
    """
    images = np.concatenate(list(rows.values()))
    count = len(images) // len(rows)
    figure, axes, (height, width) = _tiles(images, count, title)
    names, style = plain(rows)
    axes.set_yticks([height * (line + 0.5) for line in range(len(rows))], names, fontsize=9, **style)
    if columns:
        captions, style = plain(columns)
        axes.set_xticks([width * (column + 0.5) for column in range(len(columns))], captions, fontsize=9, **style)
        figure.set_figheight(figure.get_figheight() + 0.2)
    return figure


def image_grid(images: np.ndarray, *, columns: int, title: str, subtitle: str = "") -> Figure:
    """A grid of grey images ``[N, H, W]`` with values in [0, 1], row after row; ``subtitle`` is a remark on them."""
    figure, axes, _ = _tiles(images, columns, title)
    if subtitle:
        (shown,), style = plain([subtitle])
        axes.set_title(shown, fontsize=9, style="italic", wrap=True, **style)
        figure.set_figheight(figure.get_figheight() + 0.2)
    return figure


def _tiles(images: np.ndarray, columns: int, title: str) -> tuple[Figure, Axes, tuple[int, int]]:
    """One picture of all images with a line between them; also the size of a tile, line included."""
    border = max(1, images.shape[1] // 14)
    canvas = _canvas(images, columns, border)
    height, width = images.shape[1] + border, images.shape[2] + border
    aspect = canvas.shape[1] / height
    inches = min(TILE, WIDEST / aspect)
    size = max(4.5, inches * aspect + 1.0), inches * canvas.shape[0] / height + 0.2
    figure = Figure(figsize=size, layout="compressed", dpi=120)
    set_title(figure, title, size=10)
    axes = figure.subplots()
    axes.imshow(canvas[:-border, :-border], cmap="gray", vmin=0.0, vmax=1.0, extent=_extent(canvas, border))
    axes.set(xticks=[], yticks=[])
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    return figure, axes, (height, width)


def _canvas(images: np.ndarray, columns: int, border: int) -> np.ndarray:
    """The images, row after row, each with a white line below and to the right."""
    lines = -(-len(images) // columns)
    empty = np.ones((lines * columns - len(images), *images.shape[1:]))
    padded = np.pad(np.concatenate([images, empty]), ((0, 0), (0, border), (0, border)), constant_values=1.0)
    height, width = padded.shape[1:]
    return padded.reshape(lines, columns, height, width).swapaxes(1, 2).reshape(lines * height, -1)


def _extent(canvas: np.ndarray, border: int) -> tuple[float, float, float, float]:
    """Of the picture, a unit a pixel, without the last lines."""
    return 0.0, canvas.shape[1] - border, canvas.shape[0] - border, 0.0
