"""Planar normalizing flows: K layers composed, and their inverse.

One layer acts on an event ``z [D]`` with parameters ``u [D]``, ``w [D]``, ``b []``
(Rezende & Mohamed 2015, eq. 10 and appendix A.1; Xu et al. 2023, eq. 1 to 5):

    a = w.z + b      f(z) = z + u_hat h(a)      log|det df/dz| = log(1 + h'(a) w.u_hat)

Batches are leading axes: ``z0 [..., D]``. Two things differ from the usual form, and both are exact rather than
approximate: the constraint from ``u`` to ``u_hat`` has the identity inside it (``_constraint``), and
``1 + h' (m - 1) = (1 - h') + h' m`` with ``m = 1 + w.u_hat`` is a sum of two non-negative terms, so that the log-det
has nothing to cancel, no ``abs`` and no epsilon (:mod:`planar_vae_jax.flows._log_slope`).
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from planar_vae_jax.flows import _launches as launches
from planar_vae_jax.flows._amortized import amortized_layers
from planar_vae_jax.flows._constraint import constrain
from planar_vae_jax.flows._gram import gram_layers
from planar_vae_jax.flows._scan import NARROW, Prepared, inverse_layer_scan, layer_scan, layers_a_step, log_det
from planar_vae_jax.flows.nonlinearities import NONLINEARITIES, Nonlinearity, check_nonlinearity

METHODS = ("scan", "gram")


class Planar(NamedTuple):
    """Parameters of K planar layers; layer 0 is applied first. Leading axes: a flow for each entry (amortised)."""

    u: jax.Array  # [..., K, D], unconstrained
    w: jax.Array  # [..., K, D]
    b: jax.Array  # [..., K]


def init_planar(
    key: jax.Array,
    flow_length: int,
    dim: int,
    *,
    w_scale: float = 1.0,
    u_scale: float = 0.1,
    dtype: jax.typing.DTypeLike | None = None,
) -> Planar:
    """Draws K layers near the identity.

    ``w ~ N(0, w_scale^2 / D)``, so that ``w.z`` is of order ``w_scale`` for a standard normal ``z`` in any
    dimension; ``u ~ N(0, u_scale^2 / D)``, so that ``|u_hat|`` is of order ``u_scale``; ``b = 0``.

    Args:
        key: a PRNG key.
        flow_length: K >= 0, the number of layers.
        dim: D >= 1, the size of an event.
        w_scale: expected norm of each ``w``.
        u_scale: expected norm of each ``u``; 0 starts at the identity exactly.
        dtype: a floating dtype; JAX's default if None.

    Raises:
        ValueError: for a flow length below 0, a dimension below 1, or one that is no whole number; for a scale that is
            negative or not finite; for a dtype that is not floating.
    """
    for name, count, least in (("flow_length", flow_length, 0), ("dim", dim, 1)):
        if isinstance(count, bool) or not hasattr(count, "__index__") or count < least:
            raise ValueError(f"{name} must be a whole number >= {least}; got {count!r}")
    for name, scale in (("w_scale", w_scale), ("u_scale", u_scale)):
        if not isinstance(scale, jax.core.Tracer) and not 0.0 <= scale < math.inf:
            raise ValueError(f"{name} must be a number >= 0; got {scale!r}")
    dtype = jnp.zeros((), dtype).dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating dtype; got {dtype}")
    key_u, key_w = jax.random.split(key)
    shape = (flow_length, dim)
    return Planar(
        u=jax.random.normal(key_u, shape, dtype) * (u_scale / math.sqrt(dim)),
        w=jax.random.normal(key_w, shape, dtype) * (w_scale / math.sqrt(dim)),
        b=jnp.zeros((flow_length,), dtype),
    )


def planar_flow(
    params: Planar, z0: jax.Array, *, h: str = "tanh", method: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sends events through K planar layers (Xu et al. 2023, eq. 1 to 5).

    Args:
        params: ``Planar(u [..., K, D], w [..., K, D], b [..., K])``; K = 0 is the identity. Without leading axes one
            flow serves all events. With leading axes they are amortised: the leading axes are broadcast against those
            of ``z0`` from the right, so ``u [B, K, D]`` has a flow for each event of ``z0 [B, D]``, and for each S
            samples of ``z0 [S, B, D]``.
        z0: ``[..., D]``, of the dtype of ``params``. float16 and bfloat16 are computed in float32 and returned so (and
            parameters of either take such a float32).
        h: the nonlinearity, one of ``NONLINEARITIES``.
        method: ``"scan"`` carries ``z`` through ``lax.scan`` over the layers, O(K D) an event, and reverse
            mode keeps K copies of ``z``. ``"gram"`` is the same map from three matrix products and a
            recursion over K scalars (:mod:`planar_vae_jax.flows._gram`); reverse mode keeps O(K) an event. None
            picks by shape, see :func:`default_method`.

    Returns:
        ``(zK [..., D], log_det [...])``, where ``log_det = log|det dzK/dz0|`` in nats.

    ``jax.vmap`` gives the same map. Inside it, though, parameters that are batched too look like those of a flow that
    serves many events, and on a CPU the method for these is slower: pass amortised parameters with their leading axes.

    Raises:
        ValueError: for shapes or dtypes that do not fit, or an unknown ``h`` or ``method``.
    """
    params, z0 = _as_arrays(params, z0, "z0")
    check_nonlinearity(h)
    if method is None:
        method = default_method(params, z0)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, or None; got {method!r}")
    return _forward(params, z0, h=h, method=method)


