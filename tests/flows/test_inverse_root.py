"""The scalar equation ``a + (m - 1) h(a) = y`` of the inverse: its solver, and the derivatives of its root."""

import functools
import math
from decimal import Decimal

import jax
import numpy as np
import pytest
from exact import EXACT_NONLINEARITIES, exactly, to_exact
from flow_cases import each_h

from planar_vae_jax.flows._inverse import MAX_ITERATIONS, newton, solve_preactivation
from planar_vae_jax.flows.nonlinearities import NONLINEARITIES

SIZE = 600  # of every batch of equations but that over all magnitudes: one program serves them


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
    # a^3 must not underflow beside y where m = 0, nor 250 digits run out.
    lowest = max(math.log10(finfo.tiny / finfo.eps), -75)
    y, m = 10 ** rng.uniform(lowest, 3, SIZE), 10 ** rng.uniform(lowest, 3, SIZE)
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
    y, m, special = (
        np.resize(np.array(four, dtype), SIZE)
        for four in ([0.3, 2.0, 1e-20, 30.0], [0.2, 5.0, 1e-3, 0.0], [np.inf, -np.inf, np.nan, 0.0])
    )
    a, _ = compiled_newton(h)(y, m)
    np.testing.assert_array_equal(compiled_newton(h)(-y, m)[0], -np.asarray(a))
    odd, iterations = map(np.asarray, compiled_newton(h)(special, m))
    np.testing.assert_array_equal(odd, special)
    assert np.max(iterations) <= 1


@each_h
def test_derivatives_of_the_root_are_those_of_the_implicit_function(h, x64):
    solve = functools.partial(solve_preactivation, NONLINEARITIES[h])
    rng = np.random.default_rng(1)
    a, m = rng.normal(size=40) * 2, np.exp(rng.normal(size=40))
    value, slope = jax.device_get(jax.jit(jax.vmap(jax.value_and_grad(NONLINEARITIES[h].value)))(a))
    root, (in_y, in_m) = jax.jit(jax.vmap(jax.value_and_grad(solve, argnums=(0, 1))))(a + (m - 1) * value, m)
    np.testing.assert_allclose(root, a, rtol=1e-13)
    np.testing.assert_allclose(in_y, 1 / (1 + (m - 1) * slope), rtol=1e-12)
    np.testing.assert_allclose(in_m, -value / (1 + (m - 1) * slope), rtol=1e-12, atol=1e-15)
