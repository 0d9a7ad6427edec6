"""Log-densities against formulas written in another way, and at extreme arguments."""

import functools
import itertools
import math
from decimal import Decimal
from statistics import NormalDist

import jax
import numpy as np
import pytest
from exact import exactly, to_exact
from helpers import grid, normal_log_prob
from hypothesis import given
from hypothesis import strategies as st

from planar_vae_jax.flows.distribution import bernoulli_log_prob, standard_normal_log_prob
from planar_vae_jax.flows.targets import _mixture_log_prob as normal_mixture_log_prob


def rtol(dtype):
    return 16 * float(np.finfo(dtype).eps)


# --- Normal


normal_and_gradients = jax.jit(jax.value_and_grad(normal_log_prob, argnums=(0, 1, 2)))


def test_standard_normal_is_the_product_of_its_one_dimensional_densities(dtype):
    z = np.array([0.0, -1.5, 3.0, 0.25], dtype)
    expected = sum(math.log(NormalDist().pdf(float(x))) for x in z)
    log_prob = standard_normal_log_prob(z)
    assert log_prob.dtype == dtype
    assert float(log_prob) == pytest.approx(expected, rel=rtol(dtype))


def test_normal_is_the_product_of_one_dimensional_densities_with_their_own_mean_and_deviation(dtype):
    z, mean = np.array([0.3, -1.5, 3.0], dtype), np.array([1.0, -2.0, 2.5], dtype)
    std = np.array([0.5, 2.0, 0.125], dtype)
    expected = sum(math.log(NormalDist(m, s).pdf(x)) for x, m, s in zip(*map(np.float64, (z, mean, std)), strict=True))
    assert float(normal_log_prob(z, mean, np.log(std))) == pytest.approx(expected, rel=rtol(dtype))


def test_normal_integrates_to_one(x64):
    points, area = grid(-12.0, 12.0, 241)
    mean, log_std = np.array([0.7, -1.1]), np.array([0.4, -0.9])
    log_prob = jax.jit(normal_log_prob)(points, mean, log_std)
    assert np.sum(np.exp(log_prob)) * area == pytest.approx(1.0, abs=1e-12)


def test_gradients_of_the_normal_are_the_score(dtype):
    z, mean, log_std = (np.array(x, dtype) for x in ([0.3, -1.5], [1.0, -2.0], [0.5, -3.0]))
    _, (in_z, in_mean, in_log_std) = normal_and_gradients(z, mean, log_std)
    score = (np.float64(z) - mean) * np.exp(-2 * np.float64(log_std))
    np.testing.assert_allclose(in_z, -score, rtol=rtol(dtype))
    np.testing.assert_allclose(in_mean, score, rtol=rtol(dtype))
    np.testing.assert_allclose(in_log_std, score * (np.float64(z) - mean) - 1, rtol=rtol(dtype))


@pytest.mark.parametrize("log_std", [-40.0, 40.0])
def test_normal_is_finite_for_deviations_of_e_to_the_40(log_std, dtype):
    # At the mean only the normaliser is left.
    x, log_stds = np.full(2, 0.5, dtype), np.full(2, log_std, dtype)
    value, gradients = normal_and_gradients(x, x, log_stds)
    assert float(value) == pytest.approx(-2 * log_std - math.log(2 * math.pi), rel=rtol(dtype))
    np.testing.assert_array_equal(gradients[0], np.zeros(2))
    np.testing.assert_array_equal(gradients[2], -np.ones(2))


# --- Bernoulli


bernoulli = jax.jit(bernoulli_log_prob, static_argnames="axes")
bernoulli_and_gradient = jax.jit(jax.value_and_grad(bernoulli_log_prob, argnums=1))


@exactly
def exact_bernoulli(x, logits):
    """``log(p^x (1 - p)^(1 - x))`` through probabilities, with digits enough for them."""
    total = Decimal(0)
    for x_i, l_i in zip(x.ravel(), logits.ravel(), strict=True):
        p = 1 / (1 + (-l_i).exp())
        total += x_i * p.ln() + (1 - x_i) * (1 / (1 + l_i.exp())).ln()
    return float(total)


def test_bernoulli_is_the_log_of_the_product_of_probabilities(dtype):
    x = np.array([[1, 0, 1, 0], [0, 1, 1, 0]], dtype)
    logits = np.array([[0.0, 0.3, -4.0, 7.0], [-30.0, 60.0, 1e-3, 88.9]], dtype)
    log_prob = bernoulli(x, logits, axes=(-2, -1))
    assert log_prob.shape == ()
    assert log_prob.dtype == dtype
    assert float(log_prob) == pytest.approx(exact_bernoulli(to_exact(x), to_exact(logits)), rel=rtol(dtype))


def test_bernoulli_probabilities_of_all_outcomes_sum_to_one(x64):
    outcomes = np.array(list(itertools.product([0.0, 1.0], repeat=4)))
    logits = np.array([0.3, -2.0, 5.0, 0.0])
    log_probs = bernoulli(outcomes, logits)
    assert np.sum(np.exp(log_probs)) == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize(
    ("x", "logit", "value", "gradient"),
    [
        (1.0, 1e4, 0.0, 0.0),
        (0.0, 1e4, -1e4, -1.0),
        (1.0, -1e4, -1e4, 1.0),
        (0.0, -1e4, 0.0, 0.0),
        (1.0, -100.0, -100.0, 1.0),
        (0.5, 1e4, -5e3, -0.5),
        (1.0, 0.0, -math.log(2.0), 0.5),
    ],
)
def test_bernoulli_is_exact_in_value_and_gradient_for_saturated_logits(x, logit, value, gradient, dtype):
    # Through probabilities these are NaN or infinite from a logit of 88 in float32.
    actual, (slope,) = map(np.asarray, bernoulli_and_gradient(np.array([x], dtype), np.array([logit], dtype)))
    np.testing.assert_allclose((actual, slope), (value, gradient), rtol=rtol(dtype), atol=1e-30)


