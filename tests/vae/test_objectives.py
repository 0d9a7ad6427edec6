"""Free energy and importance-sampled NLL against quadrature in a model with one latent dimension."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import weights

from planar_vae_jax import planar_flow
from planar_vae_jax.vae.binarization import binarize
from planar_vae_jax.vae.losses import vae_loss
from planar_vae_jax.vae.model import VAE
from planar_vae_jax.vae.objectives import fold_in_each, free_energy, importance_nll, noise, sampled_terms

GRID = np.linspace(-20.0, 20.0, 20_001)
STEP = GRID[1] - GRID[0]
DRAWS = 200_000
X = np.array([[[1, 0, 1], [1, 0, 1]]], np.float32)  # [1, H, W]


@pytest.fixture(scope="module", params=[0, 3], ids=["K=0", "K=3"])
def model(request):
    """A VAE with weights large enough that q, the flow and the decoder all matter."""
    vae = VAE((2, 3), hidden=5, latent=1, flow_length=request.param)
    return vae.bind(weights(vae, seed=1))


def many(size):
    return jnp.broadcast_to(X, (size, *X.shape[1:]))


def nll_of(model, size, keys, **options):
    return jax.device_get(jax.jit(lambda keys: importance_nll(model, many(size), keys, **options))(keys))


KEYS = jax.random.split(jax.random.key(3), 4)


@pytest.fixture(scope="module")
def terms_of(model):
    """Terms of four images, each with its key."""
    compiled = jax.jit(lambda keys: free_energy(model, many(4), keys))
    return lambda keys: jax.device_get(compiled(keys))


@pytest.fixture(scope="module")
def whole(model):
    """Estimates for the four images, of one sample and of 50."""
    return nll_of(model, 4, KEYS, samples=(1, 50))


@pytest.fixture(scope="module")
def draws(model):
    """Terms of DRAWS samples, by one key."""
    return jax.device_get(jax.jit(lambda key: free_energy(model, many(DRAWS), key))(jax.random.key(0)))


@pytest.fixture(scope="module")
def sampled(model):
    """Terms of 50 samples of each of 960 images, and the bound of every 1, 2, 5 and 50 of them."""

    def run(key):
        terms = sampled_terms(model, many(960), key, 50)
        return terms, {
            k: jax.tree.map(lambda leaf, k=k: leaf.reshape(k, -1), terms).importance_bound for k in (1, 2, 5, 50)
        }

    return jax.device_get(jax.jit(run)(jax.random.key(2)))


@pytest.fixture(scope="module")
def on_grid(model):
    """``log p(x|z)``, ``log p(z)`` and, through the inverse of the flow, ``log q(z_K|x)`` on the grid."""
    logits, log_q = jax.jit(lambda z: (model.decode(z), model.encode(X[0]).log_prob(z)))(np.float32(GRID[:, None]))
    logits = np.asarray(logits, np.float64)
    log_likelihood = np.where(X == 1.0, -np.logaddexp(0, -logits), -np.logaddexp(0, logits)).sum((1, 2))
    return log_likelihood, -0.5 * GRID**2 - 0.5 * np.log(2 * np.pi), np.asarray(log_q, np.float64)


@pytest.fixture(scope="module")
def true_nll(on_grid):
    log_likelihood, log_prior, _ = on_grid
    return -np.log(np.sum(np.exp(log_likelihood + log_prior)) * STEP)


def test_terms_agree_with_quadrature(on_grid, draws):
    log_likelihood, log_prior, log_q = on_grid
    q = np.exp(log_q) * STEP
    assert q.sum() == pytest.approx(1.0, abs=1e-4)
    for name, values, truth in (
        ("reconstruction", draws.reconstruction, -(q * log_likelihood).sum()),
        ("kl", draws.kl, (q * (log_q - log_prior)).sum()),
        ("log_prior", draws.log_prior, (q * log_prior).sum()),
    ):
        error = 5.0 * np.std(values) / np.sqrt(DRAWS) + 1e-4
        assert np.mean(values, dtype=np.float64) == pytest.approx(truth, abs=error), name
    np.testing.assert_allclose(draws.free_energy, draws.kl + draws.reconstruction, rtol=1e-6)


def test_importance_sampling_finds_the_marginal_likelihood_below_the_free_energy(model, draws, true_nll):
    (nll,), (effective,) = nll_of(model, 1, jax.random.key(1), samples=DRAWS, chunk=20_000)
    assert 100 < effective < DRAWS
    assert nll == pytest.approx(true_nll, abs=float(5.0 / np.sqrt(effective)))
    assert np.mean(draws.free_energy) > true_nll


def test_one_importance_sample_is_the_free_energy(whole, terms_of):
    np.testing.assert_allclose(whole.nll[0], terms_of(fold_in_each(KEYS, 0)).free_energy, rtol=1e-6)
    np.testing.assert_allclose(whole.effective_sample_size[0], np.ones(4), rtol=1e-6)


def test_samples_are_the_same_whatever_the_chunk_and_the_batch(model, whole):
    # Each chunk with one of the models: what is summed in chunks are numbers, whatever the flow.
    for chunk in (1, 49) if model.encode.vae.flow_length == 0 else (7,):
        for mine, theirs in zip(nll_of(model, 4, KEYS, samples=50, chunk=chunk), whole, strict=True):
            np.testing.assert_allclose(mine, theirs[1], rtol=1e-5)
    alone = nll_of(model, 1, KEYS[2:3], samples=1)
    np.testing.assert_allclose(alone.nll[0], whole.nll[0, 2], rtol=1e-6)


def test_with_a_key_an_image_the_terms_do_not_depend_on_the_batch(model, terms_of):
    together = terms_of(KEYS)
    alone = jax.device_get(jax.jit(lambda keys: free_energy(model, X, keys))(KEYS[2:3]))
    np.testing.assert_allclose(together.free_energy[2], alone.free_energy[0], rtol=1e-6)
    assert len(set(together.free_energy.tolist())) == 4


def test_annealings_weight_the_terms_that_their_papers_say(terms_of):
    terms = terms_of(KEYS)
    log_q = terms.log_q0 - terms.log_det
    free_energy, log_prior, log_likelihood = terms.free_energy, terms.log_prior, terms.log_likelihood
    np.testing.assert_allclose(terms.annealed(1.0, 1.0), free_energy, rtol=1e-6)
    np.testing.assert_allclose(terms.annealed(0.3, 1.0), log_q - 0.3 * (log_prior + log_likelihood), rtol=1e-5)
    np.testing.assert_allclose(terms.annealed(1.0, 0.3), 0.3 * (log_q - log_prior) - log_likelihood, rtol=1e-5)


def test_squared_error_is_summed_over_pixels_of_the_mean_image(model, terms_of):
    @jax.jit
    def decoded(keys):
        posterior = model.encode(many(4))
        noise = jax.vmap(lambda key: jax.random.normal(key, (1,)))(keys)
        z, _ = planar_flow(posterior.params, posterior.mean + jnp.exp(posterior.log_std) * noise)
        return model.decode(z)

    image = 1.0 / (1.0 + np.exp(-np.asarray(decoded(KEYS), np.float64)))
    np.testing.assert_allclose(terms_of(KEYS).squared_error, ((X - image) ** 2).sum((1, 2)), rtol=1e-5)


# --- The importance bound as what is trained


def test_the_importance_bound_of_one_sample_is_the_free_energy(model):
    def both(key):
        return sampled_terms(model, many(5), key, 1).objective("iwae"), free_energy(model, many(5), key).free_energy

    np.testing.assert_allclose(*jax.jit(both)(jax.random.key(2)), rtol=1e-6)


def test_the_importance_bound_is_minus_the_logarithm_of_the_mean_weight(sampled):
    terms, bounds = sampled
    assert terms.kl.shape == (50, 960)
    weights = np.exp(-np.asarray(terms.free_energy, np.float64))
    np.testing.assert_allclose(bounds[50], -np.log(weights.mean(0)), rtol=1e-6)


def test_the_importance_bound_falls_with_samples_to_the_marginal_likelihood(sampled, true_nll):
    _, bounds = sampled
    means = np.array([np.mean(bound, dtype=np.float64) for bound in bounds.values()])
    errors = np.array([np.std(bound) / np.sqrt(len(bound)) for bound in bounds.values()])
    assert np.all(np.diff(means) < 0)
    assert np.all(means > true_nll - 4 * errors)
    assert means[-1] - true_nll < 0.2 * (means[0] - true_nll)


PIXELS = np.random.default_rng(0).integers(0, 256, (6, 2, 3), np.uint8)


def value_and_gradient(vae, params, objective, **options):
    loss = vae_loss(vae, objective, "dynamic", **options)
    value = jax.value_and_grad(lambda params: loss(params, jnp.asarray(PIXELS), jax.random.key(0), 3)[0])
    return jax.device_get(jax.jit(value)(params))


def test_training_by_one_sample_of_iwae_is_training_by_the_elbo():
    vae = VAE((2, 3), hidden=5, latent=3, flow_length=2, amortized=True)
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
    def weighted(params):
        binarize_key, noise_key = jax.random.split(jax.random.key(0))
        x = binarize(binarize_key, jnp.asarray(PIXELS).reshape(6, -1), "dynamic").reshape(PIXELS.shape)
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
