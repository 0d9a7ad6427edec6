"""``p(x|z)`` of the pixels of an image: log-probabilities, pixel means for pictures, and the decoder's last step.

Pixels are in 0..1 and are independent given ``z``. :func:`measured` says what the nats of each likelihood measure.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from planar_vae_jax.flows.distribution import bernoulli_log_prob

if TYPE_CHECKING:
    from jaxtyping import Array, Float

LEVELS = 256  # of a uint8 pixel
FIRST_LOG_SCALE = -1.0  # of pixels in 0..1, for likelihoods with a scale


class Head(nnx.Module):
    """The last step of a decoder: from ``numbers`` numbers for each pixel to the parameters of ``p(x|z)``.

    This one has a single number a pixel, which is the parameter. A likelihood with other parameters has a subclass with
    its own ``numbers`` and ``__call__``.
    """

    numbers = 1

    def __call__(self, raw: jax.Array) -> Any:
        """Parameters, each ``[..., *image_shape]``, from ``raw [..., *image_shape, numbers]``."""
        return jnp.squeeze(raw, -1)


@runtime_checkable
class Likelihood(Protocol):
    """A family of distributions of pixels.

    ``parameters`` is a pytree of arrays that end in the axes of an image, as the decoder returns them; for ``log_prob``
    the axes of an image are one.

    A likelihood is a static part of a model, so two that mean the same should be equal: a frozen dataclass, or one
    object that all models share.

    Attributes:
        binary: whether it models pixels 0 or 1, so that grey images are binarised.
        of_levels: whether its nats are those of uint8 images, so that they can be given in bits per dimension.
        measures: what its nats measure, in words.
    """

    binary: ClassVar[bool] = False
    of_levels: ClassVar[bool] = False
    measures: ClassVar[str] = "images"

    def log_prob(self, x: Float[Array, "*X P"], parameters: Any) -> Float[Array, "..."]:
        """``log p(x|z) [...]`` in nats, of images ``x [..., P]`` whose P pixels are one axis."""

    def mean(self, parameters: Any) -> Float[Array, "..."]:
        """Pixel means in 0..1, for pictures and squared errors, of the shape of the parameters."""

    def head(self, image_shape: tuple[int, ...], dtype: Any) -> Head:
        """Makes the last step of this package's decoders, by default :class:`Head`; other decoders do not call it."""
        return Head()


class LocationScale(NamedTuple):
    """Parameters of a likelihood with a location for each pixel and image, and a scale for each pixel."""

    location: jax.Array  # [..., P], in units of 0..1, not bounded
    log_scale: jax.Array  # [P], shared by all images


class _LocationScaleHead(Head):
    """The number is the location; the logarithm of each pixel's scale is a parameter of the model.

    ``log_scale = R tanh(raw / R)`` with ``R = -log(smallest_scale)``: the identity near 0, and no weight makes a scale
    smaller than ``smallest_scale``.
    """

    def __init__(self, smallest_scale: float, image_shape: tuple[int, ...], dtype: Any):
        self.smallest_scale = smallest_scale
        self.log_scale = nnx.Param(jnp.full(image_shape, FIRST_LOG_SCALE, dtype))

    def __call__(self, raw: jax.Array) -> LocationScale:
        return LocationScale(jnp.squeeze(raw, -1), bounded_log_scale(self.log_scale[...], self.smallest_scale))


