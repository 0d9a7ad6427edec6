"""Random flows and what the tests of the flow compute of them."""

import functools
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import EXACT_NONLINEARITIES, exact_flow, exactly, from_exact, to_exact
from helpers import draw

from planar_vae_jax import Planar, planar_flow

METHODS = ["scan", "gram"]

# (D, K, h). Few shapes, as each is compiled anew; 11 and 17 layers end inside a block of the Gram recursion.
TABLE = [(1, 4, "tanh"), (2, 3, "tanh"), (16, 17, "tanh"), (2, 3, "softsign"), (3, 11, "softsign")]
# Every shape at every one of these: scale^2 is the order of w.u.
SCALES = [0.1, 0.5, 1.0, 2.0]

each_shape = pytest.mark.parametrize(("dim", "flow_length", "h"), TABLE)
each_method = pytest.mark.parametrize("method", METHODS)
each_h = pytest.mark.parametrize("h", sorted(EXACT_NONLINEARITIES))


def draws(dim, flow_length, dtype=np.float64, *, scales=SCALES):
    return [draw(dim, flow_length, scale=scale, seed=seed, dtype=dtype) for seed, scale in enumerate(scales)]


def objective(params: Planar, z0, *, h: str = "tanh", method: str | None = None):
    """``sum_i cos(i) zK_i + 1.5 log_det``, summed over events, and the outputs; its gradients depend on each output."""
    zK, log_det = planar_flow(params, z0, h=h, method=method)
    weights = np.cos(np.arange(zK.size)).astype(zK.dtype)
    return jnp.vdot(weights, zK) + 1.5 * jnp.sum(log_det), (zK, log_det)


@functools.cache
def compiled_with_gradients(h: str, method: str | None):
    function = functools.partial(objective, h=h, method=method)
    return jax.jit(jax.vmap(jax.value_and_grad(function, argnums=(0, 1), has_aux=True)))


ROWS = 32


def with_gradients(h: str, method: str | None, params: Planar, z0):
    """``((zK, log_det), gradients of the objective in (params, z0))`` of each flow and event of a batch.

    Always ROWS of them at once, so that a shape is compiled once however many there are; or just one.
    """
    size = len(z0)
    chunks = []
    for indices in np.split(np.arange(size), range(ROWS, size, ROWS)):
        rows = indices if size == 1 else np.resize(indices, ROWS)
        chunk = jax.tree.map(lambda leaf, rows=rows: leaf[rows], (params, z0))
        (_, outputs), gradients = compiled_with_gradients(h, method)(*chunk)
        chunks.append((outputs, gradients))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:size], *chunks)


@functools.cache
def with_jacobian(h: str, method: str):
    """For one event: ``(zK, log_det, dzK/dz0)``."""

    def function(params, z0):
        def outputs(z0):
            zK, log_det = planar_flow(params, z0, h=h, method=method)
            return zK, (zK, log_det)

        jacobian, (zK, log_det) = jax.jacfwd(outputs, has_aux=True)(z0)
        return zK, log_det, jacobian

    return jax.jit(function)


@functools.cache
def compiled(h: str, method: str | None):
    return jax.jit(functools.partial(planar_flow, h=h, method=method))


@exactly
def exact_values(params: Planar, z0, h: str):
    zK, log_det = exact_flow(*(to_exact(leaf) for leaf in params), to_exact(z0), h)
    return from_exact(zK), np.float64(log_det)


def exact_objective(leaves, h: str):
    zK, log_det = exact_flow(*leaves, h)
    return np.dot(to_exact(np.cos(np.arange(zK.size))), zK) + Decimal("1.5") * log_det


STEP = Decimal("1e-40")  # of differences in exact arithmetic, which are as exact as that


@exactly
def exact_gradients(params: Planar, z0, h: str):
    """Of :func:`objective`, by differences."""
    leaves = [to_exact(leaf) for leaf in (*params, z0)]
    gradients = [np.zeros(leaf.shape) for leaf in leaves]
    for leaf, gradient in zip(leaves, gradients, strict=True):
        for index in np.ndindex(leaf.shape):
            centre = leaf[index]
            leaf[index] = centre + STEP
            above = exact_objective(leaves, h)
            leaf[index] = centre - STEP
            gradient[index] = float((above - exact_objective(leaves, h)) / (2 * STEP))
            leaf[index] = centre
    return Planar(*gradients[:3]), gradients[3]
