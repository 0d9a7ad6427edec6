"""Encoder, decoder and heads computed in bfloat16; parameters and everything else stay in float32.

bfloat16 has the range of float32 and 8 bits of its significand. A layer rounds its input, its weights and its result to
bfloat16, forwards and backwards (the hardware sums inside a product in float32), and then returns the dtype that it was
given. So activations between layers, the flow, log-densities, the KL term, sums over pixels and the optimiser are all
float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

PRECISIONS = ("float32", "bfloat16")


def computation_dtype(precision: str) -> Any:
    """The ``dtype`` argument of a Flax layer: None for ``"float32"``, which keeps the dtype of its arrays.

    Raises:
        ValueError: if ``precision`` is not one of ``PRECISIONS``.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    return jnp.bfloat16 if precision == "bfloat16" else None


class Linear(nnx.Linear):
    """``nnx.Linear``, computed in ``precision``, which returns the dtype of its input.

    Args:
        inputs: size of the last axis of the input.
        outputs: size of the last axis of the result.
        dtype: of the parameters.
        precision: one of ``PRECISIONS``.
        rngs: draws the kernel.
        options: further arguments of ``nnx.Linear``, such as ``kernel_init``.
    """

    def __init__(self, inputs: int, outputs: int, *, dtype: Any, precision: str, rngs: nnx.Rngs, **options: Any):
        super().__init__(inputs, outputs, dtype=computation_dtype(precision), param_dtype=dtype, rngs=rngs, **options)

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        """``[..., inputs]`` to ``[..., outputs]``."""
        y = super().__call__(x)
        return y if self.dtype is None else y.astype(x.dtype)