@given(x=st.sampled_from([0.0, 0.25, 1.0]), logit=st.floats(-700.0, 700.0, allow_subnormal=False))
def test_bernoulli_of_any_logit_is_that_of_exact_arithmetic(x, logit, x64):
    expected = exact_bernoulli(to_exact([x]), to_exact([logit]))
    actual = float(bernoulli(np.array([x]), np.array([logit])))
    assert actual == pytest.approx(expected, rel=1e-13, abs=1e-13 * max(1.0, abs(logit)))


def test_grey_levels_are_scored_best_by_their_own_logit(x64):
    x = np.array([0.1, 0.5, 0.93])
    best = np.log(x) - np.log1p(-x)
    value, gradient = bernoulli_and_gradient(x, best)
    np.testing.assert_allclose(gradient, np.zeros(3), atol=1e-15)
    entropy = -np.sum(x * np.log(x) + (1 - x) * np.log1p(-x))
    assert float(value) == pytest.approx(-entropy, rel=1e-14)


# --- Mixture


mixture = jax.jit(normal_mixture_log_prob, static_argnames="std")
MEANS = np.array([[-1.5, -1.5], [1.5, 1.5], [0.0, 2.0]])


def test_mixture_is_the_mean_of_its_components_densities(dtype):
    std = 0.8
    z = np.array([0.4, -1.1], dtype)
    densities = [
        NormalDist(float(m[0]), std).pdf(float(z[0])) * NormalDist(float(m[1]), std).pdf(float(z[1])) for m in MEANS
    ]
    log_prob = mixture(z, MEANS.astype(dtype), std)
    assert log_prob.dtype == dtype
    assert float(log_prob) == pytest.approx(math.log(np.mean(densities)), rel=rtol(dtype))


def test_mixture_of_one_component_is_a_normal(x64):
    z, mean = np.array([0.4, -1.1, 2.0]), np.array([1.0, 2.0, -0.5])
    expected, _ = normal_and_gradients(z, mean, np.full(3, math.log(0.3)))
    assert float(mixture(z, mean[None], 0.3)) == pytest.approx(float(expected), rel=1e-14)


def test_mixture_integrates_to_one(x64):
    points, area = grid(-9.0, 9.0, 241)
    log_prob = mixture(points, MEANS, 0.6)
    assert np.sum(np.exp(log_prob)) * area == pytest.approx(1.0, abs=1e-12)


def test_mixture_is_finite_where_every_component_underflows_and_points_to_the_nearest(dtype):
    # 500 deviations away; the densities themselves are exp(-125,000).
    z = np.array([500.0, 500.0], dtype)
    function = jax.jit(jax.value_and_grad(lambda z: normal_mixture_log_prob(z, MEANS.astype(dtype), 1.0)))
    value, gradient = function(z)
    nearest = MEANS[1]
    expected = -0.5 * np.sum((z - nearest) ** 2) - math.log(2 * math.pi) - math.log(3)
    assert float(value) == pytest.approx(expected, rel=rtol(dtype))
    np.testing.assert_allclose(gradient, nearest - z, rtol=rtol(dtype))


def test_gradient_of_the_mixture_is_the_responsibility_weighted_score(x64):
    z, std = np.array([0.4, -1.1]), 0.8
    densities = np.exp(-0.5 * np.sum((z - MEANS) ** 2, axis=1) / std**2)
    weights = densities / np.sum(densities)
    expected = np.sum(weights[:, None] * (MEANS - z), axis=0) / std**2
    gradient = jax.jit(jax.grad(normal_mixture_log_prob), static_argnames="std")(z, MEANS, std=std)
    np.testing.assert_allclose(gradient, expected, rtol=1e-13)


# --- Batches


def test_every_density_of_a_batch_is_that_of_its_events(dtype):
    rng = np.random.default_rng(0)
    z, mean, log_std = (rng.normal(size=shape).astype(dtype) for shape in ((5, 4, 3), (4, 3), (3,)))
    logits, x = z, (mean > 0).astype(dtype)
    events = [(i, j) for i in range(5) for j in range(4)]
    half, minus_one = dtype(0.5), dtype(-1)
    for density, of_batch, of_event in [
        (standard_normal_log_prob, (z,), lambda i, j: (z[i, j],)),
        (normal_log_prob, (z, mean, log_std), lambda i, j: (z[i, j], mean[j], log_std)),
        (normal_log_prob, (z, half, minus_one), lambda i, j: (z[i, j], half, minus_one)),
        (bernoulli_log_prob, (x, logits), lambda i, j: (x[j], logits[i, j])),
        (functools.partial(normal_mixture_log_prob, std=0.8), (z, mean), lambda i, j: (z[i, j], mean)),
    ]:
        compiled = jax.jit(density)
        batch = np.asarray(compiled(*of_batch))
        assert (batch.shape, batch.dtype) == ((5, 4), dtype)
        np.testing.assert_allclose(batch.ravel(), [compiled(*of_event(*event)) for event in events], rtol=rtol(dtype))
    of_images = np.sum(np.asarray(bernoulli(x, logits)), axis=-1)
    np.testing.assert_allclose(bernoulli(x, logits, axes=(-2, -1)), of_images, rtol=rtol(dtype))
