"""The inverse flow: its round trip, in exact arithmetic and at extremes."""

import functools
import math

import jax
import numpy as np
import pytest
from flow_cases import compiled, each_h, exact_values, with_jacobian
from helpers import draw, grid, precision, stack
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from inverse_cases import amplification, draws, each_shape, inverse

from planar_vae_jax import Planar, inverse_planar_flow, planar_flow


@each_shape
def test_round_trips_return_to_the_event_and_the_log_dets_cancel(dim, flow_length, h, x64):
    for params, z0 in draws(dim, flow_length):
        zK, log_det = compiled(h, "scan")(params, z0)
        back, inverse_log_det = inverse(h)(params, zK)
        np.testing.assert_allclose(back, z0, rtol=0, atol=1e-10)
        np.testing.assert_allclose(inverse_log_det, -log_det, rtol=0, atol=1e-10)
        z, log_det = inverse(h)(params, z0)
        again, forward_log_det = compiled(h, "scan")(params, z)
        np.testing.assert_allclose(again, z0, rtol=0, atol=1e-10)
        np.testing.assert_allclose(log_det, -forward_log_det, rtol=0, atol=1e-10)


@each_shape
def test_the_pre_image_is_sent_back_by_exact_arithmetic(dim, flow_length, h, dtype):
    # The forward map is not asked about itself here: the exact one has to return the event.
    for params, zK in draws(dim, flow_length, dtype)[:3]:
        z0, log_det = inverse(h)(params, zK)
        assert z0.dtype == log_det.dtype == dtype
        exact_zK, exact_log_det = exact_values(params, z0, h)
        tolerance = 8 * np.finfo(dtype).eps * min(amplification(params), 1e3)
        np.testing.assert_allclose(exact_zK, zK, rtol=0, atol=tolerance)
        # log_det belongs to the exact pre-image; z0 is off from it by the inverse Jacobian.
        tolerance *= math.exp(max(float(log_det), 0.0))
        np.testing.assert_allclose(log_det, -exact_log_det, rtol=0, atol=tolerance)


@each_h
def test_float32_round_trip_is_bounded_by_the_conditioning_of_the_map(h):
    for params, z0 in draws(2, 3, np.float32)[:3]:
        with precision(np.float32):
            zK, _ = compiled(h, "scan")(params, z0)
            back, _ = inverse(h)(params, zK)
        with precision(np.float64):
            params, z0 = jax.tree.map(lambda leaf: leaf.astype(np.float64), (params, z0))
            _, _, jacobian = with_jacobian(h, "scan")(params, z0)
        smallest = np.min(np.linalg.svd(jacobian, compute_uv=False))
        tolerance = 8 * np.finfo(np.float32).eps * min(amplification(params), 1e3) / smallest
        assert tolerance < 0.01
        np.testing.assert_allclose(back, z0, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("dim", "flow_length"), [(784, 16), (16, 256), (3, 0)])
def test_round_trip_in_large_dimensions_in_long_flows_and_without_layers(dim, flow_length, x64):
    params, z0 = draw(dim, flow_length, scale=0.5, seed=3)
    zK, log_det = compiled("tanh", "scan")(params, z0)
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
    again, forward_log_det = compiled(h, "scan")(params, z0)
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
    points, area = grid(-12.0, 12.0, 241)
    function = functools.partial(inverse_planar_flow, h=h)
    z0, log_det = jax.device_get(jax.jit(jax.vmap(function, in_axes=(None, 0)))(params, points))
    density = np.exp(-0.5 * np.sum(np.square(z0), axis=-1) - math.log(2 * math.pi) + log_det)
    assert np.sum(density) * area == pytest.approx(1.0, abs=1e-6 if h == "tanh" else 1e-3)
    # It is the density of the pushed-forward samples: the same first moment.
    samples = np.random.default_rng(0).normal(size=(40_000, 2))
    pushed, _ = jax.jit(jax.vmap(functools.partial(planar_flow, h=h), in_axes=(None, 0)))(params, samples)
    pushed = np.asarray(pushed)
    mean = np.sum(density[:, None] * points, axis=0) * area
    standard_error = np.std(pushed, axis=0) / math.sqrt(len(samples))
    np.testing.assert_array_less(np.abs(np.mean(pushed, axis=0) - mean), 5 * standard_error)


def test_the_inverse_refuses_an_unknown_nonlinearity_with_the_known_ones():
    params, zK = draw(2, 3, dtype=np.float32)
    with pytest.raises(ValueError, match=r"h must be one of tanh, softsign.*got 'sigmoid'"):
        inverse_planar_flow(params, zK, h="sigmoid")
