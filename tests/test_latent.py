"""Codes, lines between them and along axes, and the pages drawn from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import weights

from planar_vae_jax import evaluation, latent, latent_pages, planar_flow
from planar_vae_jax.data import Dataset
from planar_vae_jax.distributions import standard_normal_log_prob
from planar_vae_jax.models import VAE

SHAPE = (5, 4)
X = np.random.default_rng(0).integers(0, 256, (12, *SHAPE), np.uint8)
TEST = evaluation.fixed_images(X, np.arange(12), "test", "static")
MODELS = {"K=0": (0, False), "K=3 shared": (3, False), "K=3 amortised": (3, True)}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    flow_length, amortized = MODELS[request.param]
    vae = VAE(SHAPE, hidden=6, latent=3, flow_length=flow_length, amortized=amortized)
    return vae, weights(vae, seed=1, scale=0.2)


def means(vae, params, pixels):
    """The posterior's mean through the flow, and its parameters."""
    posterior = vae.bind(params).encode(jnp.asarray(pixels, jnp.float32) / 255.0)
    return planar_flow(posterior.params, posterior.mean)[0], posterior


def decoded(vae, params, z):
    return jax.nn.sigmoid(vae.bind(params).decode(z))


def test_codes_are_the_samples_of_the_free_energies(model):
    terms = evaluation.free_energy_terms(*model, TEST)
    z = latent.aggregate_posterior(*model, TEST)
    np.testing.assert_allclose(standard_normal_log_prob(z), terms.log_prior, rtol=1e-5)


def test_units_carry_what_the_posteriors_mean_and_the_closed_form_say():
    vae = VAE((5, 4), latent=3, hidden=8, flow_length=0)
    params = weights(vae)
    mean = params["encode"]["mean"]
    mean["kernel"] = mean["kernel"] * np.float32([1, 0, 1])  # the second dimension tells nothing of the image
    mean["bias"] = np.float32([0, 2, 0])
    units = latent.latent_units(vae, params, TEST)
    _, posterior = means(vae, params, TEST.pixels)
    np.testing.assert_allclose(units.variance_of_mean, np.var(posterior.mean, axis=0), rtol=1e-4, atol=1e-8)
    closed = 0.5 * (posterior.mean**2 + jnp.exp(2 * posterior.log_std) - 1) - posterior.log_std
    np.testing.assert_allclose(units.kl_q0, np.mean(closed, axis=0), rtol=1e-4)
    np.testing.assert_allclose(units.kl, np.mean(closed, axis=0), rtol=1e-4, atol=1e-6)  # z_0 is z_K
    found = latent.active_units(units)
    assert (found["count"], found["of"], found["threshold"]) == (2, 3, 0.01)
    assert units.variance_of_mean[1] < 1e-9
    assert latent.active_units(units, threshold=1e9)["count"] == 0
    keys = [jax.vmap(jax.random.fold_in, (0, None))(TEST.keys, number) for number in range(200)]
    terms = [evaluation.free_energy_terms(vae, params, TEST._replace(keys=one)).kl for one in keys]
    assert np.mean(terms) == pytest.approx(sum(found["kl_q0"]), abs=5 * np.std(terms) / np.sqrt(np.size(terms)))


def test_a_unit_is_active_by_what_the_decoder_is_given():
    vae = VAE(SHAPE, hidden=6, latent=3, flow_length=3, amortized=True)
    params = weights(vae, scale=0.2)
    for name in ("mean", "log_std"):  # q_0 is the same for all images: what is told of them, the layers tell
        params["encode"][name] = jax.tree.map(np.zeros_like, params["encode"][name])
    units = latent.latent_units(vae, params, TEST)
    _, posterior = means(vae, params, TEST.pixels)
    z = posterior.sample(jax.random.key(0), (20_000,))
    np.testing.assert_allclose(units.variance_of_mean, np.var(jnp.mean(z, axis=0), axis=0), rtol=0.2, atol=1e-3)
    assert latent.active_units(units)["count"] > 0
    np.testing.assert_allclose(units.kl_q0, 0.0, atol=1e-6)
    normal = 0.5 * (np.mean(z, axis=0) ** 2 + np.var(z, axis=0) - 1 - np.log(np.var(z, axis=0)))
    np.testing.assert_allclose(units.kl, np.mean(normal, axis=0), rtol=0.2, atol=0.01)


def test_the_kl_by_dimension_is_exact_without_a_flow_and_a_bound_with_one(model):
    vae, params = model
    found = latent.kl_by_dimension(vae, params, TEST)
    assert found.shape == (3,)
    _, posterior = means(vae, params, TEST.pixels)
    if vae.flow_length == 0:
        mean, log_std = posterior.mean, posterior.log_std
        closed = 0.5 * (mean**2 + jnp.exp(2 * log_std) - 1 - 2 * log_std)
        np.testing.assert_allclose(found, np.mean(closed, axis=0), rtol=1e-4)
        return
    z = posterior.sample(jax.random.key(0), (20_000,))
    kl = 0.5 * (jnp.mean(z, 0) ** 2 + jnp.var(z, 0) - 1 - jnp.log(jnp.var(z, 0)))
    np.testing.assert_allclose(found, np.mean(kl, axis=0), rtol=0.05, atol=0.02)


