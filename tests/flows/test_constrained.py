"""Layers given by ``u_hat``, ``w``, ``b``: the inverse of the constraint, against exact arithmetic and the map."""

import math
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import exactly
from helpers import assert_trees_close, draw

from planar_vae_jax import Planar, inverse_planar_flow, planar_flow
from planar_vae_jax.flows import planar_from_constrained, planar_to_constrained

PRODUCTS = [0.0, 1e-30, 1e-9, -1e-9, 0.3, -0.3, 0.5, -0.5, 0.6, -0.9, -1 + 1e-6, 20.0, 200.0, 1e30]


@exactly
def exact_p(product):
    """``log(expm1(1 + q)) - log(e - 1)``."""
    m = 1 + Decimal(product)
    return float((m.exp() - 1).ln() - (Decimal(1).exp() - 1).ln()) if m < 10_000 else product


@pytest.mark.parametrize("product", PRODUCTS)
def test_u_is_the_one_whose_constraint_is_u_hat(product, dtype):
    product = dtype(product)
    w, u_hat = np.array([[2.0, 0.0]], dtype), np.array([[0.5 * product, 3.0]], dtype)
    params = planar_from_constrained(u_hat, w, np.zeros(1, dtype))
    eps = float(np.finfo(dtype).eps)
    # XLA's log1p is good to 100 ulps of float64 around -0.4.
    assert float(2.0 * params.u[0, 0]) == pytest.approx(
        exact_p(float(product)), rel=(8 if dtype == np.float32 else 200) * eps
    )
    back, _, _ = planar_to_constrained(params)
    # What is left of m = 1 + w.u_hat near -1 is as exact as w.u_hat itself.
    np.testing.assert_allclose(back, u_hat, rtol=200 * eps, atol=8 * eps)


def test_a_layer_of_ones_own_gives_its_own_map(x64):
    rng = np.random.default_rng(0)
    w, b, z = rng.normal(size=(4, 3)), rng.normal(size=4), rng.normal(size=(6, 3))
    u_hat = rng.normal(size=(4, 3))
    u_hat += np.maximum(0.0, -0.9 - np.sum(u_hat * w, -1))[:, None] * w / np.sum(w * w, -1)[:, None]
    params, expected = planar_from_constrained(u_hat, w, b), z
    for k in range(4):
        expected = expected + np.tanh(expected @ w[k] + b[k])[:, None] * u_hat[k]
    zK, _ = planar_flow(params, z)
    np.testing.assert_allclose(zK, expected, atol=1e-13)
    np.testing.assert_allclose(inverse_planar_flow(params, zK)[0], z, atol=1e-9)


@pytest.mark.parametrize("lead", [(), (2, 5)], ids=str)
def test_there_and_back_are_the_same_parameters(lead, dtype):
    rng = np.random.default_rng(1)
    params = Planar(*(rng.normal(size=shape).astype(dtype) for shape in ((*lead, 4, 3), (*lead, 4, 3), (*lead, 4))))
    again = jax.jit(lambda params: planar_from_constrained(*planar_to_constrained(params)))(params)
    assert_trees_close(again, params, tolerance=200 * np.finfo(dtype).eps)


def test_one_layer_needs_no_axis_of_layers():
    (params, _) = draw(3, 1, dtype=np.float32)
    one = planar_from_constrained(params.u[0], params.w[0] * 0.1, params.b[0])
    assert [leaf.shape for leaf in one] == [(1, 3), (1, 3), (1,)]


def test_where_w_is_zero_u_is_u_hat_in_value_and_gradient(dtype):
    u_hat, w, b = np.array([[3.0, -1.0]], dtype), np.zeros((1, 2), dtype), np.zeros(1, dtype)
    np.testing.assert_array_equal(planar_from_constrained(u_hat, w, b).u, u_hat)
    of_u, of_w = jax.jit(jax.grad(lambda u, w: jnp.sum(planar_from_constrained(u, w, b).u), (0, 1)))(u_hat, w)
    np.testing.assert_array_equal(of_u, np.ones((1, 2)))
    np.testing.assert_array_equal(of_w, np.zeros((1, 2)))


@pytest.mark.parametrize("product", [p for p in PRODUCTS if abs(p) < 100])
def test_the_gradient_is_the_inverse_of_the_constraints(product, dtype):
    w, u_hat = np.array([[1.0, 0.0]], dtype), np.array([[product, 0.0]], dtype)
    gradient = jax.jit(jax.jacfwd(lambda u_hat: planar_from_constrained(u_hat, w, np.zeros(1, dtype)).u[0, 0]))(u_hat)
    m = 1.0 + float(dtype(product))
    expected = 1.0 / -math.expm1(-m)  # dp/dq = e^m / (e^m - 1)
    assert float(gradient[0, 0]) == pytest.approx(expected, rel=2e-4 if dtype == np.float32 else 1e-12)


@pytest.mark.parametrize("product", [-1.0, -1.5, float("nan")])
def test_a_layer_without_an_inverse_is_refused(product):
    w, u_hat = np.array([[1.0, 0.0]], np.float32), np.array([[product, 1.0]], np.float32)
    with pytest.raises(ValueError, match=r"w.u_hat must be greater than -1 in every layer, .*; got (-1|nan)"):
        planar_from_constrained(u_hat, w, np.zeros(1, np.float32))
    assert not np.isfinite(jax.jit(planar_from_constrained)(u_hat, w, np.zeros(1, np.float32)).u[0, 0])


def test_other_shapes_and_dtypes_are_refused():
    u, w, b = np.zeros((4, 3), np.float32), np.ones((4, 3), np.float32), np.zeros(4, np.float32)
    with pytest.raises(ValueError, match=r"layers must be u_hat \[\.\.\., K, D\], .*; got u_hat \(4, 2\), w \(4, 3\)"):
        planar_from_constrained(u[:, :2], w, b)
    with pytest.raises(ValueError, match=r"u_hat, w and b must be of one floating dtype, .*; got int32, float32"):
        planar_from_constrained(u.astype(np.int32), w, b)
    with pytest.raises(ValueError, match=r"layers must be u \[\.\.\., K, D\]"):
        planar_to_constrained(Planar(u, w, b[:2]))
