"""The forward flow and its parts: against exact arithmetic, against autodiff, and at the edges."""

import functools
import math
from decimal import Decimal
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import EXACT_NONLINEARITIES, exact_flow, exact_m, exactly, from_exact, precision, to_exact
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from planar_vae_jax import Planar, flows, init_planar, planar_flow

METHODS = ["scan", "gram"]
NONLINEARITIES = sorted(EXACT_NONLINEARITIES)


class Case(NamedTuple):
    dim: int
    flow_length: int
    scale: float  # u and w have entries of about this size
    h: str


# Few shapes, as each is compiled anew; the scales share what was compiled.
CASES = [
    Case(dim, flow_length, scale, h)
    for dim, flow_length, h in [
        (1, 4, "tanh"),
        (2, 3, "tanh"),
        (16, 4, "tanh"),
        (5, 1, "softsign"),
        (2, 3, "softsign"),
    ]
    for scale in [0.1, 1.0, 3.0]
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: f"D{c.dim}-K{c.flow_length}-{c.scale}-{c.h}")
each_method = pytest.mark.parametrize("method", METHODS)
each_h = pytest.mark.parametrize("h", NONLINEARITIES)


def draw(case: Case, dtype=np.float64, seed: int = 0) -> tuple[Planar, np.ndarray]:
    rng = np.random.default_rng([seed, case.dim, case.flow_length])
    size = case.scale / case.dim**0.25  # w.u is then of order scale^2
    shape = (case.flow_length, case.dim)
    u, w = (size * rng.normal(size=shape).astype(dtype) for _ in "uw")
    return Planar(u, w, rng.normal(size=shape[:1]).astype(dtype)), rng.normal(size=shape[1:]).astype(dtype)


@functools.cache
def compiled(h: str, method: str | None):
    return jax.jit(functools.partial(planar_flow, h=h, method=method))


@functools.cache
def compiled_jacobian(h: str, method: str):
    return jax.jit(jax.jacfwd(functools.partial(planar_flow, h=h, method=method), argnums=1))


def objective(params: Planar, z0, *, h: str, method: str | None):
    """``sum_i cos(i) zK_i + 1.5 log_det``: its gradients see every output."""
    zK, log_det = planar_flow(params, z0, h=h, method=method)
    weights = np.cos(np.arange(zK.size)).astype(zK.dtype)
    return jnp.dot(weights, zK) + 1.5 * log_det


@functools.cache
def compiled_pullback(h: str, method: str | None):
    return jax.jit(jax.grad(functools.partial(objective, h=h, method=method), argnums=(0, 1)))


@exactly
def exact_values(params: Planar, z0, h: str):
    zK, log_det = exact_flow(*(to_exact(leaf) for leaf in params), to_exact(z0), h)
    return from_exact(zK), float(log_det)


@exactly
def exact_pullback(params: Planar, z0, h: str):
    """The gradients of :func:`objective` from differences over 1e-40, exact to 1e-40 themselves."""
    leaves = [to_exact(leaf) for leaf in (*params, z0)]
    weights = to_exact(np.cos(np.arange(len(z0))))
    step = Decimal("1e-40")

    def value():
        zK, log_det = exact_flow(*leaves, h)
        return np.dot(weights, zK) + Decimal("1.5") * log_det

    gradients = [np.zeros(leaf.shape) for leaf in leaves]
    for leaf, gradient in zip(leaves, gradients, strict=True):
        for index in np.ndindex(leaf.shape):
            centre = leaf[index]
            leaf[index] = centre + step
            above = value()
            leaf[index] = centre - step
            gradient[index] = float((above - value()) / (2 * step))
            leaf[index] = centre
    return Planar(*gradients[:3]), gradients[3]


def assert_trees_close(actual, desired, *, tolerance):
    """Each leaf to ``tolerance`` of its own largest entry (or of 1, if that is smaller)."""
    actual, desired = jax.tree.leaves(actual), jax.tree.leaves(desired)
    for a, d in zip(actual, desired, strict=True):
        np.testing.assert_allclose(a, d, rtol=0, atol=tolerance * max(1.0, np.max(np.abs(d), initial=0.0)))


# --- The map


