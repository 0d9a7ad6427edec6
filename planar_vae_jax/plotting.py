"""Pictures from arrays. Every function returns a matplotlib ``Figure`` and touches no global state."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
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
        if len(epochs[first:]) == 1:
            axes.set_xlim(epochs[first] - 1, epochs[first] + 1)
        axes.set(xlabel="epoch", ylabel=ylabel, title=f"{label} the first iteration")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend(fontsize=8)
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


def density_fit(
    target: np.ndarray,
    base: np.ndarray,
    samples: np.ndarray,
    density: np.ndarray,
    *,
    extent: float,
    title: str,
) -> Figure:
    """Target, base samples, the same samples transformed, and the transformed density (figure 2).

    Both densities have one colour scale, the target's. A sample's colour is the direction in which it lay in
    the base, so that it can be found again among the transformed ones.

    Args:
        target: ``[N, N]``, a normalised density on ``[-extent, extent]^2``; rows are z2, upwards.
        base: ``[S, 2]``.
        samples: ``[S, 2]``, the transformed ``base``.
        density: as ``target``.
    """
    figure = Figure(figsize=(16, 4.2), layout="constrained", dpi=120)
    figure.suptitle(title)
    panels = figure.subplots(1, 4)
    top = float(np.max(target))
    for axes, values, label in ((panels[0], target, "target density"), (panels[3], density, "flow's density")):
        picture = _density(axes, values, extent, top)
        axes.set_title(label)
    clipped = "max" if np.max(density) > top else "neither"
    bar = figure.colorbar(picture, ax=panels[3], extend=clipped, shrink=0.8)
    bar.set_label("density (both panels)")
    centre = np.mean(base, axis=0)
    angle = np.arctan2(base[:, 1] - centre[1], base[:, 0] - centre[0])
    for axes, points, label in ((panels[1], base, "base samples"), (panels[2], samples, "transformed samples")):
        axes.scatter(*points.T, c=angle, cmap="hsv", vmin=-np.pi, vmax=np.pi, s=2, linewidths=0)
        outside = np.mean(np.max(np.abs(points), axis=1) > extent)
        axes.set_title(f"{label} ({outside:.1%} outside)" if outside >= 5e-4 else label)
        _square(axes, extent)
    return figure


def layer_densities(densities: dict[int, np.ndarray], *, extent: float, title: str) -> Figure:
    """Densities after the first k layers, k -> ``[N, N]`` as in :func:`density_fit`; a colour scale each."""
    figure = Figure(figsize=(3.1 * max(2, len(densities)), 3.5), layout="constrained", dpi=120)
    figure.suptitle(title)
    for axes, (k, values) in zip(figure.subplots(1, len(densities), squeeze=False)[0], densities.items(), strict=True):
        top = float(np.max(values))
        _density(axes, values, extent, top)
        axes.set_title(f"k = {k} (0 to {top:.2g})")
    return figure


def kl_curve(kl: np.ndarray, *, title: str) -> Figure:
    """KL of every step ``[T]`` in nats: as it is, and its moving average on a logarithmic axis."""
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=120)
    figure.suptitle(title)
    steps = np.arange(1, len(kl) + 1)
    window = max(1, len(kl) // 50)
    average = np.convolve(kl, np.full(window, 1.0 / window), mode="valid")
    left, right = figure.subplots(1, 2)
    marker = "." if len(kl) < 50 else None
    left.plot(steps, kl, linewidth=0.8, marker=marker)
    left.set(ylabel="KL estimate (nats)", title="every step")
    # An estimate near 0 is below 0 half of the time; it has no place on a logarithmic axis.
    right.plot(steps[window - 1 :], np.where(average > 0.0, average, np.nan), linewidth=1.2, marker=marker)
    right.set(ylabel="KL estimate (nats)", title=f"mean of {window} steps" if window > 1 else "every step")
    if np.any(average > 0.0):
        right.set_yscale("log")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    return figure


def _density(axes: Axes, values: np.ndarray, extent: float, top: float) -> AxesImage:
    picture = axes.imshow(
        values, origin="lower", extent=(-extent, extent, -extent, extent), vmin=0.0, vmax=top, cmap="viridis"
    )
    _square(axes, extent)
    return picture


def _square(axes: Axes, extent: float) -> None:
    axes.set(xlabel="$z_1$", ylabel="$z_2$", xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal")
