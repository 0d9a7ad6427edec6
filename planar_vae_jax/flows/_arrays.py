"""The dtype in which flows are computed, and arrays whose leading axes are broadcast."""

from typing import Any

import jax
import jax.numpy as jnp


def computed_in(dtype: jax.typing.DTypeLike) -> Any:
    """The dtype in which a flow of this dtype is computed and its results are returned: at least float32."""
    return jnp.dtype(jnp.float32) if jnp.dtype(dtype).itemsize < 4 else jnp.dtype(dtype)


def widened(tree: Any) -> Any:
    """The arrays of a pytree in the dtype in which they are computed."""
    return jax.tree.map(lambda leaf: leaf.astype(computed_in(leaf.dtype)), tree)


def add(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x + y`` for arrays of any two ranks, also where ``jax_numpy_rank_promotion`` is "raise"."""
    return jnp.add(*jnp.broadcast_arrays(x, y))
