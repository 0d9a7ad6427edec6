"""The inverse flow: its scalar solver, its round trip, and its gradients by the implicit function theorem."""

import functools
import math
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_trees_close, draw, precision, stack
from exact import EXACT_NONLINEARITIES, exact_flow, exactly, from_exact, to_exact
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from planar_vae_jax import Planar, inverse_planar_flow, planar_flow
from planar_vae_jax.inverse import MAX_ITERATIONS, newton, solve_preactivation
from planar_vae_jax.nonlinearities import NONLINEARITIES

each_h = pytest.mark.parametrize("h", sorted(EXACT_NONLINEARITIES))
each_shape = pytest.mark.parametrize(
    ("dim", "flow_length", "h"), [(1, 4, "tanh"), (2, 3, "tanh"), (16, 9, "tanh"), (2, 3, "softsign")]
)
SCALES = [0.1, 0.5, 0.8, 1.2]  # scale^2 is the order of w.u


def draws(dim, flow_length, dtype=np.float64):
    return [draw(dim, flow_length, scale=scale, seed=seed, dtype=dtype) for seed, scale in enumerate(SCALES)]


@functools.cache
def forward(h: str):
    return jax.jit(functools.partial(planar_flow, h=h, method="scan"))


@functools.cache
def inverse(h: str):
    return jax.jit(functools.partial(inverse_planar_flow, h=h))


@functools.cache
def jacobians(function, h: str, transform):
    """Of both outputs, in all parameters and in the argument."""
    return jax.jit(transform(functools.partial(function, h=h), argnums=(0, 1)))


@exactly
def exact_forward(params: Planar, z0, h: str):
    zK, log_det = exact_flow(*(to_exact(leaf) for leaf in params), to_exact(z0), h)
    return from_exact(zK), float(log_det)


def amplification(params: Planar) -> float:
    """How much the layers may at most magnify: the product of ``1 + |u||w|``, which bounds each Jacobian."""
    return float(np.prod(1 + np.linalg.norm(params.u, axis=1) * np.linalg.norm(params.w, axis=1)))


# --- The scalar equation a + (m - 1) h(a) = y


@functools.cache
def compiled_newton(h: str):
    return jax.jit(functools.partial(newton, NONLINEARITIES[h]))


def wide_grid(dtype):
    """``(y, m)`` over all magnitudes of the dtype, m = 0, and m within ulps of 1."""
    finfo = np.finfo(dtype)
    lowest = math.log10(finfo.tiny) + 0.5
    y = np.concatenate([np.logspace(lowest, 6, 150), np.linspace(0, 30, 121)])
    near_one = np.logspace(-finfo.precision - 1, -0.01, 30)
    m = np.concatenate([np.logspace(lowest, 6, 120), 1 + near_one, 1 - near_one, [0.0, 1.0, 200.0]])
    return tuple(grid.ravel().astype(dtype) for grid in np.meshgrid(y, m))


@each_h
def test_newton_stops_by_itself_within_32_iterations_over_all_magnitudes(h, dtype):
    y, m = wide_grid(dtype)
    a, iterations = map(np.asarray, compiled_newton(h)(y, m))
    # Fewer than the limit: it stopped since it was done, and not since it was told to. 17 were the most.
    assert 1 <= iterations.min() <= iterations.max() < 24 < MAX_ITERATIONS == 32
    assert np.isfinite(a).all()


@each_h
def test_root_is_within_ulps_of_what_the_equation_determines(h, dtype):
    # F is increasing, so F(a (1 - d)) <= y <= F(a (1 + d)), computed exactly, proves that the root lies within
    # the relative distance d of a: no second solver is needed, and it is told apart from a mere small residual.
    finfo = np.finfo(dtype)
    rng = np.random.default_rng(0)
    size = 600
    # a^3 must not underflow beside y where m = 0, nor 250 digits run out.
    lowest = max(math.log10(finfo.tiny / finfo.eps), -75)
    y, m = 10 ** rng.uniform(lowest, 3, size), 10 ** rng.uniform(lowest, 3, size)
    y[::3] = 10 ** rng.uniform(-3, 2, len(y[::3]))
    m[::4] = 10 ** rng.uniform(-3, 2, len(m[::4]))
    m[1::20] = 0.0
    m[2::20] = 1.0 + 1e-3 * rng.normal(size=len(m[2::20]))
    y, m = y.astype(dtype), m.astype(dtype)
    a, _ = compiled_newton(h)(y, m)
    value, slope = EXACT_NONLINEARITIES[h]

    @exactly
    def excess(a, y, m):
        """The distance as a multiple of ``eps`` times the condition number, at least 1."""
        worst = 0.0
        for a_i, y_i, m_i in zip(a, y, m, strict=True):
            residual = a_i + (m_i - 1) * value(a_i) - y_i
            derivative = 1 + (m_i - 1) * slope(a_i)
            condition = max(Decimal(1), 2 * y_i / (derivative * a_i))
            for factor in (1, 2, 4):
                d = factor * condition * Decimal(float(finfo.eps))
                low, high = (x + (m_i - 1) * value(x) for x in (a_i * (1 - d), a_i * (1 + d)))
                if low <= y_i <= high:
                    worst = max(worst, factor)
                    break
            else:
                pytest.fail(f"y {y_i:.17g}, m {m_i:.17g}: {a_i:.17g} leaves {residual:.3g}, condition {condition:.3g}")
        return worst

    assert excess(to_exact(a), to_exact(y), to_exact(m)) <= 4