@each_method
@each_case
def test_flow_is_the_papers_equations_in_exact_arithmetic(case, method, x64):
    params, z0 = draw(case)
    zK, log_det = compiled(case.h, method)(params, z0)
    exact_zK, exact_log_det = exact_values(params, z0, case.h)
    assert_trees_close(zK, exact_zK, tolerance=1e-13)
    assert_trees_close(log_det, exact_log_det, tolerance=1e-12)


@each_method
@each_case
def test_log_det_is_that_of_the_jacobian_and_the_determinant_is_positive(case, method, x64):
    params, z0 = draw(case, seed=1)
    jacobian, _ = compiled_jacobian(case.h, method)(params, z0)
    sign, expected = np.linalg.slogdet(jacobian)
    assert sign == 1.0
    # slogdet itself loses what the matrix is ill-conditioned by.
    tolerance = 1e-14 * case.dim * np.linalg.cond(jacobian)
    assert tolerance < 1e-6
    np.testing.assert_allclose(compiled(case.h, method)(params, z0)[1], expected, rtol=1e-12, atol=tolerance)


@each_case
def test_both_methods_agree_in_value_log_det_and_every_gradient(case, x64):
    params, z0 = draw(case, seed=2)
    scan, gram = (compiled(case.h, method)(params, z0) for method in METHODS)
    assert_trees_close(gram, scan, tolerance=1e-12)
    scan, gram = (compiled_pullback(case.h, method)(params, z0) for method in METHODS)
    assert_trees_close(gram, scan, tolerance=1e-12)


@each_method
@pytest.mark.parametrize("case", [c for c in CASES if c.dim * c.flow_length <= 10 and c.scale < 3], ids=str)
def test_every_gradient_equals_differences_in_exact_arithmetic(case, method, x64):
    params, z0 = draw(case, seed=3)
    gradients = compiled_pullback(case.h, method)(params, z0)
    assert_trees_close(gradients, exact_pullback(params, z0, case.h), tolerance=1e-12)


@each_method
@pytest.mark.parametrize("shape", [(784, 16), (16, 256)], ids=["D784-K16", "D16-K256"])
def test_large_dimensions_and_long_flows_lose_no_accuracy(shape, method, dtype):
    params, z0 = draw(Case(*shape, 0.5, "tanh"), dtype)
    zK, log_det = compiled("tanh", method)(params, z0)
    exact_zK, exact_log_det = exact_values(params, z0, "tanh")
    tolerance = 100 * np.finfo(dtype).eps
    assert_trees_close(zK, exact_zK, tolerance=tolerance)
    assert_trees_close(log_det, exact_log_det, tolerance=tolerance)


@pytest.mark.parametrize("shape", [(784, 16), (16, 256)], ids=["D784-K16", "D16-K256"])
def test_both_methods_have_the_same_gradients_in_large_dimensions_and_long_flows(shape, x64):
    params, z0 = draw(Case(*shape, 0.5, "tanh"), seed=1)
    scan, gram = (compiled_pullback("tanh", method)(params, z0) for method in METHODS)
    assert_trees_close(gram, scan, tolerance=1e-12)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(scan))


@each_method
@each_case
def test_float32_is_as_accurate_as_its_own_rounding_allows(case, method):
    params, z0 = draw(case, np.float32, seed=4)
    with precision(np.float32):
        zK, log_det = compiled(case.h, method)(params, z0)
        assert zK.dtype == log_det.dtype == np.float32
    exact_zK, exact_log_det = exact_values(params, z0, case.h)
    # Each layer may amplify the error of the one before by its Jacobian, whose norm is about 1 + |u||w|.
    norms = 1 + np.linalg.norm(params.u, axis=1) * np.linalg.norm(params.w, axis=1)
    tolerance = 4 * np.finfo(np.float32).eps * np.prod(norms)
    assert_trees_close(zK, exact_zK, tolerance=tolerance)
    assert_trees_close(log_det, exact_log_det, tolerance=tolerance)


@each_method
def test_float32_stays_float32_where_64_bit_types_are_on(method, x64):
    params, z0 = draw(Case(2, 3, 1.0, "tanh"), np.float32)
    outputs = compiled("tanh", method)(params, z0)
    gradients = compiled_pullback("tanh", method)(params, z0)
    assert {leaf.dtype for leaf in jax.tree.leaves((outputs, gradients))} == {np.dtype(np.float32)}


