"""The forward flow and its parts: against exact arithmetic, against autodiff, and at the edges."""

import functools
import math
import re
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    EXACT_NONLINEARITIES,
    assert_trees_close,
    draw,
    exact_flow,
    exact_m,
    exactly,
    from_exact,
    precision,
    stack,
    to_exact,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from planar_vae_jax import Planar, flows, init_planar, planar_flow, recursion
from planar_vae_jax.nonlinearities import NONLINEARITIES

METHODS = ["scan", "gram"]

# (D, K, h). Few shapes, as each is compiled anew; 11 and 17 layers end inside a block of the Gram recursion.
TABLE = [(1, 4, "tanh"), (2, 3, "tanh"), (16, 17, "tanh"), (2, 3, "softsign"), (3, 11, "softsign")]
# Every shape at every one of these: scale^2 is the order of w.u.
SCALES = [0.1, 0.5, 1.0, 2.0]

each_shape = pytest.mark.parametrize(("dim", "flow_length", "h"), TABLE)
each_method = pytest.mark.parametrize("method", METHODS)
each_h = pytest.mark.parametrize("h", sorted(EXACT_NONLINEARITIES))


def draws(dim, flow_length, dtype=np.float64):
    return [draw(dim, flow_length, scale=scale, seed=seed, dtype=dtype) for seed, scale in enumerate(SCALES)]


def objective(params: Planar, z0, *, h: str, method: str | None):
    """``sum_i cos(i) zK_i + 1.5 log_det``: its gradients see every output. With the outputs beside it."""
    zK, log_det = planar_flow(params, z0, h=h, method=method)
    weights = np.cos(np.arange(zK.size)).astype(zK.dtype)
    return jnp.dot(weights, zK) + 1.5 * log_det, (zK, log_det)


@functools.cache
def compiled_with_gradients(h: str, method: str | None):
    function = functools.partial(objective, h=h, method=method)
    return jax.jit(jax.vmap(jax.value_and_grad(function, argnums=(0, 1), has_aux=True)))


ROWS = 32


def with_gradients(h: str, method: str | None, params: Planar, z0):
    """``((zK, log_det), gradients of the objective in (params, z0))`` of each flow and event of a batch.

    Always ROWS of them at once, so that a shape is compiled once however many there are.
    """
    size = len(z0)
    chunks = []
    for indices in np.split(np.arange(size), range(ROWS, size, ROWS)):
        rows = np.resize(indices, ROWS)
        chunk = jax.tree.map(lambda leaf, rows=rows: leaf[rows], (params, z0))
        (_, outputs), gradients = compiled_with_gradients(h, method)(*chunk)
        chunks.append((outputs, gradients))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:size], *chunks)


@functools.cache
def with_jacobian(h: str, method: str):
    """For one event: ``(zK, log_det, dzK/dz0)``."""

    def function(params, z0):
        def outputs(z0):
            zK, log_det = planar_flow(params, z0, h=h, method=method)
            return zK, (zK, log_det)

        jacobian, (zK, log_det) = jax.jacfwd(outputs, has_aux=True)(z0)
        return zK, log_det, jacobian

    return jax.jit(function)


@functools.cache
def compiled(h: str, method: str | None):
    return jax.jit(functools.partial(planar_flow, h=h, method=method))


@exactly
def exact_values(params: Planar, z0, h: str):
    zK, log_det = exact_flow(*(to_exact(leaf) for leaf in params), to_exact(z0), h)
    return from_exact(zK), np.float64(log_det)


def exact_objective(leaves, h: str):
    zK, log_det = exact_flow(*leaves, h)
    return np.dot(to_exact(np.cos(np.arange(zK.size))), zK) + Decimal("1.5") * log_det


STEP = Decimal("1e-40")  # of differences in exact arithmetic, which are as exact as that


@exactly
def exact_gradients(params: Planar, z0, h: str):
    """Of :func:`objective`, by differences."""
    leaves = [to_exact(leaf) for leaf in (*params, z0)]
    gradients = [np.zeros(leaf.shape) for leaf in leaves]
    for leaf, gradient in zip(leaves, gradients, strict=True):
        for index in np.ndindex(leaf.shape):
            centre = leaf[index]
            leaf[index] = centre + STEP
            above = exact_objective(leaves, h)
            leaf[index] = centre - STEP
            gradient[index] = float((above - exact_objective(leaves, h)) / (2 * STEP))
            leaf[index] = centre
    return Planar(*gradients[:3]), gradients[3]