def inverse_planar_flow(params: Planar, zK: jax.Array, *, h: str = "tanh") -> tuple[jax.Array, jax.Array]:
    """Sends events backwards through K planar layers; the exact inverse of :func:`planar_flow`.

    From the last layer to the first: with ``y = w.z_k + b``, solve ``a + (m - 1) h(a) = y`` for the scalar ``a``
    (monotone; at most 32 Newton iterations, gradients by the implicit function theorem), then
    ``z_{k-1} = z_k - h(a) u_hat``.

    Args:
        params: as for :func:`planar_flow`.
        zK: ``[..., D]``, any points; every point has exactly one pre-image.
        h: the nonlinearity.

    Returns:
        ``(z0 [..., D], log_det [...])``, where ``log_det = log|det dz0/dzK|``, minus that of the forward map.

    The scalar equations are solved to the last ulp, so the round trip is limited by the map's own conditioning:
    a layer with ``m < 1`` contracts by ``m`` across its hyperplane ``a = 0``, and an error of one ulp in ``zK`` becomes
    ``1 / m`` ulps of ``z0`` there. Gradients grow in the same way; that is the map, not the solver.

    Derivatives are right to any order in forward mode, and to the fourth in nested reverse mode, but not beyond.

    Raises:
        ValueError: for shapes or dtypes that do not fit, or an unknown ``h``.
    """
    params, zK = _as_arrays(params, zK, "zK")
    check_nonlinearity(h)
    return _backward(params, zK, h=h)


def default_method(params: Planar, z0: jax.Array) -> str:
    """``"gram"`` where a flow serves more than one event, ``D > 4`` and ``K <= 16 D``; else ``"scan"``.

    The faster one on CPU (docs/benchmarks.md): a scanned layer costs O(D) an event and reads its parameters once; a
    Gram step costs O(K), and its products are products of matrices only if events share them. Parameters without
    leading axes count as shared even by a single event, as it may be one of a ``jax.vmap``. On a GPU, where the Gram
    form takes fewer kernels, it is also the one for flows of one event, as long as ``K <= 4 D``: it needs K x K numbers
    of each flow.
    """
    flow_length, dim = params.u.shape[-2:]
    longest = 16 * dim if _serves_many(params, z0) else 4 * dim if launches.are_dear() else 0
    return "gram" if dim > NARROW and 0 < flow_length <= longest else "scan"


def _serves_many(params: Planar, z0: jax.Array) -> bool:
    flows, events = params.b.shape[:-1], z0.shape[:-1]
    axes = itertools.zip_longest(reversed(flows), reversed(events), fillvalue=1)
    return not flows or any(flow == 1 and event != 1 for flow, event in axes)


# --- Checks.


