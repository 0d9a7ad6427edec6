"""The gated convolutional encoder and decoder of *Sylvester Normalizing Flows* (van den Berg et al. 2018, appendix A).

Each layer is ``h = (W x + b) * sigmoid(V x + c)``. The encoder's last layer, a convolution as large as what it is
given, and the decoder's first are linear maps of one vector, and written so.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

KERNEL = (5, 5)


def divisible_by_4(image_shape: Sequence[int]) -> bool:
    """Whether two strides of 2 halve ``(H, W, ...)`` twice."""
    return all(size % 4 == 0 for size in image_shape[:2])


def _quarter(image_shape: Sequence[int], channels: int) -> tuple[int, int, int]:
    """The shape between the two: after both strides."""
    return image_shape[0] // 4, image_shape[1] // 4, channels


class Gated(nnx.Module):
    """``(W x + b) * sigmoid(V x + c)``, of one layer that gives both."""

    def __init__(self, layer: Any):
        self.layer = layer

    def __call__(self, x: jax.Array) -> jax.Array:
        value, gate = jnp.split(self.layer(x), 2, axis=-1)
        return value * jax.nn.sigmoid(gate)


class GatedEncoder(nnx.Module):
    """Images ``[..., H, W, C]`` to features ``[..., 256]``; 5x5 to 32, 32, 64, 64, 64 channels, halved twice."""

    features = 256

    def __init__(self, image_shape: Sequence[int], *, dtype: str, rngs: nnx.Rngs):
        def layer(inputs: int, outputs: int, stride: int) -> Gated:
            padding = [(2, 2), (2, 2)]
            return Gated(nnx.Conv(inputs, 2 * outputs, KERNEL, stride, padding=padding, param_dtype=dtype, rngs=rngs))

        channels = image_shape[2] if len(image_shape) == 3 else 1
        self.conv1 = layer(channels, 32, 1)
        self.conv2 = layer(32, 32, 2)
        self.conv3 = layer(32, 64, 1)
        self.conv4 = layer(64, 64, 2)
        self.conv5 = layer(64, 64, 1)
        size = math.prod(_quarter(image_shape, 64))
        self.conv6 = Gated(nnx.Linear(size, 2 * self.features, param_dtype=dtype, rngs=rngs))

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.conv5(self.conv4(self.conv3(self.conv2(self.conv1(images)))))
        return self.conv6(x.reshape(*x.shape[:-3], math.prod(x.shape[-3:])))


class GatedDecoder(nnx.Module):
    """``z [..., L]`` to ``[..., H, W, 32]`` by transposed convolutions to 64, 64, 32, 32, 32, 32 channels."""

    channels = 32

    def __init__(self, latent: int, image_shape: Sequence[int], *, dtype: str, rngs: nnx.Rngs):
        def layer(inputs: int, outputs: int, stride: int) -> Gated:
            return Gated(nnx.ConvTranspose(inputs, 2 * outputs, KERNEL, stride, param_dtype=dtype, rngs=rngs))

        self.shape = _quarter(image_shape, 64)
        self.conv1 = Gated(nnx.Linear(latent, 2 * math.prod(self.shape), param_dtype=dtype, rngs=rngs))
        self.conv2 = layer(64, 64, 1)
        self.conv3 = layer(64, 32, 2)
        self.conv4 = layer(32, 32, 1)
        self.conv5 = layer(32, 32, 2)
        self.conv6 = layer(32, self.channels, 1)

    def __call__(self, z: jax.Array) -> jax.Array:
        x = self.conv1(z).reshape(*z.shape[:-1], *self.shape)
        return self.conv6(self.conv5(self.conv4(self.conv3(self.conv2(x)))))
