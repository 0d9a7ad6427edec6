"""Codes, lines between them and along axes, and what each latent dimension carries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vae_models import drawn

from planar_vae_jax import planar_flow
from planar_vae_jax.analysis import evaluation, latent
from planar_vae_jax.analysis.evaluation import unit_pixels
from planar_vae_jax.flows.distribution import standard_normal_log_prob

SHAPE = (5, 4)
X = np.random.default_rng(0).integers(0, 256, (12, *SHAPE), np.uint8)
TEST = evaluation.fixed_images(X, np.arange(12), "test", "static")
MODELS = {
    name: {"hidden": 6, "latent": 3, "flow_length": flow_length, "amortized": amortized}
    for name, flow_length, amortized in (("K=0", 0, False), ("K=3 shared", 3, False), ("K=3 amortised", 3, True))
}


def made(name, **options):
    return drawn(SHAPE, **MODELS[name], **options)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return made(request.param, seed=1, scale=0.2)


@jax.jit
def means(model):
    """The posteriors' means through the flow, and their parameters, a flow for each image of ``TEST``."""
    posterior = jax.vmap(model.encode)(unit_pixels(TEST.pixels))
    return planar_flow(posterior.params, posterior.mean)[0], posterior


@jax.jit
def decoded(model, z):
    return jax.nn.sigmoid(model.decode(z))


@jax.jit
def normals(model):
    """Means of 20 000 samples of each image's posterior, and the KL of the normal of their moments to the prior."""
    z = model.encode(unit_pixels(TEST.pixels)).sample(jax.random.key(0), (20_000,))
    mean, variance = jnp.mean(z, axis=0), jnp.var(z, axis=0)
    return mean, 0.5 * (mean**2 + variance - 1 - jnp.log(variance))


def closed_kl(posterior):
    """Of q_0 to the prior, by dimension, averaged over images."""
    mean, log_std = np.asarray(posterior.mean), np.asarray(posterior.log_std)
    return np.mean(0.5 * (mean**2 + np.exp(2 * log_std) - 1) - log_std, axis=0)


def test_codes_are_the_samples_of_the_free_energies(model):
    terms = evaluation.free_energy_terms(model, TEST)
    z = latent.aggregate_posterior(model, TEST)
    np.testing.assert_allclose(jax.jit(standard_normal_log_prob)(z), terms.log_prior, rtol=1e-5)


def test_units_carry_what_the_posteriors_mean_and_the_closed_form_say():
    model = made("K=0")
    mean = model.posterior.mean
    mean.kernel[...] = mean.kernel[...] * np.float32([1, 0, 1])  # the second dimension is the same for all images
    mean.bias[...] = np.float32([0, 2, 0])
    units = latent.latent_units(model, TEST)
    _, posterior = means(model)
    np.testing.assert_allclose(units.variance_of_mean, np.var(posterior.mean, axis=0), rtol=1e-4, atol=1e-8)
    closed = closed_kl(posterior)
    np.testing.assert_allclose(units.kl_q0, closed, rtol=1e-4)
    np.testing.assert_allclose(units.kl, closed, rtol=1e-4, atol=1e-6)  # z_0 is z_K
    found = latent.active_units(units)
    assert (found["count"], found["of"], found["threshold"]) == (2, 3, 0.01)
    assert units.variance_of_mean[1] < 1e-9
    assert latent.active_units(units, threshold=1e9)["count"] == 0
    keys = jax.jit(lambda seed: jax.random.split(jax.random.key(seed), TEST.keys.shape))
    terms = [evaluation.free_energy_terms(model, TEST._replace(keys=keys(seed))).kl for seed in range(200)]
    assert np.mean(terms) == pytest.approx(sum(found["kl_q0"]), abs=5 * np.std(terms) / np.sqrt(np.size(terms)))


