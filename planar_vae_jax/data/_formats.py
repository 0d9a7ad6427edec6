"""File formats to arrays: gzip, IDX, amat, npz, npy; and arrays on other scales to grey levels 0 to 255."""

import gzip
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from planar_vae_jax.data._errors import DataError, brief, joined, shown

WANTED = "wanted images [N, H, W] or [N, H, W, 3] uint8 of 0 to 255, N > 0"
DARK = 128  # images whose lightest pixel is darker than this were probably meant on another scale
SLACK = 1e-6  # interpolation and rounding leave floats this far outside 0 to 1

Warn = Callable[[str], object]

# --- Files ---


def read_bytes(path: Path) -> bytes:
    """The bytes of a file, unzipped if its name ends in .gz.

    Raises:
        DataError: the file cannot be read, or its gzip data is damaged.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: wanted a readable file, got {brief(error)}") from error
    try:
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: wanted whole gzip data, got {brief(error)}") from error


def read_idx(path: Path, axes: int) -> np.ndarray:
    """The uint8 array of an IDX file, plain or gzipped.

    The format is big-endian uint32: the magic 0x0800 + number of axes, the length of each axis; then the bytes.

    Args:
        path: the file.
        axes: 3 for images, 1 for labels.

    Raises:
        DataError: the file is damaged, or holds something else.
    """
    raw = read_bytes(path)
    header = 4 + 4 * axes
    if len(raw) < header:
        raise DataError(f"{path}: wanted an IDX header of {header} bytes, got {len(raw)} in all")
    magic, *shape = struct.unpack(f">{1 + axes}I", raw[:header])
    _check_magic(path, magic, 0x0800 + axes)
    wanted, came = math.prod(shape), len(raw) - header
    if came != wanted:
        raise DataError(f"{path}: wanted {wanted} bytes for its shape {shape}, got {came}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _check_magic(path: Path, came: int, wanted: int) -> None:
    kinds = {0x0801: "labels", 0x0803: "images"}
    if came >> 16 == 0x1F8B:
        raise DataError(f"{path}: wanted an IDX file, got gzip data: add .gz to its name")
    if came != wanted:
        raise DataError(
            f"{path}: wanted IDX {kinds[wanted]} (magic 0x{wanted:08x}), "
            f"got {kinds.get(came, 'something else')} (0x{came:08x})"
        )


def read_amat(path: Path) -> np.ndarray:
    """Images ``[N, 28, 28]`` uint8, 0 or 255, from lines of 784 digits 0 or 1 with blanks between them.

    Raises:
        DataError: the file is damaged, or holds something else.
    """
    text = np.frombuffer(read_bytes(path), np.uint8)  # np.loadtxt takes far longer
    digits = text[text > ord(" ")]
    if digits.size % 784 or np.any((digits != ord("0")) & (digits != ord("1"))):
        raise DataError(f"{path}: wanted lines of 784 digits 0 or 1, got something else")
    return ((digits & 1) * np.uint8(255)).reshape(-1, 28, 28)


def read_npz(path: Path, fields: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Those arrays of an npz file that ``fields`` names and the file has; if it has none of them, an array alone.

    Raises:
        DataError: the file cannot be read, is damaged, or has neither.
    """
    try:
        with path.open("rb"):  # is_zipfile answers "no" for a file that may not be read
            pass
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or brief(error)}") from error
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} cannot be read: wanted an npz file, got something else or a part of one")
    arrays, reading = {}, str(path)
    try:
        with np.load(path, allow_pickle=False) as npz:
            names = list(npz.files)
            for name in [field for field in fields if field in names] or (names if len(names) == 1 else []):
                reading = f"{path}: {name}"
                arrays[name] = np.asarray(npz[name])
    except Exception as error:  # zipfile, zlib and NumPy have no class for damage in common
        raise DataError(f"{reading} cannot be read: {brief(error)}") from error
    if not arrays:
        raise DataError(
            f"{path}: wanted {joined(fields, ' or ')}, or one array alone; got {joined(names) or 'nothing'}"
        )
    return arrays