@each_method
@each_h
def test_k_layers_are_one_layer_k_times_in_a_python_loop(h, method, x64):
    params, z0 = draw(Case(2, 3, 1.0, h), seed=5)
    z, total = z0, 0.0
    for k in range(3):
        z, log_det = compiled(h, method)(Planar(*(leaf[k : k + 1] for leaf in params)), z)
        total = total + log_det
    assert_trees_close(compiled(h, method)(params, z0), (z, total), tolerance=1e-14)


@each_method
@pytest.mark.parametrize("amortized", [False, True], ids=["shared", "amortized"])
def test_vmap_equals_stacking(amortized, method, dtype):
    case = Case(3, 4, 1.0, "tanh")
    draws = [draw(case, dtype, seed) for seed in range(5)]
    z0 = np.stack([z for _, z in draws])
    if amortized:
        params = jax.tree.map(lambda *leaves: np.stack(leaves), *(p for p, _ in draws))
        each = [p for p, _ in draws]
    else:
        params = draws[0][0]
        each = [params] * 5
    function = functools.partial(planar_flow, method=method)
    batched = jax.jit(jax.vmap(function, in_axes=(0 if amortized else None, 0)))(params, z0)
    assert batched[0].shape == (5, 3)
    stacked = [compiled("tanh", method)(p, z) for p, z in zip(each, z0, strict=True)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *stacked)
    assert_trees_close(batched, stacked, tolerance=8 * np.finfo(dtype).eps)


@each_method
def test_jit_changes_no_more_than_rounding(method, x64):
    params, z0 = draw(Case(2, 3, 1.0, "tanh"), seed=6)
    eager = planar_flow(params, z0, method=method)
    assert_trees_close(compiled("tanh", method)(params, z0), eager, tolerance=1e-15)


def entries(*shape):
    # Products of smaller numbers than 1e-50 would not fit into DIGITS digits beside 1.
    elements = st.floats(-2.0, 2.0).map(lambda x: x if abs(x) > 1e-50 else 0.0)
    return hnp.arrays(np.float64, shape, elements=elements)


@given(u=entries(3, 2), w=entries(3, 2), b=entries(3), z0=entries(2), h=st.sampled_from(NONLINEARITIES))
def test_any_flow_equals_exact_arithmetic_and_its_own_jacobian(u, w, b, z0, h, x64):
    params = Planar(u, w, b)
    exact_zK, exact_log_det = exact_values(params, z0, h)
    for method in METHODS:
        zK, log_det = compiled(h, method)(params, z0)
        # Near a hyperplane log_det magnifies rounding by 1/sqrt(m), and m >= e^-8 a layer here.
        assert_trees_close((zK, log_det), (exact_zK, exact_log_det), tolerance=1e-11)
        sign, expected = np.linalg.slogdet(compiled_jacobian(h, method)(params, z0)[0])
        assert sign == 1.0
        np.testing.assert_allclose(log_det, expected, rtol=0, atol=1e-6)


@each_method
@each_h
def test_the_density_of_a_pushed_forward_normal_integrates_to_one(h, method, x64):
    # The substitution z = f(z0) in the integral of N(z; 0, I): trapezoids in z0, log_det as the weight.
    params, _ = draw(Case(2, 3, 1.0, h), seed=7)
    axis = np.linspace(-12.0, 12.0, 601)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    function = functools.partial(planar_flow, h=h, method=method)
    z, log_det = jax.jit(jax.vmap(function, in_axes=(None, 0)))(params, grid)
    log_normal = -0.5 * np.sum(np.square(z), axis=-1) - math.log(2 * math.pi)
    mass = np.sum(np.exp(log_normal + log_det)) * (axis[1] - axis[0]) ** 2
    # tanh is analytic, and trapezoids converge geometrically; softsign has a kink in h'.
    assert mass == pytest.approx(1.0, abs=1e-9 if h == "tanh" else 1e-4)


# --- The constraint


def rounding_of_dot(x, y):
    """What one ulp in each term does to ``x.y``, along the last axis."""
    return np.finfo(x.dtype).eps * np.sum(np.abs(np.float64(x) * np.float64(y)), axis=-1)


