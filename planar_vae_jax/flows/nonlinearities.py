"""The nonlinearities ``h`` of a planar layer. A new one is a new entry of :data:`NONLINEARITIES`."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Nonlinearity(NamedTuple):
    """An odd, strictly increasing ``h`` with ``h'(0) = 1``, ``0 < h' <= 1``, ``sup|h| = 1``, and concave above 0.

    The functions are elementwise and accurate to a few ulps relative to their own values.
    """

    value: Callable[[jax.Array], jax.Array]  # a -> h(a)
    slopes: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]  # a, h(a) -> (h'(a), 1 - h'(a))
    curvature: Callable[[jax.Array, jax.Array], jax.Array]  # a, h(a) -> h''(a)
    remainder: Callable[[jax.Array], jax.Array]  # a -> a - h(a), to full relative accuracy
    # y -> an upper bound of the a >= 0 with a - h(a) = y >= 0, within a constant factor of it where y is small.
    remainder_inverse: Callable[[jax.Array], jax.Array]


def _tanh_slopes(a: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    # 1 - tanh(a)^2 has lost every digit by |a| = 9 in float32; 4 e / (1 + e)^2 keeps them all.
    e = jnp.exp(-2.0 * jnp.abs(a))
    return 4.0 * e / jnp.square(1.0 + e), jnp.square(h)


def _tanh_curvature(a: jax.Array, h: jax.Array) -> jax.Array:
    return -2.0 * h * _tanh_slopes(a, h)[0]


def _tanh_remainder(a: jax.Array) -> jax.Array:
    # Lambert's continued fraction tanh(a) = a / (1 + q), q = a^2 / (3 + a^2 / (5 + ...)): all terms are
    # positive, so a - tanh(a) = a q / (1 + q) does not cancel. Below |a| = 1 eight levels are exact to rounding.
    small = jnp.abs(a) < 1.0
    square = jnp.square(jnp.where(small, a, 0.0))
    q = jnp.zeros_like(a)
    for odd in range(17, 1, -2):
        q = square / (odd + q)
    return jnp.where(small, a * q / (1.0 + q), a - jnp.tanh(a))


def _tanh_remainder_inverse(y: jax.Array) -> jax.Array:
    # tanh(a) <= a (15 + a^2) / (15 + 6 a^2), hence a - tanh(a) >= 5 a^3 / 21 for 0 <= a <= 1.
    return jnp.where(y < 5.0 / 21.0, jnp.cbrt(4.2 * y), y + 1.0)


def _softsign_slopes(a: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.square(1.0 / (1.0 + jnp.abs(a))), jnp.abs(h) * (2.0 - jnp.abs(h))


NONLINEARITIES = {
    "tanh": Nonlinearity(jnp.tanh, _tanh_slopes, _tanh_curvature, _tanh_remainder, _tanh_remainder_inverse),
    "softsign": Nonlinearity(  # a / (1 + |a|)
        value=lambda a: a / (1.0 + jnp.abs(a)),
        slopes=_softsign_slopes,
        curvature=lambda a, _: -2.0 * jnp.sign(a) / (1.0 + jnp.abs(a)) ** 3,
        remainder=lambda a: a * (jnp.abs(a) / (1.0 + jnp.abs(a))),
        remainder_inverse=lambda y: jnp.minimum(y + jnp.sqrt(y), y + 1.0),
    ),
}


def check_nonlinearity(h: str) -> None:
    """Raises a ValueError that lists the known names unless ``h`` is one of them."""
    if h not in NONLINEARITIES:
        raise ValueError(
            f"h must be one of {', '.join(NONLINEARITIES)} (odd, slope in (0, 1] and 1 at 0, |h| < 1: "
            f"only then does w.u_hat > -1 make every layer invertible); got {h!r}"
        )
