"""Positions in inches, so that panels and images keep their shape and no label is cut off."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from planar_vae_jax.plotting._text import VERBATIM, drawable, points_wide, wrap

MARGIN = 0.08  # inches around a title
LINE = 1.3  # height of a line of text, in font sizes


def set_title(figure: Figure, text: str, *, size: float = 12) -> None:
    """Writes ``text`` above the figure, wrapped to its width, and makes the figure taller by the height of the lines.

    Args:
        figure: its axes must be placed afterwards, or by a layout engine.
        text: the title; a ``$`` in it starts no formula.
        size: of the font, in points.
    """
    width = 72 * (figure.get_figwidth() - 2 * MARGIN)
    lines = wrap(drawable(text), lambda line: points_wide(line, size) <= width)
    height = figure.get_figheight() + len(lines) * LINE * size / 72 + MARGIN
    figure.set_figheight(height)
    written = figure.suptitle("\n".join(lines), fontsize=size, **VERBATIM)
    # A layout engine places the title itself, but only if nothing has set its position.
    if figure.get_layout_engine() is None:
        written.set_y(1 - MARGIN / height)


def axes_at(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Adds axes whose frame has this position and size, in inches from the figure's lower left corner."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))