@functools.cache
def compiled_constrain():
    return jax.jit(jax.vmap(flows.constrain))


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
    u_hat, _, m, log_m = map(np.asarray, compiled_constrain()(p, np.ones_like(p)))
    exact_u_hat, exact_m_, exact_log_m = exact_constraint[dtype]
    eps, tiny = np.finfo(dtype).eps, np.finfo(dtype).tiny
    np.testing.assert_allclose(m, exact_m_, rtol=8 * eps, atol=tiny)
    np.testing.assert_allclose(log_m, exact_log_m, rtol=4 * eps, atol=4 * eps)
    # XLA's own log1p is wrong by 120 ulps at -0.4 in float64 (JAX 0.7 to 0.10 on CPU).
    np.testing.assert_allclose(u_hat[:, 0], exact_u_hat, rtol=8 * eps if dtype == np.float32 else 250 * eps)


def test_derivatives_of_m_and_log_m_are_those_of_softplus_for_w_dot_u_within_200(dtype):
    p = P_GRID.astype(dtype)
    one = np.ones(1, dtype)
    derivative = jax.jit(jax.vmap(jax.jacfwd(lambda p: flows.constrain(p[None], one))))
    u_hat_dot, _, m_dot, log_m_dot = map(np.asarray, derivative(p))
    p64 = p.astype(np.float64)
    x = p64 + math.log(math.e - 1.0)
    sigmoid = np.exp(-np.logaddexp(0.0, -x))
    eps, tiny = np.finfo(dtype).eps, np.finfo(dtype).tiny
    rtol = max(16 * eps, 1e-13)
    np.testing.assert_allclose(m_dot, sigmoid, rtol=rtol, atol=tiny)
    np.testing.assert_allclose(u_hat_dot[:, 0], sigmoid, rtol=0, atol=8 * eps)
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
    jacobian = jax.jit(jax.vmap(jax.jacrev(lambda w: flows.constrain(u, w)[0])))(w)
    scaled = np.asarray(jacobian) * scales[:, None, None]
    s = np.dot(d64, d64)
    p = np.dot(d64, u64)
    expected = -(np.outer(d64, u64) + p * np.eye(3) - 2 * p * np.outer(d64, d64) / s) / (math.e * s)
    expected = np.broadcast_to(expected, scaled.shape)
    np.testing.assert_allclose(scaled, expected, atol=1e-10 if dtype == np.float64 else 2e-6)


def test_at_w_0_u_hat_is_u_with_the_identity_for_its_gradient(dtype):
    u, w = np.array([0.7, -1.9, 0.4], dtype), np.zeros(3, dtype)
    u_hat, _, m, log_m = compiled_constrain()(u[None], w[None])
    np.testing.assert_array_equal(u_hat[0], u)
    assert (m, log_m) == (1.0, 0.0)
    in_u, in_w = jax.jit(jax.jacrev(lambda u, w: flows.constrain(u, w)[0], argnums=(0, 1)))(u, w)
    np.testing.assert_array_equal(in_u, np.eye(3))
    np.testing.assert_array_equal(in_w, np.zeros((3, 3)))


@each_h
def test_log_det_is_accurate_on_and_beside_the_hyperplane_of_a_contracting_layer(h, dtype):
    # D = 1, w = 1: p and a are then given exactly. 1 + h'(a) (m - 1) cancels completely at p = -200.
    p, a = np.meshgrid([-0.1, -5.0, -20.0, -80.0, -200.0], [0.0, 1e-15, 1e-9, 1e-4, 0.3, 3.0, 30.0, 80.0])
    p, a = p.astype(dtype).reshape(-1, 1, 1), a.astype(dtype).reshape(-1, 1)
    function = functools.partial(planar_flow, h=h, method="scan")
    params = Planar(p, np.ones_like(p), np.zeros_like(a))
    _, log_det = jax.jit(jax.vmap(function))(params, a)
    slope = EXACT_NONLINEARITIES[h][1]

    @exactly
    def exact(p, a):
        return [float((1 + slope(a) * (exact_m(p) - 1)).ln()) for p, a in zip(p, a, strict=True)]

    expected = exact(to_exact(p.ravel()), to_exact(a.ravel()))
    assert min(expected) < -199
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(log_det, expected, rtol=4 * eps, atol=8 * eps)


# --- The nonlinearities