# --- The map


@each_method
@each_shape
def test_flow_is_the_papers_equations_in_exact_arithmetic(dim, flow_length, h, method, x64):
    cases = draws(dim, flow_length)
    outputs, _ = with_gradients(h, method, *stack(cases))
    expected = [exact_values(params, z0, h) for params, z0 in cases]
    for i, one in enumerate(expected):
        assert_trees_close(jax.tree.map(lambda leaf, i=i: leaf[i], outputs), one, tolerance=1e-12)


@each_method
@each_shape
def test_log_det_is_that_of_the_jacobian_and_the_determinant_is_positive(dim, flow_length, h, method, x64):
    for params, z0 in draws(dim, flow_length):
        _, log_det, jacobian = with_jacobian(h, method)(params, z0)
        sign, expected = np.linalg.slogdet(jacobian)
        assert sign == 1.0
        # slogdet itself loses what the matrix is ill-conditioned by.
        tolerance = 1e-14 * dim * np.linalg.cond(jacobian)
        assert tolerance < 1e-5
        np.testing.assert_allclose(log_det, expected, rtol=1e-12, atol=tolerance)


@each_shape
def test_both_methods_agree_in_value_log_det_and_every_gradient(dim, flow_length, h, x64):
    scan, gram = (with_gradients(h, method, *stack(draws(dim, flow_length))) for method in METHODS)
    for i, scale in enumerate(SCALES):
        one_scan, one_gram = (jax.tree.map(lambda leaf, i=i: leaf[i], tree) for tree in (scan, gram))
        # At scale 2, gradients through 17 layers reach 1e3 and more of the first layer's.
        assert_trees_close(one_gram, one_scan, tolerance=1e-12 if scale <= 1 else 1e-10)


@each_method
@pytest.mark.parametrize(("dim", "flow_length", "h"), [shape for shape in TABLE if shape[0] < 16])
def test_every_gradient_equals_differences_in_exact_arithmetic(dim, flow_length, h, method, x64):
    cases = draws(dim, flow_length)
    _, gradients = with_gradients(h, method, *stack(cases))
    for i, (params, z0) in list(enumerate(cases))[: 3 if flow_length < 10 else 1]:
        one = jax.tree.map(lambda leaf, i=i: leaf[i], gradients)
        assert_trees_close(one, exact_gradients(params, z0, h), tolerance=1e-12)


@pytest.mark.parametrize(("flow_length", "method"), [(2, "scan"), (10, "gram")])
def test_second_derivatives_equal_differences_in_exact_arithmetic(flow_length, method, x64):
    params, z0 = draw(2, flow_length, scale=0.7, seed=5)
    direction = jax.tree.map(lambda leaf: np.random.default_rng(9).normal(size=leaf.shape), (params, z0))

    def first(params, z0):
        return jax.grad(lambda *args: objective(*args, h="tanh", method=method)[0], argnums=(0, 1))(params, z0)

    _, second = jax.jit(lambda primals, tangents: jax.jvp(first, primals, tangents))((params, z0), direction)
    actual = sum(np.vdot(x, y) for x, y in zip(*map(jax.tree.leaves, (second, direction)), strict=True))

    @exactly
    def expected():
        leaves, directions = (list(map(to_exact, jax.tree.leaves(tree))) for tree in ((params, z0), direction))
        below, here, above = (
            exact_objective([x + t * STEP * v for x, v in zip(leaves, directions, strict=True)], "tanh")
            for t in (-1, 0, 1)
        )
        return float((above - 2 * here + below) / STEP**2)

    assert actual == pytest.approx(expected(), rel=1e-11)


@each_method
def test_second_derivatives_are_right_on_the_hyperplane_too(method, x64):
    # At a = 0, log(1 + h' (m - 1)) has the Hessian -2 (1 - 1/m) w w^T; slopes of |a| could lose it.
    u, w = np.array([[0.5, 0.2]]), np.array([[1.0, -0.7]])
    params = Planar(u, w, np.zeros(1))
    hessian = jax.jit(jax.hessian(lambda z: planar_flow(params, z, method=method)[1]))(np.zeros(2))
    m = np.logaddexp(0.0, np.dot(u[0], w[0]) + math.log(math.e - 1.0))
    np.testing.assert_allclose(hessian, -2.0 * (1.0 - 1.0 / m) * np.outer(w[0], w[0]), rtol=1e-13)


