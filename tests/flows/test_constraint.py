"""The constraint, the log-determinant and the nonlinearities, each to its last digits."""

import functools
import math
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import EXACT_NONLINEARITIES, exact_m, exactly, from_exact, to_exact
from flow_cases import STEP, each_h

from planar_vae_jax import Planar, planar_flow
from planar_vae_jax.flows._constraint import constrain
from planar_vae_jax.flows.nonlinearities import NONLINEARITIES

# --- The constraint


def rounding_of_dot(x, y):
    """What one ulp in each term does to ``x.y``, along the last axis."""
    return np.finfo(x.dtype).eps * np.sum(np.abs(np.float64(x) * np.float64(y)), axis=-1)


def constrained(u, w):
    """``(u_hat, w.u_hat, m, log m)``."""
    found = constrain(u, w)
    return found.u_hat, found.w_u_hat, found.m, found.log_m


@functools.cache
def compiled_constrain():
    return jax.jit(constrained)


@pytest.mark.parametrize("norm", [1e-12, 0.3, 1.0, 40.0, 1e12])
def test_w_dot_u_hat_is_m_minus_1_and_only_the_component_along_w_moves(norm, dtype):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(401, 7))
    w *= norm / np.linalg.norm(w, axis=1, keepdims=True)
    u = rng.normal(size=w.shape)
    u += (np.linspace(-200, 200, 401) - np.sum(u * w, axis=1))[:, None] * w / norm**2
    u, w = u.astype(dtype), w.astype(dtype)
    u_hat, _, m, _ = map(np.asarray, compiled_constrain()(u, w))
    u64, w64 = u.astype(np.float64), w.astype(np.float64)
    expected = np.logaddexp(0.0, np.sum(u64 * w64, axis=1) + math.log(math.e - 1.0))
    np.testing.assert_array_less(np.abs(m - expected), 8 * rounding_of_dot(u, w) + 1e-13)
    bound = 8 * (rounding_of_dot(u, w) + rounding_of_dot(u_hat, w)) + 1e-13
    np.testing.assert_array_less(np.abs(np.sum(w64 * u_hat, axis=1) - (expected - 1.0)), bound)
    across = (u_hat - u64) - np.sum((u_hat - u64) * w64, axis=1)[:, None] * w64 / norm**2
    assert np.max(np.abs(across) / np.linalg.norm(u64, axis=1)[:, None]) < 8 * np.finfo(dtype).eps


P_GRID = np.concatenate([np.linspace(-200, 200, 401), *(sign * np.logspace(-30, 1, 125) for sign in (1, -1)), [0.0]])


@pytest.fixture(scope="module")
def exact_constraint():
    """Exact ``(u_hat, m, log_m)`` for D = 1, w = 1, u = p over P_GRID, for each dtype."""

    @exactly
    def table(dtype):
        ms = [exact_m(p) for p in to_exact(P_GRID.astype(dtype))]
        return from_exact([m - 1 for m in ms]), from_exact(ms), from_exact([m.ln() for m in ms])

    return {dtype: table(dtype) for dtype in (np.float32, np.float64)}


def test_u_hat_m_and_log_m_are_exact_to_a_few_ulps_for_w_dot_u_within_200(dtype, exact_constraint):
    p = P_GRID.astype(dtype)[:, None]
    u_hat, w_u_hat, m, log_m = map(np.asarray, compiled_constrain()(p, np.ones_like(p)))
    exact_u_hat, exact_m_, exact_log_m = exact_constraint[dtype]
    eps, tiny = np.finfo(dtype).eps, np.finfo(dtype).tiny
    np.testing.assert_allclose(m, exact_m_, rtol=8 * eps, atol=tiny)
    np.testing.assert_allclose(log_m, exact_log_m, rtol=4 * eps, atol=4 * eps)
    # XLA's own log1p is wrong by 120 ulps at -0.4 in float64 (JAX 0.7 to 0.10 on CPU).
    rtol = 8 * eps if dtype == np.float32 else 250 * eps
    np.testing.assert_allclose(w_u_hat, exact_u_hat, rtol=rtol)
    np.testing.assert_allclose(u_hat[:, 0], exact_u_hat, rtol=rtol)


