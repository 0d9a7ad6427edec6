"""Codes, lines between them and along axes, and the pages drawn from them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import weights

from planar_vae_jax import planar_flow
from planar_vae_jax import report_latent as latent_pages
from planar_vae_jax.analysis import evaluation, latent
from planar_vae_jax.analysis.evaluation import unit_pixels
from planar_vae_jax.data import Dataset
from planar_vae_jax.flows.distribution import standard_normal_log_prob
from planar_vae_jax.vae.model import VAE

SHAPE = (5, 4)
X = np.random.default_rng(0).integers(0, 256, (12, *SHAPE), np.uint8)
TEST = evaluation.fixed_images(X, np.arange(12), "test", "static")
MODELS = {
    name: VAE(SHAPE, hidden=6, latent=3, flow_length=flow_length, amortized=amortized)
    for name, flow_length, amortized in (("K=0", 0, False), ("K=3 shared", 3, False), ("K=3 amortised", 3, True))
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    vae = MODELS[request.param]
    return vae, weights(vae, seed=1, scale=0.2)


@functools.partial(jax.jit, static_argnums=0)
def means(vae, params):
    """The posteriors' means through the flow, and their parameters, a flow for each image of ``TEST``."""
    posterior = jax.vmap(vae.bind(params).encode)(unit_pixels(TEST.pixels))
    return planar_flow(posterior.params, posterior.mean)[0], posterior


@functools.partial(jax.jit, static_argnums=0)
def decoded(vae, params, z):
    return jax.nn.sigmoid(vae.bind(params).decode(z))


@functools.partial(jax.jit, static_argnums=0)
def normals(vae, params):
    """Means of 20 000 samples of each image's posterior, and the KL of the normal of their moments to the prior."""
    z = vae.bind(params).encode(unit_pixels(TEST.pixels)).sample(jax.random.key(0), (20_000,))
    mean, variance = jnp.mean(z, axis=0), jnp.var(z, axis=0)
    return mean, 0.5 * (mean**2 + variance - 1 - jnp.log(variance))


def closed_kl(posterior):
    """Of q_0 to the prior, by dimension, averaged over images."""
    mean, log_std = np.asarray(posterior.mean), np.asarray(posterior.log_std)
    return np.mean(0.5 * (mean**2 + np.exp(2 * log_std) - 1) - log_std, axis=0)


def test_codes_are_the_samples_of_the_free_energies(model):
    terms = evaluation.free_energy_terms(*model, TEST)
    z = latent.aggregate_posterior(*model, TEST)
    np.testing.assert_allclose(jax.jit(standard_normal_log_prob)(z), terms.log_prior, rtol=1e-5)


def test_units_carry_what_the_posteriors_mean_and_the_closed_form_say():
    vae = MODELS["K=0"]
    params = weights(vae)
    mean = params["encode"]["mean"]
    mean["kernel"] = mean["kernel"] * np.float32([1, 0, 1])  # the second dimension tells nothing of the image
    mean["bias"] = np.float32([0, 2, 0])
    units = latent.latent_units(vae, params, TEST)
    _, posterior = means(vae, params)
    np.testing.assert_allclose(units.variance_of_mean, np.var(posterior.mean, axis=0), rtol=1e-4, atol=1e-8)
    closed = closed_kl(posterior)
    np.testing.assert_allclose(units.kl_q0, closed, rtol=1e-4)
    np.testing.assert_allclose(units.kl, closed, rtol=1e-4, atol=1e-6)  # z_0 is z_K
    found = latent.active_units(units)
    assert (found["count"], found["of"], found["threshold"]) == (2, 3, 0.01)
    assert units.variance_of_mean[1] < 1e-9
    assert latent.active_units(units, threshold=1e9)["count"] == 0
    keys = jax.jit(lambda seed: jax.random.split(jax.random.key(seed), TEST.keys.shape))
    terms = [evaluation.free_energy_terms(vae, params, TEST._replace(keys=keys(seed))).kl for seed in range(200)]
    assert np.mean(terms) == pytest.approx(sum(found["kl_q0"]), abs=5 * np.std(terms) / np.sqrt(np.size(terms)))


def test_a_unit_is_active_by_what_the_decoder_is_given():
    vae = MODELS["K=3 amortised"]
    params = weights(vae, scale=0.2)
    for name in ("mean", "log_std"):  # q_0 is the same for all images: what is told of them, the layers tell
        params["encode"][name] = jax.tree.map(np.zeros_like, params["encode"][name])
    units = latent.latent_units(vae, params, TEST)
    mean, kl = normals(vae, params)
    np.testing.assert_allclose(units.variance_of_mean, np.var(mean, axis=0), rtol=0.2, atol=1e-3)
    assert latent.active_units(units)["count"] > 0
    np.testing.assert_allclose(units.kl_q0, 0.0, atol=1e-6)
    np.testing.assert_allclose(units.kl, np.mean(kl, axis=0), rtol=0.2, atol=0.01)


