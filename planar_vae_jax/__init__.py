"""Planar normalizing flows and planar-flow variational autoencoders in JAX."""

from planar_vae_jax.distributions import PlanarFlow
from planar_vae_jax.planar import Planar, init_planar, inverse_planar_flow, planar_flow

__all__ = ["Planar", "PlanarFlow", "init_planar", "inverse_planar_flow", "planar_flow"]
