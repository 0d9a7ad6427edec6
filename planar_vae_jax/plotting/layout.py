"""Where things stand in a figure, in inches: squares and images keep their shape, and nothing is cut."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from planar_vae_jax.plotting.text import plain, points_wide, wrap

MARGIN = 0.08  # around a title
LINE = 1.3  # the height of a line, in font sizes


def set_title(figure: Figure, text: str, *, size: float = 12) -> None:
    """Writes ``text`` over the figure, wrapped to its width; the figure grows by the height of the lines."""
    (shown,), style = plain([text])
    width = 72 * (figure.get_figwidth() - 2 * MARGIN)
    lines = wrap(shown, lambda line: points_wide(line, size, style["fontfamily"]) <= width)
    height = figure.get_figheight() + len(lines) * LINE * size / 72 + MARGIN
    figure.set_figheight(height)
    written = figure.suptitle("\n".join(lines), fontsize=size, **style)
    if figure.get_layout_engine() is None:  # which places titles itself, but only those that nobody has placed
        written.set_y(1 - MARGIN / height)


def axes_at(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes whose frame lies there, from the figure's lower left corner, whatever stands around it."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))
