"""File formats: gzip, IDX, amat and npz, to arrays by field."""

import gzip
import math
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from planar_vae_jax.data.dataset import ARRAYS
from planar_vae_jax.data.errors import DataError, brief


def read(path: Path) -> bytes:
    """The bytes of a file, unzipped where its name ends in .gz."""
    raw = read_raw(path)
    try:
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: wanted whole gzip data, got {brief(error)}") from error


def read_raw(path: Path) -> bytes:
    """The bytes of a file as they are."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: wanted a readable file, got {brief(error)}") from error


def parse_idx(path: Path, raw: bytes, axes: int) -> np.ndarray:
    """IDX, big-endian uint32: magic 0x0800 + number of axes, the length of each; then the bytes.

    Args:
        axes: 3 for images, 1 for labels.
    """
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


def parse_amat(path: Path, raw: bytes) -> np.ndarray:
    """Lines of 784 digits 0 or 1, blanks between; as bytes, since np.loadtxt takes far longer."""
    text = np.frombuffer(raw, np.uint8)
    digits = text[text > ord(" ")]
    if digits.size % 784 or np.any((digits != ord("0")) & (digits != ord("1"))):
        raise DataError(f"{path}: wanted lines of 784 digits 0 or 1, got something else")
    return ((digits & 1) * np.uint8(255)).reshape(-1, 28, 28)


def read_npz(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of Keras's convention: x_train, x_test, perhaps x_valid, y_train, y_valid and y_test.

    Returns:
        The arrays by field; and where each member of the file is found, for messages.
    """
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path}: wanted an npz file, got something else or only a part of one")
    arrays, reading = {}, str(path)
    try:
        with np.load(path, allow_pickle=False) as npz:
            where = {key: f"{path}: {key}" for key in npz.files}
            for field in [field for field in ARRAYS if field in where]:
                reading = where[field]
                arrays[field] = np.asarray(npz[field])
    except Exception as error:  # zipfile, zlib and NumPy have no class for damage in common
        raise DataError(f"{reading} cannot be read: {brief(error)}") from error
    return arrays, where
