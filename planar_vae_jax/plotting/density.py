"""Densities and samples on the plane."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from planar_vae_jax.plotting._layout import axes_at, set_title

# Inches around a panel, for tick labels and axis labels, and at the top for the panel's title.
LEFT, RIGHT, BOTTOM, TOP = 0.8, 0.2, 0.55, 0.35


def density_fit(
    target: np.ndarray,
    base: np.ndarray,
    samples: np.ndarray,
    density: np.ndarray,
    *,
    extent: float,
    title: str,
    heading: str = "target density",
) -> Figure:
    """Draws the target, samples of the base, the same samples transformed, and the flow's density (figure 2).

    Both densities share one colour scale, scaled to the maximum of the target. The colour of a base sample is its
    direction from the mean of the base; its transformed sample has the same colour.

    Args:
        target: ``[N, N]``, a normalised density on ``[-extent, extent]^2``, or a histogram; rows are z2, from bottom to
            top.
        base: ``[S, 2]``, samples of the base distribution.
        samples: ``[S, 2]``, ``base`` transformed by the flow.
        density: ``[M, M]``, the flow's density on the same square.
        extent: half the side of the square that is shown.
        title: above all panels.
        heading: of the panel of ``target``.
    """
    figure, panels = _panels(4, 3.0, title, right=0.9)
    top = float(np.max(target))
    picture = _density(panels[0], target, extent, top, heading)
    _density(panels[3], density, extent, top, "flow's density")
    clipped = "max" if np.max(density) > top else "neither"
    scale = axes_at(figure, figure.get_figwidth() - 0.9, BOTTOM, 0.12, 3.0)
    bar = figure.colorbar(picture, cax=scale, extend=clipped)
    bar.set_label("density (both panels)")
    colours = _directions(base)
    _scatter(panels[1], base, colours, extent, "base samples")
    _scatter(panels[2], samples, colours, extent, "transformed samples")
    return figure


def layer_densities(densities: Mapping[int, np.ndarray], *, extent: float, title: str) -> Figure:
    """Draws the densities after the first k layers, one panel for each k with its own colour scale.

    Args:
        densities: k -> ``[N, N]``, a density on ``[-extent, extent]^2``; rows are z2, from bottom to top.
        extent: half the side of the square that is shown.
        title: above all panels.
    """
    figure, panels = _panels(len(densities), 2.5, title)
    for axes, (k, values) in zip(panels, densities.items(), strict=True):
        top = float(np.max(values))
        _density(axes, values, extent, top, f"k = {k} (0 to {top:.2g})")
    return figure


def _panels(count: int, side: float, title: str, right: float = 0.0) -> tuple[Figure, list[Axes]]:
    """Returns a figure with ``count`` square panels of ``side`` inches in a row, and ``right`` inches of free space."""
    pitch = LEFT + side + RIGHT
    figure = Figure(figsize=(count * pitch + right, BOTTOM + side + TOP), dpi=120)
    set_title(figure, title)
    return figure, [axes_at(figure, i * pitch + LEFT, BOTTOM, side, side) for i in range(count)]


def _directions(points: np.ndarray) -> np.ndarray:
    """Returns the angles ``[S]`` of ``points [S, 2]`` around their mean, in radians."""
    x, y = np.transpose(points - np.mean(points, axis=0))
    return np.arctan2(y, x)


def _scatter(axes: Axes, points: np.ndarray, colours: np.ndarray, extent: float, title: str) -> None:
    axes.scatter(points[:, 0], points[:, 1], c=colours, cmap="hsv", vmin=-np.pi, vmax=np.pi, s=2, linewidths=0)
    outside = np.mean(np.max(np.abs(points), axis=1) > extent)
    _square(axes, extent, f"{title} ({outside:.1%} outside)" if outside >= 5e-4 else title)


def _density(axes: Axes, values: np.ndarray, extent: float, top: float, title: str) -> AxesImage:
    sides = (-extent, extent, -extent, extent)
    picture = axes.imshow(values, origin="lower", extent=sides, vmin=0.0, vmax=top, cmap="viridis")
    _square(axes, extent, title)
    return picture


def _square(axes: Axes, extent: float, title: str) -> None:
    axes.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal", title=title)
    axes.set(xlabel="$z_1$", ylabel="$z_2$")
    axes.locator_params(nbins=5)
    axes.ticklabel_format(scilimits=(-2, 4))
