"""What goes wrong with data, and the words to say it in one line."""

from collections.abc import Iterable

import numpy as np


class DataError(ValueError):
    """A data set that cannot be had, or is damaged: one line that a user can act on."""


class ArgumentError(DataError):
    """A wrong argument, whose name is the line's first word: ``dataset: unknown data set 'nope' ...``."""


class Unavailable(DataError):
    """This source has no such data set, so the next one is tried. Damage is a plain DataError."""


def joined(items: Iterable[object], separator: str = ", ") -> str:
    """The items as one text."""
    return separator.join(map(str, items))


def brief(error: BaseException) -> str:
    """One line of an exception whose text may have many."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def shown(array: np.ndarray) -> str:
    """Shape and type of an array."""
    has_nan = np.issubdtype(array.dtype, np.floating) and np.isnan(array).any()
    return f"{list(array.shape)} {array.dtype}{' with NaN values' if has_nan else ''}"
