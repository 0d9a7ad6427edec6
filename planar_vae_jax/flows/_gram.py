"""K planar layers as a recursion over K scalars: the Gram form.

``z_k = z_0 + sum_{j<=k} h_j u_hat_j``, so the pre-activations of an event solve, with ``L[k, j] = w_k.u_hat_j``,

    a_k = r_k + sum_{j<k} L[k, j] h_j      r_k = w_k.z_0 + b_k      h_k = h(a_k)      z_K = z_0 + sum_k h_k u_hat_k

All arithmetic on vectors of size D is in three matrix products. The recursion costs O(K) a layer and event, and reverse
mode keeps two scalars a layer and event (reverse mode over reverse mode keeps K^2 / 8 an event, which is what the layer
scan keeps at K = 8 D). The derivative of the recursion is the same recursion, made linear:

    a_dot_k = (r_dot + L_dot h)_k + sum_{j<k} L[k, j] h_dot_j      h_dot_k = h'(a_k) a_dot_k

This is the only rule of a ``custom_jvp``; JAX transposes it for reverse mode and differentiates it again.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from planar_vae_jax.flows._constraint import Layers
from planar_vae_jax.flows._log_slope import log_det
from planar_vae_jax.flows._xla import beside_events, full_like, recomputed
from planar_vae_jax.flows.nonlinearities import Nonlinearity

# TPUs and GPUs round matrix products to fewer bits by default, and a log-determinant must belong to its map.
PRECISION = lax.Precision.HIGHEST

# So many layers are written out in elementwise operations; a matrix product carries their values to later layers.
# XLA makes a kernel or two of a block. Larger blocks take long to compile, smaller ones need more products
# (BUILD_NOTES.md).
BLOCK = 8


def gram_layers(nonlinearity: Nonlinearity, layers: Layers, z0: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sends events ``z0 [..., D]`` through K >= 1 layers that they share: ``(zK [..., D], log_det [...])``."""
    u_hat = layers.constrained.u_hat
    r = _dot(layers.w, z0, (1, -1)) + beside_events(layers.b, z0[..., 0])
    a, h = _recursion(nonlinearity, r, jnp.tril(_dot(layers.w, u_hat, (1, 1)), -1))
    return z0 + _dot(h, u_hat, (0, 0)), log_det(nonlinearity, a, h, layers)


def _dot(x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
    return jnp.tensordot(x, y, axes=axes, precision=PRECISION)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _recursion(nonlinearity: Nonlinearity, r: jax.Array, L: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``(a, h)``, both ``[K, ...]``, for ``r [K, ...]`` and ``L [K, K]`` strictly lower triangular."""
    return _substitute(nonlinearity.value, r, L)


@_recursion.defjvp
def _recursion_jvp(nonlinearity, primals, tangents):
    (r, L), (r_dot, L_dot) = primals, tangents
    a, h = _recursion(nonlinearity, r, L)
    slope, _ = nonlinearity.slopes(a, h)
    rhs = r_dot + _dot(jnp.tril(L_dot, -1), h, (1, 0))

    def linear(rhs: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _substitute(lambda a_dot, slope: slope * a_dot, rhs, L, slope)

    # A linear function is its own derivative. JAX 0.7 transposes loops only if they come from a jvp.
    return (a, h), jax.jvp(linear, (full_like(a, 0.0),), (rhs,))[1]


Layer = Callable[..., jax.Array]  # (total [...], then what each layer takes besides, [...]) -> value [...]


def _substitute(layer: Layer, r: jax.Array, L: jax.Array, *own: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Solves ``total_k = r_k + sum_{j<k} L[k, j] value_j`` with ``value_k = layer(total_k, own_k)``, layer by layer.

    Args:
        layer: elementwise.
        r: ``[K, ...]``.
        L: ``[K, K]``, strictly lower triangular.
        own: further arguments of ``layer``, each ``[K, ...]``.

    Returns:
        ``(total, value)``, both ``[K, ...]``.
    """
    if len(r) > BLOCK:
        return _substitute_in_blocks(layer, r, L, *own)
    totals: list[jax.Array] = []
    values: list[jax.Array] = []
    for r_k, row, *own_k in zip(*map(jnp.unstack, (r, L, *own)), strict=True):
        terms = [entry * value for entry, value in zip(jnp.unstack(row), values, strict=False)]
        totals.append(functools.reduce(jnp.add, terms, r_k))
        values.append(layer(totals[-1], *own_k))
    return jnp.stack(totals), jnp.stack(values)


def _substitute_in_blocks(layer: Layer, r: jax.Array, L: jax.Array, *own: jax.Array) -> tuple[jax.Array, jax.Array]:
    """:func:`_substitute` by a scan over blocks of equal size, of which the last is padded."""
    size = len(r)
    count = -(-size // BLOCK)
    width = -(-size // count)
    padding = count * width - size

    def padded(leaf: jax.Array) -> jax.Array:
        return jnp.pad(leaf, [(0, padding)] + [(0, 0)] * (leaf.ndim - 1))

    def blocks(leaf: jax.Array) -> jax.Array:
        return padded(leaf).reshape(count, width, *leaf.shape[1:])

    @recomputed  # r, L and own are all that reverse mode needs of a block
    def step(values: jax.Array, block: Any) -> tuple[jax.Array, jax.Array]:
        r, start, rows, *own = block
        within = lax.dynamic_slice_in_dim(rows, start, width, axis=1)
        r = r + _dot(rows, values, (1, 0))  # values of this block and of later ones are still 0
        total, value = _substitute(layer, r, within, *own)
        return lax.dynamic_update_slice_in_dim(values, value, start, axis=0), total

    values = padded(full_like(own[0] if own else r, 0.0))
    rows = blocks(jnp.pad(L, [(0, 0), (0, padding)]))
    starts = jnp.arange(count, dtype=jnp.uint32) * width
    values, totals = lax.scan(step, values, (blocks(r), starts, rows, *map(blocks, own)))
    return totals.reshape(count * width, *r.shape[1:])[:size], values[:size]
