"""K planar layers one after the other by ``lax.scan``: the reference, and the fastest on a plane. And their inverse.

``z`` is carried from layer to layer. Of a few dimensions each is an array of its own, so that a step works on whole
batches.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from planar_vae_jax.flows import _launches as launches
from planar_vae_jax.flows._constraint import Constrained
from planar_vae_jax.flows._inverse import solve_preactivation
from planar_vae_jax.flows._log_slope import sum_log_slopes
from planar_vae_jax.flows._xla import kept, recomputed
from planar_vae_jax.flows.nonlinearities import Nonlinearity

# Up to this D each coordinate of z is an array of its own, and the layer scan the faster method for many layers and
# events (docs/benchmarks.md).
NARROW = 4

# Layers of these that a step takes on a GPU: XLA puts them into one kernel.
UNROLL = 8


class Prepared(NamedTuple):
    """What K layers need besides ``z``: computed once, outside of every loop over layers."""

    u: jax.Array  # [K, D]
    w: jax.Array  # [K, D]
    b: jax.Array  # [K]
    constrained: Constrained  # of u and w


def log_det(nonlinearity: Nonlinearity, a: jax.Array, h: jax.Array, layers: Prepared) -> jax.Array:
    """``sum_k log(1 + h'(a_k) w_k.u_hat_k)``: ``[...]`` for ``a`` and ``h = h(a)``, ``[K, ...]``."""
    if not len(a):
        return jnp.sum(a, 0)
    return sum_log_slopes(nonlinearity, True, a, h, *layers.constrained[-3:])


def layers_a_step(dim: int) -> int:
    """How many layers a step of :func:`layer_scan` takes: 1, but on a GPU ``UNROLL`` of those of few dimensions."""
    return UNROLL if launches.are_dear() and dim <= NARROW else 1


def layer_scan(nonlinearity: Nonlinearity, layers: Prepared, z0: jax.Array) -> tuple[jax.Array, jax.Array]:
    """K layers one after the other: the reference. Reverse mode keeps ``z`` and ``h`` of each, and no more."""

    def layer(z: Any, one: Prepared) -> tuple[Any, jax.Array]:
        a = _dot(one.w, z) + one.b
        return _add(z, kept(nonlinearity.value(a)), one), a

    z, a = lax.scan(recomputed(layer), _split(z0), _by_coordinate(layers), unroll=layers_a_step(z0.shape[-1]))
    return _join(z), log_det(nonlinearity, a, nonlinearity.value(a), layers)


def inverse_layer_scan(nonlinearity: Nonlinearity, layers: Prepared, zK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The last layer first; its ``log_det`` is that of the inverse map."""

    def layer(z: Any, one: Prepared) -> tuple[Any, jax.Array]:
        a = solve_preactivation(nonlinearity, _dot(one.w, z) + one.b, one.constrained.m)
        return _add(z, -nonlinearity.value(a), one), a

    z, a = lax.scan(layer, _split(zK), _by_coordinate(layers), reverse=True)
    return _join(z), -log_det(nonlinearity, a, nonlinearity.value(a), layers)


def _split(z: jax.Array) -> Any:
    return z if z.shape[-1] > NARROW else [z[..., d] for d in range(z.shape[-1])]


def _by_coordinate(layers: Prepared) -> Any:
    """Layers whose vectors are split as ``z`` is: what reverse mode needs of a layer is then an array that exists."""
    u_hat = _split(layers.constrained.u_hat)
    return layers._replace(w=_split(layers.w), constrained=layers.constrained._replace(u_hat=u_hat))


def _join(z: Any) -> jax.Array:
    return jnp.stack(z, -1) if isinstance(z, list) else z


def _dot(w: jax.Array, z: Any) -> jax.Array:
    """``w.z`` for ``w [D]``, ``z [..., D]``."""
    if isinstance(z, list):
        return functools.reduce(jnp.add, [w[d] * z_d for d, z_d in enumerate(z)])
    return jnp.sum(jnp.expand_dims(w, range(z.ndim - 1)) * z, -1)


def _add(z: Any, value: jax.Array, one: Prepared) -> Any:
    """``z + value u_hat``; of an amortised flow ``u_hat`` is never written out."""
    if isinstance(z, list):
        return [z_d + value * one.constrained.u_hat[d] for d, z_d in enumerate(z)]
    direction = one.w * one.constrained.inverse_scale
    u, direction = (jnp.expand_dims(x, range(z.ndim - 1)) for x in (one.u, direction))
    return z + value[..., None] * u + (value * one.constrained.along)[..., None] * direction
