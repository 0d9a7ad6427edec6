"""The variational autoencoder: an encoder, a planar-flow posterior, a decoder, a likelihood; and its objectives.

Models (``model``):

- ``VAE``: encoder, posterior, decoder and likelihood as one Flax module, itself the pytree that is trained; ``VAE.mlp``
  and ``VAE.conv`` build those of the experiments.
- ``PlanarPosterior``: features to ``q(z|x)``, a normal distribution and K planar layers.
- ``Posterior``: what a posterior of one's own implements.

Parts (``mlp``, ``conv``, ``likelihoods``):

- ``MLPEncoder``, ``MLPDecoder``: linear layers with ReLUs.
- ``GatedEncoder``, ``GatedDecoder``: gated convolutions; they need H and W that are ``divisible_by_4``.
- ``LIKELIHOODS``: ``p(x|z)`` by name, ``Bernoulli``, ``DiscretizedLogistic`` and ``Gaussian``.
- ``Likelihood``, ``Head``: what a likelihood of one's own implements.
- ``LocationScale``: the parameters of a likelihood with a scale.
- ``measured``: what the nats of a likelihood and a binarisation measure.
- ``default_binarization``: the binarisation that a likelihood and an objective need.
- ``PRECISIONS``: in which encoder and decoder are computed.

Pixels (``binarization``):

- ``BINARIZATIONS``, ``binarize``, ``binarize_each``: grey levels to what the model sees, by one key or a key for each
  image.

Objectives (``objectives``):

- ``free_energy``: the free energy of each image and its terms (``Terms``), which training minimises.
- ``sampled_terms``: the same for several samples of each image.
- ``terms``: the same for given noise and any posterior.
- ``importance_nll``: ``-log p(x)`` by importance sampling, with the effective sample size.
- ``log_joint``: ``log p(x, z)`` of images at given z.
- ``vae_loss``: the loss of an objective (``OBJECTIVES``), for ``train.loop``.
- ``Model``: what these functions ask of a model.

``whole_number`` checks an argument that is a size.
"""

from planar_vae_jax.vae._shapes import whole_number
from planar_vae_jax.vae.binarization import BINARIZATIONS, binarize, binarize_each
from planar_vae_jax.vae.conv import GatedDecoder, GatedEncoder, divisible_by_4
from planar_vae_jax.vae.likelihoods import (
    LIKELIHOODS,
    Bernoulli,
    DiscretizedLogistic,
    Gaussian,
    Head,
    Likelihood,
    LocationScale,
    default_binarization,
    measured,
)
from planar_vae_jax.vae.mlp import MLPDecoder, MLPEncoder
from planar_vae_jax.vae.model import VAE, PlanarPosterior, Posterior
from planar_vae_jax.vae.objectives import (
    OBJECTIVES,
    Model,
    Terms,
    free_energy,
    importance_nll,
    log_joint,
    sampled_terms,
    terms,
    vae_loss,
)
from planar_vae_jax.vae.precision import PRECISIONS

__all__ = [
    "BINARIZATIONS",
    "LIKELIHOODS",
    "OBJECTIVES",
    "PRECISIONS",
    "VAE",
    "Bernoulli",
    "DiscretizedLogistic",
    "GatedDecoder",
    "GatedEncoder",
    "Gaussian",
    "Head",
    "Likelihood",
    "LocationScale",
    "MLPDecoder",
    "MLPEncoder",
    "Model",
    "PlanarPosterior",
    "Posterior",
    "Terms",
    "binarize",
    "binarize_each",
    "default_binarization",
    "divisible_by_4",
    "free_energy",
    "importance_nll",
    "log_joint",
    "measured",
    "sampled_terms",
    "terms",
    "vae_loss",
    "whole_number",
]
