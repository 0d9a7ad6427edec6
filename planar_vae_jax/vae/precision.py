"""Encoder and decoder computed in bfloat16, whatever their layers are; parameters and everything else as they were.

bfloat16 has the range of float32 and 8 bits of its significand. A layer rounds its input, weights and result to them,
forwards and backwards (the hardware sums inside a product in float32); what it returns is float32 again. So activations
between layers, the flow, log-densities, KL, sums over pixels and the optimiser are all float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

PRECISIONS = ("float32", "bfloat16")
_LAYERS = (nnx.Linear, nnx.Conv, nnx.ConvTranspose)


def compute_in_bfloat16(module: nnx.Module) -> None:
    """Changes every layer with weights inside ``module``; the tree of parameters stays the same."""
    for _, layer in nnx.iter_graph(module):
        if isinstance(layer, _LAYERS):
            layer.dtype = jnp.bfloat16
            layer.__class__ = _rounding(type(layer))


@functools.cache
def _rounding(layer: type[Any]) -> type[Any]:
    """The same layer, which returns the dtype that it was given."""

    class Rounding(layer):
        def __call__(self, inputs: jax.Array) -> jax.Array:
            return super().__call__(inputs).astype(inputs.dtype)

    return Rounding