def map_npy(path: Path) -> np.memmap:
    """The array of an npy file, memory-mapped and read-only. The file must not be shortened while it is used.

    Raises:
        DataError: the file cannot be read, is damaged, or holds Python objects.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # np.load would take npz files and pickles too
        surplus = os.path.getsize(path) - array.offset - array.nbytes
    except Exception as error:  # NumPy, mmap and the file system each raise their own
        raise DataError(f"{path}: wanted a whole npy file, got {brief(error)}") from error
    if surplus:
        raise DataError(f"{path}: wanted {array.nbytes} bytes of data, got {array.nbytes + surplus}")
    return array


# --- Pixels ---


def to_levels(images: Mapping[str, np.ndarray], source: str, warn: Warn) -> dict[str, np.ndarray]:
    """Images by field as ``[N, H, W]`` or, in colour, ``[N, H, W, 3]`` uint8.

    A channel axis of length 1 is dropped, one of length 3 becomes the last axis. Floats in 0 to 1 and booleans are
    multiplied by 255; other integers in 0 to 255 become uint8.

    Args:
        images: arrays by field.
        source: names the file in messages.
        warn: is called with one line for each change, and for images that look as if another scale was meant. The line
            names all fields that it applies to.

    Raises:
        DataError: an array cannot be read as images.
    """
    lines: dict[str, list[str]] = {}
    converted = {}
    for field, x in images.items():
        where = f"{source}: {field}"
        converted[field] = _as_uint8(_channels_last(x, where), where)
        if change := _change(x, converted[field]):
            lines.setdefault(change, []).append(field)
    for line, fields in lines.items():
        warn(f"{source}: {joined(fields)}: {line}")
    return converted


def _channels_last(x: np.ndarray, where: str) -> np.ndarray:
    """``[N, H, W]`` or ``[N, H, W, 3]``. If two axes could be the channels: length 1 before 3, last before first."""
    channels = _channels(x)
    if x.size == 0 or (x.ndim != 3 and channels is None):
        raise DataError(f"{where}: {WANTED}, got {shown(x)}")
    if channels is not None and x.shape[3] != channels:
        x = np.moveaxis(x, 1, 3)
    return x[..., 0] if channels == 1 else x


def _channels(x: np.ndarray) -> int | None:
    """The number of channels (1 or 3) of an array that has an axis for them, last or after the first; else None."""
    return next((n for n in (1, 3) if x.ndim == 4 and n in (x.shape[3], x.shape[1])), None)


def _as_uint8(x: np.ndarray, where: str) -> np.ndarray:
    if x.dtype == np.uint8:
        return x
    if x.dtype == bool:
        return x * np.uint8(255)
    if np.issubdtype(x.dtype, np.floating):
        return _from_floats(x, where)
    if not np.issubdtype(x.dtype, np.integer):
        raise DataError(f"{where}: {WANTED}, got {shown(x)}")
    if x.min() < 0 or x.max() > 255:
        raise DataError(f"{where}: {WANTED}, got {shown(x)} from {x.min()} to {x.max()}: scale them to 0 to 255")
    return x.astype(np.uint8)


def _from_floats(x: np.ndarray, where: str) -> np.ndarray:
    if not np.isfinite(x).all():
        raise DataError(f"{where}: {WANTED}, got {shown(x)}{'' if np.isnan(x).any() else ' with infinite values'}")
    low, high = float(x.min()), float(x.max())
    if low < -SLACK or high > 1 + SLACK:
        raise DataError(  # nine digits show an excess of 1e-6 too
            f"{where}: {WANTED}, or floats from 0 to 1; got {shown(x)} from {low:.9g} to {high:.9g}: "
            f"{_cure(low, high)} instead"
        )
    return np.rint(np.clip(x, 0, 1) * np.asarray(255, x.dtype)).astype(np.uint8)


def _cure(low: float, high: float) -> str:
    """What to do with floats from ``low`` to ``high`` that are outside 0 to 1."""
    if low < 0 or high > 255:
        return "scale them to 0 to 1"
    return f"save x / {high:.9g}" if high < DARK else "save x.astype(numpy.uint8)"


def _change(came: np.ndarray, made: np.ndarray) -> str:
    """What was changed in an array, and a doubt about its scale; empty if neither."""
    parts = []
    if came.dtype != np.uint8 or came.shape != made.shape:
        shape = "[N, H, W]" if made.ndim == 3 else "[N, H, W, 3]"
        scaled = came.dtype == bool or np.issubdtype(came.dtype, np.floating)
        parts.append(f"{_kind(came)} taken as {shape} uint8{', 255 times what came, rounded' if scaled else ''}")
    highest = int(made.max())
    if made.min() < highest < DARK:
        parts.append(too_dark(came.dtype, highest, came.max()))
    return "; ".join(parts)


def _kind(came: np.ndarray) -> str:
    channels = _channels(came)
    axes = "H, W" if channels is None else f"H, W, {channels}" if came.shape[3] == channels else f"{channels}, H, W"
    return f"[N, {axes}] {came.dtype}"


def too_dark(dtype: np.dtype, highest: int, came: float = 0.0) -> str:
    """A doubt about the scale of images whose lightest level is ``highest``.

    Args:
        dtype: of the images as they were saved.
        highest: the lightest level, 0 to 255.
        came: the greatest value as it was saved, for floats.
    """
    if np.issubdtype(dtype, np.floating):
        return f"nearly black: their maximum is {came:.3g}, where 1 is white. Save x / x.max() if that was meant"
    return (
        f"nearly black: their maximum is {highest}, where 255 is white. "
        f"If {highest} was meant as white, multiply by 255 // {highest} = {255 // highest} before saving"
    )
