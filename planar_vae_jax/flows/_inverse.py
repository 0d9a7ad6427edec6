"""The scalar equation of a planar layer's inverse: ``a + (m - 1) h(a) = y`` for ``a``."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from planar_vae_jax.flows.nonlinearities import Nonlinearity

# More than ever needed: 17 for m and |y| in [1e-300, 1e6] (tests/flows/test_inverse_root.py).
MAX_ITERATIONS = 32


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def solve_preactivation(nonlinearity: Nonlinearity, y: jax.Array, m: jax.Array) -> jax.Array:
    """Solves ``a + (m - 1) h(a) = y`` for ``a``, elementwise; ``m >= 0``.

    As ``h`` is odd, it is enough to find the root ``a >= 0`` of ``F(a) = (a - h(a)) + m h(a) - |y|``. Its first two
    terms are non-negative and each has full relative accuracy, so the root is good to an ulp or two even where ``m`` is
    tiny.

    ``F`` is increasing; it is concave if ``m >= 1`` and convex if ``m <= 1``. Newton's method from the left end of the
    bracket in the first case, from the right end in the second, approaches the root from one side and never crosses it.
    It stops when rounding ends the progress. Clipping to the bracket is a safeguard.

    Derivatives follow from the implicit function theorem and never pass through the iteration. They are right to any
    order in forward mode and to the fourth order in nested reverse mode, see :func:`_taylor_term`.
    """
    root, _ = newton(nonlinearity, *lax.stop_gradient((y, m)))
    return root + _taylor_term(nonlinearity, root, y, m)


def _taylor_term(nonlinearity: Nonlinearity, root: jax.Array, y: jax.Array, m: jax.Array) -> jax.Array:
    """0, but with the first three derivatives of the root in ``y`` and ``m``; ``root`` counts as a constant.

    Wherever JAX takes the rule below, this term changes nothing. But for reverse mode through ``lax.scan`` JAX
    differentiates the values that the scan saves without their custom rules, so a second reverse mode would see a
    constant root. This term consists of two steps of Newton's method from the root. Each step doubles the order to
    which the result agrees with the root of neighbouring ``y`` and ``m``.
    """
    finite = jnp.isfinite(root)
    a, y = jnp.where(finite, root, 0.0), jnp.where(finite, y, 0.0)
    for _ in range(2):
        residual = nonlinearity.remainder(a) + m * nonlinearity.value(a) - y
        a = a - residual / _derivative(nonlinearity, a, m)
    return a - lax.stop_gradient(a)


@solve_preactivation.defjvp
def _solve_preactivation_jvp(nonlinearity, primals, tangents):
    # Implicit function theorem: v da + h(a) dm = dy with v = dF/da.
    (y, m), (y_dot, m_dot) = primals, tangents
    a = solve_preactivation(nonlinearity, y, m)
    return a, (y_dot - nonlinearity.value(a) * m_dot) / _derivative(nonlinearity, a, m)


def _derivative(nonlinearity: Nonlinearity, a: jax.Array, m: jax.Array) -> jax.Array:
    """``dF/da = (1 - h') + h' m``, at least ``tiny``."""
    slope, complement = nonlinearity.slopes(a, nonlinearity.value(a))
    return jnp.maximum(complement + slope * m, jnp.finfo(a.dtype).tiny)


def newton(nonlinearity: Nonlinearity, y: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The root of :func:`solve_preactivation`, and the number of iterations that it took."""
    tiny = jnp.finfo(y.dtype).tiny
    y, m = jnp.broadcast_arrays(y, m)
    target = jnp.abs(y)
    grows = m >= 1.0
    # a lies between y and y / m (h(a) <= a), and no further from y than (m - 1) sup|h|, sup|h| = 1.
    ratio = target / jnp.maximum(m, tiny)
    low = jnp.where(grows, jnp.maximum(ratio, target - (m - 1.0)), target)
    high = jnp.where(
        grows,
        target,
        jnp.minimum(jnp.minimum(ratio, target + (1.0 - m)), nonlinearity.remainder_inverse(target)),
    )

    def step(state):
        a, progress, iterations = state
        residual = nonlinearity.remainder(a) + m * nonlinearity.value(a) - target
        new = a - residual / _derivative(nonlinearity, a, m)
        new = jnp.where(progress, jnp.clip(new, low, high), a)
        return new, progress & jnp.where(grows, new > a, new < a), iterations + progress.astype(jnp.int32)

    def unfinished(state):
        _, progress, iterations = state
        return jnp.any(progress & (iterations < MAX_ITERATIONS))

    start = jnp.where(grows, low, high)
    # The whole state is made from y, so that it is batched and sharded as y is.
    started = jnp.isfinite(start)
    a, _, iterations = lax.while_loop(unfinished, step, (start, started, started.astype(jnp.int32) * 0))
    return jnp.copysign(a, y), iterations
