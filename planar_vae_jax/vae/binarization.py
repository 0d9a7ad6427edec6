"""From grey pixels to what a Bernoulli decoder models; drawn on the device."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float32, Key, UInt8, UInt32

BINARIZATIONS = ("dynamic", "static", "threshold", "none")


def bernoulli_pixels(
    key: Key[Array, ""] | UInt32[Array, " words"], pixels: UInt8[Array, "..."]
) -> Float32[Array, "..."]:
    """Draws each pixel as 1 with probability ``pixel / 255``.

    A pixel is 1 if its 16 random bits are below ``257 pixel``, which is ``65535 pixel / 255``. The probability is off
    by less than 1e-5, and 0 and 255 are certain.

    The draws depend on the key and the shape alone: not on how the pixels are split over devices, and not on how
    ``jax_threefry_partitionable`` has a device compute its share.

    Args:
        key: one key for all pixels.
        pixels: uint8, any shape.

    Returns:
        float32 zeros and ones of the same shape.
    """
    wide = pixels.astype(jnp.uint32)
    threshold = wide * 257 + (wide >> 7)  # 0 .. 65536
    # Two draws from each 32-bit word; jax.random.bits(dtype=uint16) takes three times as long on a CPU. The two pixels
    # of a word lie in one row, so that a device which has some of the images needs the words of these alone.
    *leading, size = pixels.shape or (1,)
    words = jax.random.bits(key, (*leading, -(-size // 2)), jnp.uint32)
    bits = jnp.concatenate([words & 0xFFFF, words >> 16], axis=-1)[..., :size]
    return (bits.reshape(pixels.shape) < threshold).astype(jnp.float32)


def binarize(
    key: Key[Array, ""] | UInt32[Array, " words"], pixels: UInt8[Array, "..."], binarization: str
) -> Float32[Array, "..."]:
    """The pixels that the model sees, float32 in 0..1, for grey ``pixels``.

    ``dynamic`` and ``static`` draw Bernoulli(pixel / 255); for ``dynamic`` the caller draws again at every visit, for
    ``static`` once. ``threshold`` is ``pixel >= 128``. ``none`` is ``pixel / 255``.

    Two calls with one key give equal draws to pixels of equal shape: training and test images that are drawn once
    (``static``) need two keys.

    Args:
        key: one key for all pixels; ``threshold`` and ``none`` do not use it.
        pixels: uint8, any shape.
        binarization: one of ``BINARIZATIONS``.

    Returns:
        float32, the shape of ``pixels``.

    Raises:
        ValueError: for an unknown binarization, or pixels of another dtype.
    """
    check_binarization(binarization)
    _check_pixels(pixels)
    if binarization in ("dynamic", "static"):
        return bernoulli_pixels(key, pixels)
    if binarization == "threshold":
        return (pixels >= 128).astype(jnp.float32)
    # Not `/ 255`, which jit turns into this product, an ulp away from the quotient: equal bits, compiled or not.
    return pixels.astype(jnp.float32) * jnp.float32(1 / 255)


def binarize_each(
    keys: Key[Array, " N"] | UInt32[Array, "N words"], images: UInt8[Array, "N ..."], binarization: str
) -> Float32[Array, "N ..."]:
    """As :func:`binarize`, with a key for each image: the draws of image i depend on ``keys[i]`` alone.

    Image i is ``binarize(keys[i], images[i].reshape(-1), binarization)``, in the shape of an image. That holds for
    threefry keys; draws from ``rbg`` keys depend on the batch.

    Args:
        keys: ``[N]``.
        images: ``[N, ...]`` uint8.
        binarization: one of ``BINARIZATIONS``.

    Returns:
        float32, the shape of ``images``.

    Raises:
        ValueError: as :func:`binarize`, and for keys of another number than images.
    """
    check_binarization(binarization)
    _check_pixels(images)
    if keys.shape[:1] != images.shape[:1]:
        raise ValueError(f"keys must be one for each image, [{images.shape[0]}]; got {list(keys.shape)}")
    rows = images.reshape(images.shape[0], math.prod(images.shape[1:]))
    return jax.vmap(lambda key, row: binarize(key, row, binarization))(keys, rows).reshape(images.shape)


def check_binarization(binarization: str) -> None:
    """Checks a name.

    Raises:
        ValueError: if it is not one of ``BINARIZATIONS``.
    """
    if binarization not in BINARIZATIONS:
        raise ValueError(f"binarization must be one of {', '.join(BINARIZATIONS)}; got {binarization!r}")


def _check_pixels(pixels: jax.Array) -> None:
    if (dtype := getattr(pixels, "dtype", type(pixels).__name__)) != jnp.uint8:
        raise ValueError(f"pixels must be grey levels, an array of uint8 from 0 to 255; got {dtype}")
