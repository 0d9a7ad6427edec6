"""From grey pixels to what a Bernoulli decoder models; drawn on the device."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.random import threefry2x32_p

from planar_vae_jax.train import mesh as meshes

BINARIZATIONS = ("dynamic", "static", "threshold", "none")


def bernoulli_pixels(key: jax.Array, pixels: jax.Array) -> jax.Array:
    """Draws each pixel as 1 with probability ``pixel / 255``.

    Sixteen random bits against the threshold ``257 pixel``, which is ``65535 pixel / 255``: the probability is off by
    less than 1e-5, and 0 and 255 are certain.

    Args:
        pixels: uint8, any shape.

    Returns:
        float32 zeros and ones of the same shape.
    """
    wide = pixels.astype(jnp.uint32)
    threshold = wide * 257 + (wide >> 7)  # 0 .. 65536
    # Two draws from each 32-bit word; jax.random.bits(dtype=uint16) takes three times as long on CPU.
    half = -(-pixels.size // 2)
    if meshes.size() > 1 and jax.random.key_impl(key) == "threefry2x32" and half < 2**31:
        # The two pixels of a word are half a batch apart, mostly on two devices: each computes it rather than send it.
        position = jnp.arange(pixels.size, dtype=jnp.uint32).reshape(pixels.shape)
        low = position < half
        # Once: XLA would repeat what is so cheap to start in each place that needs the pixels.
        word = lax.optimization_barrier(_words(key, jnp.where(low, position, position - half)))
        bits = jnp.where(low, word & 0xFFFF, word >> 16)
    else:
        words = jax.random.bits(key, (half,), jnp.uint32)
        bits = jnp.concatenate([words & 0xFFFF, words >> 16])[: pixels.size].reshape(pixels.shape)
    return (bits < threshold).astype(jnp.float32)


def _words(key: jax.Array, positions: jax.Array) -> jax.Array:
    """``jax.random.bits(key, (N,), uint32)[positions]`` of a threefry key, each computed by itself."""
    first, second = jnp.broadcast_arrays(*jax.random.key_data(key)[:, *[None] * positions.ndim], positions)[:2]
    high, low = threefry2x32_p.bind(first, second, jnp.zeros_like(positions), positions)
    return high ^ low


def binarize(key: jax.Array, pixels: jax.Array, binarization: str) -> jax.Array:
    """What the model is given for grey ``pixels`` (uint8, any shape), as float32 in [0, 1].

    ``dynamic`` and ``static`` draw Bernoulli(pixel / 255): they differ in whether the caller draws anew at
    every visit or once. ``threshold`` is ``pixel >= 128``; ``none`` is ``pixel / 255``.

    Two calls with one key give equal draws to pixels of equal shape: training and test images that are drawn once
    (``static``) need two keys.

    Raises:
        ValueError: for an unknown binarization, or pixels of another type.
    """
    _check(pixels, binarization)
    if binarization in ("dynamic", "static"):
        return bernoulli_pixels(key, pixels)
    if binarization == "threshold":
        return (pixels >= 128).astype(jnp.float32)
    # Not `/ 255`, which jit turns into this product, an ulp away from the quotient: equal bits, compiled or not.
    return pixels.astype(jnp.float32) * jnp.float32(1 / 255)


def binarize_each(keys: jax.Array, images: jax.Array, binarization: str) -> jax.Array:
    """As :func:`binarize`, each image by its own key: what image i is given depends on ``keys[i]`` alone.

    That holds for keys of threefry; draws by ``rbg`` keys depend on the batch.

    Args:
        keys: ``[N]``.
        images: ``[N, ...]`` uint8.

    Returns:
        float32, the shape of ``images``.
    """
    _check(images, binarization)
    if keys.shape != images.shape[:1]:
        raise ValueError(f"keys must be one for each image, [{images.shape[0]}]; got {list(keys.shape)}")
    return jax.vmap(lambda key, image: binarize(key, image, binarization))(keys, images)


def _check(pixels: jax.Array, binarization: str) -> None:
    if binarization not in BINARIZATIONS:
        raise ValueError(f"binarization must be one of {', '.join(BINARIZATIONS)}; got {binarization!r}")
    if (dtype := getattr(pixels, "dtype", type(pixels).__name__)) != jnp.uint8:
        raise ValueError(f"pixels must be grey levels, an array of uint8 from 0 to 255; got {dtype}")
