"""Arrays made in the likeness of others, where ``jax.vmap`` and ``jax.shard_map`` would otherwise tell them apart."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def full_like(x: jax.Array, value: float) -> jax.Array:
    """``value`` everywhere, but to JAX it is made from ``x``: batched as ``x`` is, varying over the same mesh axes."""
    return lax.select_n(np.True_, lax.stop_gradient(x), jnp.full_like(x, value))


def beside_events(x: jax.Array, event: jax.Array) -> jax.Array:
    """``x [K]`` repeated for every event: ``[K, ...]`` for one scalar of each, ``event [...]``.

    By an outer product with ones of the events' own, which XLA turns into a broadcast. ``jax.vmap`` puts the batch of
    such a product last; elsewhere, where an array that has its batch last meets one without a batch, it transposes.
    """
    return jnp.tensordot(x, full_like(event, 1.0), axes=0)
