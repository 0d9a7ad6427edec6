"""Figures from arrays: every function returns a matplotlib ``Figure``, ready for ``savefig``.

The modules here import NumPy and matplotlib only: no model, no pyplot, no backend, no global state. Names and titles
are drawn as they are given: a ``$`` starts no formula, and a character that the font lacks becomes ``?``. A caller
imports a function from its file:

- ``curves``: ``loss_curves``, losses against epochs, with and without the first value; ``class_losses``, the test loss
  of each class, with standard errors; ``kl_curve``, a KL divergence against steps.
- ``lengths``: ``against_length``, results over seeds against the number of layers K, beside published ones.
- ``images``: ``image_grid``, a grid of images; ``image_rows``, named rows of images with captions.
- ``density``: ``density_fit``, a target, samples before and after the flow, and the flow's density;
  ``layer_densities``, the density after the first k layers.
- ``pairs``: ``point_pairs``, points and samples in each pair of dimensions.
- ``posteriors``: ``posterior_rows``, the true posterior of each image beside q after k layers; ``PosteriorPanels``,
  what it reads of each image.
- ``latent``: ``aggregate_plane``, codes on a latent plane, by class, beside the prior; ``aggregate_histograms``,
  histograms of latent coordinates beside the prior.

``check_figures`` fails early where figures cannot be drawn.
"""

import io

import numpy as np

import planar_vae_jax.plotting._backend  # noqa: F401  first, as it imports matplotlib
from planar_vae_jax.plotting.images import image_rows

__all__ = ["check_figures"]


def check_figures() -> None:
    """Draws a small figure in memory. A run calls it before training, so that a broken installation fails early.

    Raises:
        ImportError: matplotlib or something that it needs does not work.
    """
    try:
        image_rows({"row": np.zeros((1, 2, 2))}, title="title").savefig(io.BytesIO(), format="png")
    except Exception as error:  # from matplotlib, from Pillow, from a LaTeX that a matplotlibrc asks for
        raise ImportError(f"figures cannot be drawn: {type(error).__name__}: {error}") from error