@each_h
def test_root_is_odd_in_y_and_keeps_infinities_and_nan_without_a_loop(h, dtype):
    y = np.array([0.3, 2.0, 1e-20, 30.0], dtype)
    m = np.array([0.2, 5.0, 1e-3, 0.0], dtype)
    a, _ = compiled_newton(h)(y, m)
    np.testing.assert_array_equal(compiled_newton(h)(-y, m)[0], -a)
    odd, iterations = compiled_newton(h)(np.array([np.inf, -np.inf, np.nan, 0.0], dtype), m)
    np.testing.assert_array_equal(odd, [np.inf, -np.inf, np.nan, 0.0])
    assert np.max(iterations) <= 1


@each_h
def test_derivatives_of_the_root_are_those_of_the_implicit_function(h, x64):
    solve = functools.partial(solve_preactivation, NONLINEARITIES[h])
    rng = np.random.default_rng(1)
    a, m = rng.normal(size=40) * 2, np.exp(rng.normal(size=40))
    value, slope = (jax.vmap(f) for f in (NONLINEARITIES[h].value, jax.grad(NONLINEARITIES[h].value)))
    y = a + (m - 1) * value(a)
    np.testing.assert_allclose(jax.jit(jax.vmap(solve))(y, m), a, rtol=1e-13)
    in_y, in_m = jax.jit(jax.vmap(jax.grad(solve, argnums=(0, 1))))(y, m)
    np.testing.assert_allclose(in_y, 1 / (1 + (m - 1) * slope(a)), rtol=1e-12)
    np.testing.assert_allclose(in_m, -value(a) / (1 + (m - 1) * slope(a)), rtol=1e-12, atol=1e-15)


# --- The map


@each_shape
def test_round_trips_return_to_the_event_and_the_log_dets_cancel(dim, flow_length, h, x64):
    for params, z0 in draws(dim, flow_length):
        zK, log_det = forward(h)(params, z0)
        back, inverse_log_det = inverse(h)(params, zK)
        np.testing.assert_allclose(back, z0, rtol=0, atol=1e-10)
        np.testing.assert_allclose(inverse_log_det, -log_det, rtol=0, atol=1e-10)
        z, log_det = inverse(h)(params, z0)
        again, forward_log_det = forward(h)(params, z)
        np.testing.assert_allclose(again, z0, rtol=0, atol=1e-10)
        np.testing.assert_allclose(log_det, -forward_log_det, rtol=0, atol=1e-10)


@each_shape
def test_the_pre_image_is_sent_back_by_exact_arithmetic(dim, flow_length, h, dtype):
    # The forward map is not asked about itself here: the exact one has to return the event.
    for params, zK in draws(dim, flow_length, dtype)[:3]:
        z0, log_det = inverse(h)(params, zK)
        assert z0.dtype == log_det.dtype == dtype
        exact_zK, exact_log_det = exact_forward(params, z0, h)
        tolerance = 8 * np.finfo(dtype).eps * min(amplification(params), 1e3)
        np.testing.assert_allclose(exact_zK, zK, rtol=0, atol=tolerance)
        # log_det belongs to the exact pre-image; z0 is off from it by the inverse Jacobian.
        tolerance *= math.exp(max(float(log_det), 0.0))
        np.testing.assert_allclose(log_det, -exact_log_det, rtol=0, atol=tolerance)


