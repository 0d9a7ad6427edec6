"""Free energy and importance-sampled NLL against quadrature in a model with one latent dimension."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from planar_vae_jax.flows import inverse_planar_flow, planar_flow
from planar_vae_jax.models import VAE, functional
from planar_vae_jax.objectives import free_energy, importance_nll

PIXELS = 6
GRID = np.linspace(-20.0, 20.0, 20_001)
STEP = GRID[1] - GRID[0]
DRAWS = 200_000


@pytest.fixture(scope="module", params=[0, 3], ids=["K=0", "K=3"])
def model(request):
    """A VAE with weights large enough that q, the flow and the decoder all matter."""
    init, bind = functional(lambda rngs: VAE(PIXELS, hidden=5, latent=1, flow_length=request.param, rngs=rngs))
    params = init(jax.random.key(4))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    return bind(
        tree.unflatten(
            [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
        )
    )


X = jnp.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])


def log_joint(model):
    """``log p(x, z)`` on the grid, by plain numpy."""
    logits = np.asarray(jax.vmap(model.decode)(jnp.asarray(GRID[:, None], jnp.float32)), np.float64)
    log_likelihood = np.where(np.asarray(X) == 1.0, -np.logaddexp(0, -logits), -np.logaddexp(0, logits)).sum(1)
    return log_likelihood, -0.5 * GRID**2 - 0.5 * np.log(2 * np.pi)


def log_posterior(model):
    """``log q(z_K|x)`` on the grid, through the inverse of the flow."""
    mean, log_std, flow = model.encode(X)
    z0, log_det = jax.vmap(lambda z: inverse_planar_flow(flow, z))(jnp.asarray(GRID[:, None], jnp.float32))
    standard = (np.asarray(z0[:, 0], np.float64) - float(mean[0])) / np.exp(float(log_std[0]))
    return -0.5 * standard**2 - 0.5 * np.log(2 * np.pi) - float(log_std[0]) + np.asarray(log_det, np.float64)


def test_terms_agree_with_quadrature(model):
    log_likelihood, log_prior = log_joint(model)
    log_q = log_posterior(model)
    q = np.exp(log_q) * STEP
    assert q.sum() == pytest.approx(1.0, abs=1e-4)
    keys = jax.random.split(jax.random.key(0), DRAWS)
    terms = jax.jit(jax.vmap(lambda key: free_energy(model, X, key)))(keys)
    for name, draws, truth in (
        ("reconstruction", terms.reconstruction, -(q * log_likelihood).sum()),
        ("kl", terms.kl, (q * (log_q - log_prior)).sum()),
        ("log_prior", terms.log_prior, (q * log_prior).sum()),
    ):
        error = 5.0 * float(jnp.std(draws)) / np.sqrt(DRAWS) + 1e-4
        assert float(jnp.mean(draws)) == pytest.approx(truth, abs=error), name
    np.testing.assert_allclose(terms.free_energy, terms.kl + terms.reconstruction, rtol=1e-6)


def test_importance_sampling_finds_the_marginal_likelihood_below_the_free_energy(model):
    log_likelihood, log_prior = log_joint(model)
    truth = -np.log(np.sum(np.exp(log_likelihood + log_prior)) * STEP)
    nll, effective = jax.jit(lambda key: importance_nll(model, X, key, samples=DRAWS))(jax.random.key(1))
    assert 100 < effective < DRAWS
    assert float(nll) == pytest.approx(truth, abs=5.0 / np.sqrt(float(effective)))
    keys = jax.random.split(jax.random.key(0), 1000)
    bound = jnp.mean(jax.vmap(lambda key: free_energy(model, X, key).free_energy)(keys))
    assert float(bound) > truth


def test_one_importance_sample_is_the_free_energy(model):
    key = jax.random.key(2)
    nll, effective = importance_nll(model, X, key, samples=1)
    terms = free_energy(model, X, jax.random.split(key, 1)[0])
    assert float(nll) == pytest.approx(float(terms.free_energy), rel=1e-6)
    assert float(effective) == pytest.approx(1.0, rel=1e-6)


def test_annealings_weight_the_terms_that_their_papers_say(model):
    terms = free_energy(model, X, jax.random.key(0))
    log_q = float(terms.log_q0 - terms.log_det)
    log_prior, log_likelihood = float(terms.log_prior), float(terms.log_likelihood)
    assert float(terms.annealed(1.0, 1.0)) == pytest.approx(float(terms.free_energy), rel=1e-6)
    assert float(terms.annealed(0.3, 1.0)) == pytest.approx(log_q - 0.3 * (log_prior + log_likelihood), rel=1e-5)
    assert float(terms.annealed(1.0, 0.3)) == pytest.approx(0.3 * (log_q - log_prior) - log_likelihood, rel=1e-5)


def test_squared_error_is_summed_over_pixels_of_the_mean_image(model):
    key = jax.random.key(0)
    terms = free_energy(model, X, key)
    mean, log_std, flow = model.encode(X)
    z, _ = planar_flow(flow, mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape))
    image = 1.0 / (1.0 + np.exp(-np.asarray(model.decode(z), np.float64)))
    assert float(terms.squared_error) == pytest.approx(((np.asarray(X) - image) ** 2).sum(), rel=1e-5)
