"""The constraint of a planar layer: from any ``u`` to the ``u_hat`` that makes the layer invertible, ``w.u_hat > -1``.

    m = softplus(w.u + c),  c = log(e - 1)        u_hat = u + (m - 1 - w.u) w / |w|^2        w.u_hat = m - 1

(Rezende & Mohamed 2015, appendix A.1, with the shift ``c``.) The shift gives ``m(0) = 1``: a layer with ``u = 0`` is
exactly the identity, and ``|u_hat|`` stays bounded as ``w -> 0``. Without it (the papers' form) ``m(0) - 1 = -0.307``
and ``|u_hat| ~ 0.307 / |w|``.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from planar_vae_jax.flows._xla import kept

# c in m = softplus(w.u + c); chosen so that m = 1 where w.u = 0.
SHIFT = math.log(math.e - 1.0)


class Constrained(NamedTuple):
    """``u_hat`` and what the log-determinant of its layer needs, each to full relative accuracy."""

    u_hat: jax.Array  # [..., D]
    along: jax.Array  # [...], u_hat = u + along * direction, with direction = w * inverse_scale
    inverse_scale: jax.Array  # [...], 1 / max|w|, or 0 where w counts as 0
    w_u_hat: jax.Array  # [...], m - 1 > -1
    m: jax.Array  # [...], > 0 (0 where it underflows)
    log_m: jax.Array  # [...], finite also where m underflows


class Layers(NamedTuple):
    """K layers of one flow and their constraint, which is computed once, outside of every loop over the layers."""

    u: jax.Array  # [K, D]
    w: jax.Array  # [K, D]
    b: jax.Array  # [K]
    constrained: Constrained  # of u and w


def constrain(u: jax.Array, w: jax.Array) -> Constrained:
    """Applies the constraint to layers ``u [..., D]``, ``w [..., D]``.

    Near ``w = 0``, ``|u_hat| <= |u| (1 + 1/e)``. At ``w = 0`` the correction has no limit, as it depends on the
    direction. Where ``max|w|`` is at most ``tiny / eps`` of the dtype (1e-31 in float32), ``w`` counts as 0:
    ``u_hat = u``, and the gradient of ``u_hat`` is the identity in ``u`` and zero in ``w``.
    """
    # If w is a compile-time constant, XLA would turn (w * scale)^2 into w^2 * scale^2, which under- or overflows.
    w = lax.optimization_barrier(w)
    return constrain_scaled(u, w, inverse_scale(w))


def constrain_scaled(u: jax.Array, w: jax.Array, inverse_scale: jax.Array) -> Constrained:
    """The same as :func:`constrain`, for a known :func:`inverse_scale` of ``w``, ``[...]``."""
    w_u_hat, correction, m, log_m = map(kept, _shifted_softplus(kept(jnp.sum(u * w, -1))))
    nonzero = inverse_scale > 0
    direction = w * inverse_scale[..., None]
    norm2 = jnp.where(nonzero, kept(jnp.sum(jnp.square(direction), -1)), 1.0)
    along = kept(jnp.where(nonzero, correction, 0.0) * inverse_scale / norm2)
    return Constrained(u + along[..., None] * direction, along, inverse_scale, w_u_hat, m, log_m)


def unconstrain(u_hat: jax.Array, w: jax.Array) -> jax.Array:
    """Returns the ``u [..., D]`` whose constraint with ``w [..., D]`` is ``u_hat [..., D]``.

    It is not finite if ``w.u_hat <= -1``. With ``q = w.u_hat`` and ``p = w.u``, the inverse of the softplus is
    ``p = log(expm1(1 + q)) - c``, and ``u = u_hat + (p - q) w / |w|^2``. Where ``w`` counts as 0, ``u = u_hat``.
    """
    w = lax.optimization_barrier(w)
    scale = inverse_scale(w)
    nonzero = scale > 0
    direction = w * scale[..., None]
    norm2 = jnp.where(nonzero, jnp.sum(jnp.square(direction), -1), 1.0)
    along = jnp.where(nonzero, _softplus_correction(jnp.sum(w * u_hat, -1)), 0.0) * scale / norm2
    return u_hat + along[..., None] * direction


def _softplus_correction(q: jax.Array) -> jax.Array:
    """``p - q`` for ``p = log(expm1(1 + q)) - c``, elementwise, in three forms that neither cancel nor overflow."""
    near, far = jnp.abs(q) < 0.5, q >= 0.5
    middle = jnp.where(near, q, 0.0)
    # expm1(1 + q) = (e - 1) (1 + expm1(q) e / (e - 1)), and p is of the order of q near 0.
    around_0 = jnp.log1p(jnp.expm1(middle) * (math.e / (math.e - 1.0))) - middle
    m = 1.0 + q
    large = jnp.log1p(-jnp.exp(-jnp.where(far, m, 1.0))) + (1.0 - SHIFT)  # log(expm1(m)) - m, and m - q = 1
    small = jnp.log(jnp.expm1(jnp.where(near | far, 1.0, m))) - SHIFT - q
    return jnp.where(near, around_0, jnp.where(far, large, small))


@jax.custom_jvp
def _shifted_softplus(p: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Computes ``(m - 1, m - 1 - p, m, log m)`` for ``m = softplus(p + c)``, elementwise.

    All four come from one exponential and one logarithm. With ``x = exp(-|p|) (e - 1)^(-sign p)``:

        m = log1p(x)                    for p <= -1/2        m - 1 = log1p((1 - 1/e) expm1(p))   for -1/2 < p < 0
        m - 1 - p = c - 1 + log1p(x)    for p >= 1/2         m - 1 - p = log1p(expm1(-p) / e)    for 0 <= p < 1/2

    The formulas on the left cancel near ``p = 0``. There accuracy matters, as ``m - 1 - p`` is divided by ``|w|``.
    """
    positive = p >= 0
    x = _ratio(p, positive)
    minus = jnp.where(positive, -p, p)
    near = minus > -0.5
    log = jnp.log1p(jnp.where(near, jnp.expm1(minus) * jnp.where(positive, 1.0 / math.e, 1.0 - 1.0 / math.e), x))
    gap = jnp.where(near, log, log + (SHIFT - 1.0))  # of a positive p
    below = jnp.where(near, log, log - 1.0)
    w_u_hat = jnp.where(positive, p + gap, below)
    m = jnp.where(positive, 1.0 + (p + gap), jnp.where(near, 1.0 + log, log))
    deep = _deep(x, positive)
    log_m = jnp.where(deep, p + SHIFT, jnp.log(jnp.where(deep, 1.0, m)))
    return w_u_hat, jnp.where(positive, gap, below - p), m, log_m


