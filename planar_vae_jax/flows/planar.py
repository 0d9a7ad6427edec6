"""Planar normalizing flows: K layers composed, and their inverse.

One layer acts on an event ``z [D]`` with parameters ``u [D]``, ``w [D]``, ``b []``
(Rezende & Mohamed 2015, eq. 10 and appendix A.1; Xu et al. 2023, eq. 1 to 5):

    a = w.z + b      f(z) = z + u_hat h(a)      log|det df/dz| = log(1 + h'(a) w.u_hat)

Batches are leading axes: ``z0 [..., D]``. Two things are written differently from the papers:

- The constraint that makes ``u_hat`` from ``u`` maps ``u = 0`` to ``u_hat = 0``, the identity (``_constraint.py``).
- With ``m = 1 + w.u_hat``, the argument of the logarithm is ``1 + h' (m - 1) = (1 - h') + h' m``: a sum of two
  non-negative terms, which needs no ``abs`` and no epsilon and cancels nothing (``_log_slope.py``).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from planar_vae_jax.flows import _xla
from planar_vae_jax.flows._arrays import computed_in, widened
from planar_vae_jax.flows._constraint import Layers, constrain, unconstrain
from planar_vae_jax.flows._gram import gram_layers
from planar_vae_jax.flows._scan import NARROW, amortized_scan, inverse_scan, layer_scan, trajectory_scan
from planar_vae_jax.flows.nonlinearities import NONLINEARITIES, check_nonlinearity

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_METHODS = ("scan", "gram")

# So many layers of a plane (D <= NARROW) are written out in a step of the scan on a GPU, where XLA makes one kernel of
# them.
_UNROLL = 8


class Planar(NamedTuple):
    """Parameters of K planar layers, ``u [..., K, D]``, ``w [..., K, D]``, ``b [..., K]``; layer 0 is applied first.

    Without leading axes they are one flow. With leading axes there is a flow for each entry (amortised flows).
    """

    u: Float[Array, "*batch K D"]  # unconstrained
    w: Float[Array, "*batch K D"]
    b: Float[Array, "*batch K"]


def init_planar(
    key: jax.Array,
    flow_length: int,
    dim: int,
    *,
    w_scale: float = 1.0,
    u_scale: float = 0.1,
    dtype: jax.typing.DTypeLike | None = None,
) -> Planar:
    """Draws the parameters of K layers that are near the identity.

    ``w ~ N(0, w_scale^2 / D)``, so that ``w.z`` is of order ``w_scale`` for a standard normal ``z`` in any
    dimension; ``u ~ N(0, u_scale^2 / D)``, so that ``|u_hat|`` is of order ``u_scale``; ``b = 0``.

    Args:
        key: a PRNG key.
        flow_length: K >= 0, the number of layers.
        dim: D >= 1, the size of an event.
        w_scale: the root mean square norm of each ``w``.
        u_scale: the root mean square norm of each ``u``; 0 gives the identity exactly.
        dtype: a floating dtype; JAX's default if None.

    Returns:
        ``Planar(u [K, D], w [K, D], b [K])``.

    Raises:
        ValueError: if ``flow_length`` is not a whole number >= 0, ``dim`` is not a whole number >= 1, a scale is
            negative or not finite, or the dtype is not floating.
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
    params: Planar, z0: Float[Array, "*events D"], *, h: str = "tanh", method: str | None = None
) -> tuple[Float[Array, "*lead D"], Float[Array, "*lead"]]:
    """Sends events through K planar layers (Xu et al. 2023, eq. 1 to 5).

    Args:
        params: ``Planar(u [..., K, D], w [..., K, D], b [..., K])``; K = 0 is the identity. Without leading axes one
            flow serves all events. Leading axes are broadcast against those of ``z0`` from the right: ``u [B, K, D]``
            has a flow for each event of ``z0 [B, D]``, and for each S samples of ``z0 [S, B, D]``.
        z0: ``[..., D]``, of the dtype of ``params``. float16 and bfloat16 are computed in float32, which is also the
            dtype of the results; parameters of either also take a ``z0`` of float32.
        h: the nonlinearity, a name in ``NONLINEARITIES``.
        method: how the map is computed; the result is the same up to rounding.

            - ``"scan"`` carries ``z`` from layer to layer: O(K D) an event. Reverse mode keeps ``z`` of every layer.
            - ``"gram"`` takes three matrix products and a recursion over K scalars an event. Reverse mode keeps O(K)
              numbers an event.
            - None takes ``"gram"`` if a flow serves more than one event, ``D > 4`` and ``K <= 16 D``, else ``"scan"``.
              Parameters without leading axes count as serving many events. On a GPU ``"gram"`` is also taken for
              flows of one event each if ``D > 4`` and ``K <= 4 D``. This is the faster method by measurement
              (docs/benchmarks.md).

    Returns:
        ``(zK [..., D], log_det [...])``, where ``log_det = log|det dzK/dz0|`` in nats.

    ``jax.vmap`` gives the same map. Inside ``jax.vmap`` over both arguments, however, the parameters have no leading
    axes and count as serving many events, which costs time on a CPU: give amortised parameters their leading axes.

    Raises:
        ValueError: if shapes or dtypes do not fit, or ``h`` or ``method`` is unknown.
    """
    params, z0 = _as_arrays(params, z0, "z0")
    check_nonlinearity(h)
    on_gpu = _xla.on_gpu(*params, z0)
    if method is None:
        method = _default_method(params, z0, on_gpu)
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}, or None; got {method!r}")
    return _forward(params, z0, h=h, method=method, on_gpu=on_gpu)


