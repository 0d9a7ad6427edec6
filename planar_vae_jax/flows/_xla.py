"""What the flows ask of XLA: layouts that survive ``jax.vmap``, little memory in reverse mode, and few launches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

# --- Layouts


def full_like(x: jax.Array, value: float) -> jax.Array:
    """An array filled with ``value`` that has the shape, the batch axes and the mesh axes of ``x``.

    A plain constant has no batch axis under ``jax.vmap`` and does not vary over a mesh under ``jax.shard_map``, so a
    loop cannot carry it in the place of an array that does.
    """
    return lax.select_n(np.True_, lax.stop_gradient(x), jnp.full_like(x, value))


def beside_events(x: jax.Array, event: jax.Array) -> jax.Array:
    """Repeats ``x [K]`` for every event: ``[K, ...]``, where ``event [...]`` holds one scalar of each event.

    This is an outer product with ones, which XLA turns into a broadcast. Under ``jax.vmap`` the product has its batch
    axis last, as the other arrays of the Gram form have; a broadcast would put it first, and XLA would transpose.
    """
    return jnp.tensordot(x, full_like(event, 1.0), axes=0)


# --- Memory of reverse mode


def kept(x: jax.Array) -> jax.Array:
    """Marks ``x``, a scalar of each layer and event, to be kept by reverse mode inside :func:`recomputed`."""
    return checkpoint_name(x, "kept")


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes reverse mode keep the arguments of ``function`` and what is :func:`kept` in it, and recompute the rest."""
    policy = jax.checkpoint_policies.save_only_these_names("kept")
    return jax.checkpoint(function, prevent_cse=False, policy=policy)


# --- Launches


def on_gpu(*arrays: jax.Array) -> bool:
    """Whether a computation with these arrays runs on a GPU, where the number of kernels matters most.

    Launching a kernel from the host takes longer there than most kernels of a flow do. The answer changes how a flow is
    computed, not what: it is a static argument of the functions that are compiled.

    Concrete arrays are on known devices. Tracers are not: if there are only tracers, the default backend decides.
    """
    platforms = {_platform(array) for array in arrays if not isinstance(array, jax.core.Tracer)}
    return (platforms or {jax.default_backend()}) == {"gpu"}


def _platform(array: jax.Array) -> str:
    return next(iter(array.devices())).platform  # an array is on devices of one platform
