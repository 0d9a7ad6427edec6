"""Planar flows: the map, its inverse, and the densities that they make. Needs JAX alone.

=============================  =========================================================================================
``planar``                     The map.
``Planar``                     The parameters of K layers: ``u [..., K, D]``, ``w [..., K, D]``, ``b [..., K]``.
``init_planar``                Draws the parameters of K layers that are near the identity.
``planar_flow``                Sends events through the layers: ``z0 [..., D]`` to ``zK [..., D]``, ``log_det [...]``.
``inverse_planar_flow``        Sends events back: ``zK`` to ``z0`` and the ``log_det`` of the inverse map.
``planar_trajectory``          Where events are after each layer.
``planar_from_constrained``    The parameters of layers that are given by ``u_hat``, ``w`` and ``b``.
``planar_to_constrained``      The layers' ``u_hat``, ``w`` and ``b``.

``distribution``               Densities, in nats.
``PlanarFlow``                 The density of a normal variable sent through the layers: sampling and ``log_prob``.
``PlanarDensity``              A density on data, in either direction: layers, then an affine map.
``first_layers``               The same density after the first k layers only.
``shown_layers``               Numbers of layers after which pictures show a flow.
``standard_normal_log_prob``   ``log N(z; 0, I)``.
``bernoulli_log_prob``         The log-probability of bits, from logits.

``nonlinearities``             The choices of ``h`` in ``f(z) = z + u_hat h(w.z + b)``.
``NONLINEARITIES``             The table of them, by name; a new nonlinearity is a new entry.
``Nonlinearity``               What an entry holds: ``h``, its derivatives, and what the inverse needs.
``check_nonlinearity``         Raises a ValueError unless a name is in the table.

``targets``                    Densities on the plane that a flow is fitted to.
``TARGETS``                    The names of those that are known up to a constant.
``POINT_TARGETS``              The names of those that are known by points.
``draw_points``                Draws points ``[N, 2]``.
``Target``                     An unnormalised log-density, its normaliser, and the square in which it is plotted.
``get_target``                 The target of a name.
=============================  =========================================================================================

``Planar``, ``PlanarFlow`` and ``PlanarDensity`` are registered for serialisation with ``jax.export``. Files whose names
begin with ``_`` hold what these are made of.
"""

import planar_vae_jax.flows._serialisation  # noqa: F401  registers the classes with jax.export
from planar_vae_jax.flows.distribution import (
    PlanarDensity,
    PlanarFlow,
    bernoulli_log_prob,
    first_layers,
    shown_layers,
    standard_normal_log_prob,
)
from planar_vae_jax.flows.nonlinearities import NONLINEARITIES, Nonlinearity, check_nonlinearity
from planar_vae_jax.flows.planar import (
    Planar,
    init_planar,
    inverse_planar_flow,
    planar_flow,
    planar_from_constrained,
    planar_to_constrained,
    planar_trajectory,
)
from planar_vae_jax.flows.targets import POINT_TARGETS, TARGETS, Target, draw_points, get_target

__all__ = [
    "NONLINEARITIES",
    "POINT_TARGETS",
    "TARGETS",
    "Nonlinearity",
    "Planar",
    "PlanarDensity",
    "PlanarFlow",
    "Target",
    "bernoulli_log_prob",
    "check_nonlinearity",
    "draw_points",
    "first_layers",
    "get_target",
    "init_planar",
    "inverse_planar_flow",
    "planar_flow",
    "planar_from_constrained",
    "planar_to_constrained",
    "planar_trajectory",
    "shown_layers",
    "standard_normal_log_prob",
]