def inverse_planar_flow(
    params: Planar, zK: Float[Array, "*events D"], *, h: str = "tanh"
) -> tuple[Float[Array, "*lead D"], Float[Array, "*lead"]]:
    """Sends events backwards through K planar layers; the exact inverse of :func:`planar_flow`.

    From the last layer to the first: with ``y = w.z_k + b``, solves ``a + (m - 1) h(a) = y`` for the scalar ``a``
    (monotone; at most 32 Newton iterations, derivatives by the implicit function theorem), then
    ``z_{k-1} = z_k - h(a) u_hat``.

    Args:
        params: as for :func:`planar_flow`.
        zK: ``[..., D]``, any points; every point has exactly one pre-image.
        h: the nonlinearity, a name in ``NONLINEARITIES``.

    Returns:
        ``(z0 [..., D], log_det [...])``, where ``log_det = log|det dz0/dzK|`` in nats, minus that of the forward map.

    The scalar equations are solved to the last ulp, so the accuracy of the round trip is limited by the map itself: a
    layer with ``m < 1`` contracts by ``m`` across its hyperplane ``a = 0``, and an error of one ulp in ``zK`` becomes
    ``1 / m`` ulps of ``z0`` there. Gradients grow in the same way.

    Derivatives are right to any order in forward mode, and to the fourth order in nested reverse mode. A fifth nested
    reverse mode gives wrong numbers.

    Raises:
        ValueError: if shapes or dtypes do not fit, or ``h`` is unknown.
    """
    params, zK = _as_arrays(params, zK, "zK")
    check_nonlinearity(h)
    return _backward(params, zK, h=h)


def planar_trajectory(
    params: Planar, z0: Float[Array, "*events D"], *, h: str = "tanh"
) -> tuple[Float[Array, "after *lead D"], Float[Array, " after *lead"]]:
    """Sends events through K planar layers and returns where they are after 0, 1, .. K of them.

    Args:
        params: as for :func:`planar_flow`.
        z0: ``[..., D]``, as for :func:`planar_flow`.
        h: the nonlinearity, a name in ``NONLINEARITIES``.

    Returns:
        ``(z [K + 1, ..., D], log_det [K + 1, ...])``. Entry 0 is ``z0`` with ``log_det = 0``, and the last entry is
        what :func:`planar_flow` returns: ``log_det[k]`` is that of the first k layers together, in nats.

    Raises:
        ValueError: if shapes or dtypes do not fit, or ``h`` is unknown.
    """
    params, z0 = _as_arrays(params, z0, "z0")
    check_nonlinearity(h)
    return _trajectory(params, z0, h=h)


