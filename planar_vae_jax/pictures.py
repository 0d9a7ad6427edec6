"""The pages on a trained VAE's latent space, drawn from its test images."""

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from planar_vae_jax import plotting
from planar_vae_jax.data import Dataset, examples
from planar_vae_jax.evaluation import Images
from planar_vae_jax.models import VAE
from planar_vae_jax.posteriors import posterior_grid

SHOWN = 4  # images or pairs of images on a page


def draw_latent_space(
    save: Callable[[str, Figure], None],
    vae: VAE,
    params: Any,
    data: Dataset,
    test: Images,
    setting: str,
    objective: str,
) -> None:
    """Draws every page that the model can have, and gives each to ``save`` by the name of its file.

    ``posteriors.png`` needs two latent dimensions, and a KL term in the objective: without it q approximates nothing.

    Args:
        save: such as ``RunFolder.save_figure``.
        vae: the architecture.
        params: of the model.
        data: whose test images are shown.
        test: these, as they are evaluated.
        setting: what tells these pages from another run's, for the titles.
        objective: that the model was trained by.
    """
    chosen, names = _examples(data)
    if vae.latent == 2 and objective != "reconstruction":
        save("posteriors.png", _posteriors(vae, params, test.pixels[chosen], names, setting))


def _examples(data: Dataset) -> tuple[np.ndarray, list[str]]:
    """Indices into the test images and their labels, a few of different classes."""
    chosen, names = examples(data)
    rows = np.unique(np.linspace(0, len(chosen) - 1, SHOWN).round().astype(int))
    return chosen[rows], [names[row] for row in rows] if names else []


def _posteriors(vae: VAE, params: Any, pixels: Any, names: list[str], setting: str) -> Figure:
    grids = [posterior_grid(vae, params, image) for image in pixels]
    title = "The true posterior p(z|x) of test images and what approximates it (KL to p(z|x) in nats)"
    if vae.flow_length:
        title += "; at the right q_k(z|x) after k layers, on a larger square, each in a colour scale of its own"
    title += f"\nwhite: p(z|x), around 50 and 95 % of its mass ({setting})"
    return plotting.posterior_rows(np.asarray(pixels) / 255.0, grids, title=title, names=names)
