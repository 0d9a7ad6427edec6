"""Images that a user has in files, for a model that is trained already."""

import glob
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from planar_vae_jax.data.errors import DataError, brief, joined
from planar_vae_jax.data.pixels import to_levels


def read_images(place: str, shape: tuple[int, ...], warn: Callable[[str], object]) -> np.ndarray:
    """Images ``[N, H, W]`` or ``[N, H, W, 3]`` uint8 of the size ``shape``, from an npz file or from pictures.

    Args:
        place: ``FILE.npz``, with ``x_test`` or one array alone; or a picture, or a pattern of pictures as in
            ``digits/*.png``, read in the order of their names.
        shape: ``(H, W)``, or ``(H, W, 3)`` for colours; pictures are turned into grey levels or colours.
        warn: is told in a line what was made of other numbers than uint8.

    Raises:
        DataError: there is no such file, it is damaged, or it holds something else.
    """
    pattern = os.path.expanduser(place)
    paths = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern))
    if not paths:
        raise DataError(f"{place}: no such file")
    if pattern.endswith(".npz"):
        images = to_levels(_npz_images(Path(pattern)), place, warn)["images"]
        _check(place, images.shape[1:], shape)
        return images
    pictures = [_picture(path, "RGB" if len(shape) == 3 else "L") for path in paths]
    for path, picture in zip(paths, pictures, strict=True):
        _check(path, picture.shape, shape)
    return np.stack(pictures)


def _npz_images(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as npz:
            names = npz.files
            name = "x_test" if "x_test" in names else names[0] if len(names) == 1 else None
            if name is not None:
                return {"images": np.asarray(npz[name])}
    except Exception as error:  # zipfile, zlib and NumPy have no class for damage in common
        raise DataError(f"{path} cannot be read: {brief(error)}") from error
    raise DataError(f"{path}: wanted x_test, or one array alone; got {joined(names) or 'nothing'}")


def _picture(path: str, mode: str) -> np.ndarray:
    """``[H, W]`` or ``[H, W, 3]`` uint8."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            if picture.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
                raise DataError(f"{path}: wanted a picture of 8 bits a channel, got mode {picture.mode}")
            return np.asarray(picture.convert(mode))
    except OSError as error:
        raise DataError(f"{path}: wanted a picture, got {brief(error)}") from error


def _check(place: str, came: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if came != wanted:
        sizes = (" x ".join(map(str, size)) for size in (wanted, came))
        raise DataError("{}: wanted images of {} pixels, as the run was trained on, got {}".format(place, *sizes))
