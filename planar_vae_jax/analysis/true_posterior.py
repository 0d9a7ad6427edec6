"""The true posterior of an image on the latent plane, beside its approximation after each layer of the flow.

``p(z|x)`` is prior times likelihood, normalised on a grid. The densities ``q_k`` after the first k layers are exact, by
the inverse of these layers. For models with two latent dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from planar_vae_jax.analysis.evaluation import BATCH, abstract_posterior, fixed_key, map_batches, unit_pixels
from planar_vae_jax.flows.distribution import PlanarFlow, first_layers, shown_layers, standard_normal_log_prob
from planar_vae_jax.vae import objectives

if TYPE_CHECKING:
    from jaxtyping import Array, UInt8

SIDE = 128  # points along a side of a grid
_NOISE = 5.0  # standard deviations of q_0, half the side of the grid of z_0
_SAMPLES = 2000  # of each density, to find where it lies
_PRIOR_EXTENT = 6.0  # half the side of the square in which the true posterior's mass is looked for
_HELD, _SEEN = 12.0, 6.5  # nats below its highest point, to which the true posterior is summed, and shown

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


def posterior_grid(
    model: objectives.Model, pixels: UInt8[Array, "H W *C"], layers: Sequence[int] | None = None
) -> PosteriorGrid:
    """The true posterior and ``q_k`` of one image; all figures are by quadrature.

    Args:
        model: a VAE with two latent dimensions, whose posterior is a :class:`PlanarFlow`.
        pixels: uint8, as they are evaluated (:func:`planar_vae_jax.analysis.evaluation.fixed_images`).
        layers: the numbers k, ascending, the last one K; default :func:`shown_layers`.

    Raises:
        ValueError: if the model has another number of latent dimensions, or another kind of posterior.
    """
    posterior = abstract_posterior(model, np.shape(pixels))
    latent = posterior.mean.shape[-1]
    if latent != 2 or not isinstance(posterior, PlanarFlow):
        raise ValueError(
            "model must have latent=2 and a PlanarFlow as its posterior, which is drawn on the plane; "
            f"got latent={latent} and {type(posterior).__name__}"
        )
    layers = shown_layers(posterior.params.b.shape[-1]) if layers is None else layers
    ks, pixels, dtype = jnp.asarray(layers, jnp.int32), jnp.asarray(pixels), posterior.mean.dtype

    def log_joints(square: Square) -> np.ndarray:
        return np.asarray(_log_joints(model, pixels, _points(square, dtype)), np.float64)

    def density(square: Square, k: int) -> np.ndarray:
        log_q = _log_density(model, pixels, jnp.int32(k), _points(square, dtype))
        return np.exp(np.asarray(log_q, np.float64)).reshape(SIDE, SIDE)

    samples = np.asarray(_samples(model, pixels, ks))
    half = max(_PRIOR_EXTENT, 1.2 * float(np.max(np.abs(samples))))
    log_p = log_joints(square := (-half, half, -half, half))
    nll = -_log_integral(own := _around(_mass(square, log_p, _HELD)), log_joints(own))
    seen = _mass(square, log_p, _SEEN)
    near, far = _around(seen, samples[-1]), _around(seen, *samples)
    kl = np.asarray(_free_energies(model, pixels, ks), np.float64) - nll
    return PosteriorGrid(
        near,
        np.exp(log_joints(near) + nll).reshape(SIDE, SIDE),
        density(near, layers[-1]),
        far,
        {k: density(far, k) for k in layers},
        dict(zip(layers, kl.tolist(), strict=True)),
        nll,
    )


def _posterior(model: objectives.Model, pixels: jax.Array) -> PlanarFlow:
    return cast(PlanarFlow, model.encode(unit_pixels(pixels)))


@jax.jit
def _samples(model: objectives.Model, pixels: jax.Array, ks: jax.Array) -> jax.Array:
    """Samples of each ``q_k``, ``[k, S, 2]``."""
    posterior = _posterior(model, pixels)
    return jax.lax.map(lambda k: first_layers(posterior, k).sample(fixed_key(), (_SAMPLES,)), ks)


@jax.jit
def _log_density(model: objectives.Model, pixels: jax.Array, k: jax.Array, points: jax.Array) -> jax.Array:
    """``log q_k`` at ``points [M, 2]``, ``[M]``."""
    return first_layers(_posterior(model, pixels), k).log_prob(points)


@jax.jit
def _log_joints(model: objectives.Model, pixels: jax.Array, points: jax.Array) -> jax.Array:
    """``log p(x, z)`` at ``points [M, 2]``, ``[M]``."""
    image = unit_pixels(pixels)
    return map_batches(lambda z: objectives.log_joint(model, image, z), (points,), BATCH)


@jax.jit
def _free_energies(model: objectives.Model, pixels: jax.Array, ks: jax.Array) -> jax.Array:
    """``E_{q_k}[log q_k(z) - log p(x, z)]``, ``[k]``: a grid of ``z_0`` is pushed through the first k layers.

    However thin a layer makes the density, the grid is fine where ``q_k`` is.
    """
    image, posterior = unit_pixels(pixels), _posterior(model, pixels)
    noise = _points((-_NOISE, _NOISE, -_NOISE, _NOISE), posterior.mean.dtype)
    weights = jax.nn.softmax(standard_normal_log_prob(noise))

    def free_energy(k: jax.Array) -> jax.Array:
        z, log_q0, log_det = first_layers(posterior, k).transform(noise)
        joint = map_batches(lambda z: objectives.log_joint(model, image, z), (z,), BATCH)
        return jnp.sum(weights * (log_q0 - log_det - joint))

    return jax.lax.map(free_energy, ks)


def _points(square: Square, dtype: Any) -> jax.Array:
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
    seen = np.asarray(_points(square, np.float32))[log_p >= np.max(log_p) - depth]
    spacing = (square[1] - square[0]) / SIDE
    return np.concatenate([seen - spacing, seen + spacing])


def _around(*points: np.ndarray) -> Square:
    """A square around all ``points [M, 2]``, with a margin."""
    corners = np.concatenate(points)
    low, high = np.min(corners, axis=0), np.max(corners, axis=0)
    (x, y), half = (low + high) / 2, 0.53 * np.max(high - low)
    return float(x - half), float(x + half), float(y - half), float(y + half)