# --- Other parametrisations


def planar_from_constrained(
    u_hat: Float[Array, "*batch K D"], w: Float[Array, "*batch K D"], b: Float[Array, "*batch K"]
) -> Planar:
    """Makes the parameters whose layers are ``f(z) = z + u_hat h(w.z + b)``, for any ``u_hat`` with ``w.u_hat > -1``.

    This carries over layers that another library has trained: each has a constraint of its own, and ``u_hat`` is what
    it ends at. The inverse of the constraint here is in closed form, and accurate near ``w.u_hat = 0``.

    Args:
        u_hat: ``[..., K, D]``, or ``[D]`` for one layer without an axis of layers.
        w: of the same shape.
        b: ``[..., K]``, or ``[]``.

    Returns:
        ``Planar(u [..., K, D], w [..., K, D], b [..., K])``; one layer becomes K = 1.

    Raises:
        ValueError: if shapes or dtypes do not fit, or (outside of ``jax.jit``) a layer has ``w.u_hat <= -1`` and has no
            inverse. Inside ``jax.jit`` its ``u`` is not finite.
    """
    u_hat, w, b = (jnp.asarray(leaf) for leaf in (u_hat, w, b))
    if u_hat.ndim == 1 and w.ndim == 1 and b.ndim == 0:
        u_hat, w, b = u_hat[None], w[None], b[None]
    _check_layers("u_hat", u_hat, w, b)
    product = jnp.sum(u_hat * w, -1)
    if not isinstance(product, jax.core.Tracer) and not bool(jnp.all(product > -1)):
        raise ValueError(
            f"w.u_hat must be greater than -1 in every layer, or it has no inverse; got {float(jnp.min(product)):.9g}"
        )
    return Planar(unconstrain(u_hat, w), w, b)


def planar_to_constrained(
    params: Planar,
) -> tuple[Float[Array, "*batch K D"], Float[Array, "*batch K D"], Float[Array, "*batch K"]]:
    """Returns ``(u_hat [..., K, D], w [..., K, D], b [..., K])`` of the layers ``f(z) = z + u_hat h(w.z + b)``.

    Raises:
        ValueError: if the shapes or dtypes of ``params`` do not fit.
    """
    u, w, b = map(jnp.asarray, params)
    _check_layers("u", u, w, b)
    return constrain(u, w).u_hat, w, b


# --- Checks and the choice of a method


def _check_layers(name: str, u: jax.Array, w: jax.Array, b: jax.Array) -> None:
    """Checks arrays of layers without events; ``name`` is that of ``u`` in errors."""
    if u.ndim < 2 or w.shape != u.shape or b.shape != u.shape[:-1]:
        shapes = f"{name} {u.shape}, w {w.shape}, b {b.shape}"
        raise ValueError(f"layers must be {name} [..., K, D], w [..., K, D], b [..., K]; got {shapes}")
    dtypes = {leaf.dtype for leaf in (u, w, b)}
    if len(dtypes) > 1 or not jnp.issubdtype(u.dtype, jnp.floating) or u.dtype.itemsize < 4:
        names = ", ".join(str(leaf.dtype) for leaf in (u, w, b))
        raise ValueError(f"{name}, w and b must be of one floating dtype, float32 or float64; got {names}")


def _as_arrays(params: Planar, z: jax.Array, argument: str) -> tuple[Planar, jax.Array]:
    """Makes arrays of both and checks their shapes and dtypes; ``argument`` is the name of ``z`` in errors."""
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


