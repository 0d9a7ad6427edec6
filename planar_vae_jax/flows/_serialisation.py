"""Registers the pytrees of this folder with ``jax.export``, so that functions that take or return them can be saved.

A saved function holds the names below; whoever loads one that takes or returns these classes imports this package.
"""

import json

import jax.export

from planar_vae_jax.flows.distribution import PlanarDensity, PlanarFlow
from planar_vae_jax.flows.planar import Planar

jax.export.register_namedtuple_serialization(Planar, serialized_name="planar_vae_jax.Planar")
for _density in (PlanarFlow, PlanarDensity):
    jax.export.register_pytree_node_serialization(
        _density,
        serialized_name=f"planar_vae_jax.{_density.__name__}",
        serialize_auxdata=lambda static: json.dumps(static).encode(),
        deserialize_auxdata=lambda raw: tuple(json.loads(raw)),
    )