def test_derivatives_of_m_and_log_m_are_those_of_softplus_for_w_dot_u_within_200(dtype):
    p = P_GRID.astype(dtype)
    one = np.ones(1, dtype)
    derivative = jax.jit(jax.vmap(jax.jacfwd(lambda p: constrained(p[None], one))))
    u_hat_dot, w_u_hat_dot, m_dot, log_m_dot = map(np.asarray, derivative(p))
    p64 = p.astype(np.float64)
    x = p64 + math.log(math.e - 1.0)
    sigmoid = np.exp(-np.logaddexp(0.0, -x))
    eps, tiny = np.finfo(dtype).eps, np.finfo(dtype).tiny
    rtol = max(16 * eps, 1e-13)
    np.testing.assert_allclose(m_dot, sigmoid, rtol=rtol, atol=tiny)
    np.testing.assert_allclose(u_hat_dot[:, 0], sigmoid, rtol=0, atol=8 * eps)
    np.testing.assert_allclose(w_u_hat_dot, sigmoid, rtol=0, atol=8 * eps)
    np.testing.assert_allclose(log_m_dot, sigmoid / np.logaddexp(0.0, x), rtol=rtol)


def test_u_hat_does_not_depend_on_the_scale_of_a_small_w(dtype):
    # As w -> 0: u_hat -> u - (w.u) w / (e |w|^2), which only the direction of w enters.
    u, direction = np.array([0.7, -1.9, 0.4], dtype), np.array([1.0, 0.5, -2.0], dtype)
    finfo = np.finfo(dtype)
    exponents = np.arange(-12, math.log10(finfo.tiny / finfo.eps) + 1, -1.0)
    scales = (10.0**exponents).astype(dtype)
    assert scales[-1] < (1e-29 if dtype == np.float32 else 1e-290)
    w = scales[:, None] * direction
    u_hat, *_ = compiled_constrain()(np.broadcast_to(u, w.shape), w)
    u64, d64 = u.astype(np.float64), direction.astype(np.float64)
    limit = u64 - np.dot(d64, u64) * d64 / (math.e * np.dot(d64, d64))
    np.testing.assert_allclose(u_hat, np.broadcast_to(limit, w.shape), rtol=1e-11 if dtype == np.float64 else 1e-6)
    # Hence the derivative in w grows as 1/|w|: times |w| it does not depend on the scale either.
    jacobian = jax.jit(jax.vmap(jax.jacrev(lambda w: constrained(u, w)[0])))(w)
    scaled = np.asarray(jacobian) * scales[:, None, None]
    s = np.dot(d64, d64)
    p = np.dot(d64, u64)
    expected = -(np.outer(d64, u64) + p * np.eye(3) - 2 * p * np.outer(d64, d64) / s) / (math.e * s)
    expected = np.broadcast_to(expected, scaled.shape)
    np.testing.assert_allclose(scaled, expected, atol=1e-10 if dtype == np.float64 else 2e-6)


def test_at_w_0_u_hat_is_u_with_the_identity_for_its_gradient(dtype):
    u, w = np.array([0.7, -1.9, 0.4], dtype), np.zeros(3, dtype)
    u_hat, _, m, log_m = map(np.asarray, compiled_constrain()(u[None], w[None]))
    np.testing.assert_array_equal(u_hat[0], u)
    assert (m, log_m) == (1.0, 0.0)
    in_u, in_w = jax.jit(jax.jacrev(lambda u, w: constrained(u, w)[0], argnums=(0, 1)))(u, w)
    np.testing.assert_array_equal(in_u, np.eye(3))
    np.testing.assert_array_equal(in_w, np.zeros((3, 3)))