@each_h
def test_float32_round_trip_is_bounded_by_the_conditioning_of_the_map(h):
    for params, z0 in draws(2, 3, np.float32)[:3]:
        with precision(np.float32):
            zK, _ = forward(h)(params, z0)
            back, _ = inverse(h)(params, zK)
        with precision(np.float64):
            params, z0 = jax.tree.map(lambda leaf: leaf.astype(np.float64), (params, z0))
            _, jacobian = jacobians(planar_flow, h, jax.jacfwd)(params, z0)[0]
        smallest = np.min(np.linalg.svd(jacobian, compute_uv=False))
        tolerance = 8 * np.finfo(np.float32).eps * min(amplification(params), 1e3) / smallest
        assert tolerance < 0.01
        np.testing.assert_allclose(back, z0, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("dim", "flow_length"), [(784, 16), (16, 256), (3, 0)])
def test_round_trip_in_large_dimensions_in_long_flows_and_without_layers(dim, flow_length, x64):
    params, z0 = draw(dim, flow_length, scale=0.5, seed=3)
    zK, log_det = forward("tanh")(params, z0)
    back, inverse_log_det = inverse("tanh")(params, zK)
    np.testing.assert_allclose(back, z0, rtol=0, atol=1e-10)
    np.testing.assert_allclose(inverse_log_det, -log_det, rtol=0, atol=1e-10)
    if flow_length:
        assert np.max(np.abs(zK - z0)) > 0.1
    else:
        np.testing.assert_array_equal(back, z0)


@each_h
def test_a_flow_with_u_0_is_its_own_inverse(h, dtype):
    params, z = draw(2, 3, seed=4, dtype=dtype)
    z0, log_det = inverse(h)(params._replace(u=np.zeros_like(params.u)), z)
    np.testing.assert_array_equal(z0, z)
    assert log_det == 0.0


@given(
    u=hnp.arrays(np.float64, (3, 2), elements=st.floats(-2, 2, allow_subnormal=False)),
    w=hnp.arrays(np.float64, (3, 2), elements=st.floats(-2, 2, allow_subnormal=False)),
    b=hnp.arrays(np.float64, 3, elements=st.floats(-3, 3, allow_subnormal=False)),
    zK=hnp.arrays(np.float64, 2, elements=st.floats(-30, 30, allow_subnormal=False)),
    h=st.sampled_from(["tanh", "softsign"]),
)
def test_any_event_has_a_pre_image_that_the_flow_sends_back_to_it(u, w, b, zK, h, x64):
    params = Planar(u, w, b)
    z0, log_det = inverse(h)(params, zK)
    again, forward_log_det = forward(h)(params, z0)
    scale = (1 + np.max(np.abs(zK))) * amplification(params)
    np.testing.assert_allclose(again, zK, rtol=0, atol=1e-14 * scale)
    # Beside a hyperplane log_det magnifies rounding by 1/sqrt(m), m >= e^-8 a layer here, three layers deep.
    np.testing.assert_allclose(log_det, -forward_log_det, rtol=0, atol=1e-7)


@each_h
def test_layers_that_contract_or_stretch_extremely_are_inverted_as_well_as_they_can_be(h, dtype):
    # One layer, D = 1, w = 1: u_hat = m - 1 exactly, and the map at z0 has the slope (1 - h') + h' m.
    z0 = np.concatenate([np.linspace(-6, 6, 49), np.logspace(-6, -1, 20)])
    p, z0 = np.meshgrid([-200.0, -40.0, 40.0, 200.0], z0, indexing="ij")
    params = Planar(*(x.reshape(-1, 1, 1).astype(dtype) for x in (p, np.ones_like(p))), np.zeros((p.size, 1), dtype))

    def round_trip(params, z0):
        zK, log_det = planar_flow(params, z0, h=h)
        return zK, log_det, *inverse_planar_flow(params, zK, h=h)

    out = jax.jit(jax.vmap(round_trip))(params, z0.reshape(-1, 1).astype(dtype))
    zK, log_det, back, inverse_log_det = (np.asarray(x, np.float64).reshape(p.shape) for x in out)
    assert np.isfinite(back).all()
    assert np.isfinite(inverse_log_det).all()
    # zK is the rounded sum of z0 and h u_hat; log_det tells what one ulp there makes of z0.
    z0 = z0.astype(dtype).astype(np.float64)
    terms = 2 * np.abs(z0) + np.abs(zK) + np.maximum(p, 0)
    allowed = 4 * np.finfo(dtype).eps * (terms / np.exp(np.clip(log_det, -80.0, 0.0)) + np.abs(z0))
    decided = allowed < 0.1 * np.abs(z0)  # elsewhere zK no longer tells one z0 from the next
    assert np.all(np.sum(decided, axis=1) >= 40)
    np.testing.assert_array_less(np.abs(back - z0)[decided], allowed[decided])


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

    out = jax.jit(jax.vmap(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)))(params, zK)
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


