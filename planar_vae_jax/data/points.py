"""Points ``[N, D]`` that a density is fitted to: from a npy file, split and standardised."""

import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from planar_vae_jax.data._errors import DataError, brief, shown

MOST_DIMENSIONS = 100
_FEWEST = 50  # points of a file; a fifth of them is the test split
_GREATEST = 1e150  # numbers whose square overflows have no variance


class Points(NamedTuple):
    """The splits of a set of points, each in its own order, and the scale by which they are standardised."""

    name: str  # the file's name, or that of a target
    source: str  # where they came from
    train: np.ndarray  # [N, D] float64
    valid: np.ndarray
    test: np.ndarray
    mean: np.ndarray  # [D], of the training points
    std: np.ndarray  # [D]

    @property
    def dim(self) -> int:
        """D."""
        return self.train.shape[1]

    @property
    def log_volume(self) -> float:
        """What the log-density of standardised points exceeds that of the points by, in nats."""
        return float(np.sum(np.log(self.std)))

    def standardised(self, split: np.ndarray, dtype: Any) -> np.ndarray:
        """Returns ``(split - mean) / std`` ``[N, D]``, computed in float64."""
        return ((split - self.mean) / self.std).astype(dtype)

    def identity(self) -> dict[str, Any]:
        """Returns what tells these points from others, as values that JSON can hold."""
        crc = 0
        for split in (self.train, self.valid, self.test):
            crc = zlib.crc32(np.ascontiguousarray(split).data, crc)
        return {"name": self.name, "source": self.source, "crc32": crc}


def assemble_points(name: str, source: str, train: np.ndarray, valid: np.ndarray, test: np.ndarray) -> Points:
    """Makes :class:`Points` of three splits ``[N, D]``.

    Raises:
        DataError: a column of the training points is constant, so that it has no density.
    """
    train, valid, test = (np.asarray(split, np.float64) for split in (train, valid, test))
    mean, std = np.mean(train, axis=0), np.std(train, axis=0)
    # A constant that cannot be summed exactly has a deviation of the size of rounding errors.
    constant = np.flatnonzero(~(std > 1e-12 * np.max(np.abs(train), axis=0)))
    if constant.size:
        column = int(constant[0])
        raise DataError(f"{source}: wanted columns that vary, got column {column} of {mean[column]:.9g} throughout")
    return Points(name, source, train, valid, test, mean, std)


def split_points(name: str, source: str, points: np.ndarray) -> Points:
    """Splits points ``[N, D]``: a fifth for validation, a fifth for the test, and the rest for training.

    The same permutation splits all sets of N points.

    Raises:
        DataError: as :func:`assemble_points`.
    """
    order = np.random.RandomState(0).permutation(len(points))
    fifth = len(points) // 5
    valid, test, train = np.split(order, [fifth, 2 * fifth])
    return assemble_points(name, source, points[train], points[valid], points[test])


def read_points(path: str | os.PathLike[str]) -> Points:
    """Reads and splits (:func:`split_points`) the points of a npy file.

    Args:
        path: the file, with floats ``[N, D]``: at least 50 points and at most ``MOST_DIMENSIONS`` columns.

    Raises:
        DataError: the file cannot be read, holds something else, or has values that are not finite.
    """
    path = Path(path).expanduser()
    try:
        points = np.load(path, allow_pickle=False)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or brief(error)}") from error
    except Exception as error:  # of damage, NumPy and zipfile raise many kinds
        raise DataError(f"{path}: wanted a npy file, got {brief(error)}") from error
    wanted = f"{path}: wanted points [N, D], floats, N at least {_FEWEST} and D from 1 to {MOST_DIMENSIONS}"
    if not isinstance(points, np.ndarray):
        raise DataError(f"{wanted}, got several arrays")
    fits = points.ndim == 2 and len(points) >= _FEWEST and 1 <= points.shape[1] <= MOST_DIMENSIONS
    if not fits or not np.issubdtype(points.dtype, np.floating):
        raise DataError(f"{wanted}, got {shown(points)}")
    points = points.astype(np.float64)
    with np.errstate(over="ignore"):  # of long doubles
        points = points.astype(np.float64)
    bad = np.argwhere(~(np.abs(points) < _GREATEST))  # NaN too
    if len(bad):
        row, column = bad[0].tolist()
        raise DataError(f"{path}: wanted finite numbers, got {points[row, column]} in row {row}, column {column}")
    return split_points(path.stem, str(path), points)