def test_the_distance_from_the_prior_is_that_of_the_moments():
    z = np.random.default_rng(1).normal(size=(200_000, 2)) * [1.0, 2.0] + [0.0, 3.0]
    far = latent.distance_from_prior(z)
    np.testing.assert_allclose(far.mean, [0, 3], atol=0.02)
    np.testing.assert_allclose(far.variance, [1, 4], rtol=0.02)
    assert far.nats == pytest.approx(0.5 * (9 + 4 - 1 - np.log(4.0)), rel=0.01)
    assert latent.distance_from_prior(np.zeros((1, 2))).nats == np.inf


def test_lines_end_at_the_reconstructions(model):
    left, right = TEST.pixels[:2], TEST.pixels[2:4]
    lines = latent.interpolate(*model, left, right, 5)
    for line in lines:
        assert line.shape == (2, 5, *SHAPE)
        np.testing.assert_allclose(line[:, 0], evaluation.reconstruct(*model, left), atol=1e-5)
        np.testing.assert_allclose(line[:, -1], evaluation.reconstruct(*model, right), atol=1e-5)


def test_one_line_is_straight_in_z_0_and_the_other_in_z_k(model):
    vae, params = model
    left, right = TEST.pixels[:2], TEST.pixels[2:4]
    lines = latent.interpolate(vae, params, left, right, 3)
    (first, q), (last, r) = means(vae, params, left), means(vae, params, right)
    np.testing.assert_allclose(lines.code[:, 1], decoded(vae, params, (first + last) / 2), atol=1e-5)
    layers = jax.tree.map(lambda a, b: (a + b) / 2, q.params, r.params)
    middle, _ = planar_flow(layers, (q.mean + r.mean) / 2)
    np.testing.assert_allclose(lines.base[:, 1], decoded(vae, params, middle), atol=1e-5)
    assert (np.max(np.abs(lines.base[:, 1] - lines.code[:, 1])) > 1e-4) == (vae.flow_length > 0)


def test_one_coordinate_is_moved_and_the_others_stay(model):
    vae, params = model
    moved = latent.traverse(vae, params, TEST.pixels[0], jnp.array([2, 0]), jnp.array([-3.0, 0.0, 3.0]))
    assert moved.shape == (2, 3, *SHAPE)
    code, _ = means(vae, params, TEST.pixels[0])
    np.testing.assert_allclose(moved[0, 2], decoded(vae, params, code.at[2].set(3.0)), atol=1e-5)
    np.testing.assert_allclose(moved[1, 0], decoded(vae, params, code.at[0].set(-3.0)), atol=1e-5)


# --- Pages ---


def dataset(labels, size=12):
    images, index = X[:size], np.arange(size)
    y = None if labels is None else np.asarray(labels[:size])
    return Dataset("bars", "here", images, y, None, None, images, y, index, None, index)


@pytest.mark.parametrize(
    ("size", "latents", "flow_length", "amortized", "labels"),
    [
        (12, 2, 2, True, np.arange(12) % 3),
        (12, 2, 0, False, None),
        (12, 1, 2, False, np.zeros(12, int)),
        (2, 3, 1, False, None),
        (1, 2, 1, False, np.array([7])),
        (12, 17, 3, True, np.arange(12)),
    ],
)
def test_every_page_is_drawn_for_any_data(size, latents, flow_length, amortized, labels, tmp_path):
    vae = VAE(SHAPE, hidden=4, latent=latents, flow_length=flow_length, amortized=amortized)
    pages = {}
    test = jax.tree.map(lambda leaf: leaf[:size], TEST)
    data = dataset(labels, size)
    latent_pages.draw_latent_space(pages.__setitem__, vae, weights(vae), data, test, "bars", "elbo")
    several = size > 1 and (labels is None or len(np.unique(labels)) > 1)
    assert ("interpolations.png" in pages) == several
    assert ("posteriors.png" in pages) == (latents == 2)
    assert {"traversals.png", "aggregate.png"} <= set(pages)
    for name, figure in pages.items():
        figure.savefig(tmp_path / name)


def test_no_posterior_is_drawn_that_nothing_was_trained_to_approximate():
    vae, pages = VAE(SHAPE, hidden=4, latent=2, flow_length=0), {}
    params = weights(vae)
    latent_pages.draw_latent_space(pages.__setitem__, vae, params, dataset(None), TEST, "bars", "reconstruction")
    assert "posteriors.png" not in pages


def test_pages_of_colour_images_and_full_covariances(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (12, 5, 4, 3), np.uint8)
    index, labels = np.arange(12), np.arange(12) % 2
    data = Dataset("colours", "here", x, labels, None, None, x, labels, index, None, index)
    test = evaluation.fixed_images(x, index, "test", "none")
    vae, pages = VAE((5, 4, 3), hidden=4, latent=2, flow_length=1, posterior="full", likelihood="logistic"), {}
    latent_pages.draw_latent_space(pages.__setitem__, vae, weights(vae), data, test, "colours", "elbo")
    assert set(pages) == {"posteriors.png", "interpolations.png", "traversals.png", "aggregate.png"}
    for name, figure in pages.items():
        figure.savefig(tmp_path / name)
