"""An encoder and a decoder of linear layers with ReLUs (section 4.2 of the paper: one hidden layer)."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from planar_vae_jax.vae._shapes import checked_image_shape, leading_axes, whole_number
from planar_vae_jax.vae.likelihoods import Head
from planar_vae_jax.vae.precision import Linear

LAYERS = (1, 2)


class _Hidden(nnx.Module):
    """``[..., inputs]`` to ``[..., hidden]``: one or two linear layers, each followed by a ReLU."""

    def __init__(self, inputs: int, hidden: int, layers: int, **options: Any):
        if layers not in LAYERS:
            raise ValueError(f"layers must be one of {', '.join(map(str, LAYERS))}; got {layers!r}")
        self.layers = layers
        self.first = Linear(inputs, hidden, **options)
        if layers == 2:
            self.second = Linear(hidden, hidden, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.first(x))
        return nnx.relu(self.second(x)) if self.layers == 2 else x


class MLPEncoder(nnx.Module):
    """Images ``[..., H, W]`` or ``[..., H, W, C]`` to features ``[..., hidden]``.

    Args:
        image_shape: ``(H, W)`` or ``(H, W, C)``.
        hidden: width of the hidden layers, and the number of features.
        layers: 1 or 2 hidden layers.
        dtype: of the parameters.
        precision: one of ``PRECISIONS``.
        rngs: draws the parameters.

    Raises:
        ValueError: for a size that is not a whole number in its range; when called, for images of another shape.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        hidden: int = 400,
        *,
        layers: int = 1,
        dtype: Any = "float32",
        precision: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.image_shape = checked_image_shape(image_shape)
        self.features = whole_number("hidden", hidden, 1)
        pixels = math.prod(self.image_shape)
        self.hidden = _Hidden(pixels, self.features, layers, dtype=dtype, precision=precision, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        leading = leading_axes(images, self.image_shape)
        return self.hidden(images.reshape(*leading, math.prod(self.image_shape)))


class MLPDecoder(nnx.Module):
    """``z [..., L]`` to the parameters of ``p(x|z)``; the mirror image of :class:`MLPEncoder`.

    Args:
        latent: L.
        image_shape: ``(H, W)`` or ``(H, W, C)``.
        hidden: width of the hidden layers.
        head: turns ``head.numbers`` numbers a pixel into the likelihood's parameters (``likelihood.head(...)``).
        layers, dtype, precision, rngs: as for :class:`MLPEncoder`.

    Raises:
        ValueError: for a size that is not a whole number in its range.
    """

    def __init__(
        self,
        latent: int,
        image_shape: Sequence[int],
        head: Head,
        hidden: int = 400,
        *,
        layers: int = 1,
        dtype: Any = "float32",
        precision: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.image_shape = checked_image_shape(image_shape)
        latent, hidden = whole_number("latent", latent, 1), whole_number("hidden", hidden, 1)
        self.hidden = _Hidden(latent, hidden, layers, dtype=dtype, precision=precision, rngs=rngs)
        outputs = math.prod(self.image_shape) * head.numbers
        self.last = Linear(hidden, outputs, dtype=dtype, precision=precision, rngs=rngs)
        self.head = head

    def __call__(self, z: jax.Array) -> Any:
        raw = self.last(self.hidden(z))
        return self.head(raw.reshape(*z.shape[:-1], *self.image_shape, self.head.numbers))
