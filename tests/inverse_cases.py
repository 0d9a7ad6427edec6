"""Flows whose inverse is tested, and what is computed of them."""

import functools

import jax
import numpy as np
import pytest
from conftest import draw
from exact import EXACT_NONLINEARITIES, exact_flow, exactly, from_exact, to_exact

from planar_vae_jax import Planar, inverse_planar_flow, planar_flow

each_h = pytest.mark.parametrize("h", sorted(EXACT_NONLINEARITIES))
each_shape = pytest.mark.parametrize(
    ("dim", "flow_length", "h"), [(1, 4, "tanh"), (2, 3, "tanh"), (16, 9, "tanh"), (2, 3, "softsign")]
)
SCALES = [0.1, 0.5, 0.8, 1.2]  # scale^2 is the order of w.u


def draws(dim, flow_length, dtype=np.float64):
    return [draw(dim, flow_length, scale=scale, seed=seed, dtype=dtype) for seed, scale in enumerate(SCALES)]


@functools.cache
def forward(h: str):
    return jax.jit(functools.partial(planar_flow, h=h, method="scan"))


@functools.cache
def inverse(h: str):
    return jax.jit(functools.partial(inverse_planar_flow, h=h))


@functools.cache
def jacobians(function, h: str, transform):
    """Of both outputs, in all parameters and in the argument."""
    return jax.jit(transform(functools.partial(function, h=h), argnums=(0, 1)))


@exactly
def exact_forward(params: Planar, z0, h: str):
    zK, log_det = exact_flow(*(to_exact(leaf) for leaf in params), to_exact(z0), h)
    return from_exact(zK), float(log_det)


def amplification(params: Planar) -> float:
    """How much the layers may at most magnify: the product of ``1 + |u||w|``, which bounds each Jacobian."""
    return float(np.prod(1 + np.linalg.norm(params.u, axis=1) * np.linalg.norm(params.w, axis=1)))
