"""What tests of several folders use: precisions, random flows, comparisons of trees."""

import contextlib

import jax
import numpy as np

from planar_vae_jax import Planar, PlanarFlow


@contextlib.contextmanager
def precision(dtype):
    """JAX as a user of this dtype has it: 64-bit types are on for float64 and off for float32."""
    if hasattr(jax, "enable_x64"):
        context = jax.enable_x64
    else:  # before JAX 0.8
        from jax.experimental import enable_x64 as context
    with context(np.dtype(dtype) == np.float64):
        yield


def draw(dim, flow_length, *, scale=1.0, seed=0, dtype=np.float64):
    """Parameters with ``w.u`` of order ``scale^2``, of both signs, and an event."""
    rng = np.random.default_rng([seed, dim, flow_length])
    size, shape = scale / dim**0.25, (flow_length, dim)
    u, w = (size * rng.normal(size=shape) for _ in "uw")
    params = Planar(u.astype(dtype), w.astype(dtype), rng.normal(size=flow_length).astype(dtype))
    return params, rng.normal(size=dim).astype(dtype)


def normal_log_prob(z, mean, log_std):
    """``log N(z; mean, diag(exp(2 log_std)))``, which is the density of a flow without layers."""
    shape = (0, z.shape[-1])
    return PlanarFlow(
        Planar(np.zeros(shape, z.dtype), np.zeros(shape, z.dtype), np.zeros(0, z.dtype)), mean, log_std
    ).log_prob(z)


def grid(low, high, size):
    """Points of a square ``[size^2, 2]`` and the area that belongs to each."""
    axis = np.linspace(low, high, size)
    return np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2), (axis[1] - axis[0]) ** 2


def stack(trees):
    """Trees of the same shapes as one with a leading axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def assert_trees_close(actual, desired, *, tolerance):
    """Each leaf to ``tolerance`` of its own largest entry (or of 1, if that is smaller)."""
    for a, d in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        np.testing.assert_allclose(a, d, rtol=0, atol=tolerance * max(1.0, np.max(np.abs(d), initial=0.0)))
