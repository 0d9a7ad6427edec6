"""The forward flow at the edges of its parameters and of the dtype."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flow_cases import METHODS, compiled_with_gradients, each_h, each_method, exact_gradients, with_gradients
from helpers import assert_trees_close, draw, stack

from planar_vae_jax import Planar, planar_flow

# --- Edges


def edges(dtype):
    """A batch of three layers each: every combination of a size of w, a size of u or of w.u, and a place of z0."""
    finfo = np.finfo(dtype)
    threshold = finfo.tiny / finfo.eps
    sizes = [0, finfo.smallest_subnormal, finfo.tiny, threshold, 2 * threshold, 1e3 * threshold, 1e-20, 1e-6]
    layers = []
    for size in sizes:
        for u in ([0.0, 0.0], [0.1, -0.3], [200.0, 200.0]):
            layers += [(u, [size, -size / 2]), (u, [0.0, size])]
    for p in (-200, -100, -88, -87.5, -50, -16, 50, 100, 200):
        layers += [([p, 0.0], [1.0, 0.0]), ([p / 2, p / 2], [1.0, 1.0]), ([p / 10, 3.0], [10.0, 0.0])]
    layers += [([0.0, 0.0], [1.0, -2.0]), ([1.0, 2.0], [0.0, 0.0])]
    size = len(layers)
    triples = [(layers[i], layers[(7 * i + 3) % size], layers[(11 * i + 5) % size]) for i in range(size)]
    events = [[0.0, 0.0], [1e-20, 0.0], [1e-4, -1e-4], [1.0, -0.5], [80.0, 30.0]]
    rows = [(triple, b, z) for triple in triples for b in (0.0, 0.7) for z in events]
    u = np.array([[layer[0] for layer in triple] for triple, _, _ in rows], dtype)
    w = np.array([[layer[1] for layer in triple] for triple, _, _ in rows], dtype)
    b = np.array([[b, -b, 2 * b] for _, b, _ in rows], dtype)
    return Planar(u, w, b), np.array([z for _, _, z in rows], dtype)


@each_method
@each_h
def test_values_and_gradients_are_finite_at_the_edges(h, method, dtype):
    params, z0 = edges(dtype)
    assert len(z0) > 500
    finite = np.ones(len(z0), bool)
    for leaf in jax.tree.leaves(with_gradients(h, method, params, z0)):
        finite &= np.isfinite(leaf).reshape(len(z0), -1).all(axis=1)
    bad = np.flatnonzero(~finite)
    assert not bad.size, (jax.tree.map(lambda leaf: leaf[bad[0]], params), z0[bad[0]])


@each_method
def test_parameters_that_are_compile_time_constants_give_what_arguments_give(method, dtype):
    # XLA reassociates divisions by a constant: without the barrier in `constrain` all of this is NaN.
    rng = np.random.default_rng(0)
    finfo = np.finfo(dtype)
    sizes = np.geomspace(10 * finfo.tiny / finfo.eps, finfo.max**0.65, 12, dtype=dtype)
    u, w = rng.normal(size=(2, len(sizes), 3, 2)).astype(dtype)
    params = Planar(u, w * sizes[:, None, None], np.zeros((len(sizes), 3), dtype))
    z0 = rng.normal(size=(len(sizes), 2)).astype(dtype)
    expected = with_gradients("tanh", method, params, z0)
    function = compiled_with_gradients("tanh", method).__wrapped__
    (_, outputs), gradients = jax.jit(functools.partial(function, params))(z0)
    actual = jax.device_get((outputs, gradients))
    for expected_leaf, actual_leaf in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        for e, a in zip(expected_leaf, actual_leaf, strict=True):  # one flow each, as their gradients differ in size
            np.testing.assert_allclose(a, e, rtol=0, atol=16 * finfo.eps * np.max(np.abs(e)))


@each_method
@each_h
def test_a_flow_with_u_0_is_the_identity_bit_for_bit_and_can_be_trained_away_from_it(h, method, dtype):
    size = 200
    params, z0 = stack([draw(2, 3, seed=seed, dtype=dtype) for seed in range(size)])
    params = params._replace(u=np.zeros_like(params.u))
    (zK, log_det), gradients = with_gradients(h, method, params, z0)
    np.testing.assert_array_equal(zK, z0)
    np.testing.assert_array_equal(log_det, np.zeros(size))
    for i in range(3):
        params_i, z0_i, gradients_i = jax.tree.map(lambda leaf, i=i: leaf[i], (params, z0, gradients))
        expected = exact_gradients(params_i, z0_i, h)
        assert np.max(np.abs(expected[0].u)) > 0.1
        assert_trees_close(gradients_i, expected, tolerance=16 * np.finfo(dtype).eps)


@pytest.mark.parametrize("method", [*METHODS, None])
def test_no_layers_are_the_identity(method, dtype):
    params = Planar(np.zeros((1, 0, 3), dtype), np.zeros((1, 0, 3), dtype), np.zeros((1, 0), dtype))
    z0 = np.array([[0.3, -1.2, 50.0]], dtype)
    (zK, log_det), (in_params, in_z0) = with_gradients("tanh", method, params, z0)
    np.testing.assert_array_equal(zK, z0)
    np.testing.assert_array_equal(log_det, np.zeros(1))
    assert log_det.dtype == dtype
    assert jax.tree.map(jnp.shape, in_params) == jax.tree.map(jnp.shape, params)
    np.testing.assert_allclose(in_z0[0], np.cos([0, 1, 2]), rtol=1e-6)
    shared = jax.tree.map(lambda leaf: leaf[0], params)
    zK, log_det = jax.vmap(functools.partial(planar_flow, shared, method=method))(np.tile(z0, (4, 1)))
    np.testing.assert_array_equal(zK, np.tile(z0, (4, 1)))
    np.testing.assert_array_equal(log_det, np.zeros(4))


def test_amortised_flows_without_layers_keep_their_shapes_inside_vmap_and_grad():
    params = Planar(*(np.ones(shape, np.float32) for shape in ((4, 0, 2), (4, 0, 2), (4, 0))))
    z0 = np.ones((10, 4, 2), np.float32)
    seen = []

    def total(params, z0):
        zK, log_det = planar_flow(params, z0)
        seen.append((zK.shape, log_det.shape))
        return jnp.sum(zK) + jnp.sum(log_det)

    jax.jit(jax.grad(lambda params: jnp.sum(jax.vmap(lambda z0: total(params, z0))(z0))))(params)
    assert seen == [((4, 2), (4,))]
