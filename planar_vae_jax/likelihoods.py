"""``p(x|z)`` of an image's pixels, from what a decoder gives: log-probabilities, and pixel means for pictures.

Pixels are in 0..1 and are independent given ``z``.
"""

from typing import Any, Protocol

import jax

from planar_vae_jax.distributions import bernoulli_log_prob


class Likelihood(Protocol):
    """A family of distributions of pixels; ``parameters`` is a pytree of arrays whose last axis is broadcast to P."""

    def log_prob(self, x: jax.Array, parameters: Any) -> jax.Array:
        """``log p(x|z)`` in nats, ``[...]``, of images ``x [..., P]`` with their P pixels in one axis."""

    def mean(self, parameters: Any) -> jax.Array:
        """Pixel means in 0..1, for pictures and squared errors; of the shape of the parameters, broadcast."""


class Bernoulli:
    """Pixels 0 or 1; the parameters are logits ``[..., P]``.

    For grey levels ``log_prob`` is a cross-entropy and no likelihood.
    """

    def log_prob(self, x: jax.Array, logits: jax.Array) -> jax.Array:
        """``x l - softplus(l)``, summed over pixels."""
        return bernoulli_log_prob(x, logits)

    def mean(self, logits: jax.Array) -> jax.Array:
        """``sigmoid(logits)``."""
        return jax.nn.sigmoid(logits)
