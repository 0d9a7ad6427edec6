"""The aggregate posterior beside the prior."""

from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from planar_vae_jax.plotting._layout import axes_at, set_title
from planar_vae_jax.plotting._text import VERBATIM, drawable

# Inches: the side of a panel, tick labels to its left and below, its title above, the legend to its right.
_PANEL, _LEFT, _BOTTOM, _TOP, _LEGEND, _RIGHT = 4.0, 0.8, 0.5, 0.35, 0.9, 0.15
_LISTED = 20  # with more classes than this there is no legend
_POINTS = 10_000  # codes that are drawn at most


def aggregate_plane(z: np.ndarray, labels: np.ndarray | None, *, title: str) -> Figure:
    """Draws codes on the latent plane by class, and their density; dashed circles hold 39, 86 and 99 % of the prior.

    Args:
        z: ``[N, 2]``, the codes.
        labels: ``[N]``, the class of each code, or None.
        title: above both panels.
    """
    legend = _LEGEND if labels is not None and len(np.unique(labels)) <= _LISTED else _RIGHT
    width = _LEFT + _PANEL + legend + _LEFT + _PANEL + _RIGHT
    figure = Figure(figsize=(width, _BOTTOM + _PANEL + _TOP), dpi=120)
    set_title(figure, title, size=10)
    half = 1.05 * max(3.2, float(np.quantile(np.abs(z), 0.999)))
    axes = axes_at(figure, _LEFT, _BOTTOM, _PANEL, _PANEL)
    rows = np.linspace(0, len(z) - 1, min(len(z), _POINTS)).astype(int)
    _scatter(axes, z[rows], None if labels is None else labels[rows], half)
    shown = "codes" if labels is None else "codes by class"
    _plane(axes, half, f"{shown}; dashed: 1, 2, 3 standard deviations of the prior", "0.3")
    axes = axes_at(figure, _LEFT + _PANEL + legend + _LEFT, _BOTTOM, _PANEL, _PANEL)
    edges = np.linspace(-half, half, int(np.clip(np.sqrt(len(z)), 10, 80)) + 1)
    axes.hist2d(z[:, 0], z[:, 1], bins=edges, cmap="viridis")
    _plane(axes, half, "density of the codes", "white")
    return figure


def _scatter(axes: Axes, z: np.ndarray, labels: np.ndarray | None, half: float) -> None:
    size = float(np.clip(6000 / len(z), 2, 20))
    if labels is None:
        axes.scatter(z[:, 0], z[:, 1], s=size, linewidths=0, color="tab:blue", alpha=0.6)
        return
    classes, index = np.unique(labels, return_inverse=True)
    colour = _colours(len(classes))
    axes.scatter(z[:, 0], z[:, 1], color=colour[index], s=size, linewidths=0, alpha=0.7)
    if len(classes) > _LISTED:
        return
    dots = [Line2D([], [], marker="o", linestyle="", color=tuple(one)) for one in colour]
    names = [drawable(str(label)) for label in classes]
    legend = axes.legend(dots, names, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    for text in legend.get_texts():
        text.set(**VERBATIM)


def _colours(count: int) -> np.ndarray:
    """``[count, 4]``: distinct colours for up to 20 classes, a gradient for more."""
    if count <= 10:
        name, size = "tab10", 10
    elif count <= 20:
        name, size = "tab20", 20
    else:
        name, size = "viridis", count
    return matplotlib.colormaps[name]((np.arange(count) + 0.5) / size)


def _plane(axes: Axes, half: float, name: str, colour: str) -> None:
    angle = np.linspace(0.0, 2.0 * np.pi, 200)
    for radius in (1.0, 2.0, 3.0):
        axes.plot(radius * np.cos(angle), radius * np.sin(angle), color=colour, linestyle="--", linewidth=0.8)
    axes.set(xlim=(-half, half), ylim=(-half, half), aspect="equal", xlabel="latent 0", ylabel="latent 1")
    axes.set_title(name, fontsize=9)
    axes.locator_params(nbins=6)
    axes.ticklabel_format(scilimits=(-2, 4))


def aggregate_histograms(z: Mapping[str, np.ndarray], *, title: str, columns: int = 4) -> Figure:
    """Draws a histogram of each coordinate of the codes, with the density of N(0, 1) as a line.

    Args:
        z: name -> ``[N]``, the values of one coordinate.
        title: above all histograms.
        columns: histograms in a row at most.
    """
    columns = min(columns, len(z))
    rows = -(-len(z) // columns)
    figure = Figure(figsize=(max(5.0, 2.6 * columns), 2.1 * rows), layout="constrained", dpi=120)
    set_title(figure, title, size=10)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(z) :]:
        axes.remove()
    for axes, (name, values) in zip(grid, z.items(), strict=False):
        half = 1.05 * max(3.5, float(np.max(np.abs(values))))
        line = np.linspace(-half, half, 300)
        axes.hist(values, bins=np.linspace(-half, half, 61), density=True, color="tab:blue", alpha=0.6)
        axes.plot(line, np.exp(-0.5 * line**2) / np.sqrt(2 * np.pi), color="black", linewidth=1.0)
        axes.set(xlim=(-half, half), yticks=[])
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=8)
    return figure
