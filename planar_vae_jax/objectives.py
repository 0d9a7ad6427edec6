"""What a planar-flow VAE minimises and is judged by, for one example, in nats."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from planar_vae_jax.distributions import bernoulli_log_prob, normal_log_prob, standard_normal_log_prob
from planar_vae_jax.flows import planar_flow
from planar_vae_jax.models import VAE, Posterior


class Terms(NamedTuple):
    """The terms of one example's free energy under one sample, each ``[]`` in nats."""

    log_q0: jax.Array  # log q_0(z_0|x)
    log_det: jax.Array  # log|det dz_K/dz_0|
    log_prior: jax.Array  # log p(z_K), at z_K and never at z_0
    log_likelihood: jax.Array  # log p(x|z_K)
    squared_error: jax.Array  # sum over pixels of (x - sigmoid(logits))^2; no nats

    @property
    def kl(self) -> jax.Array:
        """One-sample estimate of ``KL(q(z_K|x) || p(z_K))``; may be negative."""
        return self.log_q0 - self.log_det - self.log_prior

    @property
    def reconstruction(self) -> jax.Array:
        """``-log p(x|z_K)``."""
        return -self.log_likelihood

    @property
    def free_energy(self) -> jax.Array:
        """``log q_0 - log_det - log p(z_K) - log p(x|z_K)``, minimised; minus the ELBO (Rezende & Mohamed, eq. 15)."""
        return self.kl + self.reconstruction

    def annealed(self, temperature: jax.Array | float, kl_weight: jax.Array | float) -> jax.Array:
        """Free energy for training, under either of two annealings (1 switches one off).

        Args:
            temperature: beta_t of Rezende & Mohamed (eq. 20), which multiplies ``log p(x, z_K)``.
            kl_weight: KL warm-up, which multiplies the KL term.
        """
        kl = self.log_q0 - self.log_det - temperature * self.log_prior
        return kl_weight * kl - temperature * self.log_likelihood


def sample_posterior(
    posterior: Posterior, key: jax.Array, h: str, method: str | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws ``z_0`` by reparameterisation and sends it through the flow.

    Returns:
        ``(z_K [L], log q_0(z_0|x) [], log_det [])``.
    """
    mean, log_std, flow = posterior
    noise = jax.random.normal(key, mean.shape, mean.dtype)
    z0 = mean + jnp.exp(log_std) * noise
    zK, log_det = planar_flow(flow, z0, h=h, method=method)
    return zK, normal_log_prob(z0, mean, log_std), log_det


def free_energy(model: VAE, x: jax.Array, key: jax.Array) -> Terms:
    """Terms of the free energy of one example with one sample of ``z_0``.

    Args:
        model: encoder and decoder.
        x: ``[P]``, values 0 or 1. Grey levels are accepted, but then the Bernoulli term is a cross-entropy and
            ``free_energy`` bounds no likelihood.
        key: a PRNG key.
    """
    return _terms(model, model.encode(x), x, key)


def _terms(model: VAE, posterior: Posterior, x: jax.Array, key: jax.Array) -> Terms:
    zK, log_q0, log_det = sample_posterior(posterior, key, model.h, model.method)
    logits = model.decode(zK)
    return Terms(
        log_q0=log_q0,
        log_det=log_det,
        log_prior=standard_normal_log_prob(zK),
        log_likelihood=bernoulli_log_prob(x, logits),
        squared_error=jnp.sum(jnp.square(x - jax.nn.sigmoid(logits))),
    )


def importance_nll(model: VAE, x: jax.Array, key: jax.Array, *, samples: int) -> tuple[jax.Array, jax.Array]:
    """``-log p(x)`` of one example by importance sampling from ``q(z_K|x)`` (Burda et al. 2016, eq. 8).

    ``-log (1/S) sum_s p(x, z_s) / q(z_s|x)``: an upper bound in expectation, tighter than the free energy, exact as S
    grows.

    Args:
        samples: S, drawn at once (memory O(S P) an example; ``jax.lax.map`` over examples bounds it).

    Returns:
        ``(nll [], effective_sample_size [])``. The latter, ``(sum w)^2 / sum w^2``, lies between 1 and S; near 1 the
        estimate hangs on one sample.
    """
    posterior = model.encode(x)

    def log_weight(key: jax.Array) -> jax.Array:
        return -_terms(model, posterior, x, key).free_energy

    log_weights = jax.vmap(log_weight)(jax.random.split(key, samples))
    log_sum = jax.nn.logsumexp(log_weights)
    effective = jnp.exp(2.0 * log_sum - jax.nn.logsumexp(2.0 * log_weights))
    return jnp.log(samples) - log_sum, effective