def test_a_unit_is_active_by_what_the_decoder_is_given():
    model = made("K=3 amortised", scale=0.2)
    for head in (model.posterior.mean, model.posterior.log_std):  # q_0 is the same for all images; its layers differ
        for parameter in (head.kernel, head.bias):
            parameter[...] = np.zeros_like(parameter[...])
    units = latent.latent_units(model, TEST)
    mean, kl = normals(model)
    np.testing.assert_allclose(units.variance_of_mean, np.var(mean, axis=0), rtol=0.2, atol=1e-3)
    assert latent.active_units(units)["count"] > 0
    np.testing.assert_allclose(units.kl_q0, 0.0, atol=1e-6)
    np.testing.assert_allclose(units.kl, np.mean(kl, axis=0), rtol=0.2, atol=0.01)


def test_the_kl_by_dimension_is_exact_without_a_flow_and_a_bound_with_one(model):
    found = latent.latent_units(model, TEST).kl
    assert found.shape == (3,)
    if model.posterior.flow_length == 0:
        np.testing.assert_allclose(found, closed_kl(means(model)[1]), rtol=1e-4)
    else:
        np.testing.assert_allclose(found, np.mean(normals(model)[1], axis=0), rtol=0.05, atol=0.02)


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
    lines = latent.interpolate(model, left, right, 3)
    for line in map(np.asarray, lines):
        assert line.shape == (2, 3, *SHAPE)
        np.testing.assert_allclose(line[:, 0], evaluation.reconstruct(model, left), atol=1e-5)
        np.testing.assert_allclose(line[:, -1], evaluation.reconstruct(model, right), atol=1e-5)


def test_one_line_is_straight_in_z_0_and_the_other_in_z_k(model):
    pixels = np.asarray(TEST.pixels)
    lines = latent.interpolate(model, pixels[:2], pixels[2:4], 3)
    base, code = np.asarray(lines.base[:, 1]), np.asarray(lines.code[:, 1])
    # Of the two pairs, images 0 and 2, and 1 and 3: halfway.
    middle, q = jax.tree.map(lambda leaf: (leaf[:2] + leaf[2:4]) / 2, jax.device_get(means(model)))
    np.testing.assert_allclose(code, decoded(model, middle), atol=1e-5)
    middle, _ = planar_flow(q.params, q.mean)
    np.testing.assert_allclose(base, decoded(model, middle), atol=1e-5)
    assert (np.max(np.abs(base - code)) > 1e-4) == (model.posterior.flow_length > 0)


def test_one_coordinate_is_moved_and_the_others_stay(model):
    moved = latent.traverse(model, TEST.pixels[0], np.array([2, 0]), np.float32([-3.0, 0.0, 3.0]))
    assert moved.shape == (2, 3, *SHAPE)
    z = np.tile(means(model)[0][0], (2, 1))
    z[0, 2], z[1, 0] = 3.0, -3.0
    np.testing.assert_allclose(np.stack([moved[0, 2], moved[1, 0]]), decoded(model, z), atol=1e-5)


def test_units_of_a_posterior_of_another_kind_need_its_mean_and_its_map_alone():
    class Shifted:
        """q(z|x) = N(mean, 1), with nothing but what a posterior must have."""

        def __init__(self, mean):
            self.mean = mean

        def transform(self, noise):
            zero = jnp.zeros(noise.shape[:-1])
            return jnp.broadcast_to(self.mean, noise.shape) + noise, zero, zero

    @jax.tree_util.register_static
    class Model:
        def encode(self, images):
            return Shifted(images.reshape(*images.shape[:-2], -1)[..., :3])

    units = latent.latent_units(Model(), TEST)
    pixels = np.asarray(unit_pixels(TEST.pixels), np.float64).reshape(12, -1)[:, :3]
    np.testing.assert_allclose(units.kl, 0.5 * np.mean(pixels**2, axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(units.variance_of_mean, np.var(pixels, axis=0), rtol=1e-4)
    assert units.kl_q0 is None
    assert latent.active_units(units)["kl_q0"] is None
