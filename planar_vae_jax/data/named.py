"""The data sets that have names and files of their own: in a folder, or downloaded."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from planar_vae_jax.data import tfds
from planar_vae_jax.data.dataset import SPLITS, Dataset, assemble
from planar_vae_jax.data.errors import DataError, Unavailable, joined
from planar_vae_jax.data.formats import parse_amat, parse_idx, read, read_raw
from planar_vae_jax.data.places import is_file

_IDX_FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}
FILES = {
    "mnist": _IDX_FILES,
    "fashion_mnist": _IDX_FILES,
    "kmnist": _IDX_FILES,
    "binarized_mnist": {f"x_{split}": f"binarized_mnist_{split}.amat" for split in SPLITS},
}
# Where torchvision.datasets puts them in its `root`.
TORCHVISION = {"mnist": "MNIST/raw", "fashion_mnist": "FashionMNIST/raw", "kmnist": "KMNIST/raw"}
# Of MNIST's files unzipped: their names alone do not tell MNIST from its drop-in replacements.
MNIST_MD5 = {
    "x_train": "6bbc9ace898e44ae57da46a324031adb",
    "y_train": "a25bea736e30d166cdddb491f175f624",
    "x_test": "2646ac647ad5339dbf082846283269ea",
    "y_test": "27ae3e4e09519cfbb04c329615203637",
}


def load_named(name: str, data_dir: Path | None) -> Dataset:
    """The data set from the first source that has it.

    Raises:
        Unavailable: none has it; the line says why, source by source.
        DataError: one has it, damaged.
    """
    reasons = []
    for source in (load_files, tfds.load_prepared, load_download):
        try:
            return source(name, data_dir)
        except Unavailable as error:
            reasons.append(str(error))
    raise Unavailable(joined(dict.fromkeys(reasons), "; "))


def load_files(name: str, data_dir: Path | None) -> Dataset:
    """The data set's own files in ``data_dir``: perhaps a user's own, so no checksum is asked for."""
    if data_dir is None:
        raise Unavailable("no data_dir was given")
    for folder in (data_dir, data_dir / TORCHVISION.get(name, "")):
        found = {field: find(folder, file) for field, file in FILES[name].items()}
        paths = {field: path for field, path in found.items() if path is not None}
        if missing := [file for field, file in FILES[name].items() if field not in paths]:
            if paths:
                raise DataError(f"{folder} holds {name} in part: missing {joined(missing)} (plain or .gz)")
            continue
        kind = "amat" if name == "binarized_mnist" else "IDX"
        return _read_files(name, f"{kind} files in {folder}", paths)
    raise Unavailable(f"none of its files are in {data_dir}")


def find(directory: Path, file: str) -> Path | None:
    """The file, plain or zipped, also under the name inside the original .gz files."""
    dotted = file.replace("-idx", ".idx")
    candidates = (directory / f for f in (file, f"{file}.gz", dotted, f"{dotted}.gz"))
    return next(filter(is_file, candidates), None)


def load_download(name: str, data_dir: Path | None) -> Dataset:
    """The files that TFDS registers. TFDS does not hash its cache, so it is done here."""
    root, files = tfds.fetch(name, data_dir)
    fields = {file: field for field, file in FILES[name].items()}
    by_field = {}
    for path, info in files.items():
        field = fields[info.filename.removesuffix(".gz")]
        _verify(path, info.checksum, MNIST_MD5[field] if name == "mnist" else None)
        by_field[field] = path
    return _read_files(name, f"TFDS download in {root}", by_field)


def _verify(path: Path, sha256: str, md5: str | None) -> None:
    """``md5``, of the contents, also passes files gzipped anew."""
    came = hashlib.sha256(read_raw(path)).hexdigest()
    if came != sha256 and (md5 is None or _md5(read(path)) != md5):
        raise DataError(f"{path} is damaged, delete it: wanted sha256 {sha256}, got {came}")


def _read_files(name: str, source: str, paths: Mapping[str, Path]) -> Dataset:
    raw = {field: read(path) for field, path in paths.items()}
    if name == "binarized_mnist":
        arrays = {field: parse_amat(paths[field], raw[field]) for field in paths}
    else:
        arrays = {field: parse_idx(paths[field], raw[field], 3 if field[0] == "x" else 1) for field in paths}
        source = _check_whether_mnist(name, source, raw)
    return assemble(name, source, arrays, paths)


def _check_whether_mnist(name: str, source: str, raw: Mapping[str, bytes]) -> str:
    """MNIST itself under another name is an error; other contents under its name are told in the source."""
    is_mnist = all(_md5(raw[field]) == MNIST_MD5[field] for field in raw)
    if is_mnist and name != "mnist":
        raise DataError(f"wanted {name}, got MNIST itself: {source}")
    return source if is_mnist or name != "mnist" else f"{source} (not the original MNIST: other contents)"


def _md5(raw: bytes) -> str:
    return hashlib.md5(raw, usedforsecurity=False).hexdigest()
