"""The scalar equation of a planar layer's inverse: ``a + (m - 1) h(a) = y`` for ``a``."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from planar_vae_jax.flows.nonlinearities import Nonlinearity

# Measured over m in [1e-300, 1e6] and |y| in [1e-300, 1e6]: see tests/test_inverse_root.py, which counts them.
MAX_ITERATIONS = 32


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def solve_preactivation(nonlinearity: Nonlinearity, y: jax.Array, m: jax.Array) -> jax.Array:
    """Solves ``a + (m - 1) h(a) = y`` for ``a``, elementwise; ``m >= 0``.

    Written ``F(a) = (a - h(a)) + m h(a) - |y|`` for ``a >= 0`` (``h`` is odd): a sum of non-negative terms again,
    each to full relative accuracy, so the root is good to an ulp or two even where ``m`` is tiny.

    ``F`` is increasing; concave for ``m >= 1``, convex for ``m <= 1``. Newton's method from the left end of the
    bracket, or from the right one, therefore approaches the root from one side and never crosses it: it stops when
    rounding ends the progress. Clipping to the bracket is a safeguard.

    Derivatives are those of the implicit function; none runs through the iteration. (Reverse mode through a loop, five
    times over, is beyond it: see :func:`_nothing`.)
    """
    root, _ = newton(nonlinearity, *lax.stop_gradient((y, m)))
    return root + _nothing(nonlinearity, root, y, m)


def _nothing(nonlinearity: Nonlinearity, root: jax.Array, y: jax.Array, m: jax.Array) -> jax.Array:
    """0, with the derivatives that the root has up to the third; ``root`` is taken for a constant.

    The rule below makes no use of it. But in reverse mode through ``lax.scan`` JAX drops the rules of what it saves,
    and a second time over it differentiates that as it stands: two steps of Newton's method from the root, each of
    which doubles the order to which the root of another ``y`` and ``m`` is met.
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
    """The root of :func:`solve_preactivation`, and the number of iterations it took."""
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
    # All of the state made from y, so that it is batched and sharded as y is.
    started = jnp.isfinite(start)
    a, _, iterations = lax.while_loop(unfinished, step, (start, started, started.astype(jnp.int32) * 0))
    return jnp.copysign(a, y), iterations
