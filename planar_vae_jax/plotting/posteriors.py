"""Posteriors on the plane, an image a row."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from planar_vae_jax.analysis.true_posterior import PosteriorGrid, Square
from planar_vae_jax.plotting.layout import axes_at, set_title
from planar_vae_jax.plotting.text import plain

# Inches: a panel, the image, tick labels at the left of a group of panels and below, titles above, gaps.
PANEL, IMAGE, LEFT, BOTTOM, TOP, GAP = 1.75, 0.9, 0.5, 0.26, 0.28, 0.12
MASSES = (0.5, 0.95)  # within the contours of the true posterior


def posterior_rows(
    images: np.ndarray, grids: Sequence[PosteriorGrid], *, title: str, names: Sequence[str] = ()
) -> Figure:
    """The true posterior of each image beside q_K, and the densities after k layers.

    The true one and q_K have one colour scale, the true one's. The densities after k layers lie on a larger square,
    where a dotted frame shows the smaller one, and each has a colour scale of its own. White contours are the true
    posterior's in all panels, around 50 and 95 % of its mass.

    Args:
        images: ``[R, H, W]`` with values in [0, 1].
        grids: of each image, all with the same numbers of layers.
        title: over all.
        names: of the images, above them.
    """
    layers = len(grids[0].layers) if len(grids[0].layers) > 1 else 0  # without a flow q_K is all there is
    pitch, groups = BOTTOM + PANEL + TOP, 1 + (layers > 0)
    width = GAP + IMAGE + groups * (LEFT - GAP) + (2 + layers) * (PANEL + GAP) + GAP
    figure = Figure(figsize=(width, pitch * len(images)), dpi=110)
    set_title(figure, title, size=10)
    for row, (image, grid) in enumerate(zip(images, grids, strict=True)):
        bottom = (len(images) - 1 - row) * pitch + BOTTOM
        _image(figure, bottom, image, names[row] if names else "")
        _row(figure, bottom, grid, layers > 0)
    return figure


def _image(figure: Figure, bottom: float, image: np.ndarray, name: str) -> None:
    height, width = np.array(image.shape[:2]) * IMAGE / max(image.shape[:2])
    axes = axes_at(figure, GAP + (IMAGE - width) / 2, bottom + (PANEL - height) / 2, width, height)
    axes.imshow(image, cmap="gray", vmin=0.0, vmax=1.0, aspect="auto")
    axes.set(xticks=[], yticks=[])
    (shown,), style = plain([name])
    axes.set_title(shown, fontsize=9, **style)


def _row(figure: Figure, bottom: float, grid: PosteriorGrid, with_layers: bool) -> None:
    flow_length = max(grid.layers)
    left, top = GAP + IMAGE + LEFT, float(np.max(grid.truth))
    for number, (density, name) in enumerate(
        ((grid.truth, "$p(z|x)$"), (grid.approximation, _name(flow_length, grid.kl[flow_length])))
    ):
        axes = axes_at(figure, left + number * (PANEL + GAP), bottom, PANEL, PANEL)
        _panel(axes, density, grid, grid.near, top, name, first=number == 0)
    left += 2 * (PANEL + GAP) + LEFT - GAP
    for number, (k, density) in enumerate(grid.layers.items() if with_layers else ()):
        axes = axes_at(figure, left + number * (PANEL + GAP), bottom, PANEL, PANEL)
        _panel(axes, density, grid, grid.far, float(np.max(density)), _name(k, grid.kl[k]), first=number == 0)
        x, right, y, upper = grid.near
        axes.add_patch(Rectangle((x, y), right - x, upper - y, fill=False, color="white", linestyle=":", linewidth=0.8))


def _name(k: int, kl: float) -> str:
    return f"$q_{{{k}}}(z|x)$, KL {kl:.3g}"


def _panel(
    axes: Axes, density: np.ndarray, grid: PosteriorGrid, square: Square, top: float, name: str, *, first: bool
) -> None:
    axes.imshow(density, origin="lower", extent=square, vmin=0.0, vmax=top, cmap="viridis")
    if levels := mass_levels(grid.truth, MASSES):
        axes.contour(grid.truth, levels, origin="lower", extent=grid.near, colors="white", linewidths=0.7)
    axes.set_title(name, fontsize=9)
    axes.set(xlim=square[:2], ylim=square[2:], xticks=_ticks(*square[:2]), yticks=_ticks(*square[2:]))
    axes.tick_params(labelsize=7, length=2, pad=2, labelleft=first)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, but none near the corners, where their labels would meet the next panel's."""
    room = 0.12 * (high - low)
    return [tick for tick in MaxNLocator(nbins=4).tick_values(low, high) if low + room <= tick <= high - room]


def mass_levels(density: np.ndarray, masses: Sequence[float]) -> list[float]:
    """The heights above which a density ``[N, N]`` holds these shares of its mass, ascending and different."""
    values = np.sort(density, axis=None)[::-1]
    share = np.cumsum(values) / np.sum(values)
    heights = {float(values[np.searchsorted(share, mass).clip(0, len(values) - 1)]) for mass in masses}
    return sorted(height for height in heights if 0.0 < height < values[0])