@pytest.mark.parametrize("amortized", [False, True], ids=["shared", "amortized"])
def test_vmap_of_the_inverse_equals_stacking(amortized, x64):
    cases = [draw(2, 3, seed=seed) for seed in range(5)]
    if not amortized:
        cases = [(cases[0][0], zK) for _, zK in cases]
    params, zK = stack(cases)
    if amortized:
        z0, log_det = jax.jit(jax.vmap(inverse_planar_flow))(params, zK)
    else:
        z0, log_det = jax.jit(jax.vmap(inverse_planar_flow, in_axes=(None, 0)))(cases[0][0], zK)
    expected_z0, expected_log_det = stack([inverse("tanh")(*case) for case in cases])
    np.testing.assert_allclose(z0, expected_z0, rtol=0, atol=1e-13)
    np.testing.assert_allclose(log_det, expected_log_det, rtol=0, atol=1e-13)


@each_h
def test_a_density_evaluated_through_the_inverse_integrates_to_one(h, x64):
    params, _ = draw(2, 3, seed=7)
    axis = np.linspace(-12.0, 12.0, 401)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    function = functools.partial(inverse_planar_flow, h=h)
    z0, log_det = jax.jit(jax.vmap(function, in_axes=(None, 0)))(params, grid)
    density = np.exp(-0.5 * np.sum(np.square(z0), axis=-1) - math.log(2 * math.pi) + log_det)
    spacing = axis[1] - axis[0]
    assert np.sum(density) * spacing**2 == pytest.approx(1.0, abs=1e-6 if h == "tanh" else 1e-3)
    # It is the density of the pushed-forward samples: the same first moment.
    samples = np.random.default_rng(0).normal(size=(40_000, 2))
    pushed, _ = jax.jit(jax.vmap(functools.partial(planar_flow, h=h), in_axes=(None, 0)))(params, samples)
    mean = np.sum(density[:, None] * grid, axis=0) * spacing**2
    standard_error = np.std(pushed, axis=0) / math.sqrt(len(samples))
    np.testing.assert_array_less(np.abs(np.mean(pushed, axis=0) - mean), 5 * standard_error)


@pytest.mark.parametrize(
    "modes",
    [(jax.jacrev, jax.jacrev), (jax.jacfwd, jax.jacfwd), pytest.param((jax.jacrev,) * 3, marks=pytest.mark.slow)],
    ids=lambda modes: " ".join(mode.__name__ for mode in modes),
)
def test_derivatives_of_higher_order_are_those_of_the_implicit_function(modes, x64):
    # The truth: derivatives by autodiff through a fixed number of Newton steps, layer by layer, from the root itself.
    params, zK = draw(5, 2, scale=0.6, seed=3)
    shift = math.log(math.e - 1)

    def unrolled(t):
        z, total = zK + t[0], 0.0
        for u, w, b in reversed(list(zip(params.u * t[1], params.w + t[2], params.b, strict=True))):
            p = jnp.sum(w * u)
            m = jax.nn.softplus(p + shift)
            u_hat, y = u + (m - 1 - p) * w / jnp.sum(w * w), jnp.sum(w * z) + b
            a = jax.lax.stop_gradient(solve_preactivation(NONLINEARITIES["tanh"], y, m))
            for _ in range(3):  # right up to the seventh derivative
                a = a - (a + (m - 1) * jnp.tanh(a) - y) / (1 + (m - 1) / jnp.cosh(a) ** 2)
            z, total = z - u_hat * jnp.tanh(a), total - jnp.log(1 + (m - 1) / jnp.cosh(a) ** 2)
        return jnp.sum(z) + total

    def ours(t):
        z, log_det = inverse_planar_flow(Planar(params.u * t[1], params.w + t[2], params.b), zK + t[0])
        return jnp.sum(z) + log_det

    t = np.array([0.3, 1.1, 0.2])
    derivatives = []
    for function, by in ((ours, modes), (unrolled, (jax.jacfwd,) * len(modes))):
        for mode in by:
            function = mode(function)
        derivatives.append(jax.jit(function)(t))
    assert np.max(np.abs(derivatives[1])) > 1e-2
    assert_trees_close(*derivatives, tolerance=1e-9)


# --- Errors


def test_the_inverse_refuses_an_unknown_nonlinearity_with_the_known_ones():
    params, zK = draw(2, 3, dtype=np.float32)
    with pytest.raises(ValueError, match=r"h must be one of tanh, softsign.*got 'sigmoid'"):
        inverse_planar_flow(params, zK, h="sigmoid")
