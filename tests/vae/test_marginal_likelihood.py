"""NLL and free energy against a truth: a linear decoder with Gaussian noise, whose log p(x) is exact."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from planar_vae_jax import PlanarFlow, init_planar
from planar_vae_jax.vae.likelihoods import Gaussian, LocationScale
from planar_vae_jax.vae.objectives import free_energy, importance_nll

SHAPE, LATENT, IMAGES, REPEATS = (2, 3), 2, 3, 300
RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(0.0, 0.5, (LATENT, 6))
OFFSET = RNG.normal(0.5, 0.2, 6)
SCALE = np.exp(RNG.normal(-1.0, 0.2, 6))
X = OFFSET + RNG.normal(size=(IMAGES, LATENT)) @ WEIGHTS + SCALE * RNG.normal(size=(IMAGES, 6))
# The true posterior N(M (x - c), S), and a q_0 that is wrong by a shift, a correlation and a fifth of its width.
PRECISION = np.eye(LATENT) + (WEIGHTS / SCALE**2) @ WEIGHTS.T
COVARIANCE = np.linalg.inv(PRECISION)
MEANS = (X - OFFSET) / SCALE**2 @ WEIGHTS.T @ COVARIANCE
Q_STD, Q_LOWER = 1.2 * np.sqrt(np.diag(COVARIANCE)), 0.1


@pytest.fixture(autouse=True)
def rank_promotion():
    """For the model below, which is written as anyone would write it."""
    with jax.numpy_rank_promotion("allow"):
        yield


class LinearGaussian:
    """``x = z W + c + scale noise``: a model of one's own for the objectives."""

    likelihood = Gaussian()

    def __init__(self, full, flow_length=0):
        self.full, self.flow_length = full, flow_length

    def encode(self, images):
        pixels = images.reshape(*images.shape[:-2], 6) - jnp.asarray(OFFSET, jnp.float32)
        projection = jnp.asarray((WEIGHTS / SCALE**2).T @ COVARIANCE, jnp.float32)
        lower = jnp.asarray([[0.0, 0.0], [Q_LOWER, 0.0]], jnp.float32) if self.full else None
        layers = jax.tree.map(lambda leaf: 3.0 * leaf, init_planar(jax.random.key(0), self.flow_length, LATENT))
        return PlanarFlow(layers, pixels @ projection + 0.1, jnp.asarray(np.log(Q_STD), jnp.float32), lower=lower)

    def decode(self, z):
        location = z @ jnp.asarray(WEIGHTS, jnp.float32) + jnp.asarray(OFFSET, jnp.float32)
        return LocationScale(
            location.reshape(*z.shape[:-1], *SHAPE), jnp.asarray(np.log(SCALE).reshape(SHAPE), jnp.float32)
        )


def log_normal(x, mean, covariance):
    difference = x - mean
    _, log_det = np.linalg.slogdet(covariance)
    return -0.5 * (difference @ np.linalg.solve(covariance, difference) + log_det + len(x) * np.log(2 * np.pi))


TRUTH = np.array([-log_normal(x, OFFSET, WEIGHTS.T @ WEIGHTS + np.diag(SCALE**2)) for x in X])


def kl_of_normals(mean, covariance, other_mean, other_covariance):
    difference, precision = mean - other_mean, np.linalg.inv(other_covariance)
    log_dets = np.linalg.slogdet(other_covariance)[1] - np.linalg.slogdet(covariance)[1]
    return 0.5 * (np.trace(precision @ covariance) + difference @ precision @ difference - len(mean) + log_dets)


def q_covariance(full):
    factor = np.diag(Q_STD) + full * np.array([[0.0, 0.0], [Q_LOWER, 0.0]])
    return factor @ factor.T


def images():
    """Each image many times, ``[IMAGES REPEATS, H, W]``; not in 0..1, so an argument of what is compiled."""
    return np.repeat(X, REPEATS, axis=0).reshape(-1, *SHAPE).astype(np.float32)


def by_image(values):
    """Means and standard errors over the repetitions of each image."""
    values = np.asarray(values, np.float64).reshape(IMAGES, REPEATS)
    return values.mean(1), values.std(1) / np.sqrt(REPEATS)


@functools.partial(jax.jit, static_argnames="full")
def drawn(key, x, full):
    """Terms of every image many times, and the KL of each image's ``q_0`` in closed form."""
    model = LinearGaussian(full)
    return free_energy(model, x, key), jnp.sum(model.encode(x[::REPEATS]).base_kl, -1)


@pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full"])
def test_the_free_energy_is_above_the_nll_by_the_kl_to_the_true_posterior(full):
    terms, _ = jax.device_get(drawn(jax.random.key(0), images(), full))
    mean, error = by_image(terms.free_energy)
    gap = [kl_of_normals(m + 0.1, q_covariance(full), m, COVARIANCE) for m in MEANS]
    assert np.all(np.abs(mean - TRUTH - gap) < 5 * error + 1e-4)


@pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full"])
def test_without_a_flow_the_one_sample_kl_is_the_closed_form(full):
    terms, closed = jax.device_get(drawn(jax.random.key(1), images(), full))
    mean, error = by_image(terms.kl)
    assert np.all(np.abs(mean - closed) < 5 * error)
    truth = [kl_of_normals(m + 0.1, q_covariance(full), np.zeros(2), np.eye(2)) for m in MEANS]
    np.testing.assert_allclose(closed, truth, rtol=1e-4)


@pytest.mark.parametrize("flow_length", [0, 4])
def test_the_importance_nll_approaches_the_truth_from_above(flow_length):
    model = LinearGaussian(full=True, flow_length=flow_length)
    estimate = jax.jit(lambda key, x: importance_nll(model, x, key, samples=(1, 4, 16, 1000)).nll)
    found = [by_image(nll) for nll in np.asarray(estimate(jax.random.key(2), images()))]
    for (mean, error), (better, better_error) in itertools.pairwise(found):
        assert np.all(mean - better > -4 * np.hypot(error, better_error))
        assert np.all(better > TRUTH - 4 * better_error - 1e-4)  # above, in expectation
    assert np.mean(found[0][0]) > np.mean(found[1][0]) > np.mean(found[2][0]) > np.mean(TRUTH)
    assert np.all(np.abs(found[-1][0] - TRUTH) < 4 * found[-1][1] + 2e-3)
