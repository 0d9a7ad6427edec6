"""Folders of this machine: given by a user, or TFDS's own."""

import os
from pathlib import Path

from planar_vae_jax.data.errors import ArgumentError, DataError, Unavailable


def local_path(place: str | os.PathLike[str]) -> Path | None:
    """With ~ expanded (that of nobody stays, and names no file); None for an address as in gs://bucket."""
    text = os.fspath(place)
    return None if "://" in text else Path(os.path.expanduser(text))


def is_file(path: Path | None) -> bool:
    """False also where one may not look (where ``Path.is_file`` raises)."""
    return path is not None and os.path.isfile(path)


def is_folder(path: Path | None) -> bool:
    """Likewise."""
    return path is not None and os.path.isdir(path)


def check_folder(data_dir: str | os.PathLike[str]) -> Path:
    """The folder ``data_dir``, there and readable."""
    path = local_path(data_dir)
    if path is None:
        raise ArgumentError(f"data_dir: wanted a folder of this machine, got {data_dir}")
    if not os.path.isdir(path):
        raise ArgumentError(f"data_dir: {path}: no such directory")
    if not os.access(path, os.R_OK | os.X_OK):
        raise ArgumentError(f"data_dir: {path} may not be read")
    return path


def tfds_folders(data_dir: Path | None) -> list[Path]:
    """Where TFDS's data sets may lie; the first is where downloads go."""
    named = os.environ.get("TFDS_DATA_DIR")
    default = local_path(named or "~/tensorflow_datasets")
    usable = default is not None and not str(default).startswith("~")
    if data_dir is not None:
        return [data_dir, default] if usable and default is not None else [data_dir]
    if default is None:
        raise DataError(f"TFDS_DATA_DIR: wanted a folder of this machine, got {named}: unset it or give a data_dir")
    if not usable:
        raise Unavailable("no home folder for downloads, and neither TFDS_DATA_DIR nor data_dir is set")
    return [default]