def preactivations(dtype):
    small = np.logspace(-30 if dtype == np.float64 else -8, 0, 60)
    positive = np.concatenate([small, np.linspace(0.05, 3.0, 60), np.linspace(3.0, 30.0, 28)])
    return np.concatenate([positive, -positive, [0.0]]).astype(dtype)


@each_h
def test_slopes_and_remainder_are_exact_to_a_few_ulps_where_the_plain_formulas_cancel(h, dtype):
    nonlinearity = flows.NONLINEARITIES[h]
    a = preactivations(dtype)
    value, slope = EXACT_NONLINEARITIES[h]

    @exactly
    def exact(a):
        return (
            from_exact([value(x) for x in a]),
            from_exact([slope(x) for x in a]),
            from_exact([1 - slope(x) for x in a]),
            from_exact([x - value(x) for x in a]),
        )

    actual = (nonlinearity.value(a), *nonlinearity.slopes(a), nonlinearity.remainder(a))
    eps, tiny = np.finfo(dtype).eps, np.finfo(dtype).tiny
    for result, expected in zip(actual, exact(to_exact(a)), strict=True):
        np.testing.assert_allclose(result, expected, rtol=8 * eps, atol=tiny)


@each_h
def test_nonlinearity_keeps_its_promises(h, x64):
    nonlinearity = flows.NONLINEARITIES[h]
    a = np.sort(preactivations(np.float64))
    slope, complement = map(np.asarray, nonlinearity.slopes(a))
    autodiff = jax.jit(jax.vmap(jax.grad(nonlinearity.value)))(a)
    np.testing.assert_allclose(slope, autodiff, rtol=1e-13, atol=1e-14)  # autodiff's 1 - tanh^2 cancels
    np.testing.assert_allclose(slope + complement, 1.0, rtol=4e-15)
    assert np.all(slope > 0)
    assert np.all(complement >= 0)
    np.testing.assert_array_equal(nonlinearity.value(-a), -nonlinearity.value(a))
    assert slope[a == 0.0] == 1.0
    positive = a[a > 0]
    assert np.all(np.diff(slope[a > 0]) <= 1e-15)  # concave above 0
    # remainder_inverse bounds the a it was made from, and for small ones is of their size.
    bound = np.asarray(nonlinearity.remainder_inverse(nonlinearity.remainder(positive)))
    assert np.all(bound >= positive * (1 - 1e-14))
    small = (positive < 0.1) & (positive > 1e-20)
    assert np.all(bound[small] < 1.5 * positive[small])


@each_method
def test_second_derivatives_are_right_on_the_hyperplane_too(method, x64):
    # At a = 0, log(1 + h' (m - 1)) has the Hessian -2 (1 - 1/m) w w^T; slopes of |a| could lose it.
    u, w = np.array([[0.5, 0.2]]), np.array([[1.0, -0.7]])
    params = Planar(u, w, np.zeros(1))
    hessian = jax.jit(jax.hessian(lambda z: planar_flow(params, z, method=method)[1]))(np.zeros(2))
    m = np.logaddexp(0.0, np.dot(u[0], w[0]) + math.log(math.e - 1.0))
    np.testing.assert_allclose(hessian, -2.0 * (1.0 - 1.0 / m) * np.outer(w[0], w[0]), rtol=1e-13)


# --- Edges


@each_method
@each_h
def test_a_flow_with_u_0_is_the_identity_bit_for_bit_and_can_be_trained_away_from_it(h, method, dtype):
    drawn, z0 = draw(Case(2, 3, 1.0, h), dtype, seed=8)
    params = drawn._replace(u=np.zeros_like(drawn.u))
    zK, log_det = compiled(h, method)(params, z0)
    np.testing.assert_array_equal(zK, z0)
    assert log_det == 0.0
    gradients = compiled_pullback(h, method)(params, z0)
    expected = exact_pullback(params, z0, h)
    assert np.min(np.abs(expected[0].u)) > 1e-3
    assert_trees_close(gradients, expected, tolerance=16 * np.finfo(dtype).eps)


