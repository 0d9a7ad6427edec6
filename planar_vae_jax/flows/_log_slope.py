"""``log(1 + h'(a) w.u_hat)``, a layer's share of the log-determinant, with its derivatives."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from planar_vae_jax.flows._xla import beside_events
from planar_vae_jax.flows.nonlinearities import Nonlinearity


class LogSlope(NamedTuple):
    """``log v`` with ``v = 1 + h'(a) w.u_hat > 0``, elementwise, and what its derivative needs."""

    value: jax.Array  # log v
    slope: jax.Array  # h'(a)
    by_a: jax.Array  # d log v / da
    by_log_m: jax.Array  # d log v / d log m, in [0, 1]


def log_slope(
    nonlinearity: Nonlinearity, a: jax.Array, h: jax.Array, w_u_hat: jax.Array, m: jax.Array, log_m: jax.Array
) -> LogSlope:
    """``v = (1 - h') + h' m`` with ``m = 1 + w.u_hat``: two non-negative terms.

    Args:
        nonlinearity: ``h``.
        a: pre-activations, any shape.
        h: ``h(a)``.
        w_u_hat: ``m - 1``, to its own relative accuracy.
        m: ``> 0``, or 0 where it underflows.
        log_m: finite also there.
    """
    slope, complement = nonlinearity.slopes(a, h)
    # Where v may be small: the two terms, as nothing cancels in them. Elsewhere: relative accuracy near the identity.
    small = m < 0.5
    excess = slope * jnp.where(small, m, w_u_hat)
    tiny = jnp.finfo(m.dtype).tiny
    v = jnp.maximum(jnp.where(small, complement, 1.0) + excess, tiny)
    inverse = 1.0 / v
    # log1p(excess) = log v + what the rounding of v lost, to first order: one logarithm for both sides.
    lost = jnp.where(small, 0.0, (excess - (v - 1.0)) * inverse)
    # Both terms underflow only on the hyperplane a = 0 itself, with m < tiny; there h' = 1 and v = m.
    value = jnp.where(v <= tiny, log_m, jnp.log(v) + lost)
    by_a = nonlinearity.curvature(a, h) * w_u_hat * inverse
    by_log_m = slope * jnp.maximum(m, tiny) * inverse
    return LogSlope(value, slope, by_a, by_log_m)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def sum_log_slopes(
    nonlinearity: Nonlinearity,
    shared: bool,
    a: jax.Array,
    h: jax.Array,
    w_u_hat: jax.Array,
    m: jax.Array,
    log_m: jax.Array,
) -> jax.Array:
    """The sum of :func:`log_slope` over the first axis, with a derivative of its own: it costs half of autodiff's.

    Args:
        nonlinearity: ``h``.
        shared: whether all events share the layers.
        a: ``[K, ...]``.
        h: ``h(a)``.
        w_u_hat, m, log_m: ``[K]`` if shared, else of the shape of ``a``.
    """
    return jnp.sum(_terms(nonlinearity, shared, a, h, w_u_hat, m, log_m).value, 0)


@sum_log_slopes.defjvp
def _sum_log_slopes_jvp(nonlinearity, shared, primals, tangents):
    # By a, on which h depends, and by log m, through which w.u_hat and m depend on the parameters.
    a_dot, *_, log_m_dot = tangents
    terms = _terms(nonlinearity, shared, *primals)
    by_events = jnp.sum(terms.by_a * a_dot, 0)
    if shared:
        by_parameters = jnp.tensordot(log_m_dot, terms.by_log_m, 1, precision=lax.Precision.HIGHEST)
    else:
        by_parameters = jnp.sum(terms.by_log_m * log_m_dot, 0)
    return jnp.sum(terms.value, 0), by_events + by_parameters


def _terms(nonlinearity: Nonlinearity, shared: bool, a: jax.Array, h: jax.Array, *scalars: jax.Array) -> LogSlope:
    return log_slope(nonlinearity, a, h, *(beside_events(x, a[0]) if shared else x for x in scalars))
