"""Pictures from arrays. Every function returns a matplotlib ``Figure`` for a file: no pyplot, no backend, no state.

Which pages a run draws with them: ``planar_vae_jax.report``.

Texts are shown as they are: a ``$`` in a file's name begins no formula, and a name in another script is set in a font
that has it, if one is installed.
"""

import io

import planar_vae_jax.plotting.backend  # noqa: F401  before all others: it imports matplotlib
from planar_vae_jax.plotting.curves import class_losses, kl_curve, loss_curves
from planar_vae_jax.plotting.density import density_fit, layer_densities
from planar_vae_jax.plotting.images import image_grid, image_rows
from planar_vae_jax.plotting.latent import aggregate_histograms, aggregate_plane
from planar_vae_jax.plotting.lengths import against_length
from planar_vae_jax.plotting.posteriors import posterior_rows

__all__ = [
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
    "posterior_rows",
]


def check_figures() -> None:
    """Draws a small figure in memory: whoever trains first and draws afterwards calls it before.

    Raises:
        ImportError: something that figures need is not there, or does not work.
    """
    import numpy as np

    try:
        image_rows({"row": np.zeros((1, 2, 2))}, title="title").savefig(io.BytesIO(), format="png")
    except Exception as error:  # of matplotlib, of Pillow, of a LaTeX that a matplotlibrc asks for
        raise ImportError(f"figures cannot be drawn: {type(error).__name__}: {error}") from error
