"""Figures from arrays: every function returns a matplotlib ``Figure``, ready for ``savefig``.

The modules here import NumPy and matplotlib only: no model, no pyplot, no backend, no global state. Names and titles
are drawn as they are given: a ``$`` starts no formula, and a character that the font lacks becomes ``?``.

Training:

- ``loss_curves``: losses against epochs, with and without the first value.
- ``class_losses``: the test loss of each class, with standard errors.
- ``against_length``: results over seeds against the number of layers K, beside published ones.

Images:

- ``image_grid``: a grid of images.
- ``image_rows``: named rows of images with captions.

Densities on the plane:

- ``density_fit``: a target, samples before and after the flow, and the flow's density.
- ``layer_densities``: the density after the first k layers.
- ``kl_curve``: a KL divergence against steps.

Densities on more dimensions:

- ``point_pairs``: points and samples in pairs of dimensions.

The latent space:

- ``posterior_rows``: the true posterior of each image beside q after k layers.
- ``PosteriorPanels``: what ``posterior_rows`` reads of each image.
- ``aggregate_plane``: codes on a latent plane, by class, beside the prior.
- ``aggregate_histograms``: histograms of latent coordinates beside the prior.

``check_figures`` fails early where figures cannot be drawn.
"""

import io

import numpy as np

import planar_vae_jax.plotting._backend  # noqa: F401  first, as it imports matplotlib
from planar_vae_jax.plotting._curves import class_losses, kl_curve, loss_curves
from planar_vae_jax.plotting._density import density_fit, layer_densities
from planar_vae_jax.plotting._images import image_grid, image_rows
from planar_vae_jax.plotting._latent import aggregate_histograms, aggregate_plane
from planar_vae_jax.plotting._lengths import against_length
from planar_vae_jax.plotting._pairs import point_pairs
from planar_vae_jax.plotting._posteriors import PosteriorPanels, posterior_rows

__all__ = [
    "PosteriorPanels",
    "against_length",
    "aggregate_histograms",
    "aggregate_plane",
    "check_figures",
    "class_losses",
    "density_fit",
    "image_grid",
    "image_rows",
    "kl_curve",
    "layer_densities",
    "loss_curves",
    "point_pairs",
    "posterior_rows",
]


def check_figures() -> None:
    """Draws a small figure in memory. A run calls it before training, so that a broken installation fails early.

    Raises:
        ImportError: matplotlib or something that it needs does not work.
    """
    try:
        image_rows({"row": np.zeros((1, 2, 2))}, title="title").savefig(io.BytesIO(), format="png")
    except Exception as error:  # from matplotlib, from Pillow, from a LaTeX that a matplotlibrc asks for
        raise ImportError(f"figures cannot be drawn: {type(error).__name__}: {error}") from error
