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

# c in m = softplus(w.u + c); chosen so that m = 1 where w.u = 0.
SHIFT = math.log(math.e - 1.0)


class Constrained(NamedTuple):
    """``u_hat`` and what its layer's log-determinant needs, each to full relative accuracy."""

    u_hat: jax.Array  # [..., D]
    along: jax.Array  # [...], u_hat = u + along * direction, with direction = w * inverse_scale
    inverse_scale: jax.Array  # [...], 1 / max|w|, or 1 where w counts as 0
    w_u_hat: jax.Array  # [...], m - 1 > -1
    m: jax.Array  # [...], > 0 (0 where it underflows)
    log_m: jax.Array  # [...], finite also where m underflows


def constrain(u: jax.Array, w: jax.Array) -> Constrained:
    """The constraint of layers ``u [..., D]``, ``w [..., D]``.

    ``|u_hat| <= |u| (1 + 1/e)`` near ``w = 0``. At ``w = 0`` itself the correction has no limit (it depends on the
    direction). There, which is to say where ``max|w|`` is at most ``tiny / eps`` of the dtype (1e-31 in float32),
    ``u_hat = u``, and the gradient of ``u_hat`` is the identity in ``u`` and zero in ``w``.
    """
    p = jnp.sum(u * w, -1)
    # m - 1 = log1p((1 - 1/e) expm1(p)) = p + log1p(expm1(-p) / e). Each form is used on the side where
    # its exponential cannot overflow; near p = 0 both keep their relative accuracy and give 0 at 0,
    # which softplus(p + c) - 1 - p does not (and it is divided by |w|).
    positive = p >= 0
    above = jnp.where(positive, p, 0.0)  # `where` first: no branch ever sees the other's inputs
    below = jnp.where(positive, 0.0, p)
    gap = jnp.log1p(jnp.expm1(-above) / math.e)
    w_u_hat_below = jnp.log1p((1.0 - 1.0 / math.e) * jnp.expm1(below))
    w_u_hat = jnp.where(positive, above + gap, w_u_hat_below)
    correction = jnp.where(positive, gap, w_u_hat_below - below)  # m - 1 - p

    scaled = (math.e - 1.0) * jnp.exp(below)  # exp(p + c)
    m = jnp.where(positive, 1.0 + above + gap, jnp.log1p(scaled))
    # log softplus(x) -> x as x -> -inf, long before exp(x) underflows.
    deep = scaled < jnp.finfo(p.dtype).eps
    log_m = jnp.where(deep, below + SHIFT, jnp.log(jnp.where(deep, 1.0, m)))

    # Of a w that is a compile-time constant, XLA would turn (w * scale)^2 into w^2 * scale^2.
    w = lax.optimization_barrier(w)
    inverse_scale, nonzero = _inverse_scale(w)
    direction = w * inverse_scale[..., None]
    norm2 = jnp.where(nonzero, jnp.sum(jnp.square(direction), -1), 1.0)
    along = jnp.where(nonzero, correction, 0.0) * inverse_scale / norm2
    return Constrained(u + along[..., None] * direction, along, inverse_scale, w_u_hat, m, log_m)


def _inverse_scale(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``1 / max|w|``, and whether ``w`` counts as different from 0; both ``[...]``.

    ``w / |w|^2`` goes through ``w / max|w|``, so that ``|w|^2`` neither under- nor overflows. The result does not
    depend on the scale, hence no gradient through it.
    """
    scale = jnp.max(jnp.abs(lax.stop_gradient(w)), -1)
    finfo = jnp.finfo(w.dtype)
    nonzero = scale > finfo.tiny / finfo.eps
    largest = 1.0 / float(finfo.tiny)  # whose inverse does not underflow
    return 1.0 / jnp.minimum(jnp.where(nonzero, scale, 1.0), largest), nonzero
