"""The forward map against exact arithmetic and against autodiff."""

import functools
import math

import jax
import numpy as np
import pytest
from exact import exactly, to_exact
from flow_cases import (
    METHODS,
    SCALES,
    STEP,
    TABLE,
    compiled,
    draws,
    each_h,
    each_method,
    each_shape,
    exact_gradients,
    exact_objective,
    exact_values,
    objective,
    with_gradients,
    with_jacobian,
)
from helpers import assert_trees_close, draw, precision, stack
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from planar_vae_jax import Planar, planar_flow

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


LARGE = pytest.mark.parametrize(("dim", "flow_length"), [(784, 16), (16, 256), (8, 90)])


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
