"""Batches as vectors: what ``jax.vmap`` adds to a recursion over scalars is laid out along the last axis."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def batch_last(run: Callable[[Any, Any], Any], events: Any, shared: Any) -> Any:
    """``run(events, shared)``, laid out for batches of events.

    ``jax.vmap`` puts a batch first, where one scalar of all events lies scattered in memory. Here it comes last, so
    that ``run`` sees that scalar as a contiguous vector.

    Args:
        run: a function of two pytrees whose ``events`` are arrays ``[K, ..., *batch]``, as are its results.
        events: arrays of each event's own.
        shared: arrays that all events share. Under a ``jax.vmap`` that gives each event its own, ``run`` is
            batched as usual.

    Can be differentiated any number of times, by differentiating ``run`` itself.
    """

    @custom_vmap
    def batched(events: Any, shared: Any) -> Any:
        return run(events, shared)

    @batched.def_vmap
    def _rule(size: int, in_batched: Any, events: Any, shared: Any) -> Any:
        events_batched, shared_batched = in_batched
        if any(jax.tree.leaves(shared_batched)):
            axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, tuple(in_batched))
            out = jax.vmap(run, in_axes=axes)(events, shared)
        else:

            def last(leaf: jax.Array, is_batched: bool) -> jax.Array:
                if is_batched:
                    return jnp.moveaxis(leaf, 0, -1)
                return jnp.broadcast_to(leaf[..., None], (*leaf.shape, size))

            out = batched(jax.tree.map(last, events, events_batched), shared)
            out = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, -1, 0), out)
        return out, jax.tree.map(lambda _: True, out)

    call = jax.custom_jvp(batched)
    call.defjvp(lambda primals, tangents: jax.jvp(run, primals, tangents))
    return call(events, shared)
