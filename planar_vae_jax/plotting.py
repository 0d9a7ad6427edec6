"""Pictures from arrays. Every function returns a matplotlib ``Figure`` and touches no global state."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def loss_curves(epochs: np.ndarray, curves: dict[str, np.ndarray], *, title: str, ylabel: str) -> Figure:
    """Loss against epochs, with the first value on the left and without it on the right (figures 5 and 6).

    Args:
        epochs: ``[T]``, epochs (whole or fractions) at which the losses were taken.
        curves: name -> ``[T]`` losses.
    """
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=120)
    figure.suptitle(title)
    for axes, first, label in zip(figure.subplots(1, 2), (0, 1), ("with", "without"), strict=True):
        for name, values in curves.items():
            axes.plot(epochs[first:], values[first:], label=name, linewidth=1.5, marker=".")
        axes.set(xlabel="epoch", ylabel=ylabel, title=f"{label} the first iteration")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
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
    images = np.concatenate(list(rows.values()))
    count = len(images) // len(rows)
    figure, axes, (height, width) = _tiles(images, count, title)
    axes.set_yticks([height * (line + 0.5) for line in range(len(rows))], list(rows), fontsize=9)
    axes.set_xticks([width * (column + 0.5) for column in range(len(columns))], columns, fontsize=9)
    return figure


def image_grid(images: np.ndarray, *, columns: int, title: str) -> Figure:
    """A grid of grey images ``[N, H, W]`` with values in [0, 1], row after row."""
    return _tiles(images, columns, title)[0]


def _tiles(images: np.ndarray, columns: int, title: str) -> tuple[Figure, Axes, tuple[int, int]]:
    """One picture of all images with a line between them; also the size of a tile, line included."""
    border = max(1, images.shape[1] // 14)
    lines = -(-len(images) // columns)
    empty = np.ones((lines * columns - len(images), *images.shape[1:]))
    padded = np.pad(np.concatenate([images, empty]), ((0, 0), (0, border), (0, border)), constant_values=1.0)
    height, width = padded.shape[1:]
    canvas = padded.reshape(lines, columns, height, width).swapaxes(1, 2).reshape(lines * height, -1)
    inches = 0.75
    figure = Figure(
        figsize=(max(4.5, inches * columns * width / height + 1.0), inches * lines + 0.8),
        layout="constrained",
        dpi=120,
    )
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots()
    axes.imshow(
        canvas[:-border, :-border],
        cmap="gray",
        vmin=0.0,
        vmax=1.0,
        extent=(0, columns * width - border, lines * height - border, 0),
    )
    axes.set(xticks=[], yticks=[])
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    return figure, axes, (height, width)


def class_losses(losses: dict[str, float], *, title: str, label: str) -> Figure:
    """Test loss by class ("each category"): a bar a class with its value beside it."""
    figure = Figure(figsize=(7, 0.32 * len(losses) + 1.2), layout="constrained", dpi=120)
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots()
    bars = axes.barh(list(losses), list(losses.values()), color="tab:blue")
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=9)
    axes.set(xlabel=label, ylabel="class")
    axes.margins(x=0.12)
    axes.invert_yaxis()
    return figure
