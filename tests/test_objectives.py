"""Free energy and importance-sampled NLL against quadrature in a model with one latent dimension."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import weights

from planar_vae_jax import planar_flow
from planar_vae_jax.binarization import binarize
from planar_vae_jax.losses import vae_loss
from planar_vae_jax.models import VAE
from planar_vae_jax.objectives import free_energy, importance_nll, noise, sampled_terms

GRID = np.linspace(-20.0, 20.0, 20_001)
STEP = GRID[1] - GRID[0]
DRAWS = 200_000
X = jnp.array([[[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]]])  # [1, H, W]


@pytest.fixture(scope="module", params=[0, 3], ids=["K=0", "K=3"])
def model(request):
    """A VAE with weights large enough that q, the flow and the decoder all matter."""
    vae = VAE((2, 3), hidden=5, latent=1, flow_length=request.param)
    return vae.bind(weights(vae, seed=1))


def nll_of(model, images, keys, **options):
    return jax.jit(lambda images, keys: importance_nll(model, images, keys, **options))(images, keys)


def terms_of(model, images, keys):
    return jax.jit(lambda images, keys: free_energy(model, images, keys))(images, keys)


def many(size):
    return jnp.broadcast_to(X, (size, *X.shape[1:]))


def log_joint(model):
    """``log p(x|z)`` and ``log p(z)`` on the grid, by plain numpy."""
    logits = np.asarray(model.decode(jnp.asarray(GRID[:, None], jnp.float32)), np.float64)
    log_likelihood = np.where(np.asarray(X) == 1.0, -np.logaddexp(0, -logits), -np.logaddexp(0, logits)).sum((1, 2))
    return log_likelihood, -0.5 * GRID**2 - 0.5 * np.log(2 * np.pi)


def log_posterior(model):
    """``log q(z_K|x)`` on the grid, through the inverse of the flow."""
    posterior = model.encode(X[0])
    return np.asarray(posterior.log_prob(jnp.asarray(GRID[:, None], jnp.float32)), np.float64)


def test_terms_agree_with_quadrature(model):
    log_likelihood, log_prior = log_joint(model)
    log_q = log_posterior(model)
    q = np.exp(log_q) * STEP
    assert q.sum() == pytest.approx(1.0, abs=1e-4)
    terms = jax.jit(lambda key: free_energy(model, many(DRAWS), key))(jax.random.key(0))
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
    (nll,), (effective,) = nll_of(model, X, jax.random.key(1), samples=DRAWS, chunk=20_000)
    assert 100 < effective < DRAWS
    assert float(nll) == pytest.approx(truth, abs=5.0 / np.sqrt(float(effective)))
    bound = jnp.mean(terms_of(model, many(1000), jax.random.key(0)).free_energy)
    assert float(bound) > truth


def test_one_importance_sample_is_the_free_energy(model):
    keys = jax.random.split(jax.random.key(2), 5)
    nll, effective = nll_of(model, many(5), keys, samples=1)
    sample_keys = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys)
    np.testing.assert_allclose(nll, terms_of(model, many(5), sample_keys).free_energy, rtol=1e-6)
    np.testing.assert_allclose(effective, np.ones(5), rtol=1e-6)


def test_samples_are_the_same_whatever_the_chunk_and_the_batch(model):
    keys = jax.random.split(jax.random.key(3), 4)
    whole = nll_of(model, many(4), keys, samples=50)
    for chunk in (1, 7, 49):
        for mine, theirs in zip(nll_of(model, many(4), keys, samples=50, chunk=chunk), whole, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5)
    alone = nll_of(model, X, keys[2:3], samples=50)
    np.testing.assert_allclose(alone.nll[0], whole.nll[2], rtol=1e-6)


def test_with_a_key_an_image_the_terms_do_not_depend_on_the_batch(model):
    keys = jax.random.split(jax.random.key(3), 4)
    together, alone = terms_of(model, many(4), keys), terms_of(model, X, keys[2:3])
    np.testing.assert_allclose(together.free_energy[2], alone.free_energy[0], rtol=1e-6)
    assert len(set(np.asarray(together.free_energy).tolist())) == 4


def test_annealings_weight_the_terms_that_their_papers_say(model):
    terms = jax.tree.map(lambda leaf: leaf[0], terms_of(model, X, jax.random.key(0)))
    log_q = float(terms.log_q0 - terms.log_det)
    log_prior, log_likelihood = float(terms.log_prior), float(terms.log_likelihood)
    assert float(terms.annealed(1.0, 1.0)) == pytest.approx(float(terms.free_energy), rel=1e-6)
    assert float(terms.annealed(0.3, 1.0)) == pytest.approx(log_q - 0.3 * (log_prior + log_likelihood), rel=1e-5)
    assert float(terms.annealed(1.0, 0.3)) == pytest.approx(0.3 * (log_q - log_prior) - log_likelihood, rel=1e-5)


def test_squared_error_is_summed_over_pixels_of_the_mean_image(model):
    key = jax.random.key(0)
    posterior = model.encode(X)
    noise = jax.random.normal(key, posterior.mean.shape)
    z, _ = planar_flow(posterior.params, posterior.mean + jnp.exp(posterior.log_std) * noise)
    image = 1.0 / (1.0 + np.exp(-np.asarray(model.decode(z), np.float64)))
    error = terms_of(model, X, key).squared_error[0]
    assert float(error) == pytest.approx(((np.asarray(X) - image) ** 2).sum(), rel=1e-5)


# --- The importance bound as what is trained


def test_the_importance_bound_of_one_sample_is_the_free_energy(model):
    key = jax.random.key(2)
    terms = jax.jit(lambda key: sampled_terms(model, many(5), key, 1))(key)
    np.testing.assert_allclose(terms.objective("iwae"), terms_of(model, many(5), key).free_energy, rtol=1e-6)


def test_the_importance_bound_is_minus_the_logarithm_of_the_mean_weight(model):
    terms = jax.jit(lambda key: sampled_terms(model, many(3), key, 7))(jax.random.key(2))
    assert terms.kl.shape == (7, 3)
    weights = np.exp(-np.asarray(terms.free_energy, np.float64))
    np.testing.assert_allclose(terms.importance_bound, -np.log(weights.mean(0)), rtol=1e-6)


def test_the_importance_bound_falls_with_samples_to_the_marginal_likelihood(model):
    log_likelihood, log_prior = log_joint(model)
    truth = -np.log(np.sum(np.exp(log_likelihood + log_prior)) * STEP)
    bounds = []
    for samples in (1, 2, 5, 50):
        draw = jax.jit(lambda key, k=samples: sampled_terms(model, many(8000 // k + 800), key, k).importance_bound)
        bounds.append(np.asarray(draw(jax.random.key(samples)), np.float64))
    means = np.array([np.mean(bound) for bound in bounds])
    errors = np.array([np.std(bound) / np.sqrt(len(bound)) for bound in bounds])
    assert np.all(np.diff(means) < 0)
    assert np.all(means > truth - 4 * errors)
    assert means[-1] - truth < 0.2 * (means[0] - truth)


PIXELS = np.random.default_rng(0).integers(0, 256, (6, 2, 3), np.uint8)


def value_and_gradient(vae, params, objective, **options):
    loss = vae_loss(vae, objective, "dynamic", **options)
    return jax.jit(jax.value_and_grad(lambda params: loss(params, jnp.asarray(PIXELS), jax.random.key(0), 3)[0]))(
        params
    )


@pytest.mark.parametrize("amortized", [False, True])
def test_training_by_one_sample_of_iwae_is_training_by_the_elbo(amortized):
    vae = VAE((2, 3), hidden=5, latent=3, flow_length=2, amortized=amortized)
    params = weights(vae)
    elbo, iwae = (value_and_gradient(vae, params, name) for name in ("elbo", "iwae"))
    assert float(iwae[0]) == pytest.approx(float(elbo[0]), rel=1e-6)
    for ours, theirs in zip(jax.tree.leaves(iwae[1]), jax.tree.leaves(elbo[1]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("amortized", [False, True])
def test_the_gradient_of_the_importance_bound_is_that_of_its_definition(amortized):
    vae = VAE((2, 3), hidden=5, latent=3, flow_length=2, amortized=amortized)
    params = weights(vae)
    _, gradient = value_and_gradient(vae, params, "iwae", train_samples=5)
    assert all(np.all(np.isfinite(leaf)) and np.any(leaf != 0) for leaf in jax.tree.leaves(gradient))

    # Burda et al., eq. 13: gradients of the log-weights, each times its normalised weight.
    binarize_key, noise_key = jax.random.split(jax.random.key(0))
    x = binarize(binarize_key, jnp.asarray(PIXELS).reshape(6, -1), "dynamic").reshape(PIXELS.shape)

    def weighted(params):
        energy = sampled_terms(vae.bind(params), x, noise_key, 5).free_energy
        return jnp.mean(jnp.sum(jax.lax.stop_gradient(jax.nn.softmax(-energy, axis=0)) * energy, axis=0))

    for ours, theirs in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(jax.jit(jax.grad(weighted))(params)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("objective", "options"),
    [("elbo", {"train_samples": 2}), ("iwae", {"train_samples": 0}), ("iwae", {"kl_warmup_steps": 5})],
)
def test_what_an_objective_has_no_use_for_is_refused(objective, options):
    with pytest.raises(ValueError, match="got"):
        vae_loss(VAE((2, 3)), objective, "dynamic", **options)


def test_raw_keys_are_those_of_the_same_seed():
    raw, typed = jax.random.PRNGKey(3), jax.random.key(3)
    like = jnp.zeros((2, 3))
    for one, other in ((raw, typed), (jax.random.split(raw, 2), jax.random.split(typed, 2))):
        np.testing.assert_array_equal(noise(one, like), noise(other, like))
