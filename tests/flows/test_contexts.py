"""One table: the flow and its derivatives in each of JAX's contexts, against a plain Python loop over layers."""

import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_close, draw

from planar_vae_jax import Planar, PlanarFlow, inverse_planar_flow, planar_flow


def loop(params, z):
    """The map of one event, layer by layer, without rules of its own."""
    total = 0.0
    for u, w, b in zip(*params, strict=True):
        p = jnp.dot(w, u)
        m = jax.nn.softplus(p + math.log(math.e - 1))
        h = jnp.tanh(jnp.dot(w, z) + b)
        z = z + (u + (m - 1 - p) * w / jnp.dot(w, w)) * h
        total = total + jnp.log(1 + (1 - h * h) * (m - 1))
    return z, total


def mean_loss(flow, params, z):
    z, log_det = flow(params, z)
    return jnp.mean(jnp.sum(z**2, -1) - log_det)


CONTEXTS = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda p, z: jax.lax.scan(lambda c, x: (c + f(p, x), None), jnp.zeros(()), z[None])[0],
    "cond": lambda f: lambda p, z: jax.lax.cond(p.b[0] < 1e9, f, lambda p, z: jnp.zeros(()), p, z),
    "map": lambda f: lambda p, z: jax.lax.map(lambda x: f(p, x), z[None])[0],
    "vmap": lambda f: lambda p, z: jax.vmap(f, (None, 0))(p, z[None])[0],
}
ONE = jax.vmap(planar_flow, (None, 0))


def each_order(function, params, z):
    """Value, gradient, Hessian times ones (forward over reverse) and the gradient of the gradient's square."""

    @jax.jit
    def run(params, z):
        ones = jax.tree.map(jnp.ones_like, params)

        def square(params):
            value, gradient = jax.value_and_grad(function)(params, z)
            return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient)), (value, gradient)

        (_, first), by_square = jax.value_and_grad(square, has_aux=True)(params)
        product = jax.jvp(lambda params: jax.grad(function)(params, z), (params,), (ones,))[1]
        return *first, product, by_square

    return run(params, z)


def problem(size):
    """K layers and as many events: with K equal to the batch, second derivatives were once wrong."""
    params, _ = draw(6, size, scale=0.7)
    return params, np.random.default_rng(0).normal(size=(size, 6))


MANY = 9  # layers: two blocks of the Gram form, of which the last is padded
FEW = 3


@functools.cache
def truth():
    return each_order(functools.partial(mean_loss, jax.vmap(loop, (None, 0))), *problem(MANY))


@pytest.mark.parametrize(("context", "flow"), [*((context, planar_flow) for context in CONTEXTS), ("scan", ONE)])
def test_every_order_in_every_context_is_that_of_a_loop_over_layers(context, flow, x64):
    function = CONTEXTS[context](functools.partial(mean_loss, flow))
    assert_trees_close(each_order(function, *problem(MANY)), truth(), tolerance=1e-11)


@functools.cache
def inverse_truth():
    """By forward mode alone, which always takes the rules; test_inverse_derivatives.py has it against autodiff."""
    params, z = problem(FEW)
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    @jax.jit
    def run(flat):
        def value(flat):
            return mean_loss(inverse_planar_flow, unravel(flat), z)

        def gradient(flat):
            found = jax.jacfwd(value)(flat)
            return found, found

        hessian, found = jax.jacfwd(gradient, has_aux=True)(flat)
        return value(flat), found, hessian

    value, gradient, hessian = map(np.asarray, run(flat))
    return value, *map(unravel, (gradient, np.sum(hessian, axis=1), 2 * hessian @ gradient))


@pytest.mark.parametrize("context", ["jit", "checkpoint", "scan"])
def test_every_order_of_the_inverse_in_every_context(context, x64):
    function = CONTEXTS[context](functools.partial(mean_loss, inverse_planar_flow))
    assert_trees_close(each_order(function, *problem(FEW)), inverse_truth(), tolerance=1e-11)


@functools.cache
def on_eight_devices():
    """What ``device_cases.py`` prints: a case -> its largest error, or what happened."""
    script = Path(__file__).parents[1] / "device_cases.py"
    environment = os.environ | {"PYTHONPATH": str(script.parents[1])}
    run = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=True, timeout=600, env=environment
    )
    return dict(line.split(": ", 1) for line in run.stdout.splitlines())


@pytest.mark.parametrize("context", ["shard_map", "Explicit mesh", "Auto mesh"])
def test_sharded_batches_have_the_values_and_gradients_of_one_device(context):
    found = {case: error for case, error in on_eight_devices().items() if case.endswith(context)}
    assert len(found) == {"shard_map": 4, "Explicit mesh": 5, "Auto mesh": 1}[context]
    for case, error in found.items():
        assert error[0].isdigit(), f"{case}: {error}"
        assert float(error) < 1e-5, case


@pytest.mark.parametrize(("flow", "dim"), [(planar_flow, 2), (planar_flow, 6), (inverse_planar_flow, 6)])
def test_a_flow_can_be_exported_with_a_symbolic_batch(flow, dim):
    params, _ = draw(dim, 9, dtype=np.float32)
    (size,) = jax.export.symbolic_shape("b")
    batch = jax.ShapeDtypeStruct((size, dim), np.float32)
    exported = jax.export.export(jax.jit(flow))(params, batch)
    z = np.random.default_rng(0).normal(size=(5, dim)).astype(np.float32)
    assert_trees_close(exported.call(params, z), flow(params, z), tolerance=1e-6)


def test_amortised_flows_can_be_exported_with_a_symbolic_batch():
    (size,) = jax.export.symbolic_shape("b")
    shapes = ((size, 3, 6), (size, 3, 6), (size, 3))
    params = Planar(*(jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes))
    exported = jax.export.export(jax.jit(planar_flow))(params, jax.ShapeDtypeStruct((size, 6), np.float32))
    rng = np.random.default_rng(0)
    params = Planar(*(rng.normal(size=(5, *shape[1:])).astype(np.float32) for shape in shapes))
    z = rng.normal(size=(5, 6)).astype(np.float32)
    assert_trees_close(exported.call(params, z), planar_flow(params, z), tolerance=1e-6)


@pytest.mark.parametrize("dim", [2, 6])
def test_nothing_of_our_own_making_is_nan(dim):
    params, z = draw(dim, 3, dtype=np.float32)
    params.w[1] = 0.0
    with jax.debug_nans(True):
        flow = PlanarFlow(params)
        value, gradient = jax.jit(jax.value_and_grad(lambda flow: flow.log_prob(z)))(flow)
        zK, log_prob = flow.sample_and_log_prob(jax.random.key(0), (4,))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((value, gradient, zK, log_prob)))
