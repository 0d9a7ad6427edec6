"""Planar normalizing flows and planar-flow variational autoencoders in JAX."""

from typing import TYPE_CHECKING, Any

from planar_vae_jax.flows.distribution import PlanarFlow
from planar_vae_jax.flows.planar import Planar, init_planar, inverse_planar_flow, planar_flow

if TYPE_CHECKING:
    from planar_vae_jax.load import load_run

__all__ = ["Planar", "PlanarFlow", "init_planar", "inverse_planar_flow", "load_run", "planar_flow"]


def __getattr__(name: str) -> Any:
    """``load_run`` brings Flax with it, so it is imported where it is asked for."""
    if name != "load_run":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from planar_vae_jax.load import load_run

    return load_run