@each_h
def test_log_det_and_its_gradient_are_accurate_on_and_beside_the_hyperplane_of_a_contracting_layer(h, dtype):
    # D = 1, w = 1: p and a are then given exactly. 1 + h'(a) (m - 1) cancels completely at p = -200.
    p = [1e-6, -1e-6, -0.1, -5.0, -20.0, -80.0, -200.0]
    p, a = np.meshgrid(p, [0.0, 1e-15, 1e-9, 1e-4, 0.3, 3.0, 30.0, 80.0])
    p, a = p.astype(dtype).reshape(-1, 1, 1), a.astype(dtype).reshape(-1, 1)

    def log_det(u, z):
        w, b = jnp.ones_like(u), jnp.zeros_like(z)
        return planar_flow(Planar(u, w, b), z, h=h, method="scan")[1]

    gradients = jax.jit(jax.vmap(jax.value_and_grad(log_det, argnums=(0, 1))))
    value, (in_u, in_z) = jax.device_get(gradients(p, a))

    @exactly
    def exact(p, a):
        def log_det(p, a):
            return (1 + EXACT_NONLINEARITIES[h][1](a) * (exact_m(p) - 1)).ln()

        values = [log_det(p, a) for p, a in zip(p, a, strict=True)]
        # To the right: softsign's kink is at 0, where any slope between those of its sides is one.
        in_u = [(log_det(p + STEP, a) - log_det(p - STEP, a)) / (2 * STEP) for p, a in zip(p, a, strict=True)]
        small = Decimal("1e-150")
        in_z = [(log_det(p, a + small) - log_det(p, a)) / small for p, a in zip(p, a, strict=True)]
        return from_exact(values), from_exact(in_u), from_exact(in_z)

    value_, in_u_, in_z_ = exact(to_exact(p.ravel()), to_exact(a.ravel()))
    assert min(value_) < -199
    eps, tiny = np.finfo(dtype).eps, np.finfo(dtype).tiny
    np.testing.assert_allclose(value, value_, rtol=4 * eps, atol=8 * eps)
    # Near the identity it keeps its digits relative to itself (as far as XLA's log1p does, in float64).
    near = np.abs(p.ravel()) < 0.2
    rtol = 8 * eps if dtype == np.float32 else 400 * eps
    np.testing.assert_allclose(value[near], value_[near], rtol=rtol, atol=tiny)
    # Elsewhere than on the hyperplane m no longer matters once it underflows.
    counts = (a.ravel() == 0) | (p.ravel() > math.log(tiny))
    np.testing.assert_allclose(in_u.ravel()[counts], in_u_[counts], rtol=16 * eps, atol=1e-30)
    counts &= a.ravel() > 0
    np.testing.assert_allclose(in_z.ravel()[counts], in_z_[counts], rtol=16 * eps, atol=8 * eps)


# --- The nonlinearities


def preactivations(dtype):
    small = np.logspace(-30 if dtype == np.float64 else -8, 0, 60)
    positive = np.concatenate([small, np.linspace(0.05, 3.0, 60), np.linspace(3.0, 30.0, 28)])
    return np.concatenate([positive, -positive, [0.0]]).astype(dtype)


@each_h
def test_slopes_and_remainder_are_exact_to_a_few_ulps_where_the_plain_formulas_cancel(h, dtype):
    nonlinearity = NONLINEARITIES[h]
    a = preactivations(dtype)
    value, slope = EXACT_NONLINEARITIES[h]

    @exactly
    def exact(a):
        return (
            from_exact([value(x) for x in a]),
            from_exact([slope(x) for x in a]),
            from_exact([1 - slope(x) for x in a]),
            from_exact([(slope(x + STEP) - slope(x - STEP)) / (2 * STEP) for x in a]),
            from_exact([x - value(x) for x in a]),
        )

    @jax.jit
    def computed(a):
        h = nonlinearity.value(a)
        return h, *nonlinearity.slopes(a, h), nonlinearity.curvature(a, h), nonlinearity.remainder(a)

    eps, tiny = np.finfo(dtype).eps, np.finfo(dtype).tiny
    for result, expected in zip(computed(a), exact(to_exact(a)), strict=True):
        np.testing.assert_allclose(result, expected, rtol=8 * eps, atol=tiny)


@each_h
def test_nonlinearity_keeps_its_promises(h, x64):
    nonlinearity = NONLINEARITIES[h]
    a = np.sort(preactivations(np.float64))

    @jax.jit
    def computed(a):
        value, autodiff = jax.vmap(jax.value_and_grad(nonlinearity.value))(a)
        bound = nonlinearity.remainder_inverse(nonlinearity.remainder(jnp.maximum(a, 0.0)))
        return value, nonlinearity.value(-a), *nonlinearity.slopes(a, value), autodiff, bound

    value, of_minus_a, slope, complement, autodiff, bound = map(np.asarray, computed(a))
    np.testing.assert_allclose(slope, autodiff, rtol=1e-13, atol=1e-14)  # autodiff's 1 - tanh^2 cancels
    np.testing.assert_allclose(slope + complement, 1.0, rtol=4e-15)
    assert np.all(slope > 0)
    assert np.all(complement >= 0)
    np.testing.assert_array_equal(of_minus_a, -value)
    assert slope[a == 0.0] == 1.0
    positive = a[a > 0]
    assert np.all(np.diff(slope[a > 0]) <= 1e-15)  # concave above 0
    # remainder_inverse bounds the a it was made from, and for small ones is of their size.
    bound = bound[a > 0]
    assert np.all(bound >= positive * (1 - 1e-14))
    small = (positive < 0.1) & (positive > 1e-20)
    assert np.all(bound[small] < 1.5 * positive[small])
