"""Planar normalizing flows: one layer, K layers composed, and their inverse.

One layer acts on one event ``z [D]`` with parameters ``u [D]``, ``w [D]``, ``b []``
(Rezende & Mohamed 2015, eq. 10 and appendix A.1; Xu et al. 2023, eq. 1 to 5):

    a = w.z + b      f(z) = z + u_hat h(a)      log|det df/dz| = log(1 + h'(a) w.u_hat)

Everything is written for one event and batched by ``jax.vmap``, with shared parameters
(``in_axes=(None, 0)``) or with parameters of each event's own (``in_axes=(0, 0)``).

Two things differ from the usual form, and both are exact rather than approximate:

*Constraint.* ``m = softplus(w.u + c)`` with ``c = log(e - 1)`` and ``w.u_hat = m - 1 > -1``. The shift
``c`` gives ``m(0) = 1``: a layer with ``u = 0`` is exactly the identity, and ``|u_hat|`` stays bounded
as ``w -> 0``. Without it (the papers' form) ``m(0) - 1 = -0.307`` and ``|u_hat| ~ 0.307 / |w|``.

*Log-determinant.* ``1 + h' (m - 1) = (1 - h') + h' m``: two non-negative terms for ``0 <= h' <= 1``, so
there is nothing to cancel, no ``abs`` and no epsilon.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from planar_vae_jax.log_slope import log_slope
from planar_vae_jax.nonlinearities import NONLINEARITIES, Nonlinearity
from planar_vae_jax.recursion import NARROW, PRECISION, Layers, gram_layers

# c in m = softplus(w.u + c); chosen so that m = 1 where w.u = 0.
SHIFT = math.log(math.e - 1.0)


class Planar(NamedTuple):
    """Parameters of K planar layers; layer 0 is applied first."""

    u: jax.Array  # [K, D], unconstrained
    w: jax.Array  # [K, D]
    b: jax.Array  # [K]


def _nonlinearity(h: str) -> Nonlinearity:
    if h not in NONLINEARITIES:
        raise ValueError(
            f"h must be one of {', '.join(NONLINEARITIES)} (strictly increasing with slope in (0, 1]: "
            f"only then does w.u_hat > -1 make every layer invertible); got {h!r}"
        )
    return NONLINEARITIES[h]


def constrain(u: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Constrained ``u_hat`` of one layer, with ``w.u_hat``, ``m = 1 + w.u_hat`` and ``log m``.

    With ``p = w.u``: ``m = softplus(p + c)`` and ``u_hat = u + (m - 1 - p) w / |w|^2``
    (Rezende & Mohamed 2015, appendix A.1, with the shift ``c``).

    Args:
        u: ``[D]``, unconstrained.
        w: ``[D]``.

    Returns:
        ``(u_hat [D], w.u_hat [], m [], log m [])``. ``|u_hat| <= |u| (1 + 1/e)`` near ``w = 0``.

    At ``w = 0`` the correction has no limit (it depends on the direction). There, which is to say where
    ``max |w|`` is at most ``tiny / eps`` of the dtype (1e-31 in float32), ``u_hat = u``, and the
    gradient is the identity in ``u`` and zero in ``w``.
    """
    p = jnp.dot(w, u, precision=PRECISION)
    # m - 1 = log1p((1 - 1/e) expm1(p)) = p + log1p(expm1(-p) / e). Each form is used on the side where
    # its exponential cannot overflow; near p = 0 both keep their relative accuracy and give 0 at 0,
    # which softplus(p + c) - 1 - p does not (and it is divided by |w|).
    positive = p >= 0
    above = jnp.where(positive, p, 0.0)  # `where` first: no branch ever sees the other's inputs
    below = jnp.where(positive, 0.0, p)
    gap = jnp.log1p(jnp.expm1(-above) / math.e)
    w_u_hat_below = jnp.log1p((1.0 - 1.0 / math.e) * jnp.expm1(below))
    w_u_hat = jnp.where(positive, above + gap, w_u_hat_below)
    correction = jnp.where(positive, gap, w_u_hat_below - below)  # m - 1 - p

    scaled = (math.e - 1.0) * jnp.exp(below)  # exp(p + c)
    m = jnp.where(positive, 1.0 + above + gap, jnp.log1p(scaled))
    # log softplus(x) -> x as x -> -inf, long before exp(x) underflows.
    deep = scaled < jnp.finfo(p.dtype).eps
    log_m = jnp.where(deep, below + SHIFT, jnp.log(jnp.where(deep, 1.0, m)))

    # w / |w|^2 through w / max|w|, so that |w|^2 neither under- nor overflows. The result does not
    # depend on the scale, hence no gradient through it. The barrier: of a w that is a compile-time constant, XLA would
    # turn (w / scale)^2 into w^2 / scale^2.
    w = lax.optimization_barrier(w)
    scale = lax.stop_gradient(jnp.max(jnp.abs(w)))
    finfo = jnp.finfo(w.dtype)
    nonzero = scale > finfo.tiny / finfo.eps
    scale = jnp.where(nonzero, scale, 1.0)
    direction = w / scale
    norm2 = jnp.where(nonzero, jnp.sum(jnp.square(direction)), 1.0)
    u_hat = u + jnp.where(nonzero, correction / scale, 0.0) * direction / norm2
    return u_hat, w_u_hat, m, log_m


