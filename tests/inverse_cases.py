"""Flows whose inverse is tested, and what is computed of them."""

import functools

import flow_cases
import jax
import numpy as np
import pytest

from planar_vae_jax import Planar, inverse_planar_flow

each_shape = pytest.mark.parametrize(
    ("dim", "flow_length", "h"), [(1, 4, "tanh"), (2, 3, "tanh"), (16, 9, "tanh"), (2, 3, "softsign")]
)
draws = functools.partial(flow_cases.draws, scales=[0.1, 0.5, 0.8, 1.2])


@functools.cache
def inverse(h: str):
    return jax.jit(functools.partial(inverse_planar_flow, h=h))


@functools.cache
def jacobians(function, h: str, transform):
    """Of both outputs, in all parameters and in the argument."""
    return jax.jit(transform(functools.partial(function, h=h), argnums=(0, 1)))


def amplification(params: Planar) -> float:
    """How much the layers may at most magnify: the product of ``1 + |u||w|``, which bounds each Jacobian."""
    return float(np.prod(1 + np.linalg.norm(params.u, axis=1) * np.linalg.norm(params.w, axis=1)))
