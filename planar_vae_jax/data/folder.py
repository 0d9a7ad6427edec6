"""A folder of npy files, for images that need not fit in memory: x_train.npy, x_test.npy and, if there are, others."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from planar_vae_jax.data.dataset import ARRAYS, Dataset, assemble, blocks
from planar_vae_jax.data.errors import DataError, brief, joined
from planar_vae_jax.data.mapped import Mapped
from planar_vae_jax.data.pixels import DARK, WANTED, too_dark
from planar_vae_jax.data.places import is_file

_CURES = {"f": "numpy.rint(255 * x).astype(numpy.uint8) if they are 0 to 1", "b": "x.astype(numpy.uint8) * 255"}


def load_folder(folder: Path, warn: Callable[[str], object]) -> Dataset:
    """The images of a folder, memory-mapped, and their labels.

    Raises:
        DataError: x_train.npy or x_test.npy is missing; a file is damaged, or holds something else.
    """
    paths = {field: folder / f"{field}.npy" for field in ARRAYS}
    there = {field: path for field, path in paths.items() if is_file(path)}
    for field in ("x_train", "x_test"):
        if field not in there:
            found = joined(path.name for path in there.values()) or "none of its files; IDX files need a data_dir"
            raise DataError(f"{folder}: wanted {field}.npy, got {found}")
    arrays = {field: _images(path) if field[0] == "x" else _labels(path) for field, path in there.items()}
    dataset = assemble(folder.resolve().name, str(folder), arrays, there)
    for field in ("x_train", "x_valid", "x_test"):
        if field in arrays:
            _warn_of_dark(arrays[field], there[field], warn)
    return dataset


def _images(path: Path) -> Mapped:
    array = _mapped(path)
    if array.dtype != np.uint8:  # what an npz file may hold is converted in memory
        cure = f": save {_CURES[array.dtype.kind]}" if array.dtype.kind in _CURES else ""
        raise DataError(f"{path}: {WANTED}, got {list(array.shape)} {array.dtype}{cure}")
    if not array.flags.c_contiguous:
        raise DataError(f"{path}: wanted C order, got Fortran order: save numpy.ascontiguousarray(x)")
    return Mapped(array)


def _labels(path: Path) -> np.ndarray:
    return np.array(_mapped(path))


def _mapped(path: Path) -> np.memmap:
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # takes no pickled objects
        surplus = os.path.getsize(path) - array.offset - array.nbytes
    except Exception as error:  # NumPy, mmap and the file system each raise their own
        raise DataError(f"{path}: wanted a whole npy file, got {brief(error)}") from error
    if surplus:
        raise DataError(f"{path}: wanted {array.nbytes} bytes of data, got {array.nbytes + surplus}")
    return array


def _warn_of_dark(images: Any, path: Path, warn: Callable[[str], object]) -> None:
    """Looks no further than to the first light pixel."""
    highest = 0
    for block in blocks(images):
        highest = max(highest, int(np.max(block)))
        if highest >= DARK:
            return
    warn(f"{path}: {too_dark(images.dtype, highest)}")