@pytest.mark.parametrize("method", [*METHODS, None])
@each_h
def test_no_layers_are_the_identity(h, method, dtype):
    params = init_planar(jax.random.key(0), flow_length=0, dim=3, dtype=dtype)
    z0 = np.array([0.3, -1.2, 50.0], dtype)
    zK, log_det = compiled(h, method)(params, z0)
    np.testing.assert_array_equal(zK, z0)
    assert log_det.shape == ()
    assert log_det.dtype == dtype
    assert log_det == 0.0
    in_params, in_z0 = compiled_pullback(h, method)(params, z0)
    assert jax.tree.map(jnp.shape, in_params) == jax.tree.map(jnp.shape, params)
    np.testing.assert_allclose(in_z0, np.cos([0, 1, 2]), rtol=1e-6)
    batch = np.stack([z0, -z0])
    in_batch = jax.vmap(functools.partial(planar_flow, method=method), in_axes=(None, 0))(params, batch)
    np.testing.assert_array_equal(in_batch[0], batch)


def degenerate(dtype):
    """Pairs of layers of every combination of a size of w, a size of w.u or of u, and a place of z0."""
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
    pairs = [(layer, layers[(7 * i + 3) % len(layers)]) for i, layer in enumerate(layers)]
    events = [[0.0, 0.0], [1e-20, 0.0], [1e-4, -1e-4], [1.0, -0.5], [80.0, 30.0]]
    rows = [(pair, b, z) for pair in pairs for b in (0.0, 0.7) for z in events]
    u = np.array([[layer[0] for layer in pair] for pair, _, _ in rows], dtype)
    w = np.array([[layer[1] for layer in pair] for pair, _, _ in rows], dtype)
    b = np.array([[b, -b] for _, b, _ in rows], dtype)
    return Planar(u, w, b), np.array([z for _, _, z in rows], dtype)


@each_method
@each_h
def test_values_and_gradients_are_finite_at_the_edges(h, method, dtype):
    params, z0 = degenerate(dtype)
    assert len(z0) > 500

    function = functools.partial(objective, h=h, method=method)
    both = jax.jit(jax.vmap(jax.value_and_grad(function, argnums=(0, 1))))
    finite = np.ones(len(z0), bool)
    for leaf in jax.tree.leaves(both(params, z0)):
        finite &= np.isfinite(leaf).reshape(len(z0), -1).all(axis=1)
    bad = np.flatnonzero(~finite)
    assert not bad.size, (jax.tree.map(lambda x: x[bad[0]], params), z0[bad[0]])


# --- The public functions


def test_an_unknown_nonlinearity_is_refused_with_the_known_ones():
    params, z0 = draw(Case(2, 3, 1.0, "tanh"), np.float32)
    with pytest.raises(ValueError, match=r"h must be one of tanh, softsign.*got 'relu'"):
        planar_flow(params, z0, h="relu")


def test_an_unknown_method_is_refused_with_the_known_ones():
    params, z0 = draw(Case(2, 3, 1.0, "tanh"), np.float32)
    with pytest.raises(ValueError, match=r"method must be one of scan, gram, or None; got 'loop'"):
        planar_flow(params, z0, method="loop")


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 2)])
def test_an_event_of_the_wrong_shape_is_refused_at_trace_time_and_a_batch_is_told_of_vmap(shape):
    params, _ = draw(Case(2, 3, 1.0, "tanh"), np.float32)
    with pytest.raises(ValueError, match=r"z0 must be one event of shape \(2,\).*jax\.vmap for a batch"):
        jax.eval_shape(planar_flow, params, jnp.zeros(shape))


@pytest.mark.parametrize(
    "change",
    [{"u": (2,)}, {"w": (3, 1)}, {"w": (2, 3)}, {"b": ()}, {"b": (2,)}, {"b": (3, 2)}, {"u": (1, 3, 2)}],
    ids=str,
)
def test_parameters_of_the_wrong_shape_are_refused_and_their_shapes_named(change):
    shapes = {"u": (3, 2), "w": (3, 2), "b": (3,)} | change
    params = Planar(**{name: jnp.zeros(shape) for name, shape in shapes.items()})
    with pytest.raises(ValueError, match=r"params must be Planar\(u \[K, D\], w \[K, D\], b \[K\]\); got u"):
        planar_flow(params, jnp.zeros(2))