def nested(modes, function, argnums):
    """``function`` differentiated once by each of ``modes``."""
    for mode in modes:
        function = mode(function, argnums)
    return function


@pytest.mark.parametrize("dim", [2, 6], ids=["narrow", "dense"])
@pytest.mark.parametrize(
    "modes",
    [
        (jax.jacrev, jax.jacfwd),
        (jax.jacrev, jax.jacrev),
        (jax.jacfwd, jax.jacrev),
        (jax.jacfwd, jax.jacfwd),
        (jax.jacrev, jax.jacrev, jax.jacrev),
    ],
    ids=lambda modes: " ".join(mode.__name__ for mode in modes),
)
def test_the_gram_form_can_be_differentiated_in_either_mode_again_and_again(modes, dim, x64):
    params, z0 = draw(dim, 18, scale=0.5)

    def derivatives(method):
        def value(*args):
            return objective(Planar(*args[:3]), args[3], h="tanh", method=method)[0]

        # By z0 or b alone: constants among what is differentiated are a case of their own.
        argnums = (2, 3) if len(modes) == 2 else (3,)
        return [jax.jit(nested(modes, value, argnum))(*params, z0) for argnum in argnums]

    for actual, expected in zip(derivatives("gram"), derivatives("scan"), strict=True):
        assert np.max(np.abs(expected)) > 1e-3
        assert_trees_close(actual, expected, tolerance=1e-11)


@pytest.mark.parametrize("dim", [2, 6], ids=["narrow", "dense"])
@pytest.mark.parametrize("axes", [(None, None), (None, 0), (0, None), (0, 0)], ids=str)
def test_the_gram_form_under_two_vmaps_is_the_layer_scan(axes, dim, x64):
    # Samples of images: parameters may be shared by all, by the samples of an image, or by none.
    params, _ = draw(dim, 18)
    shape = tuple(size for size, axis in zip((3, 4), axes, strict=True) if axis == 0)
    scales = np.linspace(0.5, 1.5, math.prod(shape)).reshape(shape)
    params = jax.tree.map(lambda leaf: np.multiply.outer(scales, leaf), params)
    z0 = np.random.default_rng(0).normal(size=(3, 4, dim))

    def gradients(method):
        function = functools.partial(objective, h="tanh", method=method)
        for axis in reversed(axes):
            function = jax.vmap(function, in_axes=(axis, 0))
        return jax.jit(jax.value_and_grad(lambda *args: jnp.sum(function(*args)[0]), argnums=(0, 1)))(params, z0)

    assert_trees_close(gradients("gram"), gradients("scan"), tolerance=1e-12)


LARGE = pytest.mark.parametrize(("dim", "flow_length"), [(784, 16), (16, 256)])


@LARGE
def test_large_dimensions_and_long_flows_lose_no_accuracy_in_values_and_gradients(dim, flow_length, x64):
    case = draw(dim, flow_length, scale=0.5, seed=1)
    scan, gram = (with_gradients("tanh", method, *stack([case])) for method in METHODS)
    assert_trees_close(gram, scan, tolerance=1e-12)
    assert_trees_close(scan[0], stack([exact_values(*case, "tanh")]), tolerance=1e-13)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(scan))


@each_method
@LARGE
def test_large_dimensions_and_long_flows_lose_no_accuracy_in_float32(dim, flow_length, method):
    params, z0 = draw(dim, flow_length, scale=0.5, dtype=np.float32)
    outputs = compiled("tanh", method)(params, z0)
    assert_trees_close(outputs, exact_values(params, z0, "tanh"), tolerance=1e-5)


@each_method
@each_h
def test_float32_is_as_accurate_as_its_own_rounding_allows(h, method):
    cases = [draw(2, 3, scale=scale, seed=seed, dtype=np.float32) for scale in SCALES for seed in range(8)]
    with precision(np.float32):
        outputs, _ = with_gradients(h, method, *stack(cases))
    for i, (params, z0) in enumerate(cases):
        # Each layer may amplify the error of the one before by its Jacobian, whose norm is about 1 + |u||w|.
        norms = 1 + np.linalg.norm(params.u, axis=1) * np.linalg.norm(params.w, axis=1)
        tolerance = 4 * np.finfo(np.float32).eps * np.prod(norms)
        one = jax.tree.map(lambda leaf, i=i: leaf[i], outputs)
        assert_trees_close(one, exact_values(params, z0, h), tolerance=tolerance)


