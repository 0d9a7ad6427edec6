"""What tells the keys of ``jax.random.key`` from other arrays."""

from typing import Any

import jax
import jax.numpy as jnp


def is_key(leaf: Any) -> bool:
    """Returns whether a leaf is an array of typed PRNG keys; the words of ``jax.random.PRNGKey`` are not."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
