"""Line charts as SVG inside a page of HTML: no script, no picture file, and the page's colours."""

import html
import math
from collections.abc import Mapping, Sequence

# Sizes in SVG's own units; a page scales the chart to the width that it has.
_WIDTH, _HEIGHT = 360.0, 200.0
_TOP, _RIGHT, _BOTTOM = 10.0, 12.0, 40.0
_CHARACTER = 7.5  # width of a character of a tick label
_POINTS = 400  # at most, of a line
_MARKED = 40  # points up to which each is marked
_GREATEST = 1e150  # a greater value is left out
_LOGARITHMIC = 100.0  # ratio of the greatest to the least value from which on the axis is logarithmic

Line = tuple[Sequence[float], Sequence[float | None]]  # x [T], y [T]; None: missing


def line_chart(title: str, unit: str, lines: Mapping[str, Line]) -> str:
    """Returns an ``<svg>`` of lines over one horizontal axis.

    The vertical axis is logarithmic if all values are positive and differ by more than a factor of 100.

    Args:
        title: what is drawn, for people who do not see it.
        unit: what the horizontal axis counts.
        lines: name -> x and y.
    """
    drawn = [_drawn(*line) for line in lines.values()]
    values = [y for points in drawn for _, y in points] or [0.0]
    low, high = min(values), max(values)
    logarithmic = low > 0 and high / low > _LOGARITHMIC
    scale = math.log10 if logarithmic else float
    bottom, top = _padded(scale(low), scale(high))
    ticks = _powers(bottom, top) if logarithmic else _ticks(bottom, top, 5)
    labels = _labels([10.0**tick for tick in ticks]) if logarithmic else _labels(ticks)
    left = 10 + _CHARACTER * max(map(len, labels), default=0)
    xs = [x for points in drawn for x, _ in points] or [0.0]
    first, last = min(xs), max(xs)

    def across(x: float) -> float:
        return left + (_WIDTH - left - _RIGHT) * ((x - first) / (last - first) if last > first else 0.5)

    def up(y: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (y - bottom) / (top - bottom)

    parts = [f"<title>{html.escape(title)}</title>"]
    for tick, label in zip(ticks, labels, strict=True):
        y = up(tick)
        parts.append(f'<line class="grid" x1="{left:.1f}" x2="{_WIDTH - _RIGHT:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    whole = [tick for tick in _ticks(first, last, 5) if tick == round(tick)] or [first]
    for tick in whole:
        label = f"{tick:.10g}"
        x = min(across(tick), _WIDTH - _CHARACTER * len(label) / 2)  # the last label stays inside
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 22:.1f}" text-anchor="middle">{label}</text>')
    middle = (left + _WIDTH - _RIGHT) / 2
    axis = f"{unit}{', logarithmic scale' if logarithmic else ''}"
    parts.append(f'<text x="{middle:.1f}" y="{_HEIGHT - 4:.1f}" text-anchor="middle">{html.escape(axis)}</text>')
    for number, points in enumerate(drawn):
        parts.append(_path([(across(x), up(scale(y))) for x, y in points], number % 3))
    return f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img">{"".join(parts)}</svg>'


def _drawn(xs: Sequence[float], ys: Sequence[float | None]) -> list[tuple[float, float]]:
    """Returns at most ``_POINTS`` points of a line, the last among them."""
    points = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None and abs(y) < _GREATEST]
    every = -(-len(points) // _POINTS) or 1
    return points[::-1][::every][::-1]


def _path(points: Sequence[tuple[float, float]], colour: int) -> str:
    """Returns a path; a few points are marked too."""
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    marked = points if len(points) <= _MARKED else ()
    circles = (f'<circle class="dot{colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in marked)
    return f'<path class="line{colour}" d="{path}"/>{"".join(circles)}' if points else ""


def _padded(low: float, high: float) -> tuple[float, float]:
    size = max(abs(low), abs(high))
    room = 0.06 * (high - low)
    if room < 1e-9 * size or size < 1 / _GREATEST:  # a constant, but for rounding
        room = 0.1 * size if size > 1 / _GREATEST else 1.0
    return low - room, high + room


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Returns about ``count`` round numbers from ``low`` to ``high``."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Returns the whole exponents of 10 from ``low`` to ``high``, at most about six."""
    first, last = math.ceil(low), math.floor(high)
    return [float(exponent) for exponent in range(first, last + 1, -(-(last - first + 1) // 6))]


def _labels(ticks: Sequence[float]) -> list[str]:
    return [f"{tick:.6g}" if abs(tick) < 1e6 else f"{tick:.3g}" for tick in ticks]
