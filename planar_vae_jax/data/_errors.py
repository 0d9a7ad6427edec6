"""Errors about data, and the words that put them in one line."""

from collections.abc import Iterable
from typing import Any

import numpy as np


class DataError(ValueError):
    """A data set is missing or damaged. The message is one line that says what was wanted, what came, and where."""


class ArgumentError(DataError):
    """An argument is wrong. The message begins with the argument's name: ``dataset: unknown data set 'nope' ...``."""


class Unavailable(DataError):
    """This source does not have the data set, so the next source is tried. Damage is a plain DataError."""


def joined(items: Iterable[object], separator: str = ", ") -> str:
    """The items as one text."""
    return separator.join(map(str, items))


def brief(error: BaseException) -> str:
    """Type and text of an exception in one line of limited length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def shown(array: Any) -> str:
    """Shape and dtype of an array, and whether it has NaN values."""
    has_nan = np.issubdtype(array.dtype, np.floating) and np.isnan(array).any()
    return f"{list(array.shape)} {array.dtype}{' with NaN values' if has_nan else ''}"
