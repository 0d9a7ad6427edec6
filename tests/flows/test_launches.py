"""What a flow computes on a GPU, where launches of kernels cost most: the layer scan's map, in fewer steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flow_cases import objective
from helpers import assert_trees_close, draw

from planar_vae_jax import Planar
from planar_vae_jax.flows import _xla

CASES = [  # D, K, leading axes of the parameters; of 3 events
    (6, 7, (3,)),  # amortised: the Gram form
    (2, 11, ()),  # on a plane: eight layers and three
    (2, 11, (3,)),
]


@pytest.fixture
def gpu(monkeypatch):
    """Flows are computed as on a GPU, but on this device."""
    monkeypatch.setattr(_xla, "on_gpu", lambda *arrays: True)


def a_case(dim, flow_length, flows):
    """Parameters and events."""
    layers = [draw(dim, flow_length, scale=0.7, seed=seed)[0] for seed in range(int(np.prod(flows)))]
    params = jax.tree.map(lambda *leaves: np.reshape(leaves, (*flows, *leaves[0].shape)), *layers)
    return params, np.random.default_rng(0).normal(size=(3, dim))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gpu_has_the_values_and_gradients_of_the_layer_scan(case, request, x64):
    def found(method):
        both = jax.value_and_grad(functools.partial(objective, method=method), argnums=(0, 1), has_aux=True)
        return jax.jit(both)(*a_case(*case))

    expected = found("scan")
    request.getfixturevalue("gpu")
    assert_trees_close(found(None), expected, tolerance=1e-13)


# --- What is compiled


def equations(jaxpr):
    """All equations of a program, those inside its loops and calls too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(inner, "jaxpr", inner)  # closed or not
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def steps(dim, flow_length, flows):
    """The number of steps of each scan in a gradient."""
    shapes = ((*flows, flow_length, dim), (*flows, flow_length, dim), (*flows, flow_length), (9, dim))
    *params, z0 = (jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes)
    traced = jax.make_jaxpr(jax.grad(lambda *args: objective(*args)[0]))(Planar(*params), z0)
    scans = [equation.params for equation in equations(traced.jaxpr) if equation.primitive.name == "scan"]
    return {-(-scan["length"] // scan["unroll"]) for scan in scans}


@pytest.mark.parametrize(
    ("dim", "flow_length", "flows", "expected"),
    [
        (40, 8, (), set()),
        (40, 80, (), {10}),
        (40, 160, (9,), {20}),
        (40, 161, (9,), {161}),  # K > 4 D: the amortised scan
        (2, 80, (), {10}),
        (2, 80, (9,), {10}),
    ],
)
def test_a_gpu_takes_a_step_for_eight_layers(dim, flow_length, flows, expected, gpu):
    assert steps(dim, flow_length, flows) == expected


def test_another_platform_is_another_program_though_the_flow_was_compiled_before(monkeypatch):
    found = {}
    for on_gpu in (False, True, False):
        monkeypatch.setattr(_xla, "on_gpu", lambda *arrays, on_gpu=on_gpu: on_gpu)
        found.setdefault(on_gpu, []).append((steps(2, 24, ()), steps(40, 24, (9,))))
    assert found == {False: [({24}, {24}), ({24}, {24})], True: [({3}, {3})]}


# --- The platform


class On:
    """Stands for an array on a device of a platform."""

    def __init__(self, platform):
        self.platform = platform

    def devices(self):
        return {self}


@pytest.mark.parametrize(
    ("platforms", "default", "expected"),
    [
        (["cpu"], "gpu", False),
        (["gpu", "gpu"], "cpu", True),
        (["gpu", "cpu"], "gpu", False),  # an array that may move, as on the default device, and one that may not
        (["tpu"], "gpu", False),
        ([], "gpu", True),
        ([], "cpu", False),
    ],
    ids=str,
)
def test_the_platform_is_that_of_the_arrays_else_the_default(platforms, default, expected, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: default)
    assert _xla.on_gpu(*map(On, platforms)) == expected


def test_tracers_are_on_the_default_platform_and_constants_beside_them_on_their_own(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    here = jax.devices()[0].platform == "gpu"
    found = []
    constant = jnp.ones(2)

    def trace(x):
        found.extend([_xla.on_gpu(x), _xla.on_gpu(x, constant)])
        return x

    jax.eval_shape(trace, constant)
    assert found == [True, here]
    assert _xla.on_gpu(constant) == here
