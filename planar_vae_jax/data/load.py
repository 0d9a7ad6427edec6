"""From a name to a data set."""

import os
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path

from planar_vae_jax.data.dataset import Dataset, assemble
from planar_vae_jax.data.errors import ArgumentError, DataError, Unavailable, joined
from planar_vae_jax.data.folder import load_folder
from planar_vae_jax.data.formats import read_npz
from planar_vae_jax.data.mnist5k import INSTALL, load_mnist5k
from planar_vae_jax.data.named import FILES, load_named
from planar_vae_jax.data.pixels import to_levels
from planar_vae_jax.data.places import check_folder, is_file, is_folder, local_path

DATASETS = ("auto", *FILES, "mnist5k")
COLUMNS = 80  # of a terminal, for the box

Warn = Callable[[str], object]


def check_dataset_name(name: str) -> None:
    """Raises ArgumentError unless ``name`` is one of DATASETS, an existing FILE.npz or a folder. Reads nothing."""
    if name in DATASETS or is_folder(local_path(name)):
        return
    if not name.endswith(".npz"):
        wanted = f"{joined(DATASETS)}, FILE.npz, or a folder with x_train.npy and x_test.npy"
        raise ArgumentError(f"dataset: unknown data set {name!r}; wanted {wanted}")
    if not is_file(local_path(name)):
        raise ArgumentError(f"dataset: {name}: no such file")


def load_dataset(
    name: str = "auto",
    data_dir: str | os.PathLike[str] | None = None,
    *,
    warn: Warn = warnings.warn,
) -> Dataset:
    """Loads a whole data set; the package's text says where each name is looked for.

    Args:
        name: one of DATASETS, or the path of an npz file, or of a folder of npy files. "auto" is MNIST where it can be
            had, else mnist5k and a warning. It hides no damage: a file that is there and faulty is an error.
        data_dir: an existing folder with the data set's own files, or with a TFDS data set. Downloads are kept
            there as ``tfds.load`` keeps them, by default in ~/tensorflow_datasets.
        warn: is given a text that says what "auto" uses instead of MNIST and why (a box of several lines), or what
            was made of an npz file's images (one line). Whoever has shown it before passes a function that does not.

    Raises:
        ArgumentError: ``name`` or ``data_dir`` is none.
        DataError: the data set cannot be had (what was tried, what to do), or is damaged (where).
    """
    check_dataset_name(name)
    folder = check_folder(data_dir) if data_dir else None
    if name not in DATASETS and is_folder(local_path(name)):
        try:
            return load_folder(Path(os.path.expanduser(name)), warn)
        except DataError as error:
            raise ArgumentError(f"dataset: {error}") from error
    if name.endswith(".npz"):
        return _load_npz(Path(os.path.expanduser(name)), warn)
    if name == "mnist5k":
        return load_mnist5k()
    try:
        return load_named("mnist" if name == "auto" else name, folder)
    except Unavailable as error:
        if name == "auto":
            return _load_instead(error, warn)
        raise DataError(f"{name} cannot be had: {error}. {_advice(name)}") from error


def _advice(name: str) -> str:
    files = joined(FILES[name].values())
    return f"Give a data_dir that holds {files} (plain or .gz), or take mnist5k ({INSTALL})"


def _load_instead(reason: Unavailable, warn: Warn) -> Dataset:
    try:
        dataset = load_mnist5k()
    except Unavailable as error:
        raise DataError(f"no data set: mnist cannot be had: {reason}. {_advice('mnist')}; but {error}") from reason
    warn(
        box(
            "THIS RUN DOES NOT USE MNIST but mnist5k: 4,000 digits to train on, 1,000 to test on, from "
            f"{dataset.source}. Its figures are not comparable with those of MNIST.",
            f"MNIST cannot be had: {reason}.",
            f"To use MNIST, give a data_dir that holds {joined(FILES['mnist'].values())} (plain or .gz). Asked for by "
            "its name, the data set mnist ends in an error where it cannot be had, and mnist5k comes without this box.",
        )
    )
    return dataset


def box(*paragraphs: str) -> str:
    """The paragraphs in a frame of asterisks, beneath an empty line."""
    lines = [line for text in paragraphs for line in textwrap.wrap(text, COLUMNS - 4, break_on_hyphens=False)]
    width = max(map(len, lines))
    bar = "*" * (width + 4)
    return "\n".join(["", bar, *(f"* {line:{width}} *" for line in lines), bar])


def _load_npz(path: Path, warn: Warn) -> Dataset:
    arrays, where = read_npz(path)
    images = {field: array for field, array in arrays.items() if field.startswith("x_")}
    return assemble(path.stem, str(path), arrays | to_levels(images, str(path), warn), where)
