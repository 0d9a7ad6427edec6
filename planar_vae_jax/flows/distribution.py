"""Log-densities of batches of events, in nats, and the densities that planar layers make of a normal variable."""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from planar_vae_jax.flows._arrays import add, computed_in
from planar_vae_jax.flows.nonlinearities import check_nonlinearity
from planar_vae_jax.flows.planar import Planar, init_planar, inverse_planar_flow, planar_flow

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_LOG_2PI = math.log(2.0 * math.pi)


def standard_normal_log_prob(z: Float[Array, "*lead D"]) -> Float[Array, "*lead"]:
    """``log N(z; 0, I)``, in nats."""
    return -0.5 * (jnp.sum(jnp.square(z), -1) + z.shape[-1] * _LOG_2PI)


def bernoulli_log_prob(
    x: Float[Array, "*#all"], logits: Float[Array, "*#all"], axes: int | tuple[int, ...] = -1
) -> Float[Array, "*lead"]:
    """``log p(x)`` of independent Bernoulli variables in nats, summed over the axes of an event.

    Computed as ``x l - softplus(l)`` from logits ``l``, never from probabilities, which saturate. For ``x`` strictly
    between 0 and 1 (grey levels) this is a cross-entropy and not a log-likelihood.

    Args:
        x: 0 or 1; broadcast against ``logits``.
        logits: ``log p(1) - log p(0)``.
        axes: the axes of an event: -1 for vectors, (-2, -1) for images.
    """
    x, logits = jnp.broadcast_arrays(x, logits)
    return jnp.sum(x * logits - jax.nn.softplus(logits), axes)


