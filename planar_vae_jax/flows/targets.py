"""Target densities on the plane: known up to a constant, or known by points.

- The paper's mixture, and U1 to U4 of Rezende & Mohamed (2015, table 1): a flow is fitted to their log-density.
- Two moons, circles and eight Gaussians: a flow is fitted to points drawn from them. Each is an equal mixture of normal
  densities N(c, std^2 I) whose centres c lie on a curve, so that the density behind the points is known too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from planar_vae_jax.flows.distribution import standard_normal_log_prob

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_EXTENT = 4.0  # half the side of the square in which U1 to U4 are plotted
_TAPER = 0.5  # standard deviation of the Gaussian shoulders of U2 to U4 beyond |z_1| = _EXTENT


class Target(NamedTuple):
    """An unnormalised density ``exp(log_density(z))`` on the plane."""

    name: str
    log_density: Callable[[Float[Array, "*lead 2"]], Float[Array, "*lead"]]
    log_z: float  # logarithm of the integral of exp(log_density) over the plane, in nats
    extent: float  # the density is plotted on [-extent, extent]^2


def _wave(z: jax.Array) -> jax.Array:  # [..., 2] -> [...]; w_1 of the paper's table
    return jnp.sin(0.5 * jnp.pi * z[..., 0])


def _bump(z: jax.Array) -> jax.Array:  # w_2
    return 3.0 * jnp.exp(-0.5 * jnp.square((z[..., 0] - 1.0) / 0.6))


def _step(z: jax.Array) -> jax.Array:  # w_3
    return 3.0 * jax.nn.sigmoid((z[..., 0] - 1.0) / 0.3)


def _taper(z: jax.Array) -> jax.Array:
    # U2 to U4 do not fall off along z_1, so they have no normaliser. Outside the plotted square this factor makes them
    # fall as a normal density does; inside it is 1.
    return -0.5 * jnp.square(jnp.maximum(jnp.abs(z[..., 0]) - _EXTENT, 0.0) / _TAPER)


def _log_ridge(distance: jax.Array, std: float) -> jax.Array:
    return -0.5 * jnp.square(distance / std)


def _u1(z: jax.Array) -> jax.Array:
    ring = _log_ridge(jnp.sqrt(jnp.sum(jnp.square(z), -1) + jnp.finfo(z.dtype).tiny) - 2.0, 0.4)
    return ring + jnp.logaddexp(_log_ridge(z[..., 0] - 2.0, 0.6), _log_ridge(z[..., 0] + 2.0, 0.6))


def _u2(z: jax.Array) -> jax.Array:
    return _log_ridge(z[..., 1] - _wave(z), 0.4) + _taper(z)


def _u3(z: jax.Array) -> jax.Array:
    distance = z[..., 1] - _wave(z)
    return jnp.logaddexp(_log_ridge(distance, 0.35), _log_ridge(distance + _bump(z), 0.35)) + _taper(z)


def _u4(z: jax.Array) -> jax.Array:
    distance = z[..., 1] - _wave(z)
    return jnp.logaddexp(_log_ridge(distance, 0.4), _log_ridge(distance + _step(z), 0.35)) + _taper(z)


_ENERGIES = {"U1": _u1, "U2": _u2, "U3": _u3, "U4": _u4}
TARGETS = ("mixture", *_ENERGIES)


def _arc(start: float, stop: float, centres: int) -> np.ndarray:
    """Returns ``[centres, 2]`` points of the unit circle, evenly spaced: the middles of equal parts of the arc."""
    angle = start + (stop - start) * (np.arange(centres) + 0.5) / centres
    return np.stack([np.cos(angle), np.sin(angle)], -1)


# Name -> (centres [C, 2], standard deviation around each). Where centres stand for a curve, neighbours are at most 0.62
# standard deviations apart, so that the density does not show them: along the curve it is even to a part in 10^20.
_POINTS = {
    "two_moons": (np.concatenate([_arc(0, np.pi, 64), [1.0, 0.5] - _arc(0, np.pi, 64)]), 0.1),
    "circles": (np.concatenate([_arc(0, 2 * np.pi, 128), 0.5 * _arc(0, 2 * np.pi, 128)]), 0.08),
    "eight_gaussians": (2.0 * _arc(0, 2 * np.pi, 8), 0.25),
}
POINT_TARGETS = tuple(_POINTS)


def _log_integral(log_density: Callable[[jax.Array], jax.Array], extent: float, points: int) -> float:
    """Logarithm of the integral of ``exp(log_density)`` over ``[-extent, extent]^2``, by the midpoint rule.

    For a smooth density that vanishes at the edges the rule converges faster than any power of the spacing. The sum is
    taken in float64 on the host.
    """
    grid = (np.arange(points) + 0.5) / points * (2.0 * extent) - extent
    z = np.stack(np.meshgrid(grid, grid, indexing="ij"), axis=-1).reshape(-1, 2)
    values = np.asarray(jax.jit(log_density)(jnp.asarray(z)), np.float64)
    return float(np.log(np.sum(np.exp(values))) + 2.0 * np.log(2.0 * extent / points))


def _mixture_log_prob(z: jax.Array, means: jax.Array, std: float) -> jax.Array:
    """Log-density of an equal mixture of isotropic normals: ``[...]`` for ``z [..., D]``, ``means [C, D]``."""
    components, dim = means.shape
    means = jnp.expand_dims(means, range(1, z.ndim))
    log_probs = standard_normal_log_prob((z[None] - means) / std)  # [C, ...]
    return jax.nn.logsumexp(log_probs, 0) - math.log(components) - dim * math.log(std)


def get_target(name: str, *, scale: float = 1.0) -> Target:
    """Returns the target of a name in ``TARGETS`` or ``POINT_TARGETS``.

    Args:
        name: ``"mixture"`` is the target of the paper (Xu et al. 2023): equal parts of N((-1.5, -1.5), scale^2 I) and
            N((1.5, 1.5), scale^2 I), normalised. ``"U1"`` to ``"U4"`` are unnormalised; their ``log_z`` is computed by
            quadrature. The density of points (:func:`draw_points`) is normalised.
        scale: the standard deviation of the mixture's parts; the other targets ignore it.

    Raises:
        ValueError: if the name is unknown or the scale is not a positive number.
    """
    if name == "mixture":
        if not (scale > 0.0 and math.isfinite(scale)):
            raise ValueError(f"scale must be a positive number; got {scale!r}")
        return _mixture(name, np.array([[-1.5, -1.5], [1.5, 1.5]]), scale, max(_EXTENT, 1.5 + 2.5 * scale))
    if name in _POINTS:
        centres, std = _POINTS[name]
        return _mixture(name, centres, std, float(np.max(np.abs(centres))) + 4.0 * std)
    if name not in _ENERGIES:
        raise ValueError(f"target must be one of {', '.join((*TARGETS, *POINT_TARGETS))}; got {name!r}")
    log_density = _ENERGIES[name]
    log_z = _log_integral(log_density, extent=8.0, points=1024)
    return Target(name, log_density, log_z, _EXTENT)


def _mixture(name: str, means: np.ndarray, std: float, extent: float) -> Target:
    return Target(name, lambda z: _mixture_log_prob(z, jnp.asarray(means, z.dtype), std), 0.0, extent)


def draw_points(name: str, count: int, seed: int) -> np.ndarray:
    """Draws points of a target in ``POINT_TARGETS``; the same numbers for the same seed, in every version of NumPy.

    - ``"two_moons"``: two half circles of radius 1, the upper one around (0, 0) and the lower one around (1, 0.5), with
      normal noise of standard deviation 0.1: the shape of scikit-learn's ``make_moons(noise=0.1)``.
    - ``"circles"``: circles of radius 1 and 0.5 with noise of 0.08: ``make_circles(factor=0.5, noise=0.08)``.
    - ``"eight_gaussians"``: eight normal densities of standard deviation 0.25 on a circle of radius 2.

    Args:
        name: the target.
        count: N, the number of points.
        seed: 0 to 2^32 - 1.

    Returns:
        ``[N, 2]``, float64.

    Raises:
        ValueError: if the name is unknown, or NumPy refuses the seed or the count.
    """
    if name not in _POINTS:
        raise ValueError(f"name must be one of {', '.join(POINT_TARGETS)}; got {name!r}")
    centres, std = _POINTS[name]
    generator = np.random.RandomState(seed)  # NumPy keeps its stream the same, default_rng's not
    chosen = centres[generator.randint(len(centres), size=count)]
    return chosen + std * generator.standard_normal((count, 2))
