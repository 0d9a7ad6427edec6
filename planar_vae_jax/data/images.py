"""Images that a user has in files, for a trained model."""

import glob
import os
from collections.abc import Callable, Sized
from pathlib import Path
from typing import NamedTuple

import numpy as np

from planar_vae_jax.data._errors import DataError, brief
from planar_vae_jax.data._formats import read_npz, to_levels

_SAVE_NPZ = "numpy.savez('FILE.npz', x_test=images)"
_LIGHT = "transparent pixels taken as white, as what is drawn is dark"
_DARK = "transparent pixels taken as black, as what is drawn is light"
_TURNED = "turned as its EXIF orientation says"


class Pictures(NamedTuple):
    """Images, and the file of each."""

    pixels: np.ndarray  # [N, H, W] or [N, H, W, 3] uint8
    files: list[str]  # N paths; of an npz file N times the same


def read_images(
    place: str, shape: tuple[int, ...], warn: Callable[[str], object], *, resize: bool = False, invert: bool = False
) -> Pictures:
    """Images ``[N, H, W]`` or ``[N, H, W, 3]`` uint8 of the size ``shape``, from an npz file or from pictures.

    Args:
        place: ``FILE.npz`` with ``x_test`` or with one array alone; a picture; or a pattern of pictures such as
            ``digits/*.png``, which are read in the order of their names.
        shape: ``(H, W)``, or ``(H, W, 3)`` in colour. Pictures are converted to grey levels or to colours.
        warn: is called with one line for each change to the images: another scale or axes in an npz file, transparency
            put on white or black, a picture turned by its EXIF orientation, and what ``resize`` and ``invert`` did.
        resize: images of another height or width are scaled to (H, W); proportions are not kept.
        invert: black becomes white and white black, for what is drawn black on white.

    Raises:
        DataError: the file does not exist, is damaged, or holds something else.
    """
    pattern = os.path.expanduser(place)
    if os.path.isdir(pattern):
        raise DataError(f"{place}: wanted a picture or FILE.npz, got a folder; for its pictures give {place}/*.png")
    if pattern.lower().endswith(".npy"):
        raise DataError(f"{place}: wanted a picture or FILE.npz, got an npy file; save {_SAVE_NPZ}")
    paths = _matching(pattern)
    if not paths:
        raise DataError(f"{place}: no such file")
    if pattern.lower().endswith(".npz"):
        (array,) = read_npz(Path(paths[0]), ("x_test",)).values()
        images = list(to_levels({"images": array}, place, warn)["images"])
        paths = paths[:1] * len(images)
    else:
        images = _pictures(paths, "RGB" if len(shape) == 3 else "L", warn)
    if resize:
        images = _resized(images, shape, warn)
    for path, image in zip(paths, images, strict=True):
        _check_size(path, image.shape, shape)
    pixels = np.stack(images)
    if invert:
        warn(f"{_number(pixels)} inverted: black became white, and white black")
        pixels = 255 - pixels
    return Pictures(pixels, paths)


def _number(images: Sized) -> str:
    return f"{len(images)} image{'' if len(images) == 1 else 's'}"


def _matching(pattern: str) -> list[str]:
    """The file of this name or, if there is none, the files of this pattern. Brackets in a folder's name are kept."""
    if os.path.isfile(pattern):
        return [pattern]
    folder, name = os.path.split(pattern)
    return sorted(glob.glob(os.path.join(glob.escape(folder) if os.path.isdir(folder) else folder, name)))


def _pictures(paths: list[str], mode: str, warn: Callable[[str], object]) -> list[np.ndarray]:
    pictures: list[np.ndarray] = []
    changed: dict[str, list[str]] = {}
    for path in paths:
        picture, changes = _picture(path, mode)
        pictures.append(picture)
        for change in changes:
            changed.setdefault(change, []).append(path)
    for change, of_paths in changed.items():
        others = len(of_paths) - 1
        warn(f"{of_paths[0]}{f' and {others} more' if others else ''}: {change}")
    return pictures


def _resized(images: list[np.ndarray], shape: tuple[int, ...], warn: Callable[[str], object]) -> list[np.ndarray]:
    """The images with those of another height or width scaled to that of ``shape``."""
    from PIL import Image

    def scaled(image: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(image).resize((shape[1], shape[0]), Image.Resampling.BILINEAR))

    sizes = [image.shape[:2] for image in images]
    others = sorted({size for size in sizes if size != shape[:2]})
    came = ", ".join(map(_size, others[:3])) + (", ..." if len(others) > 3 else "")
    count = sum(size != shape[:2] for size in sizes)
    warn(f"{count} of {_number(images)} resized to {_size(shape[:2])} pixels{f', from {came}' if others else ''}")
    return [image if size == shape[:2] else scaled(image) for image, size in zip(images, sizes, strict=True)]


def _picture(path: str, mode: str) -> tuple[np.ndarray, list[str]]:
    """``[H, W]`` or ``[H, W, 3]`` uint8, and what was changed."""
    from PIL import Image, ImageOps

    changes = []
    try:
        with Image.open(path) as picture:
            if picture.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
                raise DataError(f"{path}: wanted a picture of 8 bits a channel, got mode {picture.mode}")
            clear = picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info
            if picture.getexif().get(0x0112, 1) != 1:  # Orientation
                changes.append(_TURNED)
            turned = ImageOps.exif_transpose(picture)
            if not clear:
                return np.asarray(turned.convert(mode)), changes
            levels, change = _on_background(np.asarray(turned.convert("RGBA")))
            flat = Image.fromarray(levels)
            return np.asarray(flat.convert(mode)), changes + ([change] if change else [])
    except DataError:
        raise
    except Exception as error:  # Pillow raises OSError, ValueError, SyntaxError, DecompressionBombError ...
        raise DataError(f"{path}: wanted a picture, got {brief(error)}") from error


def _on_background(pixels: np.ndarray) -> tuple[np.ndarray, str]:
    """``[H, W, 3]`` uint8 from ``[H, W, 4]``, on the background, white or black, from which it stands out.

    Black ink on a transparent page keeps its strokes only on white, white ink only on black.

    Returns:
        The colours, and the sentence that says which background was taken; empty if nothing is transparent.
    """
    colours, alpha = pixels[..., :3].astype(float), pixels[..., 3:] / 255.0
    if alpha.min() == 1:
        return pixels[..., :3], ""
    drawn = (alpha * colours).sum() / max(3 * alpha.sum(), 1e-9)  # mean level of what is drawn
    background, change = (255, _LIGHT) if drawn < 128 else (0, _DARK)
    return np.rint(alpha * colours + (1 - alpha) * background).astype(np.uint8), change


def _check_size(place: str, came: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if came != wanted:
        cure = "" if len(came) != len(wanted) or came[2:] != wanted[2:] else " (resize scales them)"
        raise DataError(
            f"{place}: wanted images of {_size(wanted)} pixels, as the run was trained on, got {_size(came)}{cure}"
        )


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