def _prepare(params: Planar) -> Layers:
    u, w, b = params
    u_hat, w_u_hat, m, log_m = jax.vmap(constrain)(u, w)
    return Layers(u_hat, w, b, w_u_hat, m, log_m)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _log_det(nonlinearity: Nonlinearity, a: jax.Array, layers: Layers) -> jax.Array:
    """``sum_k log(1 + h'(a_k) w_k.u_hat_k)`` for ``a [K]``; a derivative of its own costs half of autodiff's."""
    return jnp.sum(log_slope(nonlinearity, a, layers.w_u_hat, layers.m, layers.log_m).value)


@_log_det.defjvp
def _log_det_jvp(nonlinearity, primals, tangents):
    (a, layers), (a_dot, layers_dot) = primals, tangents
    terms = log_slope(nonlinearity, a, layers.w_u_hat, layers.m, layers.log_m)
    return jnp.sum(terms.value), jnp.sum(terms.by_a * a_dot + terms.by_log_m * layers_dot.log_m)


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
        ValueError: for a flow length below 0, a dimension below 1, or one that is no whole number.
    """
    for name, value, least in (("flow_length", flow_length, 0), ("dim", dim, 1)):
        if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
            raise ValueError(f"{name} must be a whole number >= {least}; got {value!r}")
    key_u, key_w = jax.random.split(key)
    shape = (flow_length, dim)
    dtype = jnp.zeros((), dtype).dtype
    return Planar(
        u=jax.random.normal(key_u, shape, dtype) * (u_scale / math.sqrt(dim)),
        w=jax.random.normal(key_w, shape, dtype) * (w_scale / math.sqrt(dim)),
        b=jnp.zeros((flow_length,), dtype),
    )


def _as_arrays(params: Planar, z: jax.Array, argument: str) -> tuple[Planar, jax.Array]:
    """Both as arrays, checked."""
    # A copy in name: JAX's custom rules refuse numpy arrays under vmap.
    params, z = Planar(*map(jnp.array, params)), jnp.array(z)
    u, w, b = (jnp.shape(leaf) for leaf in params)
    if len(u) != 2 or w != u or b != u[:1]:
        raise ValueError(f"params must be Planar(u [K, D], w [K, D], b [K]); got u {u}, w {w}, b {b}")
    if jnp.shape(z) != u[1:]:
        raise ValueError(
            f"{argument} must be one event of shape {u[1:]}, as params has D = {u[1]}; "
            f"got shape {jnp.shape(z)} (use jax.vmap for a batch)"
        )
    dtypes = [leaf.dtype for leaf in (z, *params)]
    if not jnp.issubdtype(z.dtype, jnp.floating) or len(set(dtypes)) > 1:
        names = ", ".join(map(str, dtypes[1:]))
        raise ValueError(f"{argument} and params must be of one floating dtype; got {z.dtype} and u, w, b of {names}")
    return params, z


def planar_flow(
    params: Planar, z0: jax.Array, *, h: str = "tanh", method: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sends one event through K planar layers (Xu et al. 2023, eq. 1 to 5).

    Args:
        params: ``Planar(u [K, D], w [K, D], b [K])``; K = 0 is the identity.
        z0: ``[D]``, one event. Batches by ``jax.vmap``, over ``z0`` alone or over both arguments.
        h: the nonlinearity, one of ``NONLINEARITIES``.
        method: ``"scan"`` carries ``z`` through ``lax.scan`` over the layers, O(K D) an event, and reverse
            mode keeps K copies of ``z``. ``"gram"`` is the same map from two matrix products and a
            recursion over K scalars (:mod:`planar_vae_jax.recursion`); reverse mode keeps O(K) an event. None
            picks by shape, see :func:`default_method`.

    Returns:
        ``(zK [D], log_det [])``, where ``log_det = log|det dzK/dz0|`` in nats.

    Raises:
        ValueError: for shapes or dtypes that do not fit, or an unknown ``h`` or ``method``.
    """
    params, z0 = _as_arrays(params, z0, "z0")
    nonlinearity = _nonlinearity(h)
    if method is None:
        method = default_method(*params.u.shape)
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}, or None; got {method!r}")
    if params.b.size == 0:
        return z0, jnp.zeros((), z0.dtype)
    return _METHODS[method](nonlinearity, z0, _prepare(params))