@pytest.mark.parametrize("shape", [(1, 784), (80, 8), (2, 9)], ids=str)
def test_without_a_method_the_documented_one_is_taken(shape):
    flow_length, dim = shape
    params, z0 = init_planar(jax.random.key(0), flow_length, dim), jnp.zeros(dim)
    jaxprs = {m: str(jax.make_jaxpr(functools.partial(planar_flow, method=m))(params, z0)) for m in METHODS}
    assert jaxprs["scan"] != jaxprs["gram"]
    default = str(jax.make_jaxpr(planar_flow)(params, z0))
    assert default == jaxprs[flows.default_method(flow_length, dim)]
    assert flows.default_method(flow_length, dim) == ("gram" if dim > 8 and flow_length > 1 else "scan")


def test_reverse_mode_of_the_gram_form_keeps_no_copy_of_z_for_every_layer():
    params, z0 = init_planar(jax.random.key(0), flow_length=32, dim=784), jnp.zeros((64, 784))

    def kept(method):
        flow = jax.vmap(functools.partial(planar_flow, method=method), in_axes=(None, 0))
        # The pullback is a pytree, and its leaves are what reverse mode keeps.
        pullback = jax.eval_shape(lambda *args: jax.vjp(flow, *args)[1], params, z0)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    copies = 32 * 64 * 784  # z after every layer
    assert kept("scan") > copies
    assert kept("gram") < copies / 4


# --- init_planar


def test_init_draws_u_and_w_independently_at_the_stated_scales():
    params = init_planar(jax.random.key(0), flow_length=100, dim=50, w_scale=2.0, u_scale=0.5)
    assert params.u.shape == params.w.shape == (100, 50)
    u, w = (np.asarray(leaf, np.float64).ravel() for leaf in (params.u, params.w))
    # 5,000 draws: five standard errors are 5 percent of the deviation and 0.07 of the correlation.
    assert np.std(u) * math.sqrt(50) == pytest.approx(0.5, rel=0.05)
    assert np.std(w) * math.sqrt(50) == pytest.approx(2.0, rel=0.05)
    assert abs(np.mean(w)) * math.sqrt(50) < 0.15
    assert abs(np.corrcoef(u, w)[0, 1]) < 0.07
    np.testing.assert_array_equal(params.b, np.zeros(100))


def test_init_is_a_function_of_its_key():
    first, again, other = (init_planar(jax.random.key(seed), 3, 4) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.u, again.u)
    np.testing.assert_array_equal(first.w, again.w)
    assert np.all(first.u != other.u)
    assert np.all(first.w != other.w)


@pytest.mark.parametrize("dim", [2, 784])
def test_a_drawn_flow_is_near_the_identity_and_with_u_scale_0_exactly_there(dim):
    z0 = jax.random.normal(jax.random.key(1), (dim,))
    zK, log_det = compiled("tanh", None)(init_planar(jax.random.key(0), 8, dim), z0)
    assert 0.0 < np.linalg.norm(zK - z0) < 0.1 * 8
    assert 0.0 < abs(log_det) < 0.1 * 8
    zK, log_det = compiled("tanh", None)(init_planar(jax.random.key(0), 8, dim, u_scale=0.0), z0)
    np.testing.assert_array_equal(zK, z0)
    assert log_det == 0.0


def test_init_takes_a_dtype_and_else_jaxs_default():
    def dtypes(**kwargs):
        return {leaf.dtype.name for leaf in init_planar(jax.random.key(0), 2, 3, **kwargs)}

    assert dtypes() == {"float32"}
    with precision(np.float64):
        assert dtypes() == {"float64"}
        assert dtypes(dtype=jnp.float32) == {"float32"}


@pytest.mark.parametrize("flow_length", [-1, 2.0, True, "3", None])
def test_init_refuses_a_flow_length_that_is_no_count(flow_length):
    with pytest.raises(ValueError, match=r"flow_length must be a whole number >= 0; got"):
        init_planar(jax.random.key(0), flow_length=flow_length, dim=2)


@pytest.mark.parametrize("dim", [0, -2, 2.5, False])
def test_init_refuses_a_dimension_that_is_no_positive_count(dim):
    with pytest.raises(ValueError, match=r"dim must be a whole number >= 1; got"):
        init_planar(jax.random.key(0), flow_length=2, dim=dim)


def test_init_takes_numpys_whole_numbers():
    assert init_planar(jax.random.key(0), np.int64(2), np.int32(3)).u.shape == (2, 3)
