"""Arrays made in the likeness of others, where ``jax.vmap`` and ``jax.shard_map`` would otherwise tell them apart."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name


def full_like(x: jax.Array, value: float) -> jax.Array:
    """``value`` everywhere, but to JAX it is made from ``x``: batched as ``x`` is, varying over the same mesh axes."""
    return lax.select_n(np.True_, lax.stop_gradient(x), jnp.full_like(x, value))


def beside_events(x: jax.Array, event: jax.Array) -> jax.Array:
    """``x [K]`` repeated for every event: ``[K, ...]`` for one scalar of each, ``event [...]``.

    By an outer product with ones of the events' own, which XLA turns into a broadcast. ``jax.vmap`` puts the batch of
    such a product last; elsewhere, where an array that has its batch last meets one without a batch, it transposes.
    """
    return jnp.tensordot(x, full_like(event, 1.0), axes=0)


def kept(x: jax.Array) -> jax.Array:
    """``x``, a scalar of each layer and event: reverse mode through :func:`recomputed` keeps it."""
    return checkpoint_name(x, "kept")


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, of which reverse mode keeps the arguments and what is :func:`kept`; the rest is computed again."""
    policy = jax.checkpoint_policies.save_only_these_names("kept")
    return jax.checkpoint(function, prevent_cse=False, policy=policy)
