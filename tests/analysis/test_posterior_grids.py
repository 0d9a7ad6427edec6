"""The true posterior on a grid, and the densities after k layers, against other ways to the same figures."""

import jax
import numpy as np
import pytest
from vae_models import drawn

from planar_vae_jax import PlanarFlow
from planar_vae_jax.analysis import true_posterior as posteriors
from planar_vae_jax.flows.planar import Planar
from planar_vae_jax.vae import objectives

SHAPE = (3, 4)
PIXELS = np.where(np.random.default_rng(0).random(SHAPE) < 0.4, np.uint8(255), np.uint8(0))
IMAGE = np.float32(PIXELS / 255.0)


def made(flow_length, amortized):
    return drawn(SHAPE, hidden=6, latent=2, flow_length=flow_length, amortized=amortized)


@pytest.fixture(scope="module", params=[(0, False), (4, False), (4, True)], ids=["K=0", "K=4 shared", "K=4 amortised"])
def model(request):
    return made(*request.param)


@pytest.fixture(scope="module")
def grid(model):
    return posteriors.posterior_grid(model, PIXELS)


def middles(square):
    left, right, bottom, top = square
    steps = (np.arange(posteriors.SIDE) + 0.5) / posteriors.SIDE
    x, y = np.meshgrid(left + (right - left) * steps, bottom + (top - bottom) * steps)
    return np.stack([x, y], axis=-1), ((right - left) / posteriors.SIDE) ** 2


def numpy_log_joint(model, z):
    def layer(linear, x):
        return x @ np.asarray(linear.kernel[...], np.float64) + np.asarray(linear.bias[...], np.float64)

    logits = layer(model.decoder.last, np.maximum(layer(model.decoder.hidden.first, z), 0.0))
    log_likelihood = np.where(PIXELS.ravel() == 255, -np.logaddexp(0, -logits), -np.logaddexp(0, logits)).sum(-1)
    return log_likelihood - 0.5 * np.sum(z**2, -1) - np.log(2 * np.pi)


def test_the_joint_density_is_prior_times_likelihood():
    model = made(4, True)
    z = np.random.default_rng(1).normal(size=(50, 2))
    found = jax.jit(objectives.log_joint)(model, IMAGE, np.float32(z))
    np.testing.assert_allclose(found, numpy_log_joint(model, z), rtol=1e-5)


def test_the_true_posterior_is_normalised(model, grid):
    axis = np.linspace(-8.0, 8.0, 401)
    z = np.stack(np.meshgrid(axis, axis), axis=-1)
    nll = -np.log(np.exp(numpy_log_joint(model, z)).sum() * 0.04**2)
    assert grid.nll == pytest.approx(nll, abs=1e-4)
    points, cell = middles(grid.near)
    np.testing.assert_allclose(grid.truth, np.exp(numpy_log_joint(model, points) + nll), rtol=1e-3)
    assert 0.98 < cell * grid.truth.sum() < 1.0005


def test_all_densities_lie_in_their_squares(model, grid):
    flow_length = model.posterior.flow_length
    assert min(grid.layers) == 0
    assert list(grid.layers)[-1] == flow_length
    assert list(grid.kl) == list(grid.layers)
    for square, density in ((grid.near, grid.approximation), *((grid.far, q) for q in grid.layers.values())):
        assert 0.99 < middles(square)[1] * density.sum() < 1.001
        assert square[1] - square[0] == pytest.approx(square[3] - square[2])


@jax.jit
def log_prob_of_layers(layers, mean, log_std, points):
    return PlanarFlow(layers, mean, log_std).log_prob(points)


def test_the_density_after_k_layers_is_that_of_a_flow_of_k_layers(model, grid):
    posterior = jax.jit(lambda model, image: model.encode(image))(model, IMAGE)
    points = np.float32(middles(grid.far)[0])
    for k in list(grid.layers)[::2]:  # the base, half of the layers, all of them
        first = Planar(*(np.asarray(leaf)[:k] for leaf in posterior.params))
        expected = np.exp(log_prob_of_layers(first, posterior.mean, posterior.log_std, points))
        np.testing.assert_allclose(grid.layers[k], expected, rtol=2e-3, atol=1e-6)


def test_the_kl_is_free_energy_less_nll(model, grid):
    """By samples, the way the objectives go."""
    draw = jax.jit(lambda model, key: objectives.sampled_terms(model, IMAGE[None], key, 100_000).free_energy)
    energies = np.asarray(draw(model, jax.random.key(0)), np.float64)
    mean, error = np.mean(energies), np.std(energies) / np.sqrt(len(energies))
    assert abs(grid.kl[model.posterior.flow_length] - (mean - grid.nll)) < 5 * error + 1e-4
    assert min(grid.kl.values()) > 0.0


def test_a_thin_density_does_not_slip_through_the_grid():
    """q a thousand times thinner than the prior: its KL is in closed form where the decoder ignores z."""
    model = jax.tree.map(np.zeros_like, made(0, False))
    model.posterior.log_std.bias[...] = np.full(2, -7.0, np.float32)
    model.posterior.mean.bias[...] = np.array([1.0, -2.0], np.float32)
    grid = posteriors.posterior_grid(model, PIXELS)
    log_std = 10.0 * np.tanh(-0.7)
    assert grid.kl[0] == pytest.approx(2 * (0.5 * np.exp(2 * log_std) - 0.5 - log_std) + 2.5, abs=1e-3)
    assert grid.nll == pytest.approx(12 * np.log(2.0), abs=1e-3)


def test_a_model_of_another_size_is_refused():
    model = drawn(SHAPE, hidden=2, latent=3, flow_length=1)
    with pytest.raises(ValueError, match=r"latent=2.*got latent=3"):
        posteriors.posterior_grid(model, PIXELS)


def test_the_layers_shown_begin_with_the_base_and_end_with_the_flow():
    assert posteriors.shown_layers(0) == [0]
    assert posteriors.shown_layers(3) == [0, 1, 2, 3]
    assert posteriors.shown_layers(80) == [0, 20, 40, 60, 80]