def _default_method(params: Planar, z0: jax.Array, on_gpu: bool) -> str:
    """The rule that :func:`planar_flow` documents.

    A scanned layer costs O(D) an event and reads its parameters once. A step of the Gram form costs O(K) an event, and
    its products are products of matrices only if events share them; for a flow of one event it needs K x K numbers
    more, but fewer kernels. Parameters without leading axes may serve one event of a ``jax.vmap``.
    """
    flow_length, dim = params.u.shape[-2:]
    longest = 16 * dim if _serves_many(params, z0) else 4 * dim if on_gpu else 0
    return "gram" if dim > NARROW and 0 < flow_length <= longest else "scan"


def _serves_many(params: Planar, z0: jax.Array) -> bool:
    """Whether a flow serves, or may serve, more than one event."""
    flows, events = params.b.shape[:-1], z0.shape[:-1]
    axes = itertools.zip_longest(reversed(flows), reversed(events), fillvalue=1)
    return not flows or any(flow == 1 and event != 1 for flow, event in axes)


# --- What is compiled


@functools.partial(jax.jit, static_argnames=("h", "method", "on_gpu"))
def _forward(params: Planar, z0: jax.Array, *, h: str, method: str, on_gpu: bool) -> tuple[jax.Array, jax.Array]:
    nonlinearity = NONLINEARITIES[h]
    flow_length, dim = params.u.shape[-2:]
    layers_a_step = _UNROLL if on_gpu and dim <= NARROW else 1
    if method == "scan" and layers_a_step == 1 and flow_length and not _serves_many(params, z0):
        return amortized_scan(nonlinearity, *widened((params, z0)))
    if method == "gram" and flow_length:
        flow = functools.partial(gram_layers, nonlinearity)
    else:
        flow = functools.partial(layer_scan, nonlinearity, layers_a_step=layers_a_step)
    layers, z0, axes = _aligned(params, z0)
    return _vmapped(flow, axes)(layers, z0)


@functools.partial(jax.jit, static_argnames="h")
def _backward(params: Planar, zK: jax.Array, *, h: str) -> tuple[jax.Array, jax.Array]:
    layers, zK, axes = _aligned(params, zK)
    return _vmapped(functools.partial(inverse_scan, NONLINEARITIES[h]), axes)(layers, zK)


@functools.partial(jax.jit, static_argnames="h")
def _trajectory(params: Planar, z0: jax.Array, *, h: str) -> tuple[jax.Array, jax.Array]:
    layers, z0, axes = _aligned(params, z0)
    return _vmapped(functools.partial(trajectory_scan, NONLINEARITIES[h]), axes, leading=1)(layers, z0)


def _aligned(params: Planar, z: jax.Array) -> tuple[Layers, jax.Array, list[int]]:
    """Broadcasts ``z`` and names its axes along which the flows differ.

    Returns:
        ``(layers, z, axes)``. Each entry along the axes ``axes`` of ``z`` has a flow to itself; in the same order these
        are the leading axes of ``layers``. The events along the other axes share their flow.
    """
    params, z = widened((params, z))
    layers = Layers(*params, constrain(params.u, params.w))
    flows = params.b.shape[:-1]
    lead = jnp.broadcast_shapes(flows, z.shape[:-1])
    z = jnp.broadcast_to(z, (*lead, z.shape[-1]))
    shared = tuple(i for i, size in enumerate(flows) if size == 1)
    layers = jax.tree.map(lambda leaf: jnp.squeeze(leaf, shared), layers)
    return layers, z, [len(lead) - len(flows) + i for i in range(len(flows)) if i not in shared]


_Flow = Callable[[Layers, jax.Array], tuple[jax.Array, jax.Array]]


def _vmapped(flow: _Flow, axes: list[int], *, leading: int = 0) -> _Flow:
    """``flow``, a map of one flow's layers ``[K, ...]`` and its events, for layers and events of :func:`_aligned`.

    ``leading`` is the number of axes that the results of ``flow`` have in front of those of the events.
    """
    for position, axis in reversed(list(enumerate(axes))):
        flow = jax.vmap(flow, in_axes=(0, axis - position), out_axes=leading + axis - position)
    return flow
