"""The gated convolutional encoder and decoder of *Sylvester Normalizing Flows* (van den Berg et al. 2018, appendix A).

Each layer is ``h = (W x + b) * sigmoid(V x + c)``. The last layer of the encoder and the first of the decoder are
convolutions as large as their input, so they are written as linear layers.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from planar_vae_jax.vae._shapes import checked_image_shape, leading_axes, whole_number
from planar_vae_jax.vae.likelihoods import Head
from planar_vae_jax.vae.precision import Linear, computation_dtype

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


def _partitioned_by_xla(function: Callable[..., jax.Array], x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``function(x [..., H, W, C], kernel)``, also where the leading axes of ``x`` are split over an Explicit mesh.

    On such a mesh JAX asks for the sharding of every reshape; here only that of the result is stated.
    """
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return function(x, kernel)
    spec = PartitionSpec(*sharding.spec[:-3], None, None, None)
    return jax.sharding.auto_axes(function, out_sharding=spec)(x, kernel)


class Convolution(nnx.Conv):
    """5x5, zeros around, ``[..., H, W, C]`` to ``[..., H, W, C']``."""

    def __init__(self, inputs: int, outputs: int, *, dtype: Any, precision: str = "float32", rngs: nnx.Rngs):
        super().__init__(inputs, outputs, KERNEL, dtype=computation_dtype(precision), param_dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        given = x.dtype
        x, kernel, bias = self.promote_dtype((x, self.kernel[...], self.bias[...]), dtype=self.dtype)  # type: ignore[index]
        y = _partitioned_by_xla(self._convolved, x, kernel)
        y = y + jnp.broadcast_to(bias, y.shape)
        return y if self.dtype is None else y.astype(given)

    def _convolved(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        images = x.reshape(-1, *x.shape[-3:])
        y = jax.lax.platform_dependent(images, kernel, cpu=self.on_cpu, default=self.plain)
        return y.reshape(*x.shape[:-3], *y.shape[1:])

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
    """Images ``[..., H, W]`` or ``[..., H, W, C]`` to features ``[..., 256]``.

    Convolutions 5x5 to 32, 32, 64, 64, 64 channels, of which the second and the fourth halve H and W.

    Args:
        image_shape: ``(H, W)`` or ``(H, W, C)``, H and W divisible by 4.
        dtype: of the parameters.
        precision: one of ``PRECISIONS``.
        rngs: draws the parameters.

    Raises:
        ValueError: for an ``image_shape`` that cannot be halved twice; when called, for images of another shape.
    """

    features = 256

    def __init__(
        self, image_shape: Sequence[int], *, dtype: Any = "float32", precision: str = "float32", rngs: nnx.Rngs
    ):
        options = {"dtype": dtype, "precision": precision, "rngs": rngs}
        self.image_shape = _checked(image_shape)
        self.conv1 = _gated(Convolution, _channels(self.image_shape), 32, options)
        self.conv2 = _gated(Halving, 32, 32, options)
        self.conv3 = _gated(Convolution, 32, 64, options)
        self.conv4 = _gated(Halving, 64, 64, options)
        self.conv5 = _gated(Convolution, 64, 64, options)
        size = math.prod(_quarter(self.image_shape, 64))
        self.conv6 = Gated(Linear(size, 2 * self.features, **options))

    def __call__(self, images: jax.Array) -> jax.Array:
        leading = leading_axes(images, self.image_shape)
        x = images.reshape(*leading, *self.image_shape[:2], _channels(self.image_shape))
        x = self.conv5(self.conv4(self.conv3(self.conv2(self.conv1(x)))))
        return self.conv6(x.reshape(*leading, math.prod(x.shape[-3:])))


class GatedDecoder(nnx.Module):
    """``z [..., L]`` to the parameters of ``p(x|z)``.

    Convolutions to 64, 64, 32, 32, 32, 32 channels, of which the third and the fifth are transposed and double H and W;
    then one of 1x1.

    Args:
        latent: L.
        image_shape: ``(H, W)`` or ``(H, W, C)``, H and W divisible by 4.
        head: turns ``head.numbers`` numbers a pixel into the likelihood's parameters (``likelihood.head(...)``).
        dtype, precision, rngs: as for :class:`GatedEncoder`.

    Raises:
        ValueError: if ``latent`` is not a whole number of at least 1, or ``image_shape`` cannot be halved twice.
    """

    channels = 32

    def __init__(
        self,
        latent: int,
        image_shape: Sequence[int],
        head: Head,
        *,
        dtype: Any = "float32",
        precision: str = "float32",
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "precision": precision, "rngs": rngs}
        self.image_shape = _checked(image_shape)
        self.shape = _quarter(self.image_shape, 64)
        self.conv1 = Gated(Linear(whole_number("latent", latent, 1), 2 * math.prod(self.shape), **options))
        self.conv2 = _gated(Convolution, 64, 64, options)
        self.conv3 = _gated(Doubling, 64, 32, options)
        self.conv4 = _gated(Convolution, 32, 32, options)
        self.conv5 = _gated(Doubling, 32, 32, options)
        self.conv6 = _gated(Convolution, 32, self.channels, options)
        self.last = Linear(self.channels, _channels(self.image_shape) * head.numbers, **options)
        self.head = head

    def __call__(self, z: jax.Array) -> Any:
        x = self.conv1(z).reshape(*z.shape[:-1], *self.shape)
        raw = self.last(self.conv6(self.conv5(self.conv4(self.conv3(self.conv2(x))))))
        return self.head(raw.reshape(*z.shape[:-1], *self.image_shape, self.head.numbers))


def _gated(kind: type[Convolution], inputs: int, outputs: int, options: dict[str, Any]) -> Gated:
    return Gated(kind(inputs, 2 * outputs, **options))


def _channels(image_shape: tuple[int, ...]) -> int:
    return image_shape[2] if len(image_shape) == 3 else 1


def _checked(image_shape: Sequence[int]) -> tuple[int, ...]:
    """The image shape as a tuple of ints, which two strides of 2 can halve."""
    shape = checked_image_shape(image_shape)
    if not divisible_by_4(shape):
        raise ValueError(f"image_shape must have H and W divisible by 4 for convolutions; got {shape}")
    return shape
