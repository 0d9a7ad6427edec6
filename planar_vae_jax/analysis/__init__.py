"""Figures of a trained model on a data set; every function takes ``(model, images, ...)``.

- ``evaluation``: ``fixed_images`` binarises test images by keys of their own; ``evaluate``
  gives free energy, NLL, KL and squared error of each, ``means`` and ``means_by_class`` their means and standard
  errors; ``reconstruct`` and ``sample_prior`` decode pictures.
- ``latent``: ``latent_units`` and ``active_units`` say what each latent dimension carries;
  ``aggregate_posterior`` samples codes; ``interpolate`` and ``traverse`` decode pictures between and around them.
- ``true_posterior``: ``posterior_grid`` compares the true posterior of an image on the
  latent plane with the density after each layer of the flow.
- ``inference_gap``: ``gap_of_images`` splits the distance between the free energy and
  ``-log p(x)`` into amortisation gap and approximation gap, ``summarise`` averages it.
"""

from planar_vae_jax.analysis.evaluation import (
    Figures,
    Images,
    evaluate,
    fixed_images,
    mean_loss,
    means,
    means_by_class,
    reconstruct,
    sample_prior,
)
from planar_vae_jax.analysis.inference_gap import Gap, Settings, gap_of_images, summarise
from planar_vae_jax.analysis.latent import active_units, aggregate_posterior, interpolate, latent_units, traverse
from planar_vae_jax.analysis.true_posterior import PosteriorGrid, posterior_grid

__all__ = [
    "Figures",
    "Gap",
    "Images",
    "PosteriorGrid",
    "Settings",
    "active_units",
    "aggregate_posterior",
    "evaluate",
    "fixed_images",
    "gap_of_images",
    "interpolate",
    "latent_units",
    "mean_loss",
    "means",
    "means_by_class",
    "posterior_grid",
    "reconstruct",
    "sample_prior",
    "summarise",
    "traverse",
]