@each_method
def test_float32_stays_float32_where_64_bit_types_are_on(method, x64):
    function = functools.partial(objective, h="tanh", method=method)
    both = jax.value_and_grad(function, argnums=(0, 1), has_aux=True)
    outputs = jax.eval_shape(both, *draw(2, 3, dtype=np.float32))
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {np.dtype(np.float32)}


@each_method
@each_h
def test_k_layers_are_one_layer_k_times_in_a_python_loop(h, method, x64):
    params, z0 = draw(2, 3, seed=5)
    z, total = z0, 0.0
    for k in range(3):
        z, log_det = compiled(h, method)(Planar(*(leaf[k : k + 1] for leaf in params)), z)
        total = total + log_det
    zK, log_det, _ = with_jacobian(h, method)(params, z0)
    assert_trees_close((zK, log_det), (z, total), tolerance=1e-14)


@each_method
@pytest.mark.parametrize("amortized", [False, True], ids=["shared", "amortized"])
def test_vmap_under_jit_equals_stacking_of_calls_without_either(amortized, method, x64):
    cases = [draw(2, 3, seed=seed) for seed in range(4)]
    if not amortized:
        cases = [(cases[0][0], z0) for _, z0 in cases]
    params, z0 = stack(cases)
    function = functools.partial(planar_flow, method=method)
    if amortized:
        batched = jax.jit(jax.vmap(function))(params, z0)
    else:
        batched = jax.jit(jax.vmap(function, in_axes=(None, 0)))(cases[0][0], z0)
    assert_trees_close(batched, stack([function(*case) for case in cases]), tolerance=4e-15)


def entries(*shape):
    # Products of smaller numbers than 1e-50 would not fit into DIGITS digits beside 1.
    elements = st.floats(-2.0, 2.0).map(lambda x: x if abs(x) > 1e-50 else 0.0)
    return hnp.arrays(np.float64, shape, elements=elements)


@given(u=entries(3, 2), w=entries(3, 2), b=entries(3), z0=entries(2), h=st.sampled_from(["tanh", "softsign"]))
def test_any_flow_equals_exact_arithmetic_and_its_own_jacobian(u, w, b, z0, h, x64):
    params = Planar(u, w, b)
    expected = exact_values(params, z0, h)
    for method in METHODS:
        zK, log_det, jacobian = with_jacobian(h, method)(params, z0)
        # Near a hyperplane log_det magnifies rounding by 1/sqrt(m), and m >= e^-8 a layer here.
        assert_trees_close((zK, log_det), expected, tolerance=1e-11)
        sign, log_abs_det = np.linalg.slogdet(jacobian)
        assert sign == 1.0
        np.testing.assert_allclose(log_det, log_abs_det, rtol=0, atol=1e-6)


@each_h
def test_the_density_of_a_pushed_forward_normal_integrates_to_one(h, x64):
    # The substitution z = f(z0) in the integral of N(z; 0, I): trapezoids in z0, log_det as the weight.
    params, _ = draw(2, 3, seed=7)
    axis = np.linspace(-12.0, 12.0, 481)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    z, log_det = jax.jit(jax.vmap(functools.partial(planar_flow, h=h), in_axes=(None, 0)))(params, grid)
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
    derivative = jax.jit(jax.vmap(jax.jacfwd(lambda p: flows.constrain(p[None], one))))
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
def test_log_det_and_its_gradient_are_accurate_on_and_beside_the_hyperplane_of_a_contracting_layer(h, dtype):
    # D = 1, w = 1: p and a are then given exactly. 1 + h'(a) (m - 1) cancels completely at p = -200.
    p = [1e-6, -1e-6, -0.1, -5.0, -20.0, -80.0, -200.0]
    p, a = np.meshgrid(p, [0.0, 1e-15, 1e-9, 1e-4, 0.3, 3.0, 30.0, 80.0])
    p, a = p.astype(dtype).reshape(-1, 1, 1), a.astype(dtype).reshape(-1, 1)

    def log_det(u, z):
        w, b = jnp.ones_like(u), jnp.zeros_like(z)
        return planar_flow(Planar(u, w, b), z, h=h, method="scan")[1]

    value, (in_u, in_z) = jax.jit(jax.vmap(jax.value_and_grad(log_det, argnums=(0, 1))))(p, a)

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

    curvature, remainder = nonlinearity.curvature(a), nonlinearity.remainder(a)
    actual = (nonlinearity.value(a), *nonlinearity.slopes(a), curvature, remainder)
    eps, tiny = np.finfo(dtype).eps, np.finfo(dtype).tiny
    for result, expected in zip(actual, exact(to_exact(a)), strict=True):
        np.testing.assert_allclose(result, expected, rtol=8 * eps, atol=tiny)


