"""K planar layers one after the other by ``lax.scan``, and their inverse.

There are two scans of the forward map. :func:`layer_scan` is for a flow that many events share, and the reference for
all other methods. :func:`amortized_scan` is for flows that serve one event each.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from planar_vae_jax.flows._constraint import Layers, constrain_scaled, inverse_scale
from planar_vae_jax.flows._inverse import solve_preactivation
from planar_vae_jax.flows._log_slope import log_det, sum_log_slopes
from planar_vae_jax.flows._xla import full_like, kept, recomputed
from planar_vae_jax.flows.nonlinearities import Nonlinearity

# Up to this D each coordinate of z is an array by itself, so that a step works on vectors over the whole batch. The
# layer scan is then the faster method for many layers and events (docs/benchmarks.md).
NARROW = 4

# --- One flow for many events


def layer_scan(
    nonlinearity: Nonlinearity, layers: Layers, z0: jax.Array, *, layers_a_step: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Sends events ``z0 [..., D]`` through K layers that they share: ``(zK [..., D], log_det [...])``.

    Reverse mode keeps ``z`` and ``h(a)`` of each layer. ``layers_a_step`` layers are written out in each step of the
    scan; on a GPU they become one kernel.
    """

    def layer(z: Any, one: Layers) -> tuple[Any, jax.Array]:
        a = _dot(one.w, z) + one.b
        return _add(z, kept(nonlinearity.value(a)), one), a

    z, a = lax.scan(recomputed(layer), _split(z0), _by_coordinate(layers), unroll=layers_a_step)
    return _join(z), log_det(nonlinearity, a, nonlinearity.value(a), layers)


def trajectory_scan(nonlinearity: Nonlinearity, layers: Layers, z0: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same map as :func:`layer_scan`, after each layer: ``(z [K + 1, ..., D], log_det [K + 1, ...])``."""

    def layer(carry: tuple[jax.Array, jax.Array], one: Layers) -> tuple[tuple[jax.Array, jax.Array], Any]:
        z, total = carry
        a = _dot(one.w, z) + one.b
        h = nonlinearity.value(a)
        z, total = _add(z, h, one), total + log_det(nonlinearity, a[None], h[None], jax.tree.map(_with_axis, one))
        return (z, total), (z, total)

    start = (z0, full_like(z0[..., 0], 0.0))
    _, after = lax.scan(layer, start, layers)
    return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), start, after)


def _with_axis(leaf: jax.Array) -> jax.Array:
    return leaf[None]


def inverse_scan(nonlinearity: Nonlinearity, layers: Layers, zK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sends ``zK [..., D]`` back, the last layer first: ``(z0 [..., D], log_det of the inverse map [...])``."""

    def layer(z: Any, one: Layers) -> tuple[Any, jax.Array]:
        a = solve_preactivation(nonlinearity, _dot(one.w, z) + one.b, one.constrained.m)
        return _add(z, -nonlinearity.value(a), one), a

    z, a = lax.scan(layer, _split(zK), _by_coordinate(layers), reverse=True)
    return _join(z), -log_det(nonlinearity, a, nonlinearity.value(a), layers)


def _split(z: jax.Array) -> Any:
    """``z [..., D]`` as a list of its coordinates, if there are at most ``NARROW``."""
    return z if z.shape[-1] > NARROW else [z[..., d] for d in range(z.shape[-1])]


def _by_coordinate(layers: Layers) -> Any:
    """The layers with ``w`` and ``u_hat`` split as ``z`` is.

    Split here and not in the loop: reverse mode keeps the coordinates of each layer, which are then arrays that exist
    already and need no copy.
    """
    u_hat = _split(layers.constrained.u_hat)
    return layers._replace(w=_split(layers.w), constrained=layers.constrained._replace(u_hat=u_hat))


def _join(z: Any) -> jax.Array:
    return jnp.stack(z, -1) if isinstance(z, list) else z


def _dot(w: jax.Array, z: Any) -> jax.Array:
    """``w.z`` for ``w [D]``, ``z [..., D]``."""
    if isinstance(z, list):
        return functools.reduce(jnp.add, [w[d] * z_d for d, z_d in enumerate(z)])
    return jnp.sum(jnp.expand_dims(w, range(z.ndim - 1)) * z, -1)


def _add(z: Any, value: jax.Array, one: Layers) -> Any:
    """``z + value u_hat``, with ``u_hat`` as ``u + along * direction`` unless it is split.

    Under ``jax.vmap`` over flows ``u_hat`` is as large as the parameters; this form does not write it to memory.
    """
    if isinstance(z, list):
        return [z_d + value * one.constrained.u_hat[d] for d, z_d in enumerate(z)]
    direction = one.w * one.constrained.inverse_scale
    u, direction = (jnp.expand_dims(x, range(z.ndim - 1)) for x in (one.u, direction))
    return z + value[..., None] * u + (value * one.constrained.along)[..., None] * direction


# --- A flow for each event

# From this D on a layer slices its u and w out of [..., K, D]; below, the layer axis is moved to the front first.
SLICED = 256


def amortized_scan(
    nonlinearity: Nonlinearity, params: tuple[jax.Array, jax.Array, jax.Array], z0: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sends each event through K >= 1 layers of a flow that serves it alone: ``(zK [..., D], log_det [...])``.

    The time goes into reading the parameters, so a layer does everything that needs ``u`` and ``w`` in one pass, the
    constraint included, and never writes ``u_hat`` to memory. Reverse mode keeps ``z`` and the scalars of each layer,
    and reads ``u`` and ``w`` again.

    Args:
        nonlinearity: ``h``.
        params: ``u [..., K, D]``, ``w [..., K, D]``, ``b [..., K]``, whose leading axes are those of the events or 1.
        z0: ``[..., D]``.
    """
    flow_length, dim = params[0].shape[-2:]
    flows = params[2].shape[:-1]
    lead = jnp.broadcast_shapes(flows, z0.shape[:-1])
    u, w, b = (jnp.broadcast_to(leaf, (*lead, *leaf.shape[len(flows) :])) for leaf in params)

    def layer(z: jax.Array, one: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
        u, w, b, inverse_scale = one
        constrained = constrain_scaled(u, w, inverse_scale)
        a = kept(jnp.sum(w * z, -1) + b)
        value = kept(nonlinearity.value(a))
        direction = w * inverse_scale[..., None]
        z = z + value[..., None] * u + kept(value * constrained.along)[..., None] * direction
        return z, (a, value, constrained.w_u_hat, constrained.m, constrained.log_m)

    def sliced_layer(z: jax.Array, one: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
        k, *scalars = one
        return layer(z, (*(lax.dynamic_index_in_dim(leaf, k, -2, keepdims=False) for leaf in (u, w)), *scalars))

    z = jnp.broadcast_to(z0, (*lead, dim))
    scalars = (jnp.moveaxis(leaf, -1, 0) for leaf in (b, inverse_scale(w)))
    if dim < SLICED:
        rows = (jnp.moveaxis(leaf, -2, 0) for leaf in (u, w))
        z, found = lax.scan(recomputed(layer), z, (*rows, *scalars))
    else:
        z, found = lax.scan(recomputed(sliced_layer), z, (jnp.arange(flow_length, dtype=jnp.uint32), *scalars))
    return z, sum_log_slopes(nonlinearity, False, *found)
