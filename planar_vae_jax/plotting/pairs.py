"""Points and samples on more than two dimensions."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from planar_vae_jax.plotting._layout import axes_at, set_title
from planar_vae_jax.plotting.density import BOTTOM, LEFT, RIGHT, TOP

_SMALLEST, _WIDTH, _GAP = 1.3, 5.0, 0.36  # inches: of a panel, of all panels at least, and between panels
_OUTSIDE = 0.0005  # share of the points that may lie outside of a panel at either end of a dimension
_COLOURS = ("black", "tab:blue")  # points, samples


def point_pairs(points: np.ndarray, samples: np.ndarray, *, dimensions: list[int], title: str) -> Figure:
    """Draws points and samples of a fitted density in each pair of some dimensions.

    Points are black and below the diagonal, samples blue and above it; on the diagonal are histograms of both. A panel
    shows the range of the points, but for the outermost 0.05 % at either end.

    Args:
        points: ``[N, D]``.
        samples: ``[S, D]``.
        dimensions: which of the D dimensions are drawn.
        title: above all panels.
    """
    count = len(dimensions)
    side = max(_SMALLEST, _WIDTH / count)
    pitch = side + _GAP
    figure = Figure(figsize=(LEFT + count * pitch - _GAP + RIGHT, BOTTOM + count * pitch - _GAP + TOP / 2), dpi=120)
    set_title(figure, title, size=10)
    ranges = [_range(points[:, dimension]) for dimension in dimensions]
    for row, down in enumerate(dimensions):
        for column, across in enumerate(dimensions):
            axes = axes_at(figure, LEFT + column * pitch, BOTTOM + (count - 1 - row) * pitch, side, side)
            axes.locator_params(nbins=3, prune="both")
            axes.ticklabel_format(scilimits=(-3, 4))
            axes.tick_params(labelsize=7, labelbottom=row == count - 1, labelleft=column == 0)
            if row == column:
                _histograms(axes, points[:, across], samples[:, across], ranges[column])
            else:
                shown, colour = (points, _COLOURS[0]) if row > column else (samples, _COLOURS[1])
                axes.scatter(shown[:, across], shown[:, down], s=2, linewidths=0, color=colour)
                axes.set_ylim(*ranges[row])
            axes.set_xlim(*ranges[column])
            if row == count - 1:
                axes.set_xlabel(f"$x_{{{across}}}$")
            if column == 0 and count > 1:
                axes.set_ylabel(f"$x_{{{down}}}$")
    return figure


def _range(values: np.ndarray) -> tuple[float, float]:
    low, high = (float(q) for q in np.quantile(values, (_OUTSIDE, 1 - _OUTSIDE)))
    room = 0.05 * (high - low) or 1.0
    return low - room, high + room


def _histograms(axes: Axes, points: np.ndarray, samples: np.ndarray, limits: tuple[float, float]) -> None:
    bins = np.linspace(*limits, 25).tolist()
    for values, colour in zip((points, samples), _COLOURS, strict=True):
        axes.hist(values, bins=bins, weights=np.full(len(values), 1 / len(values)), histtype="step", color=colour)
    axes.set_yticks([])