def default_method(flow_length: int, dim: int) -> str:
    """``"gram"`` for ``D <= 4`` or ``K <= 16 D``, else ``"scan"``.

    The faster one on CPU for a batch that shares its parameters (BUILD_NOTES.md): a scanned layer costs O(D) an
    event, a Gram step O(K), or O(D) for a D of a few. Where each event has parameters of its own (amortised) the Gram
    form's products are no matrix products over the batch any more, which cannot be seen from here: ask for ``"scan"``.
    """
    return "gram" if dim <= NARROW or flow_length <= 16 * dim else "scan"


def _scan(nonlinearity: Nonlinearity, z0: jax.Array, layers: Layers) -> tuple[jax.Array, jax.Array]:
    """K layers one after the other."""

    def layer(z: jax.Array, one: Layers) -> tuple[jax.Array, jax.Array]:
        a = jnp.dot(one.w, z, precision=PRECISION) + one.b
        return z + nonlinearity.value(a) * one.u_hat, a

    zK, a = lax.scan(layer, z0, layers)
    return zK, _log_det(nonlinearity, a, layers)


_METHODS: dict[str, Callable[[Nonlinearity, jax.Array, Layers], tuple[jax.Array, jax.Array]]] = {
    "scan": _scan,
    "gram": gram_layers,
}


