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
PADDING = ((2, 2), (2, 2))
AXES = ("NHWC", "HWIO", "NHWC")


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


@jax.custom_jvp
def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``[N, H, W, C]`` by ``[h, w, C, C']`` with h and w odd, zeros around: ``[N, H, W, C']``.

    Its derivative is a rule for the sake of CPUs: inside a loop, XLA's CPU compiler has fast convolutions only for this
    order of the axes, and JAX's own derivatives have others (a training step took 70 times as long). So the rule
    takes its operands in such orders that their transposes, by which JAX goes backwards, are in this one.
    """
    return _same(x, kernel, AXES)


@convolve.defjvp
def _convolve_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
    (x, kernel), (dx, dkernel) = primals, tangents
    by_x = _same(dx, kernel.transpose(0, 1, 3, 2), ("NHWC", "HWOI", "NHWC"))
    by_kernel = _same(x.transpose(3, 1, 2, 0), dkernel.transpose(2, 0, 1, 3), ("CHWN", "IHWO", "HWNC"))
    return convolve(x, kernel), by_x + by_kernel.transpose(2, 0, 1, 3)


def _same(x: jax.Array, kernel: jax.Array, axes: tuple[str, str, str]) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=axes)


class Convolution(nnx.Conv):
    """5x5, zeros around, ``[..., H, W, C]`` to ``[..., H, W, C']``."""

    def __init__(self, inputs: int, outputs: int, *, dtype: str, rngs: nnx.Rngs):
        super().__init__(inputs, outputs, KERNEL, param_dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        x, kernel, bias = self.promote_dtype((x, self.kernel[...], self.bias[...]), dtype=self.dtype)  # type: ignore[index]
        images = x.reshape(-1, *x.shape[-3:])
        y = jax.lax.platform_dependent(images, kernel, cpu=self.on_cpu, default=self.plain)
        y = y.reshape(*x.shape[:-3], *y.shape[1:])
        return y + jnp.broadcast_to(bias, y.shape)

    def plain(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Of images along one axis, by one operation."""
        return _same(x, kernel, AXES)

    def on_cpu(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """The same by :func:`convolve`."""
        return convolve(x, kernel)


class Halving(Convolution):
    """The same at every other row and column: ``[..., H/2, W/2, C']``."""

    def plain(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), PADDING, dimension_numbers=AXES)

    def on_cpu(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """3x3 of blocks of 2x2 pixels: along an axis, tap 2 j + p meets pixel p of the block j - 1 places away."""
        (size, height, width, inputs), outputs = x.shape, kernel.shape[-1]
        x = x.reshape(size, height // 2, 2, width // 2, 2, inputs).transpose(0, 1, 3, 2, 4, 5)
        taps = _six_taps(kernel).transpose(0, 2, 1, 3, 4, 5)
        return convolve(x.reshape(size, height // 2, width // 2, -1), taps.reshape(3, 3, -1, outputs))


class Doubling(Convolution):
    """The transposed convolution: ``[..., 2 H, 2 W, C']``."""

    def plain(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_transpose(x, kernel, (2, 2), "SAME", dimension_numbers=AXES)

    def on_cpu(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """3x3 to blocks of 2x2 pixels: along an axis, tap 2 j + 1 - p takes the value j - 1 places away to pixel p.

        Of the 5 taps two meet values in an even row, three in an odd one; the others meet zeros.
        """
        (size, height, width, inputs), outputs = x.shape, kernel.shape[-1]
        taps = _six_taps(kernel)[:, ::-1, :, ::-1].transpose(0, 2, 4, 1, 3, 5)
        y = convolve(x, taps.reshape(3, 3, inputs, -1)).reshape(size, height, width, 2, 2, outputs)
        return y.transpose(0, 1, 3, 2, 4, 5).reshape(size, 2 * height, 2 * width, outputs)


def _six_taps(kernel: jax.Array) -> jax.Array:
    """``[5, 5, C, C']`` and zeros as ``[3, 2, 3, 2, C, C']``."""
    return jnp.pad(kernel, [(0, 1), (0, 1), (0, 0), (0, 0)]).reshape(3, 2, 3, 2, *kernel.shape[2:])


class GatedEncoder(nnx.Module):
    """Images ``[..., H, W, C]`` to features ``[..., 256]``; 5x5 to 32, 32, 64, 64, 64 channels, halved twice."""

    features = 256

    def __init__(self, image_shape: Sequence[int], *, dtype: str, rngs: nnx.Rngs):
        def layer(kind: type[Convolution], inputs: int, outputs: int) -> Gated:
            return Gated(kind(inputs, 2 * outputs, dtype=dtype, rngs=rngs))

        channels = image_shape[2] if len(image_shape) == 3 else 1
        self.conv1 = layer(Convolution, channels, 32)
        self.conv2 = layer(Halving, 32, 32)
        self.conv3 = layer(Convolution, 32, 64)
        self.conv4 = layer(Halving, 64, 64)
        self.conv5 = layer(Convolution, 64, 64)
        size = math.prod(_quarter(image_shape, 64))
        self.conv6 = Gated(nnx.Linear(size, 2 * self.features, param_dtype=dtype, rngs=rngs))

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.conv5(self.conv4(self.conv3(self.conv2(self.conv1(images)))))
        return self.conv6(x.reshape(*x.shape[:-3], math.prod(x.shape[-3:])))


class GatedDecoder(nnx.Module):
    """``z [..., L]`` to ``[..., H, W, 32]`` by transposed convolutions to 64, 64, 32, 32, 32, 32 channels."""

    channels = 32

    def __init__(self, latent: int, image_shape: Sequence[int], *, dtype: str, rngs: nnx.Rngs):
        def layer(kind: type[Convolution], inputs: int, outputs: int) -> Gated:
            return Gated(kind(inputs, 2 * outputs, dtype=dtype, rngs=rngs))

        self.shape = _quarter(image_shape, 64)
        self.conv1 = Gated(nnx.Linear(latent, 2 * math.prod(self.shape), param_dtype=dtype, rngs=rngs))
        self.conv2 = layer(Convolution, 64, 64)
        self.conv3 = layer(Doubling, 64, 32)
        self.conv4 = layer(Convolution, 32, 32)
        self.conv5 = layer(Doubling, 32, 32)
        self.conv6 = layer(Convolution, 32, self.channels)

    def __call__(self, z: jax.Array) -> jax.Array:
        x = self.conv1(z).reshape(*z.shape[:-1], *self.shape)
        return self.conv6(self.conv5(self.conv4(self.conv3(self.conv2(x)))))
