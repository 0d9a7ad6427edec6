"""Text in figures: names are drawn as they are given, and long lines are wrapped."""

import bisect
import functools
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.textpath import text_to_path

# Properties of a matplotlib ``Text`` that shows a name of the user's: a ``$`` in it starts no formula.
VERBATIM: dict[str, Any] = {"parse_math": False}


def drawable(text: str) -> str:
    """Returns ``text`` with ``?`` for each character that is invisible or missing from the default fonts.

    matplotlib warns of a missing glyph, and that warning would be an error under ``python -W error``; a lone surrogate,
    as in a file name that is not UTF-8, cannot be drawn at all.
    """
    glyphs = _glyphs(tuple(matplotlib.rcParams["font.family"]))
    return "".join(c if c in "\n " or (c.isprintable() and ord(c) in glyphs) else "?" for c in text)


@functools.cache
def _glyphs(families: tuple[str, ...]) -> frozenset[int]:
    """Code points that at least one of these font families has."""
    files = (findfont(FontProperties(family=[name])) for name in families)
    return frozenset(code for file in files for code in get_font(file).get_charmap())


def wrap(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Returns the lines of ``text``, broken at blanks, and inside a word only where the word does not fit on a line.

    Args:
        text: may hold line breaks, which are kept.
        fits: whether a string fits on one line.
    """
    return [line for whole in text.split("\n") for line in _broken(whole, fits)]


def _broken(text: str, fits: Callable[[str], bool]) -> list[str]:
    if len(text) <= 1 or fits(text):
        return [text]
    lengths = range(1, len(text))
    longest = max(1, bisect.bisect(lengths, False, key=lambda n: not fits(text[:n])))
    blank = text.rfind(" ", 1, longest + 1)
    cut = blank if blank > 0 else longest
    return [text[:cut], *_broken(text[cut:].lstrip(), fits)]


def points_wide(text: str, size: float) -> float:
    """Returns an upper bound on the width of a line of text in points, for a font ``size`` in points.

    Rendered on a grid of pixels, letters are up to 3 % wider than their outlines.
    """
    return 1.04 * float(text_to_path.get_text_width_height_descent(text, FontProperties(size=size), False)[0])
