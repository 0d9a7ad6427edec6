"""Free energy and importance-sampled NLL against quadrature in a model with one latent dimension."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vae_models import drawn

from planar_vae_jax import planar_flow
from planar_vae_jax.flows.distribution import standard_normal_log_prob
from planar_vae_jax.vae.binarization import binarize
from planar_vae_jax.vae.objectives import (
    OBJECTIVES,
    fold_in_each,
    free_energy,
    importance_nll,
    log_joint,
    noise,
    sampled_terms,
    terms,
    vae_loss,
)

GRID = np.linspace(-20.0, 20.0, 20_001)
STEP = GRID[1] - GRID[0]
DRAWS = 200_000
X = np.array([[[1, 0, 1], [1, 0, 1]]], np.float32)  # [1, H, W]


@pytest.fixture(scope="module", params=[0, 3], ids=["K=0", "K=3"])
def model(request):
    """A VAE with weights large enough that q, the flow and the decoder all matter."""
    return drawn((2, 3), hidden=5, latent=1, flow_length=request.param, seed=1)


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
    for chunk in (1, 49) if model.posterior.flow_length == 0 else (7,):
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


def value_and_gradient(model, objective, **options):
    loss = vae_loss(objective, "dynamic", **options)
    value = jax.value_and_grad(lambda model: loss(model, jnp.asarray(PIXELS), jax.random.key(0), 3)[0])
    return jax.device_get(jax.jit(value)(model))


def test_training_by_one_sample_of_iwae_is_training_by_the_elbo():
    model = drawn((2, 3), hidden=5, latent=3, flow_length=2, amortized=True)
    elbo, iwae = (value_and_gradient(model, name) for name in ("elbo", "iwae"))
    assert float(iwae[0]) == pytest.approx(float(elbo[0]), rel=1e-6)
    for ours, theirs in zip(jax.tree.leaves(iwae[1]), jax.tree.leaves(elbo[1]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("amortized", [False, True])
def test_the_gradient_of_the_importance_bound_is_that_of_its_definition(amortized):
    model = drawn((2, 3), hidden=5, latent=3, flow_length=2, amortized=amortized)
    _, gradient = value_and_gradient(model, "iwae", train_samples=5)
    assert all(np.all(np.isfinite(leaf)) and np.any(leaf != 0) for leaf in jax.tree.leaves(gradient))

    # Burda et al., eq. 13: gradients of the log-weights, each times its normalised weight.
    def weighted(model):
        binarize_key, noise_key = jax.random.split(jax.random.key(0))
        x = binarize(binarize_key, jnp.asarray(PIXELS).reshape(6, -1), "dynamic").reshape(PIXELS.shape)
        energy = sampled_terms(model, x, noise_key, 5).free_energy
        return jnp.mean(jnp.sum(jax.lax.stop_gradient(jax.nn.softmax(-energy, axis=0)) * energy, axis=0))

    for ours, theirs in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(jax.jit(jax.grad(weighted))(model)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("objective", "options", "reported"),
    [
        ("elbo", {}, "train_loss"),
        ("iwae", {"train_samples": 3}, "train_loss"),
        ("reconstruction", {}, "train_loss"),
        ("elbo", {"kl_warmup_steps": 10}, "annealed_loss"),
        ("elbo", {"annealing_steps": 10}, "annealed_loss"),
    ],
)
def test_what_is_minimised_is_what_is_reported(objective, options, reported):
    model, key = drawn((2, 3), hidden=5, latent=3, flow_length=2), jax.random.key(0)
    loss = jax.jit(vae_loss(objective, "dynamic", **options))
    value, figures = loss(model, jnp.asarray(PIXELS), key, 3)
    assert set(figures) == {"train_loss", "reconstruction", "kl", reported}
    assert float(value) == float(figures[reported])
    if reported == "annealed_loss":  # its other figures are those of no annealing
        plain, others = jax.jit(vae_loss(objective, "dynamic"))(model, jnp.asarray(PIXELS), key, 3)
        assert float(plain) != pytest.approx(float(value), rel=1e-3)
        for name in others:
            assert float(figures[name]) == pytest.approx(float(others[name]), rel=1e-5)


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("elbo", {"train_samples": 2}),
        ("iwae", {"train_samples": 0}),
        ("iwae", {"kl_warmup_steps": 5}),
        ("reconstruction", {"kl_warmup_steps": 10}),
        ("reconstruction", {"annealing_steps": 10}),
        ("elbo", {"annealing_steps": -1}),
        ("reconstuction", {}),
        ("ELBO", {}),
    ],
)
def test_what_an_objective_has_no_use_for_is_refused(objective, options):
    name = next(iter(options), "objective")
    with pytest.raises(ValueError, match=f"^{name} must be .*got"):
        vae_loss(objective, "dynamic", **options)


def test_names_are_checked_where_they_are_taken(terms_of):
    with pytest.raises(ValueError, match=r"binarization must be one of dynamic.*got 'coin'"):
        vae_loss("elbo", "coin")
    with pytest.raises(ValueError, match=f"objective must be one of {', '.join(OBJECTIVES)}; got 'nll'"):
        terms_of(KEYS).objective("nll")


# --- Arguments


BINARY = jnp.ones((4, 2, 3))
ARGUMENTS = {
    "grey levels": (BINARY.astype(jnp.uint8), KEYS, r"images must be floating-point.*got uint8.*binarize"),
    "grey levels as floats": (255 * BINARY, KEYS, r"images must have values in 0..1; got 255 to 255"),
    "beyond rounding": (1.00001 * BINARY, KEYS, r"images must have values in 0..1; got 1\.0000\d+ to 1\.0000\d+"),
    "not numbers": (jnp.nan * BINARY, KEYS, r"images must have values in 0..1; got nan to nan"),
    "flat images": (BINARY.reshape(4, 6), KEYS, r"images must be of shape \[B, H, W\].*got \[4, 6\]"),
    "an int for a key": (BINARY, 3, r"key must be made by jax.random.key or jax.random.split; got 3"),
    "too few keys": (BINARY, KEYS[:3], r"key must be one key, or keys \[4\], one for each image; got \[3\]"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_are_named_in_errors(case):
    model, (images, key, message) = drawn((2, 3), hidden=5, latent=1), ARGUMENTS[case]
    for function in (free_energy, lambda *given: importance_nll(*given, samples=2)):
        with pytest.raises(ValueError, match=message):
            function(model, images, key)


def test_rounding_beyond_white_is_taken_and_constants_in_traced_functions_are_checked():
    model = drawn((2, 3), hidden=5, latent=1)
    near = (1.0 + 2e-7) * BINARY
    assert jax.eval_shape(lambda key: free_energy(model, near, key), KEYS[0]).log_q0.shape == (4,)
    with pytest.raises(ValueError, match="got 255 to 255"):
        jax.eval_shape(lambda key: free_energy(model, 255 * np.asarray(BINARY), key), KEYS[0])


def test_noise_of_another_size_is_refused(model):
    with pytest.raises(ValueError, match=r"noise must be of shape \[\.\.\., 4, 1\]; got \[5, 1\]"):
        jax.eval_shape(lambda noise: terms(model, many(4), noise), jnp.zeros((5, 1)))


# --- Another posterior, points, and large images


def test_another_posterior_may_take_the_place_of_the_models(model):
    """That of the same images gives the same; noise of zeros gives the joint density at its mode."""
    posterior = model.encode(many(4))

    @jax.jit
    def both(key):
        given = {"posterior": posterior}
        nlls = [importance_nll(model, many(4), key, samples=3, **one).nll for one in ({}, given)]
        found = terms(model, many(4), jnp.zeros((5, 4, 1)))
        zK = posterior.transform(jnp.zeros((5, 4, 1)))[0]
        energies = [free_energy(model, many(4), key, **one).free_energy for one in ({}, given)]
        return energies, nlls, found, log_joint(model, many(4), zK), log_joint(model, many(1)[0], zK[:, 0])

    energies, nlls, found, joint, of_one = both(KEYS)
    np.testing.assert_allclose(*energies, rtol=1e-6)
    np.testing.assert_allclose(*nlls, rtol=1e-6)
    assert joint.shape == (5, 4)
    np.testing.assert_allclose(joint, found.log_prior + found.log_likelihood, rtol=1e-5)
    np.testing.assert_allclose(of_one, joint[:, 0], rtol=1e-5)


class PriorPosterior:
    """A model whose ``q(z|x)`` is the prior, so that a weight is ``p(x|z)`` alone, which is given."""

    def __init__(self, log_likelihood):
        self.likelihood = types.SimpleNamespace(log_prob=log_likelihood, mean=jnp.zeros_like)

    def encode(self, images):
        return self

    mean = np.zeros((3, 1), np.float32)

    def transform(self, noise):
        return noise, standard_normal_log_prob(noise), jnp.zeros(noise.shape[:-1])

    def decode(self, z):
        return jnp.broadcast_to(z[..., None], (*z.shape[:-1], 2, 2))


@pytest.mark.parametrize("constant", [0.0, -3e5, 3e5])
@pytest.mark.parametrize("chunk", [1, 33, 128])
def test_the_effective_sample_size_is_between_one_and_s_whatever_the_size_of_the_image(constant, chunk):
    model = PriorPosterior(lambda x, parameters: jnp.full(parameters.shape[:-1], constant))
    found = importance_nll(model, jnp.zeros((3, 2, 2)), jax.random.key(0), samples=(7, 100), chunk=chunk)
    for size, effective, nll in zip((7, 100), *reversed(found), strict=True):
        assert np.all(effective <= size)
        assert np.all(effective >= 0.99 * size)
        np.testing.assert_allclose(nll, np.full(3, -constant), atol=1e-4 + 1e-6 * abs(constant))


def test_a_sample_that_outweighs_all_others_counts_as_one():
    model = PriorPosterior(lambda x, parameters: 1e4 * parameters[..., 0])
    found = importance_nll(model, jnp.zeros((3, 2, 2)), jax.random.key(0), samples=50, chunk=8)
    np.testing.assert_allclose(found.effective_sample_size, np.ones(3), atol=1e-3)


def test_raw_keys_are_those_of_the_same_seed():
    raw, typed = jax.random.PRNGKey(3), jax.random.key(3)
    like = jnp.zeros((2, 3))
    for one, other in ((raw, typed), (jax.random.split(raw, 2), jax.random.split(typed, 2))):
        np.testing.assert_array_equal(noise(one, like), noise(other, like))
