"""K planar layers of flows that serve one event each (amortised): the cost is that of reading their parameters.

A layer does all it needs its ``u`` and ``w`` for while it has them, and ``u_hat`` is never written out. Reverse mode
keeps ``z`` and the scalars of each layer, and reads ``u`` and ``w`` again.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from planar_vae_jax.flows._constraint import constrain_scaled, inverse_scale
from planar_vae_jax.flows._log_slope import sum_log_slopes
from planar_vae_jax.flows._xla import kept, recomputed
from planar_vae_jax.flows.nonlinearities import Nonlinearity

# From this D on a layer slices its u and w out of [..., K, D]; below, the layers are put in front first.
SLICED = 256


def amortized_layers(
    nonlinearity: Nonlinearity, params: tuple[jax.Array, jax.Array, jax.Array], z0: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """K layers one after the other, a flow for each event: ``(zK [..., D], log_det [...])``.

    Args:
        nonlinearity: ``h``.
        params: ``u [..., K, D]``, ``w [..., K, D]``, ``b [..., K]``, K at least 1; the leading axes are those of the
            events, but for some of size 1.
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

    def sliced(z: jax.Array, one: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
        k, *scalars = one
        return layer(z, (*(lax.dynamic_index_in_dim(leaf, k, -2, keepdims=False) for leaf in (u, w)), *scalars))

    z = jnp.broadcast_to(z0, (*lead, dim))
    scalars = (jnp.moveaxis(leaf, -1, 0) for leaf in (b, inverse_scale(w)))
    if dim < SLICED:
        rows = (jnp.moveaxis(leaf, -2, 0) for leaf in (u, w))
        z, found = lax.scan(recomputed(layer), z, (*rows, *scalars))
    else:
        z, found = lax.scan(recomputed(sliced), z, (jnp.arange(flow_length, dtype=jnp.uint32), *scalars))
    return z, sum_log_slopes(nonlinearity, False, *found)
