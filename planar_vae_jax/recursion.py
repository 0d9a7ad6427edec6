"""K planar layers as a recursion over K scalars, with its derivative: the Gram form.

``z_k = z_0 + sum_{j<=k} h_j u_hat_j``, so the pre-activations of an event solve, with ``L[k, j] = w_k.u_hat_j``,

    a_k = (w_k.z_0 + b_k) + sum_{j<k} L[k, j] h(a_j)        z_K = z_0 + sum_k h(a_k) u_hat_k

The recursion costs O(K) a layer through ``L``, and whatever has size D is a product of matrices. For a D of a few it
carries ``z`` instead, a scalar a dimension: O(D) a layer.

The derivative is the same recursion made linear, and its transpose runs from the last layer to the first. Both are
written here instead of being left to autodiff, as a linear system with its transpose (``lax.custom_linear_solve``, so
that forward and reverse mode work, to any order). Reverse mode saves four scalars a layer, and sums over a batch
are products of matrices outside of the recursion.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from planar_vae_jax.batching import batch_last
from planar_vae_jax.log_slope import log_slope
from planar_vae_jax.nonlinearities import Nonlinearity

# TPUs and GPUs round matrix products to fewer bits by default; a log-det must belong to its map.
PRECISION = lax.Precision.HIGHEST

# Layers that are taken one by one before a product of matrices carries them to all later ones (BUILD_NOTES.md).
BLOCK = 16

# Up to this D the recursion carries z (BUILD_NOTES.md).
NARROW = 4

# (parameters of a layer, total) -> (value, anything else that the layer gives), elementwise over a batch.
Layer = Callable[[Any, jax.Array], tuple[jax.Array, Any]]


class Layers(NamedTuple):
    """What the K layers need besides ``z``: computed once, outside every recursion over layers."""

    u_hat: jax.Array  # [K, D]
    w: jax.Array  # [K, D]
    b: jax.Array  # [K]
    w_u_hat: jax.Array  # [K], > -1
    m: jax.Array  # [K], 1 + w.u_hat > 0 (0 where it underflows)
    log_m: jax.Array  # [K], finite also where m underflows


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.dot(x, y, precision=PRECISION)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def gram_layers(nonlinearity: Nonlinearity, z0: jax.Array, layers: Layers) -> tuple[jax.Array, jax.Array]:
    """K layers one after the other: ``(zK [D], log_det [])`` for ``z0 [D]``."""
    zK, log_det, *_ = _forward(nonlinearity, z0, layers)
    return zK, log_det


def _forward(nonlinearity: Nonlinearity, z0: jax.Array, layers: Layers) -> tuple[jax.Array, ...]:
    """``(zK [D], log_det [], h [K], slope [K], by_a [K], by_log_m [K])``, the last three as in ``LogSlope``."""

    def layer(b: jax.Array, total: jax.Array) -> tuple[jax.Array, Any]:
        a = total + b
        return nonlinearity.value(a), a

    def terms(a: jax.Array, layers: Layers) -> tuple[jax.Array, ...]:
        scalars = (jnp.expand_dims(leaf, range(1, a.ndim)) for leaf in (layers.w_u_hat, layers.m, layers.log_m))
        log_v, *rest = log_slope(nonlinearity, a, *scalars)
        return jnp.sum(log_v, 0), *rest

    if z0.size <= NARROW:

        def run_narrow(z0, layers):
            zK, h, a = _carry(layer, layers.b, z0, layers.w, layers.u_hat)
            return zK, h, *terms(a, layers)

        zK, h, log_det, *rest = batch_last(run_narrow, z0, layers)
    else:

        def run(r, shared):
            layers, L = shared
            h, a = _substitute(layer, layers.b, r, L)
            return h, *terms(a, layers)

        h, log_det, *rest = batch_last(run, _dot(layers.w, z0), (layers, _dot(layers.w, layers.u_hat.T)))
        zK = z0 + _dot(h, layers.u_hat)
    return zK, log_det, h, *rest


@gram_layers.defjvp
def _gram_layers_jvp(nonlinearity, primals, tangents):
    (z0, layers), (z0_dot, layers_dot) = primals, tangents
    u_hat, w = layers.u_hat, layers.w
    zK, log_det, h, slope, by_a, by_log_m = _forward(nonlinearity, z0, layers)
    L = jnp.tril(_dot(w, u_hat.T), -1)
    L_dot = jnp.tril(_dot(layers_dot.w, u_hat.T) + _dot(w, layers_dot.u_hat.T), -1)
    r_dot = _dot(layers_dot.w, z0) + _dot(w, z0_dot) + layers_dot.b + _dot(L_dot, h)
    # The unknowns: tangents of a [K], of h [K], and of the log-det as far as it depends on a [].
    given = _tied(r_dot, jnp.zeros_like(r_dot), jnp.zeros_like(log_det))

    def matrix(unknown):
        a, h, log_det = _tied(*unknown)
        return _tied(a - _dot(L, h), h - slope * a, log_det - jnp.sum(by_a * a))

    def solve(_, given):
        def layer(one, a):
            slope, a_given, h_given = one
            a = a + a_given
            return slope * a + h_given, a

        def finish(events, h, a):
            _, by_a, (_, _, log_det_given) = events
            return a, h, jnp.sum(by_a * a, 0) + log_det_given

        return _linear(layer, lambda events: (events[0], *events[2][:2]), finish, (slope, by_a, given), w, u_hat)

    def transposed_solve(_, given):
        # a_bar_k = a_given_k + by_a_k log_det_bar + slope_k h_bar_k, h_bar_k = h_given_k + sum_{j>k} L[j, k] a_bar_j:
        # the same from the last layer to the first, with w and u_hat exchanged.
        def layer(one, h):
            slope, a_given, h_given = one
            h = h + h_given
            return slope * h + a_given, h

        def start(events):
            slope, by_a, (a_given, h_given, log_det_given) = events
            return slope[::-1], (a_given + by_a * log_det_given[None])[::-1], h_given[::-1]

        def finish(events, a, h):
            return a[::-1], h[::-1], events[2][2]

        return _linear(layer, start, finish, (slope, by_a, given), u_hat[::-1], w[::-1])

    _, h_dot, log_det_dot = _tied(*lax.custom_linear_solve(matrix, given, solve, transposed_solve))
    zK_dot = z0_dot + _dot(h_dot, u_hat) + _dot(h, layers_dot.u_hat)
    return (zK, log_det), (zK_dot, log_det_dot + _dot(by_log_m, layers_dot.log_m))


def _tied(*leaves: jax.Array) -> tuple[jax.Array, ...]:
    """The same values, each of them (in name) a linear function of all of them.

    ``lax.custom_linear_solve`` has no transpose where a part of what it is given, or of the cotangent of what it
    returns, is a constant. Compiled, nothing of this is left.
    """
    link = functools.reduce(jnp.add, [jnp.sum(leaf) for leaf in leaves])
    return tuple(jnp.where(jnp.zeros_like(leaf, bool), link, leaf) for leaf in leaves)


def _linear(layer: Layer, start: Any, finish: Any, events: Any, w: jax.Array, u: jax.Array) -> Any:
    """``finish(events, value, out)`` of the recursion with ``L = w u^T`` over ``layers = start(events)``."""
    if w.shape[1] <= NARROW:

        def run_narrow(events, shared):
            w, u = shared
            layers = start(events)
            zeros = jnp.zeros((w.shape[1], *layers[0].shape[1:]), w.dtype)
            _, value, out = _carry(layer, layers, zeros, w, u)
            return finish(events, value, out)

        return batch_last(run_narrow, events, (w, u))

    def run(events, L):
        layers = start(events)
        return finish(events, *_substitute(layer, layers, jnp.zeros_like(layers[0]), L))

    return batch_last(run, events, _dot(w, u.T))


def _carry(layer: Layer, layers: Any, start: jax.Array, w: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
    """``total_k = w_k.y_k`` with ``y_k = start + sum_{j<k} value_j u_j`` carried along.

    Args:
        start: ``[D, *batch]``.

    Returns:
        ``(y_K [D, *batch], value [K, *batch], out)``.
    """

    def step(y: list[jax.Array], one: Any) -> tuple[list[jax.Array], Any]:
        layers, w, u = one
        # Scalars, each a vector over the batch: there is no product of matrices worth the name.
        total = functools.reduce(jnp.add, [w_d * y_d for w_d, y_d in zip(w, y, strict=True)])
        value, out = layer(layers, total)
        return [y_d + value * u_d for y_d, u_d in zip(y, u, strict=True)], (value, out)

    y, (value, out) = lax.scan(step, list(start), (layers, w, u))
    return jnp.stack(y), value, out


def _substitute(layer: Layer, layers: Any, r: jax.Array, L: jax.Array) -> tuple[jax.Array, Any]:
    """``total_k = r_k + sum_{j<k} L[k, j] value_j`` and ``value_k, out_k = layer(layers_k, total_k)``.

    Args:
        layers: leaves ``[K, ...]``.
        r: ``[K, *batch]``.
        L: ``[K, K]``; what stands on its diagonal and above is not read.

    Returns:
        ``(value [K, *batch], out)``.
    """
    L = jnp.tril(L, -1)
    size = r.shape[0]
    if size <= BLOCK:
        return _block(layer, layers, r, L)
    count = -(-size // BLOCK)
    width = -(-size // count)
    padding = count * width - size

    def blocks(leaf: jax.Array) -> jax.Array:
        leaf = jnp.pad(leaf, [(0, padding)] + [(0, 0)] * (leaf.ndim - 1))
        return leaf.reshape(count, width, *leaf.shape[1:])

    def step(values: jax.Array, block: Any) -> tuple[jax.Array, Any]:
        start, layers, r, rows = block
        within = lax.dynamic_slice_in_dim(rows, start, width, axis=1)
        here, out = _block(layer, layers, r + _dot_rows(rows, values), within)
        return lax.dynamic_update_slice_in_dim(values, here, start, axis=0), out

    values = jnp.zeros((count * width, *r.shape[1:]), r.dtype)
    rows = blocks(jnp.pad(L, [(0, 0), (0, padding)]))
    values, out = lax.scan(step, values, (jnp.arange(count) * width, jax.tree.map(blocks, layers), blocks(r), rows))
    return values[:size], jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:size], out)


def _block(layer: Layer, layers: Any, r: jax.Array, L: jax.Array) -> tuple[jax.Array, Any]:
    def step(values: jax.Array, one: Any) -> tuple[jax.Array, Any]:
        k, layers, r, row = one
        value, out = layer(layers, r + _dot_rows(row, values))  # values of this layer and of later ones are still 0
        return lax.dynamic_update_index_in_dim(values, value, k, axis=0), out

    return lax.scan(step, jnp.zeros_like(r), (jnp.arange(r.shape[0]), layers, r, L))


def _dot_rows(rows: jax.Array, values: jax.Array) -> jax.Array:
    """``sum_j rows[..., j] values[j, ...]``."""
    return jnp.tensordot(rows, values, axes=1, precision=PRECISION)
