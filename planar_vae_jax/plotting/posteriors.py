"""True posteriors on the latent plane beside the densities that a flow gives after each layer."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from planar_vae_jax.plotting._layout import axes_at, set_title
from planar_vae_jax.plotting._text import VERBATIM, drawable

# Inches: a panel, the image, tick labels to the left of a group of panels and below it, titles above, gaps.
_PANEL, _IMAGE, _LEFT, _BOTTOM, _TOP, _GAP = 1.75, 0.9, 0.5, 0.26, 0.28, 0.12
_MASSES = (0.5, 0.95)  # shares of the true posterior's mass that its two contours enclose

Square = tuple[float, float, float, float]  # left, right, bottom, top


class PosteriorPanels(Protocol):
    """The densities of one image that :func:`posterior_rows` draws; rows of each array are z's second coordinate."""

    @property
    def near(self) -> Square:
        """The square that ``truth`` and ``approximation`` cover."""

    @property
    def truth(self) -> np.ndarray:
        """``[N, N]``, the true posterior ``p(z|x)``."""

    @property
    def approximation(self) -> np.ndarray:
        """``[N, N]``, ``q_K(z|x)`` after all K layers."""

    @property
    def far(self) -> Square:
        """The larger square that the densities in ``layers`` cover."""

    @property
    def layers(self) -> Mapping[int, np.ndarray]:
        """k -> ``[N, N]``, ``q_k(z|x)`` after the first k layers; the largest k is K."""

    @property
    def kl(self) -> Mapping[int, float]:
        """k -> KL(q_k(z|x) || p(z|x)), nats."""


def posterior_rows(
    images: np.ndarray, panels: Sequence[PosteriorPanels], *, title: str, names: Sequence[str] = ()
) -> Figure:
    """Draws one row for each image: the image, its true posterior, q_K, and the densities after k layers.

    The true posterior and q_K share one colour scale, scaled to the maximum of the true posterior. The densities after
    k layers are drawn on a larger square, in which a dotted frame marks the smaller one, and each has its own colour
    scale. White contours enclose 50 and 95 % of the true posterior's mass in every panel.

    Args:
        images: ``[R, H, W]`` with values in [0, 1].
        panels: the densities of each image, all with the same numbers of layers.
        title: above all rows.
        names: of the images, drawn above them; may be empty.
    """
    layers = len(panels[0].layers) if len(panels[0].layers) > 1 else 0  # without a flow, q_K is the only density
    pitch, groups = _BOTTOM + _PANEL + _TOP, 1 + (layers > 0)
    width = _GAP + _IMAGE + groups * (_LEFT - _GAP) + (2 + layers) * (_PANEL + _GAP) + _GAP
    figure = Figure(figsize=(width, pitch * len(images)), dpi=110)
    set_title(figure, title, size=10)
    for row, (image, densities) in enumerate(zip(images, panels, strict=True)):
        bottom = (len(images) - 1 - row) * pitch + _BOTTOM
        _image(figure, bottom, image, names[row] if names else "")
        _row(figure, bottom, densities, layers > 0)
    return figure


def _image(figure: Figure, bottom: float, image: np.ndarray, name: str) -> None:
    height, width = np.array(image.shape[:2]) * _IMAGE / max(image.shape[:2])
    axes = axes_at(figure, _GAP + (_IMAGE - width) / 2, bottom + (_PANEL - height) / 2, width, height)
    axes.imshow(image, cmap="gray", vmin=0.0, vmax=1.0, aspect="auto")
    axes.set(xticks=[], yticks=[])
    axes.set_title(drawable(name), fontsize=9, **VERBATIM)


def _row(figure: Figure, bottom: float, densities: PosteriorPanels, with_layers: bool) -> None:
    flow_length = max(densities.layers)
    near, top = densities.near, float(np.max(densities.truth))
    left = _GAP + _IMAGE + _LEFT
    axes = axes_at(figure, left, bottom, _PANEL, _PANEL)
    _panel(axes, densities.truth, densities, near, top, "$p(z|x)$", first=True)
    axes = axes_at(figure, left + _PANEL + _GAP, bottom, _PANEL, _PANEL)
    _panel(axes, densities.approximation, densities, near, top, _name(densities, flow_length), first=False)
    if not with_layers:
        return
    left += 2 * (_PANEL + _GAP) + _LEFT - _GAP
    for number, (k, density) in enumerate(densities.layers.items()):
        axes = axes_at(figure, left + number * (_PANEL + _GAP), bottom, _PANEL, _PANEL)
        top = float(np.max(density))
        _panel(axes, density, densities, densities.far, top, _name(densities, k), first=number == 0)
        x, right, y, upper = near
        axes.add_patch(Rectangle((x, y), right - x, upper - y, fill=False, color="white", linestyle=":", linewidth=0.8))


def _name(densities: PosteriorPanels, k: int) -> str:
    return f"$q_{{{k}}}(z|x)$, KL {densities.kl[k]:.3g}"


def _panel(
    axes: Axes,
    density: np.ndarray,
    densities: PosteriorPanels,
    square: Square,
    top: float,
    name: str,
    *,
    first: bool,
) -> None:
    axes.imshow(density, origin="lower", extent=square, vmin=0.0, vmax=top, cmap="viridis")
    if levels := _mass_levels(densities.truth, _MASSES):
        axes.contour(densities.truth, levels, origin="lower", extent=densities.near, colors="white", linewidths=0.7)
    axes.set_title(name, fontsize=9)
    axes.set(xlim=square[:2], ylim=square[2:], xticks=_ticks(*square[:2]), yticks=_ticks(*square[2:]))
    axes.tick_params(labelsize=7, length=2, pad=2, labelleft=first)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers away from the corners, where their labels would meet those of the next panel."""
    room = 0.12 * (high - low)
    return [tick for tick in MaxNLocator(nbins=4).tick_values(low, high) if low + room <= tick <= high - room]


def _mass_levels(density: np.ndarray, masses: Sequence[float]) -> list[float]:
    """Returns, for each share of mass, the height above which a density ``[N, N]`` holds that share.

    The heights are in ascending order; equal ones, zero and the maximum are left out, as no contour has that height.
    """
    values = np.sort(density, axis=None)[::-1]
    share = np.cumsum(values) / np.sum(values)
    heights = {float(values[np.searchsorted(share, mass).clip(0, len(values) - 1)]) for mass in masses}
    return sorted(height for height in heights if 0.0 < height < values[0])
