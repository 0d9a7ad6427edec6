"""The true posterior of an image on a latent plane, and what the encoder and each layer of the flow make of it.

``p(z|x)`` is prior times likelihood, normalised on a grid; the densities ``q_k`` after the first k layers are exact, by
the inverse of these layers. For models with two latent dimensions.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from planar_vae_jax.analysis.evaluation import fixed_key, map_batches, unit_pixels
from planar_vae_jax.flows.distribution import PlanarFlow, first_layers, shown_layers, standard_normal_log_prob
from planar_vae_jax.flows.planar import Planar
from planar_vae_jax.vae import objectives
from planar_vae_jax.vae.model import VAE

SIDE = 128  # points along a side of a grid
NOISE = 5.0  # standard deviations of q_0, half the side of the grid of z_0
DECODED = 1000  # points decoded at a time, so that memory is bounded
SAMPLES = 2000  # of each density, to find where it lies
PRIOR_EXTENT = 6.0  # half the side of the square in which the true posterior's mass is looked for
HELD, SEEN = 12.0, 6.5  # nats below its highest point, to which the true posterior is summed, and shown

Square = tuple[float, float, float, float]  # left, right, bottom, top


class PosteriorGrid(NamedTuple):
    """Densities of one image on two square grids; rows are z2, upwards."""

    near: Square  # around the masses of p(z|x) and q_K(z|x)
    truth: np.ndarray  # [N, N], p(z|x) there
    approximation: np.ndarray  # [N, N], q_K(z|x) there
    far: Square  # around those of all q_k(z|x) too
    layers: dict[int, np.ndarray]  # k -> [N, N], q_k(z|x) there
    kl: dict[int, float]  # k -> KL(q_k(z|x) || p(z|x)), nats
    nll: float  # -log p(x), nats


class _Replaced:
    def __init__(self, model: objectives.Model, posterior: PlanarFlow):
        self.model, self.posterior = model, posterior

    def encode(self, images: jax.Array) -> PlanarFlow:
        return self.posterior

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def with_posterior(model: objectives.Model, posterior: PlanarFlow) -> objectives.Model:
    """The model with another encoder: whatever the images ``[B, H, W]``, it gives this ``q(z|x)`` of B images."""
    return cast(objectives.Model, _Replaced(model, posterior))


def point_posterior(z: jax.Array) -> PlanarFlow:
    """q(z|x) all at the points ``z [B, L]``: normals without width, and no layers."""
    nothing = Planar(jnp.zeros((0, z.shape[-1]), z.dtype), jnp.zeros((0, z.shape[-1]), z.dtype), jnp.zeros(0, z.dtype))
    return PlanarFlow(nothing, z, jnp.full((), -jnp.inf, z.dtype))


def log_joint(model: objectives.Model, image: jax.Array, z: jax.Array) -> jax.Array:
    """``log p(x, z)`` of one image ``[H, W]`` or ``[H, W, 3]`` at points ``z [M, L]``: ``[M]``, nats.

    The terms of the free energy where q is all at ``z``; what is drawn there has no effect.
    """
    images = jnp.broadcast_to(image, (len(z), *image.shape))
    terms = objectives.free_energy(with_posterior(model, point_posterior(z)), images, jax.random.key(0))
    return terms.log_prior + terms.log_likelihood


def posterior_grid(vae: VAE, params: Any, pixels: jax.Array, layers: Sequence[int] | None = None) -> PosteriorGrid:
    """The true posterior and ``q_k`` of one image, all figures by quadrature.

    Args:
        vae: with ``latent=2``.
        params: of the model.
        pixels: ``[H, W]`` or ``[H, W, 3]`` uint8, as they are evaluated
            (:func:`planar_vae_jax.analysis.evaluation.fixed_images`).
        layers: the numbers k, ascending and K the last; default :func:`shown_layers`.

    Raises:
        ValueError: for a model of another latent size.
    """
    if vae.latent != 2:
        raise ValueError(f"vae must have latent=2, for a posterior on the plane; got latent={vae.latent}")
    layers = shown_layers(vae.flow_length) if layers is None else layers
    ks, pixels = jnp.asarray(layers, jnp.int32), jnp.asarray(pixels)

    def log_joints(square: Square) -> np.ndarray:
        return np.asarray(_log_joints(vae, params, pixels, _points(square, vae.dtype)), np.float64)

    def density(square: Square, k: int) -> np.ndarray:
        log_q = _log_density(vae, params, pixels, jnp.int32(k), _points(square, vae.dtype))
        return np.exp(np.asarray(log_q, np.float64)).reshape(SIDE, SIDE)

    samples = np.asarray(_samples(vae, params, pixels, ks))
    half = max(PRIOR_EXTENT, 1.2 * float(np.max(np.abs(samples))))
    log_p = log_joints(square := (-half, half, -half, half))
    nll = -_log_integral(own := _around(_mass(square, log_p, HELD)), log_joints(own))
    seen = _mass(square, log_p, SEEN)
    near, far = _around(seen, samples[-1]), _around(seen, *samples)
    kl = np.asarray(_free_energies(vae, params, pixels, ks), np.float64) - nll
    return PosteriorGrid(
        near,
        np.exp(log_joints(near) + nll).reshape(SIDE, SIDE),
        density(near, layers[-1]),
        far,
        {k: density(far, k) for k in layers},
        dict(zip(layers, kl.tolist(), strict=True)),
        nll,
    )


@functools.partial(jax.jit, static_argnames="vae")
def _samples(vae: VAE, params: Any, pixels: jax.Array, ks: jax.Array) -> jax.Array:
    """Of each ``q_k``: ``[k, S, 2]``."""
    posterior = vae.bind(params).encode(unit_pixels(pixels))
    return jax.lax.map(lambda k: first_layers(posterior, k).sample(fixed_key(), (SAMPLES,)), ks)


@functools.partial(jax.jit, static_argnames="vae")
def _log_density(vae: VAE, params: Any, pixels: jax.Array, k: jax.Array, points: jax.Array) -> jax.Array:
    """``log q_k`` at ``points [M, 2]``: ``[M]``."""
    return first_layers(vae.bind(params).encode(unit_pixels(pixels)), k).log_prob(points)


@functools.partial(jax.jit, static_argnames="vae")
def _log_joints(vae: VAE, params: Any, pixels: jax.Array, points: jax.Array) -> jax.Array:
    """``log p(x, z)`` at ``points [M, 2]``: ``[M]``."""
    model, image = vae.bind(params), unit_pixels(pixels)
    return map_batches(lambda z: log_joint(model, image, z), (points,), DECODED)


@functools.partial(jax.jit, static_argnames="vae")
def _free_energies(vae: VAE, params: Any, pixels: jax.Array, ks: jax.Array) -> jax.Array:
    """``E_{q_k}[log q_k(z) - log p(x, z)]``, ``[k]``: a grid of ``z_0`` is pushed through the first k layers.

    However thin a layer makes the density, the grid is fine where ``q_k`` is.
    """
    model, image = vae.bind(params), unit_pixels(pixels)
    posterior, noise = model.encode(image), _points((-NOISE, NOISE, -NOISE, NOISE), vae.dtype)
    weights = jax.nn.softmax(standard_normal_log_prob(noise))

    def free_energy(k: jax.Array) -> jax.Array:
        z, log_q0, log_det = first_layers(posterior, k).transform(noise)
        joint = map_batches(lambda z: log_joint(model, image, z), (z,), DECODED)
        return jnp.sum(weights * (log_q0 - log_det - joint))

    return jax.lax.map(free_energy, ks)


def _points(square: Square, dtype: str) -> jax.Array:
    """The middles of the cells of a square, ``[SIDE^2, 2]``, row after row upwards."""
    left, right, bottom, top = square
    middles = (np.arange(SIDE) + 0.5) / SIDE
    grid = np.meshgrid(left + (right - left) * middles, bottom + (top - bottom) * middles)
    return jnp.asarray(np.stack(grid, axis=-1).reshape(-1, 2), dtype)


def _log_integral(square: Square, log_values: np.ndarray) -> float:
    """``log`` of the integral of ``exp(log_values [SIDE^2])`` over the square, by the midpoint rule."""
    top = np.max(log_values)
    return float(top + np.log(np.sum(np.exp(log_values - top))) + 2.0 * np.log((square[1] - square[0]) / SIDE))


def _mass(square: Square, log_p: np.ndarray, depth: float) -> np.ndarray:
    """Corners of the cells in which ``log_p [SIDE^2]`` is no more than ``depth`` below its maximum: ``[M, 2]``."""
    seen = np.asarray(_points(square, "float32"))[log_p >= np.max(log_p) - depth]
    spacing = (square[1] - square[0]) / SIDE
    return np.concatenate([seen - spacing, seen + spacing])


def _around(*points: np.ndarray) -> Square:
    """A square around all ``points [M, 2]``, with a margin."""
    corners = np.concatenate(points)
    low, high = np.min(corners, axis=0), np.max(corners, axis=0)
    (x, y), half = (low + high) / 2, 0.53 * np.max(high - low)
    return float(x - half), float(x + half), float(y - half), float(y + half)
