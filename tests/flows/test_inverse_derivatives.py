"""Derivatives of the inverse, by the implicit function theorem."""

import functools
import math
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import EXACT_NONLINEARITIES
from flow_cases import each_h
from helpers import assert_trees_close, draw
from inverse_cases import amplification, draws, each_shape, inverse, jacobians

from planar_vae_jax import Planar, inverse_planar_flow, planar_flow
from planar_vae_jax.flows._inverse import solve_preactivation
from planar_vae_jax.flows.nonlinearities import NONLINEARITIES


@each_h
def test_gradients_are_finite_off_the_hyperplane_and_for_every_size_of_w(h, dtype):
    finfo = np.finfo(dtype)
    layers = [([p, 0.5], [1.0, 0.0]) for p in (-200, -88, -50, 0, 50, 200)]
    sizes = [0, finfo.smallest_subnormal, finfo.tiny, finfo.tiny / finfo.eps, 1e3 * finfo.tiny / finfo.eps, 1e-20]
    layers += [([1.0, 1.0], [size, -2 * size]) for size in sizes]
    u, w = (np.array(x, dtype)[:, None] for x in zip(*layers, strict=True))
    params = Planar(u, w, np.full((len(u), 1), 0.5, dtype))
    zK = np.broadcast_to(np.array([0.5, -1.0], dtype), (len(u), 2))

    def objective(params, zK):
        z0, log_det = inverse_planar_flow(params, zK, h=h)
        return jnp.sum(z0) + log_det, (z0, log_det)

    both = jax.jit(jax.vmap(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)))
    out = jax.device_get(both(params, zK))
    for leaf in jax.tree.leaves(out):
        assert np.isfinite(leaf).all()
    # At w = 0, and at floats too small to have a square, the layer is a shift by u h(b).
    (_, (z0, log_det)), (in_params, in_zK) = jax.tree.map(lambda leaf: leaf[6:9], out)
    shift = float(EXACT_NONLINEARITIES[h][0](Decimal("0.5")))
    np.testing.assert_allclose(z0, zK[:3] - shift, rtol=0, atol=4 * finfo.eps)
    np.testing.assert_array_equal(log_det, np.zeros(3))
    np.testing.assert_array_equal(in_zK, np.ones((3, 2)))
    np.testing.assert_allclose(in_params.u, np.full((3, 1, 2), -shift), rtol=4 * finfo.eps)


@each_shape
def test_jacobians_of_the_inverse_follow_from_those_of_the_forward_map(dim, flow_length, h, x64):
    # f(theta, g(theta, z)) = z and log_det_g(theta, z) = -log_det_f(theta, g(theta, z)), differentiated.
    for params, zK in draws(dim, flow_length)[:3]:
        z0, _ = inverse(h)(params, zK)
        (f_params, f_z), (l_params, l_z) = jacobians(planar_flow, h, jax.jacfwd)(params, z0)
        expected_z = np.linalg.inv(f_z)
        expected_params = [-np.tensordot(expected_z, leaf, 1) for leaf in f_params]
        expected_log_det_z = -np.dot(l_z, expected_z)
        expected_log_det_params = [
            -np.asarray(partial) - np.tensordot(l_z, through, 1)
            for partial, through in zip(l_params, expected_params, strict=True)
        ]
        expected = (*expected_params, expected_z, *expected_log_det_params, expected_log_det_z)
        actual = jax.tree.leaves(jacobians(inverse_planar_flow, h, jax.jacrev)(params, zK))
        tolerance = 1e-13 * np.linalg.cond(f_z) * min(amplification(params), 1e3)
        assert tolerance < 1e-7
        for a, e in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * max(1.0, np.max(np.abs(e))))


@each_h
def test_gradients_of_the_inverse_equal_finite_differences_and_forward_mode(h, x64):
    params, zK = draw(2, 3, seed=6)
    actual = jax.tree.leaves(jacobians(inverse_planar_flow, h, jax.jacrev)(params, zK))
    forward_mode = jax.tree.leaves(jacobians(inverse_planar_flow, h, jax.jacfwd)(params, zK))
    leaves = [*params, zK]
    step = 1e-6
    for position, leaf in enumerate(leaves):
        differences = []
        for index in np.ndindex(leaf.shape):
            sides = []
            for sign in (1, -1):
                moved = [x.copy() for x in leaves]
                moved[position][index] += sign * step
                sides.append(inverse(h)(Planar(*moved[:3]), moved[3]))
            differences.append([(np.asarray(x) - np.asarray(y)) / (2 * step) for x, y in zip(*sides, strict=True)])
        for output in (0, 1):
            expected = np.stack([d[output] for d in differences], axis=-1)
            expected = expected.reshape(*expected.shape[:-1], *leaf.shape)
            place = 4 * output + position
            np.testing.assert_allclose(actual[place], expected, rtol=1e-7, atol=1e-7)
            np.testing.assert_allclose(forward_mode[place], actual[place], rtol=1e-12, atol=1e-13)


def shifted(t):
    """A flow and an event that depend on three numbers."""
    params, zK = draw(5, 2, scale=0.6, seed=3)
    return Planar(params.u * t[1], params.w + t[2], params.b), zK + t[0]


T = np.array([0.3, 1.1, 0.2])


@functools.cache
def derivatives_of_unrolled(order):
    """By autodiff through a fixed number of Newton steps, layer by layer, from the root itself."""
    shift = math.log(math.e - 1)

    def function(t):
        params, z = shifted(t)
        total = 0.0
        for u, w, b in reversed(list(zip(*params, strict=True))):
            p = jnp.sum(w * u)
            m = jax.nn.softplus(p + shift)
            u_hat, y = u + (m - 1 - p) * w / jnp.sum(w * w), jnp.sum(w * z) + b
            a = jax.lax.stop_gradient(solve_preactivation(NONLINEARITIES["tanh"], y, m))
            for _ in range(2):  # right up to the third derivative
                a = a - (a + (m - 1) * jnp.tanh(a) - y) / (1 + (m - 1) / jnp.cosh(a) ** 2)
            z, total = z - u_hat * jnp.tanh(a), total - jnp.log(1 + (m - 1) / jnp.cosh(a) ** 2)
        return jnp.sum(z) + total

    for _ in range(order):
        function = jax.jacfwd(function)
    return np.asarray(jax.jit(function)(T))


@pytest.mark.parametrize(
    "modes",
    [(jax.jacrev, jax.jacrev), (jax.jacfwd, jax.jacfwd), pytest.param((jax.jacrev,) * 3, marks=pytest.mark.slow)],
    ids=lambda modes: " ".join(mode.__name__ for mode in modes),
)
def test_derivatives_of_higher_order_are_those_of_the_implicit_function(modes, x64):
    def function(t):
        z, log_det = inverse_planar_flow(*shifted(t))
        return jnp.sum(z) + log_det

    for mode in modes:
        function = mode(function)
    expected = derivatives_of_unrolled(len(modes))
    assert np.max(np.abs(expected)) > 1e-2
    assert_trees_close(jax.jit(function)(T), expected, tolerance=1e-9)
