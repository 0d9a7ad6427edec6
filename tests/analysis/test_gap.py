"""The parts of the inference gap, in a model whose posterior is a normal that is known exactly."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import draw
from vae_models import drawn

from planar_vae_jax import PlanarFlow
from planar_vae_jax.analysis import inference_gap as gap
from planar_vae_jax.analysis.evaluation import Images
from planar_vae_jax.flows.planar import Planar, init_planar
from planar_vae_jax.vae.likelihoods import LIKELIHOODS

pytestmark = pytest.mark.usefixtures("standard_promotion")


DIM, BATCH = 2, 6
# Of the likelihood. With a stronger correlation the weights of a factorised q* would have no variance, as its
# precision, the diagonal of the posterior's, would exceed twice the posterior's along the diagonal.
PRECISION = np.array([[6.0, 2.8], [2.8, 5.0]])
CENTRE = np.array([0.7, -0.4])
SHIFT = 30.0  # nats, so that a pixel's logit is far below 0
SETTINGS = gap.Settings(steps=300, learning_rate=0.03, samples=10, bound_samples=4000, nll_samples=4000)
IMAGES = np.ones((BATCH, 1, 1), np.float32)
KEYS = jax.random.split(jax.random.key(3), BATCH)


class NormalModel:
    """One pixel, which is 1: at logits far below 0 its log-likelihood is the logit itself, here a quadratic of z.

    So ``p(z|x)`` is a normal with precision ``PRECISION + I``, whatever the encoder says: ``mean`` and ``log_std [D]``.
    """

    likelihood = LIKELIHOODS["bernoulli"]

    def __init__(self, mean, log_std, flow_length):
        layers = init_planar(jax.random.key(0), flow_length, DIM)
        each = Planar(*(jnp.broadcast_to(leaf, (BATCH, *leaf.shape)) for leaf in layers))
        shared = layers if flow_length else each
        self.posterior = PlanarFlow(shared, *(jnp.broadcast_to(leaf, (BATCH, DIM)) for leaf in (mean, log_std)))

    def encode(self, images):
        return self.posterior

    def decode(self, z):
        difference = z - jnp.broadcast_to(jnp.asarray(CENTRE, z.dtype), z.shape)
        squares = jnp.einsum("...i,ij,...j->...", difference, jnp.asarray(PRECISION, z.dtype), difference)
        return (-SHIFT - 0.5 * squares)[..., None, None]


LAMBDA = PRECISION + np.eye(DIM)
MEAN = np.linalg.solve(LAMBDA, PRECISION @ CENTRE)
# log p(x) = -SHIFT + log N(CENTRE; 0, P^-1 + I) + log of (2 pi)^(D/2) |P|^(-1/2)
LOG_EVIDENCE = -SHIFT - 0.5 * (
    CENTRE @ np.linalg.solve(np.linalg.inv(PRECISION) + np.eye(DIM), CENTRE) + math.log(np.linalg.det(LAMBDA))
)
APPROXIMATION = 0.5 * (np.log(np.diag(LAMBDA)).sum() - math.log(np.linalg.det(LAMBDA)))  # of a factorised normal


def kl_of_encoder(mean, log_std):
    """KL(N(mean, std^2 I) || N(MEAN, LAMBDA^-1))"""
    difference, variance = mean - MEAN, math.exp(2 * log_std)
    trace = variance * np.trace(LAMBDA) + difference @ LAMBDA @ difference
    return 0.5 * (trace - DIM - math.log(np.linalg.det(LAMBDA)) - 2 * DIM * log_std)


@functools.partial(jax.jit, static_argnums=2)
def compiled(mean, log_std, flow_length):
    return gap.inference_gap(NormalModel(mean, log_std, flow_length), IMAGES, KEYS, SETTINGS)


def found(mean, log_std, flow_length=0):
    mean, log_std = (np.broadcast_to(np.float32(value), (DIM,)) for value in (mean, log_std))
    return jax.device_get(compiled(mean, log_std, flow_length))


@pytest.mark.parametrize(("mean", "log_std"), [(1.5, -1.0), (-0.3, -2.0)])
def test_the_parts_are_the_known_ones(mean, log_std):
    parts = found(mean, log_std)
    np.testing.assert_allclose(parts.nll, -LOG_EVIDENCE, atol=0.05)
    assert np.mean(parts.nll) == pytest.approx(-LOG_EVIDENCE, abs=0.015)
    assert np.mean(parts.approximation) == pytest.approx(APPROXIMATION, abs=0.02)
    amortisation = kl_of_encoder(mean, log_std) - APPROXIMATION
    assert np.mean(parts.amortisation) == pytest.approx(amortisation, rel=0.05, abs=0.05)
    np.testing.assert_array_equal(parts.own, parts.factorised)
    assert np.all(parts.effective_sample_size > 200)


def test_layers_of_its_own_let_q_come_nearer():
    parts = found(0.0, -0.5, flow_length=6)
    assert np.mean(parts.factorised_approximation) == pytest.approx(APPROXIMATION, abs=0.02)
    assert np.mean(parts.approximation) < 0.6 * APPROXIMATION
    assert np.all(parts.amortisation > 0.1)
    assert np.mean(parts.nll) == pytest.approx(-LOG_EVIDENCE, abs=0.015)


def test_a_right_encoder_has_no_amortisation_gap():
    parts = found(MEAN, -0.5 * np.log(np.diag(LAMBDA)))
    assert abs(np.mean(parts.amortisation)) < 0.02
    assert np.mean(parts.approximation) == pytest.approx(APPROXIMATION, abs=0.02)


@pytest.fixture(scope="module")
def flow():
    """One for all images of a batch."""
    params, _ = draw(DIM, 3, scale=0.5, dtype=np.float32)
    return PlanarFlow(params, np.ones((BATCH, DIM), np.float32), np.full((BATCH, DIM), -1.0, np.float32))


def test_flows_become_each_images_own_without_changing(flow):
    noise = np.random.default_rng(1).normal(size=(7, BATCH, DIM)).astype(np.float32)

    @jax.jit
    def run(flow):
        own = gap._own_posteriors(flow, BATCH)
        return own, gap._own_posteriors(own, BATCH), flow.transform(noise), own.transform(noise)

    own, again, before, after = run(flow)
    assert own.params.u.shape == (BATCH, 3, DIM)
    assert own.params.b.shape == (BATCH, 3)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(again.params.u, own.params.u)
    assert not gap._is_factorised(own)


def test_the_factorised_start_has_the_moments_of_q(flow):
    @jax.jit
    def run(flow):
        normal = gap._factorised_posteriors(gap._own_posteriors(flow, BATCH), KEYS, samples=5000)
        return normal, flow.sample(jax.random.key(1), (5000,))

    normal, z = run(flow)
    np.testing.assert_allclose(normal.mean, np.mean(z, 0), atol=0.05)
    np.testing.assert_allclose(normal.log_std, np.log(np.std(z, 0)), atol=0.05)
    assert gap._is_factorised(normal)


@pytest.mark.slow
def test_a_vaes_images_are_independent_of_each_other():
    model = drawn((5, 4), hidden=6, latent=3, flow_length=2, amortized=True, posterior="full")
    pixels = 255 * np.random.default_rng(0).integers(0, 2, (7, 5, 4), np.uint8)
    images = Images(pixels, jax.random.split(jax.random.key(5), 7))
    settings = gap.Settings(steps=20, samples=4, bound_samples=200, nll_samples=200)
    order = np.array([4, 2, 6, 0, 5, 1, 3])  # other images in each batch of 3, and others beside the last
    whole, shuffled = (
        jax.device_get(gap.gap_of_images(model, given, settings, batch_size=3))
        for given in (images, images.take(order))
    )
    for one, other in zip(whole, shuffled, strict=True):
        np.testing.assert_allclose(one[order], other, rtol=1e-5)
    assert np.all(whole.amortisation > -0.1)
    assert np.all(whole.approximation > -0.1)
    assert np.all(whole.factorised_approximation > -0.1)
    summary = gap.summarise(whole)
    assert summary["images"] == 7
    assert summary["own_family"]["amortisation"] == pytest.approx(float(np.mean(whole.amortisation)), rel=1e-5)
    assert summary["factorised"]["approximation_se"] > 0


def test_a_posterior_that_is_no_planar_flow_is_refused():
    class Point:
        likelihood = LIKELIHOODS["bernoulli"]

        def encode(self, images):
            return images[:, 0]

    with pytest.raises(ValueError, match="model must have a PlanarFlow as its posterior"):
        gap.inference_gap(Point(), IMAGES, KEYS, SETTINGS)
