"""Log-densities of one event, in nats."""

import math

import jax
import jax.numpy as jnp

_LOG_2PI = math.log(2.0 * math.pi)


def standard_normal_log_prob(z: jax.Array) -> jax.Array:
    """``log N(z; 0, I)`` for ``z [D]``."""
    return -0.5 * (jnp.sum(jnp.square(z)) + z.size * _LOG_2PI)


def normal_log_prob(z: jax.Array, mean: jax.Array, log_std: jax.Array) -> jax.Array:
    """``log N(z; mean, diag(exp(2 log_std)))``, all ``[D]``."""
    return standard_normal_log_prob((z - mean) * jnp.exp(-log_std)) - jnp.sum(log_std)


def bernoulli_log_prob(x: jax.Array, logits: jax.Array) -> jax.Array:
    """``log p(x)`` of independent Bernoulli variables, summed over any shape.

    ``x l - softplus(l)`` with logits ``l``: never through probabilities, which saturate. For ``x`` strictly between 0
    and 1 (grey levels) this is a cross-entropy, not a log-likelihood.
    """
    return jnp.sum(x * logits - jax.nn.softplus(logits))


def normal_mixture_log_prob(z: jax.Array, means: jax.Array, std: float) -> jax.Array:
    """Log-density of an equal mixture of isotropic normals: ``z [D]``, ``means [C, D]``, common ``std``."""
    log_probs = jax.vmap(lambda mean: standard_normal_log_prob((z - mean) / std))(means)
    return jax.nn.logsumexp(log_probs) - math.log(means.shape[0]) - z.size * math.log(std)