def _as_arrays(params: Planar, z: jax.Array, argument: str) -> tuple[Planar, jax.Array]:
    """Both as arrays, checked."""
    params, z = Planar(*map(jnp.asarray, params)), jnp.asarray(z)
    u, w, b = (leaf.shape for leaf in params)
    if len(u) < 2 or w != u or b != u[:-1]:
        raise ValueError(f"params must be Planar(u [..., K, D], w [..., K, D], b [..., K]); got u {u}, w {w}, b {b}")
    if not z.ndim or z.shape[-1] != u[-1]:
        raise ValueError(f"{argument} must be of shape [..., {u[-1]}], as params has D = {u[-1]}; got shape {z.shape}")
    try:
        jnp.broadcast_shapes(b[:-1], z.shape[:-1])
    except ValueError:
        raise ValueError(
            f"the leading axes of {argument} and params must broadcast; got shape {z.shape} and u, w of {u}"
        ) from None
    dtypes = [leaf.dtype for leaf in params]
    fits = z.dtype in (dtypes[0], computed_in(dtypes[0]))
    if not jnp.issubdtype(z.dtype, jnp.floating) or len(set(dtypes)) > 1 or not fits:
        names = ", ".join(map(str, dtypes))
        raise ValueError(f"{argument} and params must be of one floating dtype; got {z.dtype} and u, w, b of {names}")
    return params, z


# --- What is compiled: everything is written for one flow [K, D] and its events [..., D].


@functools.partial(jax.jit, static_argnames=("h", "method"))
def _forward(params: Planar, z0: jax.Array, *, h: str, method: str) -> tuple[jax.Array, jax.Array]:
    layer_by_layer = layers_a_step(z0.shape[-1]) == 1
    if method == "scan" and layer_by_layer and params.b.shape[-1] and not _serves_many(params, z0):
        return amortized_layers(NONLINEARITIES[h], *_widened(params, z0))
    run = _gram if method == "gram" and params.b.shape[-1] else layer_scan
    return _for_each_flow(functools.partial(run, NONLINEARITIES[h]), params, z0)


@functools.partial(jax.jit, static_argnames="h")
def _backward(params: Planar, zK: jax.Array, *, h: str) -> tuple[jax.Array, jax.Array]:
    return _for_each_flow(functools.partial(inverse_layer_scan, NONLINEARITIES[h]), params, zK)


Flow = Callable[[Prepared, jax.Array], tuple[jax.Array, jax.Array]]


def _for_each_flow(flow: Flow, params: Planar, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``flow(layers of one flow, z [..., D])``, with ``jax.vmap`` over the leading axes that ``params`` have."""
    params, z = _widened(params, z)
    layers = Prepared(*params, constrain(params.u, params.w))
    flows = params.b.shape[:-1]
    lead = jnp.broadcast_shapes(flows, z.shape[:-1])
    z = jnp.broadcast_to(z, (*lead, z.shape[-1]))
    shared = tuple(i for i, size in enumerate(flows) if size == 1)  # by all events along that axis
    layers = jax.tree.map(lambda leaf: jnp.squeeze(leaf, shared), layers)
    own = [len(lead) - len(flows) + i for i in range(len(flows)) if i not in shared]
    for position, axis in reversed(list(enumerate(own))):
        flow = jax.vmap(flow, in_axes=(0, axis - position), out_axes=axis - position)
    return flow(layers, z)


def _widened(params: Planar, z: jax.Array) -> tuple[Planar, jax.Array]:
    return jax.tree.map(lambda leaf: leaf.astype(computed_in(leaf.dtype)), (params, z))


def computed_in(dtype: jax.typing.DTypeLike) -> Any:
    """The dtype in which a flow of this dtype is computed, and its results are: float32 at least."""
    return jnp.dtype(jnp.float32) if jnp.dtype(dtype).itemsize < 4 else jnp.dtype(dtype)


def _gram(nonlinearity: Nonlinearity, layers: Prepared, z0: jax.Array) -> tuple[jax.Array, jax.Array]:
    zK, found = gram_layers(nonlinearity, layers.constrained.u_hat, layers.w, layers.b, z0)
    return zK, log_det(nonlinearity, *found, layers)