class _Density:
    """What :class:`PlanarFlow` and :class:`PlanarDensity` share: layers, an affine map ``x -> shift + C x``, and draws.

    ``C`` has ``exp(log_scale)`` on its diagonal, and the entries of ``lower`` below it. A subclass is a frozen
    dataclass, and names its fields for the shift and the logarithms of the scales in ``_AFFINE``.
    """

    _AFFINE: ClassVar[tuple[str, str]]
    _STATIC: ClassVar[tuple[str, ...]] = ("h",)

    params: Planar
    lower: Any
    h: str

    def __post_init__(self) -> None:
        check_nonlinearity(self.h)
        params = Planar(*map(jnp.asarray, self.params))
        object.__setattr__(self, "params", params)
        for name in self._AFFINE:
            object.__setattr__(self, name, _affine_array(name, getattr(self, name), params.u))
        if self.lower is not None:
            object.__setattr__(self, "lower", _affine_array("lower", self.lower, params.u, axes=2))
        try:
            self.batch_shape  # noqa: B018
        except ValueError:
            *names, last = ["params", *self._AFFINE] + ["lower"] * (self.lower is not None)
            raise ValueError(
                f"the leading axes of {', '.join(names)} and {last} must broadcast; got {self._leading}"
            ) from None

    @property
    def dim(self) -> int:
        """D."""
        return self.params.u.shape[-1]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The broadcast leading axes of ``params`` and of the affine map."""
        return jnp.broadcast_shapes(*self._leading)

    @property
    def _affine(self) -> tuple[jax.Array, jax.Array]:
        shift, log_scale = (getattr(self, name) for name in self._AFFINE)
        return shift, log_scale

    @property
    def _leading(self) -> tuple[tuple[int, ...], ...]:
        leading = (self.params.b.shape[:-1], *(array.shape[:-1] for array in self._affine))
        return leading if self.lower is None else (*leading, self.lower.shape[:-2])

    def _events(self, name: str, x: jax.Array) -> jax.Array:
        """Checks ``x [..., D]``, noise or data, and returns it in the dtype in which it is computed."""
        dtype, computed = self.params.u.dtype, self._affine[0].dtype
        if x.shape[-1:] != (self.dim,):
            raise ValueError(f"{name} must be of shape [..., {self.dim}], as params has; got {x.shape}")
        if x.dtype not in (dtype, computed):
            raise ValueError(f"{name} and params must be of one floating dtype; got {x.dtype} and {dtype}")
        return x.astype(computed)

    def _broadcast(self, x: jax.Array) -> jax.Array:
        """``x [..., D]`` with the leading axes of the batch."""
        return jnp.broadcast_to(x, (*jnp.broadcast_shapes(x.shape[:-1], self.batch_shape), self.dim))

    def _scaled(self, x: jax.Array) -> jax.Array:
        """``shift + C x``, for ``x [..., D]`` that has the leading axes of the batch."""
        shift, log_scale = (jnp.broadcast_to(array, x.shape) for array in self._affine)
        y = shift + jnp.exp(log_scale) * x
        if self.lower is not None:
            lower = jnp.tril(self.lower, -1)
            y = y + jnp.einsum("...ij,...j->...i", lower, x, precision=jax.lax.Precision.HIGHEST)
        return y

    def _standardised(self, y: jax.Array) -> jax.Array:
        """The inverse of :meth:`_scaled`, for any leading axes that broadcast."""
        y, shift, log_scale = jnp.broadcast_arrays(y, *self._affine)
        if self.lower is None:
            return (y - shift) * jnp.exp(-log_scale)
        batch, dim = jnp.broadcast_shapes(y.shape[:-1], self.lower.shape[:-2]), y.shape[-1]
        difference, log_scale = (jnp.broadcast_to(array, (*batch, dim)) for array in (y - shift, log_scale))
        diagonal = jnp.broadcast_to(jnp.eye(dim, dtype=y.dtype), (*batch, dim, dim)) * jnp.exp(log_scale)[..., None]
        factor = diagonal + jnp.tril(jnp.broadcast_to(self.lower, diagonal.shape), -1)
        return jax.scipy.linalg.solve_triangular(factor, difference[..., None], lower=True)[..., 0]

    @property
    def _log_volume(self) -> jax.Array:
        """``log|det C|``: ``[...]``, with the leading axes of the log-scales."""
        return jnp.sum(self._affine[1], -1)

    def transform(self, noise: jax.Array) -> tuple[jax.Array, ...]:
        raise NotImplementedError

    def sample(self, key: jax.Array, shape: int | tuple[int, ...] = ()) -> Float[Array, "*lead D"]:
        """Draws ``[*shape, *batch_shape, D]``; a number n stands for the shape ``(n,)``."""
        return self.transform(self._noise(key, shape))[0]

    def _noise(self, key: jax.Array, shape: int | tuple[int, ...]) -> jax.Array:
        shape = shape if isinstance(shape, tuple | list) else (operator.index(shape),)
        return jax.random.normal(key, (*shape, *self.batch_shape, self.dim), self._affine[0].dtype)

    def tree_flatten_with_keys(self) -> tuple[Any, tuple[Any, ...]]:
        """The arrays with their names, and the static fields."""
        names = ("params", *self._AFFINE, "lower")
        arrays = tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names)
        return arrays, tuple(getattr(self, name) for name in self._STATIC)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], leaves: Any) -> Self:
        """Makes the object without checks, as JAX puts other things than arrays into pytrees."""
        density = object.__new__(cls)
        names = ("params", *cls._AFFINE, "lower", *cls._STATIC)
        for name, leaf in zip(names, (*leaves, *static), strict=True):
            object.__setattr__(density, name, leaf)
        return density


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class PlanarFlow(_Density):
    """The density ``q`` of ``zK`` when ``z0 ~ N(mean, diag(exp(2 log_std)))`` passes through K planar layers.

    With ``lower``, ``z0 ~ N(mean, C C^T)``, where ``C`` has ``exp(log_std)`` on its diagonal and ``lower`` below it.
    This is the posterior of a VAE: the affine map comes before the layers. :class:`PlanarDensity` has it after them.

    It is a pytree, so that ``jax.jit``, ``jax.grad`` and ``jax.vmap`` take it. The leading axes of ``params``,
    ``mean``, ``log_std`` and ``lower`` broadcast to :attr:`batch_shape`, the shape of a batch of densities.

    Args:
        params: ``Planar(u [..., K, D], w [..., K, D], b [..., K])``.
        mean: ``[..., D]``; a number is repeated D times, in the dtype of ``params``.
        log_std: ``[..., D]`` or a number, the logarithms of the standard deviations.
        h: the nonlinearity, a name in ``NONLINEARITIES``.
        lower: None, or ``[..., D, D]``; only its entries below the diagonal are used.

    Raises:
        ValueError: if ``mean``, ``log_std`` or ``lower`` has another D or another floating dtype than ``params``, if
            leading axes do not broadcast, or if ``h`` is unknown.
    """

    _AFFINE = ("mean", "log_std")

    params: Planar
    mean: Float[Array, "*base D"] = 0.0  # type: ignore[assignment]
    log_std: Float[Array, "*scale D"] = 0.0  # type: ignore[assignment]
    h: str = "tanh"
    lower: Float[Array, "*factor D D"] | None = None

    @property
    def base_kl(self) -> Float[Array, "*lead D"]:
        """``KL(q_0 || N(0, I))`` of the normal before the layers, dimension by dimension, in nats, in closed form.

        ``(mean^2 + var - 1 - log var) / 2``. With ``lower``, the term of dimension i is the expected KL of the
        conditional ``q_0(z_i | z_1 .. z_{i-1})``: the sum is the whole KL again, but each term depends on the order of
        the dimensions. The leading axes are those of ``mean``, ``log_std`` and ``lower``.
        """
        mean, log_std = jnp.broadcast_arrays(self.mean, self.log_std)
        kl = 0.5 * (jnp.square(mean) + jnp.expm1(2.0 * log_std)) - log_std
        if self.lower is None:
            return kl
        return add(kl, 0.5 * jnp.sum(jnp.square(jnp.tril(self.lower, -1)), -1))

    def transform(
        self, noise: Float[Array, "*events D"]
    ) -> tuple[Float[Array, "*lead D"], Float[Array, "*lead"], Float[Array, "*lead"]]:
        """Sends ``z0 = mean + exp(log_std) noise + lower noise`` through the layers.

        Args:
            noise: ``[..., D]``, draws from N(0, I), broadcast against :attr:`batch_shape`.

        Returns:
            ``(zK [..., D], log q_0(z0) [...], log_det [...])``, so that ``log q(zK) = log q_0(z0) - log_det``.

        Raises:
            ValueError: if ``noise`` has another D or dtype than ``params``, or leading axes do not broadcast.
        """
        noise = self._broadcast(self._events("noise", noise))
        zK, log_det = planar_flow(self.params, self._scaled(noise), h=self.h)
        return zK, add(standard_normal_log_prob(noise), -self._log_volume), log_det

    def sample_and_log_prob(
        self, key: jax.Array, shape: int | tuple[int, ...] = ()
    ) -> tuple[Float[Array, "*lead D"], Float[Array, "*lead"]]:
        """Draws ``[*shape, *batch_shape, D]`` and their log-densities in nats, without an inverse."""
        zK, log_q0, log_det = self.transform(self._noise(key, shape))
        return zK, log_q0 - log_det

    def log_prob(self, x: Float[Array, "*events D"]) -> Float[Array, "*lead"]:
        """``log q(x)`` in nats, by the inverse; the leading axes of ``x`` are broadcast against :attr:`batch_shape`."""
        z0, log_det = inverse_planar_flow(self.params, x, h=self.h)
        log_q0 = add(standard_normal_log_prob(self._standardised(z0)), -self._log_volume)
        return add(log_q0, log_det)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class PlanarDensity(_Density):
    """A density on data: K planar layers between standard normal noise and an affine map on the side of the data.

    ``x = loc + C f(eps)`` with ``eps ~ N(0, I)``, where ``f`` is the layers, or their inverse if ``inverted``, and
    ``C`` has ``exp(log_scale)`` on its diagonal and ``lower`` below it. The two directions:

    - ``inverted=False``, the sampling direction: noise passes forwards through the layers. Draws with their log-density
      need no inverse, as a variational posterior wants it.
    - ``inverted=True``, the density direction: data passes forwards through the layers to the noise. ``log_prob`` needs
      no inverse, so fitting to data by maximum likelihood is several times faster.

    Both directions offer everything; the slower one solves for the exact inverse
    (:func:`~planar_vae_jax.flows.planar.inverse_planar_flow`). It is a pytree, and the leading axes of its arrays are
    batches of densities, as those of :class:`PlanarFlow`, which has the affine map on the side of the noise.

    Args:
        params: ``Planar(u [..., K, D], w [..., K, D], b [..., K])``.
        loc: ``[..., D]``; a number is repeated D times, in the dtype of ``params``.
        log_scale: ``[..., D]`` or a number, the logarithms of the scales.
        lower: None, or ``[..., D, D]``; only its entries below the diagonal are used.
        h: the nonlinearity, a name in ``NONLINEARITIES``.
        inverted: the direction, see above.

    Raises:
        ValueError: if ``loc``, ``log_scale`` or ``lower`` has another D or another floating dtype than ``params``, if
            leading axes do not broadcast, or if ``h`` is unknown.
    """

    _AFFINE = ("loc", "log_scale")
    _STATIC = ("h", "inverted")

    params: Planar
    loc: Float[Array, "*base D"] = 0.0  # type: ignore[assignment]
    log_scale: Float[Array, "*scale D"] = 0.0  # type: ignore[assignment]
    lower: Float[Array, "*factor D D"] | None = None
    h: str = "tanh"
    inverted: bool = False

    @classmethod
    def init(
        cls,
        key: jax.Array,
        flow_length: int,
        dim: int,
        *,
        loc: Any = 0.0,
        scale: Any = 1.0,
        h: str = "tanh",
        inverted: bool = False,
        dtype: jax.typing.DTypeLike | None = None,
    ) -> PlanarDensity:
        """Draws a density near ``N(loc, diag(scale^2))``, whose layers are near the identity.

        Args:
            key: a PRNG key.
            flow_length: K >= 0, the number of layers.
            dim: D >= 1, the size of an event.
            loc: ``[D]`` or a number, such as the mean of the data.
            scale: ``[D]`` or a number, positive, such as the standard deviations of the data.
            h, inverted: as for the class.
            dtype: a floating dtype; JAX's default if None.

        Raises:
            ValueError: if ``scale`` is not positive (outside of ``jax.jit``), or as the class and
                :func:`~planar_vae_jax.flows.planar.init_planar`.
        """
        params = init_planar(key, flow_length, dim, dtype=dtype)
        loc, scale = (jnp.asarray(value).astype(params.u.dtype) for value in (loc, scale))
        if not isinstance(scale, jax.core.Tracer) and not bool(np.all(np.asarray(scale) > 0)):
            raise ValueError(f"scale must be positive; got {scale}")
        return cls(params, loc, jnp.log(scale), h=h, inverted=inverted)

    def transform(self, eps: Float[Array, "*events D"]) -> tuple[Float[Array, "*lead D"], Float[Array, "*lead"]]:
        """Sends noise to data.

        Args:
            eps: ``[..., D]``, draws from N(0, I), broadcast against :attr:`batch_shape`.

        Returns:
            ``(x [..., D], log_det [...])`` with ``log_det = log|det dx/deps|`` in nats, so that
            ``log p(x) = log N(eps; 0, I) - log_det``.

        Raises:
            ValueError: if ``eps`` has another D or dtype than ``params``, or leading axes do not broadcast.
        """
        layers = inverse_planar_flow if self.inverted else planar_flow
        z, log_det = layers(self.params, self._broadcast(self._events("eps", eps)), h=self.h)
        return self._scaled(z), add(log_det, self._log_volume)

    def inverse(self, x: Float[Array, "*events D"]) -> tuple[Float[Array, "*lead D"], Float[Array, "*lead"]]:
        """Sends data to noise.

        Args:
            x: ``[..., D]``, any points, broadcast against :attr:`batch_shape`.

        Returns:
            ``(eps [..., D], log_det [...])`` with ``log_det = log|det deps/dx|`` in nats, so that
            ``log p(x) = log N(eps; 0, I) + log_det``.

        Raises:
            ValueError: if ``x`` has another D or dtype than ``params``, or leading axes do not broadcast.
        """
        layers = planar_flow if self.inverted else inverse_planar_flow
        eps, log_det = layers(self.params, self._standardised(self._events("x", x)), h=self.h)
        return eps, add(log_det, -self._log_volume)

    def sample_and_log_prob(
        self, key: jax.Array, shape: int | tuple[int, ...] = ()
    ) -> tuple[Float[Array, "*lead D"], Float[Array, "*lead"]]:
        """Draws ``[*shape, *batch_shape, D]`` and their log-densities in nats."""
        eps = self._noise(key, shape)
        x, log_det = self.transform(eps)
        return x, standard_normal_log_prob(eps) - log_det

    def log_prob(self, x: Float[Array, "*events D"]) -> Float[Array, "*lead"]:
        """``log p(x)`` in nats; the leading axes of ``x`` are broadcast against :attr:`batch_shape`."""
        eps, log_det = self.inverse(x)
        return standard_normal_log_prob(eps) + log_det


def _affine_array(name: str, value: Any, u: jax.Array, axes: int = 1) -> jax.Array:
    """Makes an array of a shift, log-scales or ``lower`` (``axes=2``) and checks it against ``u [..., K, D]``."""
    dtype = computed_in(u.dtype)
    given = getattr(value, "dtype", None)
    array = jnp.asarray(value)
    if given is None or not jnp.issubdtype(given, jnp.floating):
        array = array.astype(dtype)
    if array.dtype not in (u.dtype, dtype):
        raise ValueError(f"{name} and params must be of one floating dtype; got {array.dtype} and {u.dtype}")
    dim = u.shape[-1]
    if axes == 1 and not array.ndim:  # a vector, so that stacked densities, or those made by jax.vmap, are a batch
        array = jnp.broadcast_to(array, (dim,))
    if axes == 1 and array.shape[-1] != dim:
        raise ValueError(f"{name} must be of shape [] or [..., {dim}], as params has; got {array.shape}")
    if axes == 2 and array.shape[-2:] != (dim, dim):
        raise ValueError(f"{name} must be of shape [..., {dim}, {dim}], as params has; got {array.shape}")
    return array.astype(dtype)


_AnyDensity = TypeVar("_AnyDensity", bound=_Density)


def first_layers(flow: _AnyDensity, k: jax.Array | int) -> _AnyDensity:
    """The density that noise has after the first k layers that it passes.

    In the density direction (``PlanarDensity(..., inverted=True)``) noise passes the last layer first. The other layers
    become the identity, so that shapes do not depend on ``k``: it may be traced.
    """
    u = flow.params.u
    place = jnp.arange(u.shape[-2])
    if getattr(flow, "inverted", False):
        place = place[::-1]
    kept = jnp.expand_dims(place < k, (*range(u.ndim - 2), -1))
    params = flow.params._replace(u=jnp.where(kept, u, 0.0))
    return dataclasses.replace(flow, params=params)  # type: ignore[type-var]  # subclasses are dataclasses


def shown_layers(flow_length: int, most: int = 5) -> list[int]:
    """Numbers of layers after which a flow is drawn: 0, K and up to ``most - 2`` evenly spaced ones between."""
    return np.unique(np.linspace(0, flow_length, most).round().astype(int)).tolist()
