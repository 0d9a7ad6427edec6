"""Texts as they are, in fonts that have them."""

import bisect
import functools
from collections.abc import Callable, Iterable
from typing import Any

import matplotlib
from matplotlib.font_manager import FontEntry, FontProperties, findfont, fontManager, get_font
from matplotlib.textpath import text_to_path


def plain(texts: Iterable[str]) -> tuple[list[str], dict[str, Any]]:
    """The texts as they can be drawn, and the properties of a matplotlib ``Text`` that draw them so.

    A character that no installed font has, or that cannot be seen, becomes ``?``.
    """
    texts = list(texts)
    wanted = frozenset("".join(texts)) - {"\n", " "}
    families, drawn = _families(wanted)
    shown = ["".join(c if c in drawn or c in "\n " else "?" for c in text) for text in texts]
    return shown, {"fontfamily": list(families), "parse_math": False}


def wrap(text: str, fits: Callable[[str], bool]) -> list[str]:
    """The lines of ``text``, broken at blanks, and inside of words where a word does not fit."""
    return [line for whole in text.split("\n") for line in _broken(whole, fits)]


def _broken(text: str, fits: Callable[[str], bool]) -> list[str]:
    if len(text) <= 1 or fits(text):
        return [text]
    lengths = range(1, len(text))
    longest = max(1, bisect.bisect(lengths, False, key=lambda n: not fits(text[:n])))
    blank = text.rfind(" ", 1, longest + 1)
    cut = blank if blank > 0 else longest
    return [text[:cut], *_broken(text[cut:].lstrip(), fits)]


def points_wide(text: str, size: float, families: list[str]) -> float:
    """The width of a line of text, at most: on a grid of pixels letters come out up to 3 % wider than drawn."""
    properties = FontProperties(family=families, size=size)
    return 1.04 * float(text_to_path.get_text_width_height_descent(text, properties, False)[0])


@functools.lru_cache(maxsize=64)
def _families(characters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Font families for ``characters``: the default ones and, if these lack any, the one that has most of the rest;
    and the characters that these have."""
    default = tuple(matplotlib.rcParams["font.family"])
    visible = {c for c in characters if c.isprintable()}
    drawn = _had(visible, findfont(FontProperties(family=list(default))))
    missing = visible - drawn
    family, found = _most(missing) if missing else ("", set())
    return (*default, family) if found else default, frozenset(drawn | found)


def _most(characters: set[str]) -> tuple[str, set[str]]:
    """The installed family with the most of ``characters``, and which these are."""
    best: tuple[str, set[str]] = "", set()
    for entry in sorted(fontManager.ttflist, key=_oddity):
        # The last resort has a box for each character; matplotlib draws no fonts of coloured bitmaps.
        if "Last Resort" in entry.name or "Emoji" in entry.name:
            continue
        found = _had(characters, entry.fname)
        if len(found) > len(best[1]):
            best = entry.name, found
        if found == characters:
            break
    return best


def _oddity(entry: FontEntry) -> tuple[bool, bool]:
    return entry.style != "normal", str(entry.weight) not in ("400", "normal", "regular")


def _had(characters: set[str], file: str) -> set[str]:
    """Those of ``characters`` that the font in ``file`` has."""
    try:
        font = get_font(file)
    except (OSError, RuntimeError):  # gone since matplotlib listed it, or damaged
        return set()
    return {c for c in characters if font.get_char_index(ord(c))}
