"""K planar layers as a recursion over K scalars: the Gram form.

``z_k = z_0 + sum_{j<=k} h_j u_hat_j``, so the pre-activations of an event solve, with ``L[k, j] = w_k.u_hat_j``,

    a_k = r_k + sum_{j<k} L[k, j] h_j      r_k = w_k.z_0 + b_k      h_k = h(a_k)      z_K = z_0 + sum_k h_k u_hat_k

Whatever has size D is a product of matrices; the recursion costs O(K) a layer, and reverse mode keeps two scalars a
layer and event (of reverse mode itself, K^2 / 8 an event: as much as the layer scan does at K = 8 D). Its derivative is
the same recursion, made linear,

    a_dot_k = (r_dot + L_dot h)_k + sum_{j<k} L[k, j] h_dot_j      h_dot_k = h'(a_k) a_dot_k

which is written below as the one rule of a ``custom_jvp``. JAX transposes it, and differentiates it again.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from planar_vae_jax.flows._xla import beside_events, full_like, recomputed
from planar_vae_jax.flows.nonlinearities import Nonlinearity

# TPUs and GPUs round matrix products to fewer bits by default; a log-det must belong to its map.
PRECISION = lax.Precision.HIGHEST

# Layers that are written out before a product of matrices carries them to later ones. XLA makes a kernel or two of so
# many, in little time; more take long to compile, fewer take more products (BUILD_NOTES.md).
BLOCK = 8


def gram_layers(
    nonlinearity: Nonlinearity, u_hat: jax.Array, w: jax.Array, b: jax.Array, z0: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """K layers one after the other, for events ``z0 [..., D]``: ``zK [..., D]``, and ``a`` and ``h(a)``, ``[K, ...]``.

    Args:
        nonlinearity: ``h``.
        u_hat: ``[K, D]``.
        w: ``[K, D]``.
        b: ``[K]``.
        z0: events that share these layers.
    """
    r = _dot(w, z0, (1, -1)) + beside_events(b, z0[..., 0])
    a, h = _recursion(nonlinearity, r, jnp.tril(_dot(w, u_hat, (1, 1)), -1))
    return z0 + _dot(h, u_hat, (0, 0)), (a, h)


def _dot(x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
    return jnp.tensordot(x, y, axes=axes, precision=PRECISION)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _recursion(nonlinearity: Nonlinearity, r: jax.Array, L: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``(a, h)``, both ``[K, ...]``, for ``r [K, ...]`` and ``L [K, K]`` strictly lower triangular."""
    return _substitute(lambda a, _: nonlinearity.value(a), r, L, None)


@_recursion.defjvp
def _recursion_jvp(nonlinearity, primals, tangents):
    (r, L), (r_dot, L_dot) = primals, tangents
    a, h = _recursion(nonlinearity, r, L)
    slope, _ = nonlinearity.slopes(a, h)
    rhs = r_dot + _dot(jnp.tril(L_dot, -1), h, (1, 0))

    def linear(rhs: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _substitute(lambda a_dot, slope: slope * a_dot, rhs, L, slope)

    # A linear function is its own derivative: only as such do older versions (JAX 0.7) transpose its loops.
    return (a, h), jax.jvp(linear, (full_like(a, 0.0),), (rhs,))[1]


Layer = Callable[[jax.Array, Any], jax.Array]  # (total [...], what the layer has of its own) -> value [...]


def _substitute(layer: Layer, r: jax.Array, L: jax.Array, own: Any) -> tuple[jax.Array, jax.Array]:
    """``total_k = r_k + sum_{j<k} L[k, j] value_j`` and ``value_k = layer(total_k, own_k)``; both ``[K, ...]``.

    Args:
        layer: elementwise over a batch.
        r: ``[K, ...]``.
        L: ``[K, K]``, strictly lower triangular.
        own: ``[K, ...]``, or None.
    """
    size = len(r)
    count = -(-size // BLOCK)
    width = -(-size // count)
    if count == 1:
        return _written_out(layer, r, L, own)
    padding = count * width - size

    def padded(leaf: jax.Array) -> jax.Array:
        return jnp.pad(leaf, [(0, padding)] + [(0, 0)] * (leaf.ndim - 1))

    def blocks(leaf: jax.Array) -> jax.Array:
        return padded(leaf).reshape(count, width, *leaf.shape[1:])

    @recomputed  # reverse mode has what it needs of a block in r, L and own
    def step(values: jax.Array, block: Any) -> tuple[jax.Array, jax.Array]:
        r, start, rows, own = block
        within = lax.dynamic_slice_in_dim(rows, start, width, axis=1)
        r = r + _dot(rows, values, (1, 0))  # values of this block and of later ones are still 0
        total, value = _written_out(layer, r, within, own)
        return lax.dynamic_update_slice_in_dim(values, value, start, axis=0), total

    values = padded(full_like(r if own is None else own, 0.0))
    rows = blocks(jnp.pad(L, [(0, 0), (0, padding)]))
    starts = jnp.arange(count, dtype=jnp.uint32) * width
    values, totals = lax.scan(step, values, (blocks(r), starts, rows, jax.tree.map(blocks, own)))
    return totals.reshape(count * width, *r.shape[1:])[:size], values[:size]


def _written_out(layer: Layer, r: jax.Array, L: jax.Array, own: Any) -> tuple[jax.Array, jax.Array]:
    """The same layer by layer, in elementwise operations."""
    totals: list[jax.Array] = []
    values: list[jax.Array] = []
    owns = [None] * len(r) if own is None else jnp.unstack(own)
    for r_k, row, own_k in zip(jnp.unstack(r), jnp.unstack(L), owns, strict=True):
        terms = [entry * value for entry, value in zip(jnp.unstack(row), values, strict=False)]
        totals.append(functools.reduce(jnp.add, terms, r_k))
        values.append(layer(totals[-1], own_k))
    return jnp.stack(totals), jnp.stack(values)
