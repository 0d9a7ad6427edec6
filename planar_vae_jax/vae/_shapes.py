"""Checks of sizes and shapes that the encoders and decoders share."""

import operator
from collections.abc import Sequence
from typing import Any

import jax


def whole_number(name: str, value: Any, least: int, when: str = "") -> int:
    """``value`` as a Python int; NumPy's integers are taken, booleans are not.

    Raises:
        ValueError: if it is not a whole number of at least ``least``; the message names the argument and says ``when``.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"{name} must be a whole number of at least {least}{when}; got {value!r}")
    return number


def checked_image_shape(image_shape: Sequence[Any]) -> tuple[int, ...]:
    """``(H, W)`` or ``(H, W, C)`` as a tuple of Python ints.

    Raises:
        ValueError: for another number of axes, or sizes that are not whole numbers of at least 1.
    """
    shape = tuple(image_shape)
    try:
        sizes = tuple(whole_number("image_shape", size, 1) for size in shape)
    except ValueError:
        sizes = ()
    if len(sizes) not in (2, 3):
        raise ValueError(f"image_shape must be (H, W) or (H, W, C), all at least 1; got {shape}")
    return sizes


def leading_axes(images: jax.Array, image_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of ``images [..., *image_shape]`` before those of one image.

    Raises:
        ValueError: if the last axes of ``images`` are not ``image_shape``.
    """
    leading = images.ndim - len(image_shape)
    if leading < 0 or images.shape[leading:] != image_shape:
        wish = ", ".join(map(str, image_shape))
        raise ValueError(f"images must be of shape [..., {wish}], the encoder's image_shape; got {images.shape}")
    return images.shape[:leading]
