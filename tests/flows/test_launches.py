"""What a flow computes where launches of kernels are dear (on a GPU): the layer scan's map, in few steps."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_trees_close, draw

from planar_vae_jax import Planar, planar_flow
from planar_vae_jax.flows import _launches as launches
from planar_vae_jax.flows import _scan as layer_scan

CASES = [  # D, K, leading axes of the parameters; of 3 events
    (6, 7, (3,)),  # amortised: the Gram form
    (2, 7, ()),  # each coordinate by itself, three layers written out
    (2, 7, (3,)),
]


@pytest.fixture
def gpu(monkeypatch, traced_anew):
    """As on a GPU, but for the device."""
    monkeypatch.setattr(launches, "are_dear", lambda: True)


def a_case(dim, flow_length, flows):
    """Parameters and events."""
    layers = [draw(dim, flow_length, scale=0.7, seed=seed)[0] for seed in range(int(np.prod(flows)))]
    params = jax.tree.map(lambda *leaves: np.reshape(leaves, (*flows, *leaves[0].shape)), *layers)
    return params, np.random.default_rng(0).normal(size=(3, dim))


def objective(params, z0, method=None):
    zK, log_det = planar_flow(params, z0, method=method)
    weights = np.cos(np.arange(zK.size)).reshape(zK.shape)
    return jnp.sum(weights * zK) + 1.5 * jnp.sum(log_det), (zK, log_det)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gpu_has_the_values_and_gradients_of_the_layer_scan(case, request, monkeypatch, x64):
    found = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True), static_argnames="method")
    expected = found(*a_case(*case), method="scan")
    monkeypatch.setattr(layer_scan, "UNROLL", 3)
    request.getfixturevalue("gpu")
    assert_trees_close(found(*a_case(*case)), expected, tolerance=1e-13)


def loops(dim, flow_length, flows):
    """The number of steps of each scan in a gradient."""
    shapes = ((*flows, flow_length, dim), (*flows, flow_length, dim), (*flows, flow_length), (9, dim))
    *params, z0 = (jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes)
    text = str(jax.make_jaxpr(jax.grad(lambda *args: objective(*args)[0]))(Planar(*params), z0))
    found = re.findall(r"\blength=(\d+).*?\bunroll=(\d+)", text, re.DOTALL)
    return {-(-int(length) // int(unroll)) for length, unroll in found}


@pytest.mark.parametrize(
    ("dim", "flow_length", "flows", "steps"),
    [
        (40, 8, (), set()),
        (40, 80, (), {10}),
        (40, 160, (9,), {20}),
        (40, 161, (9,), {161}),  # K > 4 D: the amortised scan
        (2, 80, (), {10}),
        (2, 80, (9,), {10}),
    ],
)
def test_a_gpu_takes_a_step_for_eight_layers(dim, flow_length, flows, steps, gpu):
    assert loops(dim, flow_length, flows) == steps
