"""Planar normalizing flows and planar-flow variational autoencoders in JAX.

=======================  ===============================================================================================
``Planar``               The parameters of K planar layers: ``u [..., K, D]``, ``w [..., K, D]``, ``b [..., K]``.
``init_planar``          Draws the parameters of K layers that are near the identity.
``planar_flow``          Sends events through the layers: ``z0 [..., D]`` to ``zK [..., D]`` and ``log_det [...]``.
``inverse_planar_flow``  Sends events back: ``zK`` to ``z0`` and the ``log_det`` of the inverse map.
``PlanarFlow``           The density of a normal variable sent through the layers: sampling and ``log_prob``.
``PlanarDensity``        A density on data, in either direction: layers, then an affine map.
``VAE``                  A variational autoencoder of four parts: encoder, posterior, decoder, likelihood.
``free_energy``          The negative ELBO of each image, in nats, and its terms.
``load_run``             Opens the folder of a finished or running training.
=======================  ===============================================================================================

The flows need JAX alone. ``VAE``, ``free_energy`` and ``load_run`` also need Flax and are imported at their first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from planar_vae_jax.flows.distribution import PlanarDensity, PlanarFlow
from planar_vae_jax.flows.planar import Planar, init_planar, inverse_planar_flow, planar_flow

if TYPE_CHECKING:
    from planar_vae_jax.load import load_run
    from planar_vae_jax.vae.model import VAE
    from planar_vae_jax.vae.objectives import free_energy

# A literal: setuptools reads it here without importing JAX.
__version__ = "0.3.0"

__all__ = [
    "VAE",
    "Planar",
    "PlanarDensity",
    "PlanarFlow",
    "free_energy",
    "init_planar",
    "inverse_planar_flow",
    "load_run",
    "planar_flow",
]

_AT_FIRST_USE = {
    "VAE": "planar_vae_jax.vae.model",
    "free_energy": "planar_vae_jax.vae.objectives",
    "load_run": "planar_vae_jax.load",
}


def __getattr__(name: str) -> Any:
    """Imports what needs Flax when it is asked for."""
    if name not in _AT_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_AT_FIRST_USE[name]), name)
