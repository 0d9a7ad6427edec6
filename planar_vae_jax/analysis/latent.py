"""The latent space of a trained VAE: where codes lie, and what is decoded between them and along its axes.

Pictures are pixel means in 0..1; ``pixels`` are uint8, as they are evaluated.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from planar_vae_jax.analysis.evaluation import (
    BATCH,
    Images,
    code_of_mean,
    fixed_key,
    map_batches,
    map_chunks,
    pictures,
    unit_pixels,
)
from planar_vae_jax.data.streamed import Streamed
from planar_vae_jax.vae import objectives
from planar_vae_jax.vae.model import Posterior

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, UInt8

STEPS = 9  # pictures between two images
VALUES = np.linspace(-3.0, 3.0, 13)  # that a traversal gives to a coordinate of the code
_MOMENTS = 128  # samples of each image's q, for its mean and variance in each dimension


def aggregate_posterior(model: objectives.Model, images: Images | Streamed) -> Float[Array | np.ndarray, "N L"]:
    """One sample ``z_K`` for each image: together a sample of the aggregate posterior.

    They are the samples that the free energies of the images have.
    """
    return map_chunks(functools.partial(_codes, model), images, BATCH)


@jax.jit
def _codes(model: objectives.Model, images: Images) -> jax.Array:
    def batch(pixels: jax.Array, keys: jax.Array) -> jax.Array:
        posterior = model.encode(unit_pixels(pixels))
        return posterior.transform(objectives.noise(objectives.fold_in_each(keys, 0), posterior.mean))[0]

    return map_batches(batch, images, BATCH)


def posterior_moments(posterior: Posterior) -> tuple[Float[Array, "*B L"], Float[Array, "*B L"]]:
    """Mean and variance of each dimension of ``z_K``, from 128 draws.

    All posteriors get the same noise, each draw with its negative, scaled to a variance of 1: without a flow both
    moments are exact.
    """
    *batch, dim = posterior.mean.shape
    noise = jax.random.normal(fixed_key(), (_MOMENTS // 2, dim), posterior.mean.dtype)
    noise = jnp.concatenate([noise, -noise])
    noise = noise / jnp.sqrt(jnp.mean(jnp.square(noise), axis=0, keepdims=True))
    noise = noise.reshape(_MOMENTS, *(1,) * len(batch), dim)
    z, _, _ = posterior.transform(jnp.broadcast_to(noise, (_MOMENTS, *batch, dim)))
    return jnp.mean(z, axis=0), jnp.var(z, axis=0)


class LatentUnits(NamedTuple):
    """What each latent dimension carries, ``[L]``."""

    variance_of_mean: np.ndarray  # over images, of the mean of z_K under q(z_K|x)
    # E_x KL(q(z_d|x) || N(0, 1)), nats. q(z_d|x) is taken as the normal of its mean and variance, which it is without a
    # flow; otherwise this is a lower bound, since of all densities with these moments the normal is the closest to a
    # normal. Correlations do not count.
    kl: np.ndarray
    kl_q0: np.ndarray | None  # nats: closed-form KL of q_0 to the prior, mean over images; None: q has no ``base_kl``


def latent_units(model: objectives.Model, images: Images | Streamed) -> LatentUnits:
    """What each latent dimension carries, over a whole data set; without a flow ``kl_q0`` sums to the mean KL."""
    moments = map_chunks(lambda chunk: _mean_and_kl(model, chunk.pixels), images, BATCH // 4)
    mean, kl, kl_q0 = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), moments)
    return LatentUnits(np.var(mean, axis=0), np.mean(kl, axis=0), None if kl_q0 is None else np.mean(kl_q0, axis=0))


@jax.jit
def _mean_and_kl(model: objectives.Model, pixels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    def batch(pixels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        posterior = model.encode(unit_pixels(pixels))
        mean, variance = posterior_moments(posterior)
        kl = 0.5 * (jnp.square(mean) + variance - 1.0 - jnp.log(variance))
        return mean, kl, getattr(posterior, "base_kl", None)

    return map_batches(batch, (pixels,), BATCH // 4)


def active_units(units: LatentUnits, threshold: float = 0.01) -> dict[str, Any]:
    """The number of active dimensions, and what each dimension carries, for ``summary.json``.

    A dimension is active if the mean of ``q(z_K|x)`` varies over images by more than ``threshold`` (Burda et al. 2016,
    section 5.2). It is the mean of z_K, not of z_0: an amortised flow may do the work of the encoder's mean, which then
    hardly varies.
    """
    return {
        "count": int(np.sum(units.variance_of_mean > threshold)),
        "of": len(units.kl),
        "threshold": threshold,
        "variance_of_mean": units.variance_of_mean.tolist(),
        "kl": units.kl.tolist(),
        "kl_q0": None if units.kl_q0 is None else units.kl_q0.tolist(),
    }


class Distance(NamedTuple):
    """How far an aggregate posterior is from the prior N(0, I), by its moments."""

    mean: np.ndarray  # [L]
    variance: np.ndarray  # [L]
    nats: float  # sum of KL(N(mean_d, variance_d) || N(0, 1)); infinite if a coordinate never varies


def distance_from_prior(z: Float[np.ndarray, "N L"]) -> Distance:
    """The distance of a sample of the aggregate posterior; correlations and third moments do not count."""
    z = np.asarray(z, np.float64)
    mean, variance = np.mean(z, axis=0), np.var(z, axis=0)
    with np.errstate(divide="ignore"):
        nats = 0.5 * np.sum(mean**2 + variance - 1.0 - np.log(variance))
    return Distance(mean, variance, float(nats))


class Interpolations(NamedTuple):
    """Pictures along straight lines between images, ``[P, T, H, W]`` each."""

    base: jax.Array  # straight in the space of z_0
    code: jax.Array  # straight in the space of z_K


@functools.partial(jax.jit, static_argnames="steps")
def interpolate(
    model: objectives.Model, left: UInt8[Array, "P H W *C"], right: UInt8[Array, "P H W *C"], steps: int = STEPS
) -> Interpolations:
    """Pictures between the images ``left`` and ``right``, ``steps`` for each pair.

    Both lines run between the posteriors' means sent through the flow. ``base``: all parameters of q change linearly,
    its mean and, if the flow is amortised, ``u``, ``w`` and ``b`` too, and the mean goes through the flow that they
    make; otherwise a point of z_0 between two images would have no flow. ``code``: z_K changes linearly. Without a flow
    both are the same.
    """
    ends = [model.encode(unit_pixels(pixels)) for pixels in (left, right)]
    first, last = map(code_of_mean, ends)

    def at(t: jax.Array) -> Interpolations:
        between = jax.tree.map(lambda one, other: (1.0 - t) * one + t * other, *ends)
        return Interpolations(pictures(model, code_of_mean(between)), pictures(model, (1.0 - t) * first + t * last))

    lines = jax.lax.map(at, jnp.linspace(0.0, 1.0, steps, dtype=first.dtype))
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), lines)


@jax.jit
def traverse(
    model: objectives.Model, pixels: UInt8[Array, "H W *C"], dimensions: Int[Array, " D"], values: Float[Array, " T"]
) -> Float[Array, "D T H W *C"]:
    """Pictures around one image: each coordinate in ``dimensions`` of its code z_K is set to each of ``values``.

    The code is the posterior's mean sent through the flow.
    """
    code = code_of_mean(model.encode(unit_pixels(pixels)))
    moved = jax.vmap(lambda d: jax.vmap(lambda value: code.at[d].set(value))(values))(dimensions)
    return pictures(model, moved)
