"""A trained VAE's latent space: where codes lie, and what is decoded between them and along its axes.

Pictures are pixel means in 0..1; ``pixels`` are uint8, as they are evaluated.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from planar_vae_jax.analysis.evaluation import BATCH, Images, fixed_key, map_batches, map_chunks, pictures, unit_pixels
from planar_vae_jax.data.streamed import Streamed
from planar_vae_jax.flows.distribution import PlanarFlow
from planar_vae_jax.vae import objectives
from planar_vae_jax.vae.model import VAE

MOMENTS = 128  # samples of each image's q, for its mean and variance in each dimension
RATED = 500  # images that the KL by dimension is averaged over


def aggregate_posterior(vae: VAE, params: Any, images: Images | Streamed) -> jax.Array | np.ndarray:
    """One sample ``z_K`` for each image, ``[N, L]``: together a sample of the aggregate posterior.

    They are the samples that the images' free energies have.
    """
    return map_chunks(functools.partial(_codes, vae, params), images, BATCH)


@functools.partial(jax.jit, static_argnames="vae")
def _codes(vae: VAE, params: Any, images: Images) -> jax.Array:
    def batch(pixels: jax.Array, keys: jax.Array) -> jax.Array:
        posterior = vae.bind(params).encode(unit_pixels(pixels))
        return posterior.transform(objectives.noise(objectives.fold_in_each(keys, 0), posterior.mean))[0]

    return map_batches(batch, images, BATCH)


def kl_by_dimension(vae: VAE, params: Any, images: Images | Streamed) -> np.ndarray:
    """``E_x KL(q(z_d|x) || N(0, 1))`` of each dimension of ``z_K``, ``[L]``, nats, over a part of the images.

    ``q(z_d|x)`` is taken as the normal of its mean and variance: what it is without a flow, and otherwise a lower
    bound, as of all densities with these moments the normal is closest to a normal. Correlations count nowhere.
    """
    size = len(images.pixels) if isinstance(images, Images) else len(images)
    rows = np.unique(np.linspace(0, size - 1, RATED).astype(int))
    return np.asarray(_kl_by_dimension(vae, params, images.take(rows)))


@functools.partial(jax.jit, static_argnames="vae")
def _kl_by_dimension(vae: VAE, params: Any, images: Images) -> jax.Array:
    def batch(pixels: jax.Array, keys: jax.Array) -> jax.Array:
        mean, variance = posterior_moments(vae.bind(params).encode(unit_pixels(pixels)))
        return _kl_to_prior(mean, variance)

    return jnp.mean(map_batches(batch, images, BATCH // 4), axis=0)


def _kl_to_prior(mean: jax.Array, variance: jax.Array) -> jax.Array:
    return 0.5 * (jnp.square(mean) + variance - 1.0 - jnp.log(variance))


def posterior_moments(posterior: PlanarFlow) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of each dimension of ``z_K``, ``[..., L]`` each, from ``MOMENTS`` draws.

    All densities are given the same noise, each draw with its negative, and scaled: without a flow both are exact.
    """
    batch, dim = posterior.batch_shape, posterior.dim
    noise = jax.random.normal(fixed_key(), (MOMENTS // 2, dim), posterior.mean.dtype)
    noise = jnp.concatenate([noise, -noise])
    noise = noise / jnp.sqrt(jnp.mean(jnp.square(noise), axis=0, keepdims=True))
    noise = noise.reshape(MOMENTS, *(1,) * len(batch), dim)
    z, _, _ = posterior.transform(jnp.broadcast_to(noise, (MOMENTS, *batch, dim)))
    return jnp.mean(z, axis=0), jnp.var(z, axis=0)


class LatentUnits(NamedTuple):
    """What each latent dimension carries, ``[L]``."""

    variance_of_mean: np.ndarray  # over images, of the mean of the posterior of z_K, which the decoder is given
    kl: np.ndarray  # nats: of the posterior of z_K to the prior, as in :func:`kl_by_dimension`, averaged over images
    kl_q0: np.ndarray  # nats: the closed-form KL of q_0 to the prior (``PlanarFlow.base_kl``), averaged over images


def latent_units(vae: VAE, params: Any, images: Images | Streamed) -> LatentUnits:
    """Over a whole data set, in float64; for K = 0 the sum of ``kl_q0`` is the mean KL without sampling."""
    moments = map_chunks(lambda chunk: _mean_and_kl(vae, params, chunk.pixels), images, BATCH // 4)
    mean, kl, kl_q0 = (np.asarray(leaf, np.float64) for leaf in moments)
    return LatentUnits(np.var(mean, axis=0), np.mean(kl, axis=0), np.mean(kl_q0, axis=0))


@functools.partial(jax.jit, static_argnames="vae")
def _mean_and_kl(vae: VAE, params: Any, pixels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    def batch(pixels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        posterior = vae.bind(params).encode(unit_pixels(pixels))
        mean, variance = posterior_moments(posterior)
        return mean, _kl_to_prior(mean, variance), posterior.base_kl

    return map_batches(batch, (pixels,), BATCH // 4)


def active_units(units: LatentUnits, threshold: float = 0.01) -> dict[str, Any]:
    """For a summary: how many dimensions are active, and what each carries.

    Active is one whose posterior's mean varies over images by more than the ``threshold`` (Burda et al. 2016, section
    5.2). The mean is that of z_K: an amortised flow may do the work of the encoder's mean, which then hardly varies.
    """
    return {
        "count": int(np.sum(units.variance_of_mean > threshold)),
        "of": len(units.kl_q0),
        "threshold": threshold,
        "variance_of_mean": units.variance_of_mean.tolist(),
        "kl": units.kl.tolist(),
        "kl_q0": units.kl_q0.tolist(),
    }


class Distance(NamedTuple):
    """How far an aggregate posterior is from the prior N(0, I), by its moments."""

    mean: np.ndarray  # [L]
    variance: np.ndarray  # [L]
    nats: float  # sum of KL(N(mean_d, variance_d) || N(0, 1)); not finite where a coordinate never varies


def distance_from_prior(z: np.ndarray) -> Distance:
    """Of a sample ``z [N, L]`` of the aggregate posterior. Correlations count nowhere, nor do third moments."""
    z = np.asarray(z, np.float64)
    mean, variance = np.mean(z, axis=0), np.var(z, axis=0)
    with np.errstate(divide="ignore"):
        nats = 0.5 * np.sum(mean**2 + variance - 1.0 - np.log(variance))
    return Distance(mean, variance, float(nats))


class Interpolations(NamedTuple):
    """Pictures along straight lines between images, ``[P, T, H, W]`` each."""

    base: jax.Array  # straight in the space of z_0
    code: jax.Array  # straight in that of z_K


@functools.partial(jax.jit, static_argnames=("vae", "steps"))
def interpolate(vae: VAE, params: Any, left: jax.Array, right: jax.Array, steps: int) -> Interpolations:
    """Pictures between the images ``left`` and ``right``, ``[P, H, W]`` each, in ``steps`` pictures a pair.

    Both lines run between the posteriors' means sent through the flow. ``base``: all parameters of q change linearly,
    its mean and, where the flow is amortised, ``u``, ``w`` and ``b`` too, and the mean goes through the flow that they
    make; otherwise a point of z_0 between two images would have no flow of its own. ``code``: z_K changes linearly.
    Without a flow both are the same.
    """
    model = vae.bind(params)
    ends = [model.encode(unit_pixels(pixels)) for pixels in (left, right)]
    first, last = (end.transform(jnp.zeros_like(end.mean))[0] for end in ends)

    def at(t: jax.Array) -> Interpolations:
        # Not through log_std: the mean alone is decoded.
        between = jax.tree.map(lambda one, other: (1.0 - t) * one + t * other, *ends)
        base, _, _ = between.transform(jnp.zeros_like(between.mean))
        return Interpolations(pictures(model, base), pictures(model, (1.0 - t) * first + t * last))

    lines = jax.lax.map(at, jnp.linspace(0.0, 1.0, steps, dtype=first.dtype))
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), lines)


@functools.partial(jax.jit, static_argnames="vae")
def traverse(vae: VAE, params: Any, pixels: jax.Array, dimensions: jax.Array, values: jax.Array) -> jax.Array:
    """Pictures ``[D, T, H, W]`` around one image ``[H, W]``: one coordinate of its code z_K at each of ``values [T]``.

    The code is the posterior's mean sent through the flow; ``dimensions [D]`` are the coordinates that are moved.
    """
    model = vae.bind(params)
    posterior = model.encode(unit_pixels(pixels))
    code, _, _ = posterior.transform(jnp.zeros_like(posterior.mean))
    moved = jax.vmap(lambda d: jax.vmap(lambda value: code.at[d].set(value))(values))(dimensions)
    return pictures(model, moved)