@dataclasses.dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Pixels 0 or 1; the parameters are logits ``[..., P]``.

    For grey levels ``log_prob`` is a cross-entropy and no likelihood.
    """

    binary = True
    measures = "binary images"

    def log_prob(self, x: Float[Array, "*X P"], logits: Float[Array, "*Z P"]) -> Float[Array, "..."]:
        """``x l - softplus(l)``, summed over pixels."""
        return bernoulli_log_prob(x, logits)

    def mean(self, logits: Float[Array, "*Z"]) -> Float[Array, "*Z"]:
        """``sigmoid(logits)``."""
        return jax.nn.sigmoid(logits)


@dataclasses.dataclass(frozen=True)
class DiscretizedLogistic(Likelihood):
    """The 256 levels of a uint8 pixel: the mass of a logistic distribution in the bin of each (Salimans et al. 2017).

    Bins are a level wide, ``k / 255`` in the middle of bin k; the first and the last one take the tails. So it is a
    likelihood of uint8 images, whose ``log p(x|z) <= 0``.
    """

    of_levels = True
    measures = "uint8 images"
    smallest_scale = 0.1 / 255  # a tenth of a level, where a pixel is certain of its level

    def log_prob(self, x: Float[Array, "*X P"], parameters: LocationScale) -> Float[Array, "..."]:
        """``log(sigmoid(a) - sigmoid(b))`` with the bin's edges a > b in units of the scale, summed over pixels.

        ``sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a))``: no difference of nearly equal numbers.
        """
        inverse = jnp.exp(-parameters.log_scale) / (LEVELS - 1)  # scales in levels from here on
        width = jnp.log(-jnp.expm1(-inverse))
        x, location, inverse, width = jnp.broadcast_arrays(x, parameters.location, inverse, width)
        level = jnp.round((LEVELS - 1) * x)
        distance = level - (LEVELS - 1) * location
        below = jnp.where(level < LEVELS - 1, jax.nn.log_sigmoid((distance + 0.5) * inverse), 0.0)
        above = jnp.where(level > 0, jax.nn.log_sigmoid((0.5 - distance) * inverse), 0.0)
        inner = jnp.where((level > 0) & (level < LEVELS - 1), width, 0.0)
        return jnp.sum(below + above + inner, -1)

    def mean(self, parameters: LocationScale) -> Float[Array, "..."]:
        """The mean of the logistic distribution with its tails moved to 0 and 1; the bins' own to 1/1000.

        ``E min(max(y, 0), 1) = integral of P(y > t) over 0 < t < 1``, which is a difference of two softplus.
        """
        location, scale = jnp.broadcast_arrays(parameters.location, jnp.exp(parameters.log_scale))
        mean = scale * (jax.nn.softplus(location / scale) - jax.nn.softplus((location - 1.0) / scale))
        return jnp.clip(mean, 0.0, 1.0)  # rounding

    def head(self, image_shape: tuple[int, ...], dtype: Any) -> Head:
        """One location for each pixel and image, and one scale for each pixel."""
        return _LocationScaleHead(self.smallest_scale, image_shape, dtype)


@dataclasses.dataclass(frozen=True)
class Gaussian(Likelihood):
    """A normal density of each pixel on 0..1: nats of a density, which may be negative and are none of uint8 images.

    A pixel that never changes would make the density grow without bound: no scale is below a level's width.
    """

    measures = "a density on pixels in 0..1"
    smallest_scale = 1.0 / 255

    def log_prob(self, x: Float[Array, "*X P"], parameters: LocationScale) -> Float[Array, "..."]:
        """``-((x - location) / scale)^2 / 2 - log scale - log(2 pi) / 2``, summed over pixels."""
        x, location, log_scale = jnp.broadcast_arrays(x, *parameters)
        squares = jnp.square((x - location) * jnp.exp(-log_scale))
        return -0.5 * jnp.sum(squares + 2.0 * log_scale + math.log(2.0 * math.pi), -1)

    def mean(self, parameters: LocationScale) -> Float[Array, "..."]:
        """The location, where it is in 0..1."""
        return jnp.clip(parameters.location, 0.0, 1.0)

    def head(self, image_shape: tuple[int, ...], dtype: Any) -> Head:
        """One location for each pixel and image, and one scale for each pixel."""
        return _LocationScaleHead(self.smallest_scale, image_shape, dtype)


LIKELIHOODS: dict[str, Likelihood] = {
    "bernoulli": Bernoulli(),
    "logistic": DiscretizedLogistic(),
    "gaussian": Gaussian(),
}


def bounded_log_scale(raw: Float[Array, "*P"], smallest_scale: float) -> Float[Array, "*P"]:
    """``R tanh(raw / R)`` with ``R = -log(smallest_scale)``: the identity near 0, and never below ``-R``."""
    reach = -math.log(smallest_scale)
    return reach * jnp.tanh(raw / reach)


def measured(likelihood: Likelihood, binarization: str) -> str:
    """What the nats of a model with this likelihood measure, in words, for images binarised in this way."""
    if getattr(likelihood, "binary", False) and binarization == "none":
        return "a cross-entropy of grey levels, which bounds no likelihood"
    return getattr(likelihood, "measures", type(likelihood).__name__)


def default_binarization(likelihood: Likelihood, objective: str) -> str:
    """``"dynamic"`` for a likelihood of binary pixels; ``"none"`` for others and for the paper's squared error."""
    return "dynamic" if getattr(likelihood, "binary", False) and objective != "reconstruction" else "none"
