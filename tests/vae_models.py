"""Small VAEs whose parameters all matter, drawn by NumPy so that no test compiles a program for them."""

import jax
import numpy as np
from flax import nnx

from planar_vae_jax.vae.model import VAE

KINDS = {"mlp": VAE.mlp, "conv": VAE.conv}


def drawn(image_shape, *, kind="mlp", seed=0, scale=0.3, **options):
    """``VAE.mlp`` or ``VAE.conv`` of these options, with kernels wide enough that each layer changes what comes out."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        width = np.hypot(scale, 1.0 / np.sqrt(max(1, np.prod(leaf.shape[:-1])))) if leaf.ndim > 1 else scale
        return (width * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    return jax.tree.map(draw, jax.eval_shape(lambda: KINDS[kind](image_shape, **options, rngs=nnx.Rngs(0))))


def named(model):
    """``{".decoder.last.kernel": array, ...}``."""
    leaves = jax.tree_util.tree_leaves_with_path(model)
    return {jax.tree_util.keystr(path).removesuffix(".value"): leaf for path, leaf in leaves}


def moved(model, other):
    """The arrays of ``model`` in ``other``, which differs in what is static."""
    return jax.tree.unflatten(jax.tree.structure(other), jax.tree.leaves(model))
