"""Densities and samples on the plane."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from planar_vae_jax.plotting.text import set_title


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
    figure = Figure(figsize=(16, 4.1), layout="compressed", dpi=120)
    set_title(figure, title)
    panels = figure.subplots(1, 4)
    top = float(np.max(target))
    picture = _density(panels[0], target, extent, top, "target density")
    _density(panels[3], density, extent, top, "flow's density")
    clipped = "max" if np.max(density) > top else "neither"
    bar = figure.colorbar(picture, ax=panels[3], extend=clipped, shrink=0.8)
    bar.set_label("density (both panels)")
    colours = _directions(base)
    _scatter(panels[1], base, colours, extent, "base samples")
    _scatter(panels[2], samples, colours, extent, "transformed samples")
    return figure


def layer_densities(densities: Mapping[int, np.ndarray], *, extent: float, title: str) -> Figure:
    """Densities after the first k layers, k -> ``[N, N]`` as in :func:`density_fit`; a colour scale each."""
    figure = Figure(figsize=(3.1 * max(2, len(densities)), 3.6), layout="compressed", dpi=120)
    set_title(figure, title)
    for axes, (k, values) in zip(figure.subplots(1, len(densities), squeeze=False)[0], densities.items(), strict=True):
        top = float(np.max(values))
        _density(axes, values, extent, top, f"k = {k} (0 to {top:.2g})")
    return figure


def _directions(points: np.ndarray) -> np.ndarray:
    """Angles ``[S]`` of ``points [S, 2]`` seen from their mean."""
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
