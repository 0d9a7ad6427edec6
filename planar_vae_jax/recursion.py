"""The recursion ``a_k = r_k + sum_{j<k} L[k, j] h(a_j)`` over K scalars: a planar flow in its Gram form.

K steps that depend on each other are slow wherever a step is small. Here they are taken eight at a time: inside a
block the steps are written out, and a finished block reaches all later ones by one product with a matrix. One scan over
blocks, so that compile time does not grow with K.

The derivative is the same recursion made linear, ``x_k = r_k + sum_{j<k} L[k, j] h'(a_j) x_j``, and its transpose runs
from the last layer to the first. Both are written here, so reverse mode saves ``a [K]`` of each event and nothing
of what the blocks did in between.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from planar_vae_jax.nonlinearities import Nonlinearity

# TPUs and GPUs round matrix products to fewer bits by default; a log-det must belong to its map.
PRECISION = lax.Precision.HIGHEST

# Steps written out: 4, 16 and 32 are slower on CPU, and 32 takes seconds to compile (BUILD_NOTES.md).
BLOCK = 8


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def preactivations(nonlinearity: Nonlinearity, r: jax.Array, L: jax.Array) -> jax.Array:
    """Solves ``a_k = r_k + sum_{j<k} L[k, j] h(a_j)``.

    Args:
        nonlinearity: ``h``.
        r: ``[K]``.
        L: ``[K, K]``; what stands on its diagonal and above is not read.

    Returns:
        ``a [K]``.
    """
    return _run(lambda _, a: nonlinearity.value(a), (), r, L)[0]


@preactivations.defjvp
def _preactivations_jvp(nonlinearity, primals, tangents):
    (r, L), (r_dot, L_dot) = primals, tangents
    a = preactivations(nonlinearity, r, L)
    slope, _ = nonlinearity.slopes(a)
    lower = jnp.tril(L, -1)

    def matrix(x):
        return x - jnp.dot(lower, slope * x, precision=PRECISION)

    def solve(_, b):
        return _run(lambda slope, x: slope * x, slope, b, L)[0]

    def transposed_solve(_, b):
        # y_k = b_k + slope_k sum_{j>k} L[j, k] y_j: the recursion of L^T from the last step to the first.
        given = (b[::-1], slope[::-1])
        _, y = _run(lambda given, total: given[0] + given[1] * total, given, jnp.zeros_like(b), L.T[::-1, ::-1])
        return y[::-1]

    b = r_dot + jnp.dot(jnp.tril(L_dot, -1), nonlinearity.value(a), precision=PRECISION)
    return a, lax.custom_linear_solve(matrix, b, solve, transposed_solve)


def _run(
    activation: Callable[[Any, jax.Array], jax.Array], given: Any, r: jax.Array, L: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """``total_k = r_k + sum_{j<k} L[k, j] value_j`` and ``value_k = activation(given_k, total_k)``, both ``[K]``."""
    size = r.shape[0]
    if size <= BLOCK:
        return _run_block(activation, given, r, L)
    blocks = -(-size // BLOCK)
    padding = blocks * BLOCK - size
    r = jnp.pad(r, (0, padding))
    L = jnp.pad(L, (0, padding))
    given = jax.tree.map(lambda leaf: jnp.pad(leaf, (0, padding)).reshape(blocks, BLOCK), given)
    # Of each block: how it acts within itself [BLOCK, BLOCK], and its columns [BLOCK, K].
    columns = L.reshape(-1, blocks, BLOCK).transpose(1, 2, 0)
    index = jnp.arange(blocks)
    within = L.reshape(blocks, BLOCK, blocks, BLOCK)[index, :, index, :]

    def step(total: jax.Array, block: Any) -> tuple[jax.Array, Any]:
        index, given, within, columns = block
        here = lax.dynamic_slice_in_dim(total, index * BLOCK, BLOCK)
        here, values = _run_block(activation, given, here, within)
        # Blocks up to this one are changed too, but not read again.
        return total + jnp.dot(values, columns, precision=PRECISION), (here, values)

    _, (totals, values) = lax.scan(step, r, (index, given, within, columns))
    return totals.reshape(-1)[:size], values.reshape(-1)[:size]


def _run_block(
    activation: Callable[[Any, jax.Array], jax.Array], given: Any, r: jax.Array, L: jax.Array
) -> tuple[jax.Array, jax.Array]:
    totals: list[jax.Array] = []
    values: list[jax.Array] = []
    for k in range(r.shape[0]):
        total = r[k]
        for j in range(k):
            total = total + L[k, j] * values[j]
        totals.append(total)
        values.append(activation(jax.tree.map(lambda leaf, k=k: leaf[k], given), total))
    if not totals:
        return r, r
    return jnp.stack(totals), jnp.stack(values)