@each_h
def test_nonlinearity_keeps_its_promises(h, x64):
    nonlinearity = NONLINEARITIES[h]
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


@pytest.mark.parametrize("size", [1, 7, 16, 17, 40])
def test_substitution_in_blocks_is_the_plain_one_and_reads_nothing_on_or_above_the_diagonal(size, x64):
    rng = np.random.default_rng(size)
    r, L, shift = rng.normal(size=(size, 3)), rng.normal(size=(size, size)), rng.normal(size=size)

    def layer(shift, total):
        return jnp.tanh(total + shift), total

    value, total = np.zeros((2, size, 3))
    for k in range(size):
        total[k] = r[k] + L[k, :k] @ value[:k]
        value[k] = np.tanh(total[k] + shift[k])
    actual = jax.jit(functools.partial(recursion._substitute, layer))(shift, r, L)
    assert_trees_close(actual, (value, total), tolerance=1e-13)


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
    function = compiled_with_gradients("tanh", method).__wrapped__
    expected, actual = jax.jit(function)(params, z0), jax.jit(functools.partial(function, params))(z0)
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


# --- The public functions


def test_an_unknown_nonlinearity_is_refused_with_the_known_ones():
    params, z0 = draw(2, 3, dtype=np.float32)
    with pytest.raises(ValueError, match=r"h must be one of tanh, softsign.*got 'relu'"):
        planar_flow(params, z0, h="relu")


def test_an_unknown_method_is_refused_with_the_known_ones():
    params, z0 = draw(2, 3, dtype=np.float32)
    with pytest.raises(ValueError, match=r"method must be one of scan, gram, or None; got 'loop'"):
        planar_flow(params, z0, method="loop")


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 2)])
def test_an_event_of_the_wrong_shape_is_refused_at_trace_time_and_a_batch_is_told_of_vmap(shape):
    params, _ = draw(2, 3, dtype=np.float32)
    with pytest.raises(ValueError, match=r"z0 must be one event of shape \(2,\).*jax\.vmap for a batch"):
        jax.eval_shape(planar_flow, params, jnp.zeros(shape))


@pytest.mark.parametrize("dtype", ["int32", "float16", "bfloat16"])
def test_an_event_of_another_dtype_is_refused_and_both_are_named(dtype):
    params, _ = draw(2, 3, dtype=np.float32)
    with pytest.raises(ValueError, match=rf"z0 and params must be of one floating dtype; got {dtype} and .* float32"):
        planar_flow(params, jnp.zeros(2, dtype))


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


@pytest.mark.parametrize(
    ("flow_length", "dim", "expected"),
    [(1, 784, "gram"), (80, 5, "gram"), (81, 5, "scan"), (1000, 4, "gram"), (15, 1, "gram")],
)
def test_without_a_method_the_documented_one_is_taken(flow_length, dim, expected):
    assert flows.default_method(flow_length, dim) == expected
    params, z0 = init_planar(jax.random.key(0), flow_length, dim), jnp.zeros(dim)

    def jaxpr(method):
        text = str(jax.make_jaxpr(functools.partial(planar_flow, method=method))(params, z0))
        return re.sub(r"0x[0-9a-f]+", "", text)  # addresses of functions in it

    assert jaxpr("scan") != jaxpr("gram")
    assert jaxpr(None) == jaxpr(expected)


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
    @jax.jit
    def drawn(u_scale):
        z0 = jax.random.normal(jax.random.key(1), (dim,))
        return z0, *planar_flow(init_planar(jax.random.key(0), 8, dim, u_scale=u_scale), z0)

    z0, zK, log_det = drawn(0.1)
    assert 0.0 < np.linalg.norm(zK - z0) < 0.1 * 8
    assert 0.0 < abs(log_det) < 0.1 * 8
    z0, zK, log_det = drawn(0.0)
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
