"""Pictures from arrays. Every function returns a matplotlib ``Figure`` and touches no global state."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure


def loss_curves(epochs: np.ndarray, curves: dict[str, np.ndarray], *, title: str, ylabel: str) -> Figure:
    """Loss against epochs, with the first value on the left and without it on the right (figures 5 and 6).

    Args:
        epochs: ``[T]``, epochs (whole or fractions) at which the losses were taken.
        curves: name -> ``[T]`` losses.
    """
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=120)
    figure.suptitle(title)
    for axes, first, label in zip(figure.subplots(1, 2), (0, 1), ("all", "without the first"), strict=True):
        for name, values in curves.items():
            axes.plot(epochs[first:], values[first:], label=name, linewidth=1.5)
        axes.set(xlabel="epoch", ylabel=ylabel, title=label)
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend()
    return figure


def image_rows(rows: dict[str, np.ndarray], *, title: str, columns: Sequence[str] = ()) -> Figure:
    """Rows of grey images, each row with its name at the left (figures 3 and 4).

    Args:
        rows: name -> ``[N, H, W]`` with values in [0, 1], the same N in each row.
        columns: a caption over each column.
    """
    count = next(iter(rows.values())).shape[0]
    figure = Figure(figsize=(1.6 + 0.9 * count, 0.9 * len(rows) + 0.9), layout="constrained", dpi=120)
    figure.suptitle(title, fontsize=10)
    grid = figure.subplots(len(rows), count, squeeze=False)
    for line, (name, images) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(line, images, strict=True):
            _image(axes, image)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    for axes, caption in zip(grid[0], columns, strict=False):
        axes.set_title(caption, fontsize=9)
    return figure


def image_grid(images: np.ndarray, *, columns: int, title: str) -> Figure:
    """A grid of grey images ``[N, H, W]`` with values in [0, 1]."""
    lines = -(-len(images) // columns)
    figure = Figure(figsize=(0.7 * columns + 0.2, 0.7 * lines + 0.6), layout="constrained", dpi=120)
    figure.suptitle(title, fontsize=10)
    for axes in figure.subplots(lines, columns, squeeze=False).flat:
        axes.set_axis_off()
    for axes, image in zip(figure.axes, images, strict=False):
        axes.set_axis_on()
        _image(axes, image)
    return figure


def _image(axes, image: np.ndarray) -> None:
    axes.imshow(image, cmap="gray", vmin=0.0, vmax=1.0)
    axes.set(xticks=[], yticks=[])
