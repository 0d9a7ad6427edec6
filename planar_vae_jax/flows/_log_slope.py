"""The log-determinant of planar layers, ``sum_k log(1 + h'(a_k) w_k.u_hat_k)``, and its derivatives."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from planar_vae_jax.flows._constraint import Layers
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
    """Computes ``log v`` from ``v = (1 - h') + h' m`` with ``m = 1 + w.u_hat``: two non-negative terms.

    Args:
        nonlinearity: ``h``.
        a: pre-activations, any shape.
        h: ``h(a)``.
        w_u_hat: ``m - 1``, to full relative accuracy.
        m: ``> 0``, or 0 where it underflows.
        log_m: ``log m``, finite also where ``m`` underflows.
    """
    slope, complement = nonlinearity.slopes(a, h)
    # Where v may be small it is the sum of two terms, in which nothing cancels. Elsewhere it is 1 + excess, which keeps
    # the relative accuracy of log v near the identity.
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


def log_det(nonlinearity: Nonlinearity, a: jax.Array, h: jax.Array, layers: Layers) -> jax.Array:
    """The log-determinant of K layers that all events share: ``[...]``, for ``a`` and ``h = h(a)`` of ``[K, ...]``."""
    if not len(a):
        return jnp.sum(a, 0)
    constrained = layers.constrained
    return sum_log_slopes(nonlinearity, True, a, h, constrained.w_u_hat, constrained.m, constrained.log_m)


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
    """Sums :func:`log_slope` over the first axis. Its derivative is written out, at half the cost of autodiff's.

    This is a function of ``a`` and ``log_m`` alone: ``h``, ``w_u_hat`` and ``m`` are passed because the caller has
    them already, at full accuracy. The caller must pass ``h = h(a)``, ``m = exp(log_m)`` and ``w_u_hat = m - 1``, each
    *computed from the same variables*, so that their tangents are ``h' a_dot``, ``m log_m_dot`` and ``m log_m_dot``.
    The first derivative takes the tangents of ``a`` and ``log_m`` and ignores the other three, which would count the
    same dependence twice; derivatives of higher order differentiate through all five. So none of the three may be
    varied by itself, nor be a constant (``lax.stop_gradient``) while ``a`` or ``log_m`` is not.

    Args:
        nonlinearity: ``h``.
        shared: whether all events share the layers.
        a: ``[K, ...]``.
        h: ``h(a)``, of the shape of ``a``.
        w_u_hat, m, log_m: ``[K]`` if ``shared``, else of the shape of ``a``.
    """
    return jnp.sum(_terms(nonlinearity, shared, a, h, w_u_hat, m, log_m).value, 0)


@sum_log_slopes.defjvp
def _sum_log_slopes_jvp(nonlinearity, shared, primals, tangents):
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