@_shifted_softplus.defjvp
def _shifted_softplus_jvp(primals, tangents):
    (p,), (p_dot,) = primals, tangents
    found = _shifted_softplus(p)
    positive = p >= 0
    x = _ratio(p, positive)
    by_p = kept(jnp.where(positive, 1.0, x) / (1.0 + x))  # dm/dp = sigmoid(p + c)
    deep = _deep(x, positive)
    log_by_p = kept(jnp.where(deep, 1.0, by_p / jnp.where(deep, 1.0, found[2])))
    return found, (by_p * p_dot, (by_p - 1.0) * p_dot, by_p * p_dot, log_by_p * p_dot)


def _ratio(p: jax.Array, positive: jax.Array) -> jax.Array:
    """``exp(p + c)`` below 0 and ``exp(-p - c)`` above."""
    return jnp.exp(jnp.where(positive, -p, p)) * jnp.where(positive, 1.0 / (math.e - 1.0), math.e - 1.0)


def _deep(x: jax.Array, positive: jax.Array) -> jax.Array:
    """True where ``log softplus(p + c)`` rounds to ``p + c``, long before ``m`` underflows."""
    return ~positive & (x < jnp.finfo(x.dtype).eps)


def inverse_scale(w: jax.Array) -> jax.Array:
    """``1 / max|w|`` for ``w [..., D]``, or 0 where ``w`` counts as 0: ``[...]``.

    ``w / |w|^2`` is computed from ``w / max|w|``, so that ``|w|^2`` neither under- nor overflows. The quotient does not
    depend on this scale, so no gradient passes through it.
    """
    scale = jnp.max(jnp.abs(lax.stop_gradient(w)), -1)
    finfo = jnp.finfo(w.dtype)
    nonzero = scale > finfo.tiny / finfo.eps
    largest = 1.0 / float(finfo.tiny)  # whose inverse does not underflow
    return jnp.where(nonzero, 1.0 / jnp.minimum(jnp.where(nonzero, scale, 1.0), largest), 0.0)