def test_the_kl_by_dimension_is_exact_without_a_flow_and_a_bound_with_one(model):
    vae, params = model
    found = latent.kl_by_dimension(vae, params, TEST)
    assert found.shape == (3,)
    if vae.flow_length == 0:
        np.testing.assert_allclose(found, closed_kl(means(vae, params)[1]), rtol=1e-4)
    else:
        np.testing.assert_allclose(found, np.mean(normals(vae, params)[1], axis=0), rtol=0.05, atol=0.02)


def test_the_distance_from_the_prior_is_that_of_the_moments():
    z = np.random.default_rng(1).normal(size=(200_000, 2)) * [1.0, 2.0] + [0.0, 3.0]
    far = latent.distance_from_prior(z)
    np.testing.assert_allclose(far.mean, [0, 3], atol=0.02)
    np.testing.assert_allclose(far.variance, [1, 4], rtol=0.02)
    assert far.nats == pytest.approx(0.5 * (9 + 4 - 1 - np.log(4.0)), rel=0.01)
    assert latent.distance_from_prior(np.zeros((1, 2))).nats == np.inf


def test_lines_end_at_the_reconstructions(model):
    pixels = np.asarray(TEST.pixels)
    left, right = pixels[:2], pixels[2:4]
    lines = latent.interpolate(*model, left, right, 3)
    for line in map(np.asarray, lines):
        assert line.shape == (2, 3, *SHAPE)
        np.testing.assert_allclose(line[:, 0], evaluation.reconstruct(*model, left), atol=1e-5)
        np.testing.assert_allclose(line[:, -1], evaluation.reconstruct(*model, right), atol=1e-5)


def test_one_line_is_straight_in_z_0_and_the_other_in_z_k(model):
    vae, params = model
    pixels = np.asarray(TEST.pixels)
    lines = latent.interpolate(vae, params, pixels[:2], pixels[2:4], 3)
    base, code = np.asarray(lines.base[:, 1]), np.asarray(lines.code[:, 1])
    # Of the two pairs, images 0 and 2, and 1 and 3: halfway.
    middle, q = jax.tree.map(lambda leaf: (leaf[:2] + leaf[2:4]) / 2, jax.device_get(means(vae, params)))
    np.testing.assert_allclose(code, decoded(vae, params, middle), atol=1e-5)
    middle, _ = planar_flow(q.params, q.mean)
    np.testing.assert_allclose(base, decoded(vae, params, middle), atol=1e-5)
    assert (np.max(np.abs(base - code)) > 1e-4) == (vae.flow_length > 0)


def test_one_coordinate_is_moved_and_the_others_stay(model):
    vae, params = model
    moved = latent.traverse(vae, params, TEST.pixels[0], np.array([2, 0]), np.float32([-3.0, 0.0, 3.0]))
    assert moved.shape == (2, 3, *SHAPE)
    z = np.tile(means(vae, params)[0][0], (2, 1))
    z[0, 2], z[1, 0] = 3.0, -3.0
    np.testing.assert_allclose(np.stack([moved[0, 2], moved[1, 0]]), decoded(vae, params, z), atol=1e-5)


# --- Pages ---


def dataset(labels, size=12):
    images, index = X[:size], np.arange(size)
    y = None if labels is None else np.asarray(labels[:size])
    return Dataset("bars", "here", images, y, None, None, images, y, index, None, index)


@pytest.mark.parametrize(
    ("size", "latents", "flow_length", "amortized", "labels"),
    [
        (12, 1, 2, False, np.zeros(12, int)),
        (2, 3, 0, False, None),
        (1, 2, 0, False, np.array([7])),
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


def colours(objective):
    """The pages of colour images under a model with full covariances."""
    x = np.random.default_rng(0).integers(0, 256, (12, *SHAPE, 3), np.uint8)
    index, labels = np.arange(12), np.arange(12) % 3
    data = Dataset("colours", "here", x, labels, None, None, x, labels, index, None, index)
    test, pages = evaluation.fixed_images(x, index, "test", "none"), {}
    architecture = {"flow_length": 2, "amortized": True, "posterior": "full", "likelihood": "logistic"}
    vae = VAE((*SHAPE, 3), hidden=4, latent=2, **architecture)
    latent_pages.draw_latent_space(pages.__setitem__, vae, weights(vae), data, test, "colours", objective)
    return pages


def test_pages_of_colour_images_and_full_covariances(tmp_path):
    pages = colours("elbo")
    assert set(pages) == {"posteriors.png", "interpolations.png", "traversals.png", "aggregate.png"}
    for name, figure in pages.items():
        figure.savefig(tmp_path / name)


def test_no_posterior_is_drawn_that_nothing_was_trained_to_approximate():
    assert set(colours("reconstruction")) == {"interpolations.png", "traversals.png", "aggregate.png"}
