"""Gaussians with full covariance under a planar flow, against numpy's multivariate normal; q_0's KL in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import draw

from planar_vae_jax import PlanarFlow
from planar_vae_jax.vae.model import VAE, _strictly_lower
from planar_vae_jax.vae.objectives import free_energy

DIM, BATCH = 4, 3


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def posterior(flow_length=0, scale=1.0):
    params, _ = draw(DIM, flow_length, scale=0.5, dtype=np.float32)
    mean, log_std, lower = normal(0, BATCH, DIM), 0.5 * normal(1, BATCH, DIM), scale * normal(2, BATCH, DIM, DIM)
    return PlanarFlow(params, mean, log_std, lower=lower)


def factors(q):
    """The Cholesky factors in float64, ``[B, D, D]``."""
    diagonal = np.exp(np.asarray(q.log_std, np.float64))
    return np.tril(np.asarray(q.lower, np.float64), -1) + diagonal[:, :, None] * np.eye(DIM)


def multivariate_normal_log_prob(z, mean, covariance):
    difference = z - mean
    _, log_det = np.linalg.slogdet(covariance)
    return -0.5 * (difference @ np.linalg.solve(covariance, difference) + log_det + len(z) * np.log(2 * np.pi))


def test_log_q0_is_that_of_a_multivariate_normal():
    q = posterior()
    noise = normal(3, 5, BATCH, DIM)
    z, log_q0, log_det = jax.device_get(jax.jit(PlanarFlow.transform)(q, noise))
    assert z.shape == noise.shape
    np.testing.assert_array_equal(log_det, np.zeros((5, BATCH)))
    for b, factor in enumerate(factors(q)):
        for s in range(5):
            point, mean = z[s, b].astype(np.float64), np.asarray(q.mean, np.float64)[b]
            np.testing.assert_allclose(point, mean + factor @ noise[s, b].astype(np.float64), rtol=1e-5, atol=1e-6)
            truth = multivariate_normal_log_prob(point, mean, factor @ factor.T)
            assert float(log_q0[s, b]) == pytest.approx(truth, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("flow_length", [0, 3])
def test_a_density_by_the_inverse_agrees_with_that_of_its_draws(flow_length):
    q = posterior(flow_length, scale=0.5)

    @jax.jit
    def run(q, key):
        draws, log_probs = q.sample_and_log_prob(key, (6,))
        return draws, log_probs, q.log_prob(draws)

    draws, log_probs, by_the_inverse = run(q, jax.random.key(4))
    assert draws.shape == (6, BATCH, DIM)
    np.testing.assert_allclose(by_the_inverse, log_probs, rtol=2e-4, atol=2e-4)


def test_one_covariance_serves_a_batch_of_means_and_the_other_way_round():
    noise = normal(3, BATCH, DIM)

    @jax.jit
    def run(q, key):
        shared = PlanarFlow(q.params, q.mean, q.log_std, lower=q.lower[0])
        alone = PlanarFlow(q.params, q.mean[2], q.log_std[2], lower=q.lower[0])
        common = PlanarFlow(q.params, q.mean[0], q.log_std[0], lower=q.lower)
        of_common = common.sample(key, (7,)), common.base_kl, common.log_prob(noise)
        return shared.transform(noise), alone.transform(noise[2]), common, of_common

    shared, alone, common, (draws, base_kl, log_probs) = run(posterior(), jax.random.key(0))
    for many, one in zip(shared, alone, strict=True):
        np.testing.assert_allclose(many[2], one, rtol=1e-5, atol=1e-6)
    assert common.batch_shape == (BATCH,)
    assert draws.shape == (7, BATCH, DIM)
    assert base_kl.shape == (BATCH, DIM)
    assert log_probs.shape == (BATCH,)


def test_it_is_a_pytree_under_every_transformation():
    q, noise = posterior(2), normal(3, BATCH, DIM)
    leaves, tree = jax.tree.flatten(q)
    assert len(leaves) == 6
    assert tree.unflatten(leaves).lower is q.lower

    def one(mean, log_std, lower, noise):
        return PlanarFlow(q.params, mean, log_std, lower=lower).transform(noise)

    @jax.jit
    def run(q):
        gradient = jax.grad(lambda q: jnp.sum(q.transform(noise)[0] ** 2))(q)
        return q.transform(noise), jax.vmap(one)(q.mean, q.log_std, q.lower, noise), gradient

    together, each, gradient = run(q)
    for mine, theirs in zip(together, each, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    assert np.all(np.triu(np.asarray(gradient.lower)[0]) == 0.0)  # what is not below the diagonal does not count
    assert np.all(np.isfinite(np.asarray(gradient.lower)))


def test_the_kl_of_the_base_is_that_of_two_normals_and_its_terms_a_chain():
    q = posterior()
    mean, log_std = np.asarray(q.mean, np.float64), np.asarray(q.log_std, np.float64)

    @jax.jit
    def run(q):
        near_one = PlanarFlow(q.params, jnp.zeros(DIM), jnp.full(DIM, 1e-6))
        return q.base_kl, PlanarFlow(q.params, q.mean, q.log_std).base_kl, near_one.base_kl

    full, diagonal, near_one = jax.device_get(run(q))
    for b, factor in enumerate(factors(q)):
        covariance = factor @ factor.T
        truth = 0.5 * (np.trace(covariance) + mean[b] @ mean[b] - DIM - np.linalg.slogdet(covariance)[1])
        assert np.sum(full[b]) == pytest.approx(truth, rel=1e-5)
        leading = 0.5 * (covariance[0, 0] + mean[b, 0] ** 2 - 1 - np.log(covariance[0, 0]))
        assert full[b, 0] == pytest.approx(leading, rel=1e-4, abs=1e-5)
    variance = np.exp(2 * log_std)
    np.testing.assert_allclose(diagonal, 0.5 * (mean**2 + variance - 1 - np.log(variance)), rtol=1e-4, atol=1e-6)
    assert near_one[0] == pytest.approx(0.0, abs=1e-9)


def test_each_entry_of_the_encoder_is_below_the_diagonal_once():
    for size in (1, 2, 3, 6, 7):
        entries = 1.0 + np.arange(size * (size - 1) // 2, dtype=np.float32)
        both = np.stack([entries, 2 * entries])
        matrix, batch = jax.device_get(
            jax.jit(lambda one, many, n=size: (_strictly_lower(one, n), _strictly_lower(many, n)))(entries, both)
        )
        assert matrix.shape == (size, size)
        assert np.all(np.triu(matrix) == 0.0)
        np.testing.assert_array_equal(np.sort(matrix[np.tril_indices(size, -1)]), entries)
        np.testing.assert_array_equal(batch[1], 2 * matrix)


@pytest.mark.parametrize("amortized", [False, True])
def test_a_full_posterior_starts_near_the_diagonal_one_and_is_trained(amortized):
    x = np.random.default_rng(0).integers(0, 2, (5, 3, 4)).astype(np.float32)
    full, diagonal = (
        VAE.mlp((3, 4), latent=3, hidden=6, flow_length=2, amortized=amortized, posterior=posterior, rngs=nnx.Rngs(1))
        for posterior in ("full", "diagonal")
    )

    def energy(model):
        return jnp.sum(free_energy(model, x, jax.random.key(2)).free_energy)

    @jax.jit
    def run(full, diagonal):
        return full.encode(x), diagonal.encode(x), jax.grad(energy)(full).posterior.lower.bias[...]

    mine, theirs, gradient = jax.device_get(run(full, diagonal))
    np.testing.assert_array_equal(mine.mean, theirs.mean)
    np.testing.assert_array_equal(mine.log_std, theirs.log_std)
    assert 0.0 < np.max(np.abs(mine.lower)) < 0.1
    assert not np.array_equal(mine.lower[0], mine.lower[1])  # of each image's own
    assert np.all(np.abs(gradient) > 0.0)


@pytest.mark.parametrize(
    ("lower", "words"),
    [
        (np.zeros(DIM, np.float32), "lower must be of shape"),
        (np.zeros((DIM, DIM + 1), np.float32), "lower must be of shape"),
        (np.zeros((DIM, DIM), np.float16), "lower and params must be of one floating dtype"),
        (np.zeros((BATCH + 1, DIM, DIM), np.float32), "params, mean, log_std and lower must broadcast"),
    ],
)
def test_other_factors_are_refused(lower, words):
    q = posterior()
    with pytest.raises(ValueError, match=words):
        PlanarFlow(q.params, q.mean, q.log_std, lower=lower)
