"""Likelihoods against sums, integrals and exact logarithms by numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from planar_vae_jax.vae.likelihoods import (
    LIKELIHOODS,
    Bernoulli,
    DiscretizedLogistic,
    Gaussian,
    LocationScale,
    bounded_log_scale,
    measured,
)

PIXELS = np.arange(256) / 255.0


def one_pixel(likelihood, x, location, scale):
    """``log p`` of each x, a pixel alone."""
    parameters = LocationScale(jnp.full((1,), location, jnp.float32), jnp.log(jnp.full((1,), scale, jnp.float32)))
    return np.asarray(likelihood.log_prob(jnp.asarray(x, jnp.float32)[:, None], parameters), np.float64)


def log_mass(location, scale):
    """Log-masses of the 256 bins, in float64, each from the side where nothing cancels."""
    upper, lower = (PIXELS + 0.5 / 255 - location) / scale, (PIXELS - 0.5 / 255 - location) / scale
    upper[-1], lower[0] = np.inf, -np.inf
    flip = lower + upper > 0  # sigmoid(a) - sigmoid(b) = sigmoid(-b) - sigmoid(-a)
    upper, lower = np.where(flip, -lower, upper), np.where(flip, -upper, lower)
    log_upper, log_lower = -np.logaddexp(0, -upper), -np.logaddexp(0, -lower)
    return log_upper + np.log(-np.expm1(np.where(np.isinf(lower), -np.inf, log_lower - log_upper)))


@pytest.mark.parametrize("location", [-3.0, 0.0, 0.001, 0.5, 0.77, 1.0, 5.0])
@pytest.mark.parametrize("scale", [0.1 / 255, 1 / 255, 0.1, 3.0])
def test_the_discretised_logistic_is_a_distribution_over_levels(location, scale):
    found = one_pixel(DiscretizedLogistic(), PIXELS, location, scale)
    assert np.all(found <= 0.0)
    assert np.exp(found).sum() == pytest.approx(1.0, abs=1e-4 if scale < 0.01 else 1e-5)
    # An argument of 1e4 has an absolute rounding error of 1e-3 in float32.
    np.testing.assert_allclose(found, log_mass(location, scale), rtol=2e-5, atol=2e-4)


def test_far_from_its_location_the_logistic_has_a_value_and_a_gradient():
    def value(location, log_scale):
        return DiscretizedLogistic().log_prob(jnp.array([0.5019608]), LocationScale(location[None], log_scale[None]))

    for location in (-1e3, 1e3):
        for log_scale in (-7.8, 0.0, 7.8):
            found, slopes = jax.value_and_grad(value, argnums=(0, 1))(jnp.float32(location), jnp.float32(log_scale))
            assert np.isfinite(found)
            assert np.all(np.isfinite(slopes))
    near, slope = jax.value_and_grad(value)(jnp.float32(1e3), jnp.float32(0.0))
    assert float(slope) == pytest.approx(-1.0, rel=1e-5)  # the tail is exponential: a level of gradient stays
    assert float(near) == pytest.approx(-999.5 - np.log(255), rel=1e-4)


def test_the_mean_of_the_logistic_is_that_of_its_levels():
    for location in (-0.2, 0.1, 0.5, 1.3):
        for scale in (0.001, 0.05, 0.7):
            parameters = LocationScale(jnp.full((2, 3), location), jnp.full((3,), np.log(scale)))
            mean = DiscretizedLogistic().mean(parameters)
            assert mean.shape == (2, 3)
            np.testing.assert_allclose(mean, (np.exp(log_mass(location, scale)) * PIXELS).sum(), atol=1e-3)


def test_the_gaussian_is_a_density():
    x = np.linspace(-10.0, 10.0, 20_001)
    found = one_pixel(Gaussian(), x, 0.3, 0.5)
    assert np.exp(found).sum() * (x[1] - x[0]) == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_allclose(found, -0.5 * ((x - 0.3) / 0.5) ** 2 - np.log(0.5) - 0.5 * np.log(2 * np.pi), rtol=1e-5)
    np.testing.assert_array_equal(
        Gaussian().mean(LocationScale(jnp.array([-1.0, 0.3, 2.0]), jnp.zeros(3))), [0, np.float32(0.3), 1]
    )


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_pixels_are_summed_and_images_are_not(name):
    x = jnp.round(255 * jax.random.uniform(jax.random.key(0), (4, 6))) / 255
    location = jax.random.normal(jax.random.key(1), (5, 4, 6))
    log_scale = jax.random.normal(jax.random.key(2), (6,)) - 1.0
    likelihood = LIKELIHOODS[name]

    def parameters(index):
        plain = location[index]
        return plain if name == "bernoulli" else LocationScale(plain, log_scale[index[-1]])

    whole = likelihood.log_prob(x, parameters((..., slice(None))))
    assert whole.shape == (5, 4)
    parts = [likelihood.log_prob(x[2, p : p + 1], parameters((3, 2, slice(p, p + 1)))) for p in range(6)]
    np.testing.assert_allclose(whole[3, 2], sum(parts), rtol=1e-5)
    mean = likelihood.mean(parameters((..., slice(None))))
    assert mean.shape == location.shape
    assert jnp.all((mean >= 0.0) & (mean <= 1.0))


def test_scales_are_bounded_whatever_the_weight():
    for name in ("logistic", "gaussian"):
        smallest = LIKELIHOODS[name].smallest_scale
        found = np.exp(bounded_log_scale(jnp.array([-1e9, -1.0, 0.0, 1e9]), smallest))
        np.testing.assert_allclose(found[[0, 2, 3]], [smallest, 1.0, 1.0 / smallest], rtol=1e-5)
        assert found[1] == pytest.approx(np.exp(-1.0), rel=0.02)


def test_it_is_told_what_nats_are_nats_of():
    assert measured(LIKELIHOODS["bernoulli"], "static") == "binary images"
    assert "no likelihood" in measured(LIKELIHOODS["bernoulli"], "none")
    assert measured(LIKELIHOODS["logistic"], "none") == "uint8 images"
    assert "density" in measured(LIKELIHOODS["gaussian"], "none")
    grey = Bernoulli().log_prob(jnp.array([0.5]), jnp.array([0.0]))
    assert float(grey) == pytest.approx(-np.log(2))
