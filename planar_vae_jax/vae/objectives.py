"""What a planar-flow VAE minimises and is judged by, in nats, on batches of images.

Everything here asks for a model (:class:`Model`: an encoder, a decoder and a likelihood) and knows nothing else about
it.

Keys: one key draws for the whole batch (training); keys ``[B]`` draw for each image by its own, so that what is drawn
for an image depends on no other image and on no batch size (evaluation).
"""

import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from planar_vae_jax.flows.distribution import standard_normal_log_prob
from planar_vae_jax.vae.likelihoods import Likelihood


class Posterior(Protocol):
    """``q(z|x)`` of images: what is made of standard normal noise. :class:`PlanarFlow` is one."""

    @property
    def mean(self) -> jax.Array:
        """``[..., L]``, of ``z_0``: what noise of zeros is before the flow."""

    def transform(self, noise: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """``(z_K [..., L], log q_0(z_0|x) [...], log|det dz_K/dz_0| [...])`` of ``noise [..., L]`` from N(0, I)."""


class Model(Protocol):
    """A VAE with its parameters. Images are ``[..., H, W]`` or ``[..., H, W, C]``, values in 0..1."""

    @property
    def likelihood(self) -> Likelihood:
        """The family of ``p(x|z)``."""

    def encode(self, images: jax.Array) -> Posterior:
        """``q(z|x)`` of images, with ``mean [..., L]``."""

    def decode(self, z: jax.Array) -> Any:
        """The parameters of the likelihood for ``z [..., L]``: a pytree of arrays ``[..., H, W]`` (or ``C`` beside)."""


class Terms(NamedTuple):
    """The terms of the free energy of each image under one sample of ``z``, in nats."""

    log_q0: jax.Array  # [...], log q_0(z_0|x)
    log_det: jax.Array  # [...], log|det dz_K/dz_0|
    log_prior: jax.Array  # [...], log p(z_K), at z_K and never at z_0
    log_likelihood: jax.Array  # [...], log p(x|z_K)
    squared_error: jax.Array  # [...], sum over pixels of (x - their mean)^2; no nats

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

    @property
    def importance_bound(self) -> jax.Array:
        """``-log (1/k) sum_s exp(-free_energy_s)`` over the leading axis of k samples: ``[k, ...]`` to ``[...]``.

        Minimised; in expectation it falls with k from the free energy (k = 1) to ``-log p(x)`` (Burda et al. 2016,
        eq. 8).
        """
        return math.log(len(self.log_q0)) - jax.nn.logsumexp(-self.free_energy, axis=0)

    def objective(self, name: str) -> jax.Array:
        """``"elbo"``: the free energy; ``"iwae"``: the importance bound over the leading axis; ``"reconstruction"``:
        the squared error, without a KL term."""
        if name == "iwae":
            return self.importance_bound
        return self.squared_error if name == "reconstruction" else self.free_energy

    def annealed(self, temperature: jax.Array | float, kl_weight: jax.Array | float) -> jax.Array:
        """Free energy for training, under either of two annealings (1 switches one off; schedules: ``losses``).

        Args:
            temperature: beta_t of Rezende & Mohamed (eq. 20), which multiplies ``log p(x, z_K)``.
            kl_weight: KL warm-up, which multiplies the KL term.
        """
        kl = self.log_q0 - self.log_det - temperature * self.log_prior
        return kl_weight * kl - temperature * self.log_likelihood


def free_energy(model: Model, images: jax.Array, key: jax.Array) -> Terms:
    """Terms of the free energy of each image, with one sample of ``z_0`` each.

    Args:
        model: encoder and decoder.
        images: ``[B, H, W]`` or ``[B, H, W, C]``, values 0 or 1 for a Bernoulli likelihood. Grey levels are accepted,
            but then its term is a cross-entropy and ``free_energy`` bounds no likelihood.
        key: one key for the batch, or keys ``[B]``, one an image.

    Returns:
        :class:`Terms`, each ``[B]``.
    """
    posterior = model.encode(images)
    return _terms(model, posterior, images, noise(key, posterior.mean))


def sampled_terms(model: Model, images: jax.Array, key: jax.Array, samples: int) -> Terms:
    """As :func:`free_energy`, with ``samples`` samples of each image by one key for the batch: each ``[samples, B]``.

    Memory is O(samples B H W): for training. Many samples: :func:`importance_nll`.
    """
    posterior = model.encode(images)
    shape = (samples, *posterior.mean.shape)
    return _terms(model, posterior, images, jax.random.normal(key, shape, posterior.mean.dtype))


def fold_in_each(keys: jax.Array, number: jax.Array | int) -> jax.Array:
    """Keys ``[B]``, one an image, with ``number`` folded into each."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def typed_key(key: jax.Array) -> jax.Array:
    """The key, or keys, as of ``jax.random.key``; those of ``jax.random.PRNGKey`` are arrays of words."""
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)


def noise(key: jax.Array, like: jax.Array) -> jax.Array:
    """Standard normal draws of the shape of ``like [B, L]``, by one key or by keys ``[B]``."""
    key = typed_key(key)
    if key.ndim == 0:
        return jax.random.normal(key, like.shape, like.dtype)
    return jax.vmap(lambda key: jax.random.normal(key, like.shape[1:], like.dtype))(key)


def _terms(model: Model, posterior: Posterior, images: jax.Array, noise: jax.Array) -> Terms:
    """For ``noise [..., B, L]``: as many samples of each image's ``z_0``."""
    zK, log_q0, log_det = posterior.transform(noise)
    # Pixels in one axis: loops over 784 are faster than loops over 28 times 28.
    axes = images.ndim - (posterior.mean.ndim - 1)  # of an image: (H, W) or (H, W, C)
    images, parameters = jax.tree.map(lambda leaf: _flat(leaf, axes), (images, model.decode(zK)))
    mean = model.likelihood.mean(parameters)
    images = jnp.broadcast_to(images, mean.shape)
    return Terms(
        log_q0=log_q0,
        log_det=log_det,
        log_prior=standard_normal_log_prob(zK),
        log_likelihood=model.likelihood.log_prob(images, parameters),
        squared_error=jnp.sum(jnp.square(images - mean), -1),
    )


def _flat(array: jax.Array, axes: int) -> jax.Array:
    """The last ``axes`` axes as one: ``[..., H, W]`` to ``[..., H W]``."""
    leading = array.ndim - axes
    return array.reshape(*array.shape[:leading], math.prod(array.shape[leading:]))


class MarginalLikelihood(NamedTuple):
    """An importance-sampling estimate for each image."""

    nll: jax.Array  # [B], or [M, B] for M numbers of samples; -log p(x), nats
    effective_sample_size: jax.Array  # the same; between 1 and S; near 1 the estimate hangs on one sample


def sample_counts(samples: int) -> tuple[int, ...]:
    """S/4, S/2 and S, whole and without 0: where an estimate that has settled no longer changes."""
    return tuple(sorted({samples // 4, samples // 2, samples} - {0}))


def importance_nll(
    model: Model, images: jax.Array, key: jax.Array, *, samples: int | tuple[int, ...], chunk: int = 128
) -> MarginalLikelihood:
    """``-log p(x)`` of each image by importance sampling from ``q(z_K|x)`` (Burda et al. 2016, eq. 8).

    ``-log (1/S) sum_s p(x, z_s) / q(z_s|x)``: an upper bound in expectation, tighter than the free energy, exact as S
    grows. The effective sample size is ``(sum w)^2 / sum w^2``.

    Args:
        model: encoder and decoder.
        images: ``[B, H, W]`` or ``[B, H, W, C]``, as :func:`free_energy` takes them.
        key: one key for the batch, or keys ``[B]``. Sample ``s`` of an image has a key of its own, whatever S is.
        samples: S; or several, whose estimates share samples: that of a smaller S is of the first S, in one pass.
        chunk: samples of an image that are held at a time: memory is O(chunk B H W), time O(S B).
    """
    if isinstance(samples, int):
        one = importance_nll(model, images, key, samples=(samples,), chunk=chunk)
        return MarginalLikelihood(*(leaf[0] for leaf in one))
    if not samples or min(samples) < 1:
        raise ValueError(f"samples must be at least 1; got {samples}")
    posterior = model.encode(images)
    key = typed_key(key)
    keys = jax.random.split(key, len(images)) if key.ndim == 0 else key
    counts, most = jnp.array(samples), max(samples)
    chunk = min(chunk, most)

    def log_weights(start: jax.Array) -> tuple[jax.Array, jax.Array]:
        """``log sum w`` and ``log sum w^2`` over the chunk of samples that begins at ``start``, ``[M, B]`` each."""
        numbers = start + jnp.arange(chunk)
        draws = jax.vmap(lambda s: noise(fold_in_each(keys, s), posterior.mean))(numbers)
        log_w = -_terms(model, posterior, images, draws).free_energy
        # [M, chunk, B]; the last chunk may be longer than S.
        log_w = jax.vmap(lambda count: jnp.where((numbers < count)[:, None], log_w, -jnp.inf))(counts)
        return jax.nn.logsumexp(log_w, axis=1), jax.nn.logsumexp(2.0 * log_w, axis=1)

    sums = jax.lax.map(log_weights, jnp.arange(0, most, chunk))
    log_sum, log_sum_squares = (jax.nn.logsumexp(part, axis=0) for part in sums)
    nll = jnp.log(counts.astype(log_sum.dtype))[:, None] - log_sum
    return MarginalLikelihood(nll, jnp.exp(2.0 * log_sum - log_sum_squares))