def inverse_planar_flow(params: Planar, zK: jax.Array, *, h: str = "tanh") -> tuple[jax.Array, jax.Array]:
    """Sends one event backwards through K planar layers; the exact inverse of :func:`planar_flow`.

    From the last layer to the first: with ``y = w.z_k + b``, solve ``a + (m - 1) h(a) = y`` for the scalar ``a``
    (monotone; at most 32 Newton iterations, gradients by the implicit function theorem), then
    ``z_{k-1} = z_k - h(a) u_hat``.

    Args:
        params: as for :func:`planar_flow`.
        zK: ``[D]``, any point; every point has exactly one pre-image.
        h: the nonlinearity.

    Returns:
        ``(z0 [D], log_det [])``, where ``log_det = log|det dz0/dzK|``, minus that of the forward map.

    The scalar equations are solved to the last ulp, so the round trip is limited by the map's own conditioning:
    a layer with ``m < 1`` contracts by ``m`` across its hyperplane ``a = 0``, and an error of one ulp in ``zK`` becomes
    ``1 / m`` ulps of ``z0`` there. Gradients grow in the same way; that is the map, not the solver.

    Raises:
        ValueError: for shapes or dtypes that do not fit, or an unknown ``h``.
    """
    params, zK = _as_arrays(params, zK, "zK")
    nonlinearity = _nonlinearity(h)
    layers = _prepare(params)

    def layer(z: jax.Array, one: Layers) -> tuple[jax.Array, jax.Array]:
        y = jnp.dot(one.w, z, precision=PRECISION) + one.b
        a = _solve_preactivation(nonlinearity, y, one.m)
        return z - nonlinearity.value(a) * one.u_hat, a

    z0, a = lax.scan(layer, zK, layers, reverse=True)
    return z0, -_log_det(nonlinearity, a, layers)


# Measured over m in [1e-300, 1e6] and |y| in [1e-300, 1e6]: see tests/test_flows.py, which counts them.
_MAX_ITERATIONS = 32


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _solve_preactivation(nonlinearity: Nonlinearity, y: jax.Array, m: jax.Array) -> jax.Array:
    """Solves ``a + (m - 1) h(a) = y`` for ``a``; ``y [], m [] >= 0``.

    Written ``F(a) = (a - h(a)) + m h(a) - |y|`` for ``a >= 0`` (``h`` is odd): a sum of non-negative terms again,
    each to full relative accuracy, so the root is good to an ulp or two even where ``m`` is tiny.

    ``F`` is increasing; concave for ``m >= 1``, convex for ``m <= 1``. Newton's method from the left end of the
    bracket, or from the right one, therefore approaches the root from one side and never crosses it: it stops when
    rounding ends the progress. Clipping to the bracket is a safeguard.
    """
    a, _ = _newton(nonlinearity, y, m)
    return a


@_solve_preactivation.defjvp
def _solve_preactivation_jvp(nonlinearity, primals, tangents):
    # Implicit function theorem: v da + h(a) dm = dy with v = dF/da = (1 - h') + h' m.
    (y, m), (y_dot, m_dot) = primals, tangents
    a = _solve_preactivation(nonlinearity, y, m)
    slope, complement = nonlinearity.slopes(a)
    v = jnp.maximum(complement + slope * m, jnp.finfo(a.dtype).tiny)
    return a, (y_dot - nonlinearity.value(a) * m_dot) / v


def _newton(nonlinearity: Nonlinearity, y: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The root of :func:`_solve_preactivation` and the number of iterations it took."""
    tiny = jnp.finfo(y.dtype).tiny
    target = jnp.abs(y)
    grows = m >= 1.0
    # a lies between y and y / m (h(a) <= a), and no further from y than (m - 1) sup|h|, sup|h| = 1.
    ratio = target / jnp.maximum(m, tiny)
    low = jnp.where(grows, jnp.maximum(ratio, target - (m - 1.0)), target)
    high = jnp.where(
        grows,
        target,
        jnp.minimum(jnp.minimum(ratio, target + (1.0 - m)), nonlinearity.remainder_inverse(target)),
    )

    def step(state):
        a, _, iteration = state
        slope, complement = nonlinearity.slopes(a)
        residual = nonlinearity.remainder(a) + m * nonlinearity.value(a) - target
        new = a - residual / jnp.maximum(complement + slope * m, tiny)
        new = jnp.clip(new, low, high)
        return new, jnp.where(grows, new > a, new < a), iteration + 1

    def unfinished(state):
        _, progress, iteration = state
        return progress & (iteration < _MAX_ITERATIONS)

    start = jnp.where(grows, low, high)
    a, _, iterations = lax.while_loop(unfinished, step, (start, jnp.isfinite(start), jnp.zeros((), jnp.int32)))
    return jnp.copysign(a, y), iterations
