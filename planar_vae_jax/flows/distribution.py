"""Log-densities of batches of events, in nats, and the density of a normal variable sent through planar layers."""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from planar_vae_jax.flows._arrays import add, computed_in
from planar_vae_jax.flows.nonlinearities import check_nonlinearity
from planar_vae_jax.flows.planar import Planar, inverse_planar_flow, planar_flow

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_LOG_2PI = math.log(2.0 * math.pi)


def standard_normal_log_prob(z: Float[Array, "*lead D"]) -> Float[Array, "*lead"]:
    """``log N(z; 0, I)``, in nats."""
    return -0.5 * (jnp.sum(jnp.square(z), -1) + z.shape[-1] * _LOG_2PI)


def _normal_log_prob(z: jax.Array, mean: jax.Array, log_std: jax.Array) -> jax.Array:
    """``log N(z; mean, diag(exp(2 log_std)))``: ``[...]`` for three arrays that broadcast to ``[..., D]``."""
    z, mean, log_std = jnp.broadcast_arrays(z, mean, log_std)
    return standard_normal_log_prob((z - mean) * jnp.exp(-log_std)) - jnp.sum(log_std, -1)


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


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class PlanarFlow:
    """The density ``q`` of ``zK`` when ``z0 ~ N(mean, diag(exp(2 log_std)))`` passes through K planar layers.

    With ``lower``, ``z0 ~ N(mean, C C^T)``, where ``C`` has ``exp(log_std)`` on its diagonal and ``lower`` below it.

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

    params: Planar
    mean: Float[Array, "*base D"] = 0.0  # type: ignore[assignment]
    log_std: Float[Array, "*scale D"] = 0.0  # type: ignore[assignment]
    h: str = "tanh"
    lower: Float[Array, "*factor D D"] | None = None

    def __post_init__(self) -> None:
        check_nonlinearity(self.h)
        params = Planar(*map(jnp.asarray, self.params))
        object.__setattr__(self, "params", params)
        for name in ("mean", "log_std"):
            object.__setattr__(self, name, _of_the_base(name, getattr(self, name), params.u))
        if self.lower is not None:
            object.__setattr__(self, "lower", _of_the_base("lower", self.lower, params.u, axes=2))
        try:
            self.batch_shape  # noqa: B018
        except ValueError:
            names = "params, mean and log_std" if self.lower is None else "params, mean, log_std and lower"
            raise ValueError(f"the leading axes of {names} must broadcast; got {self._leading}") from None

    @property
    def dim(self) -> int:
        """D."""
        return self.params.u.shape[-1]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The broadcast leading axes of ``params``, ``mean``, ``log_std`` and ``lower``."""
        return jnp.broadcast_shapes(*self._leading)

    @property
    def _leading(self) -> tuple[tuple[int, ...], ...]:
        leading = (self.params.b.shape[:-1], self.mean.shape[:-1], self.log_std.shape[:-1])
        return leading if self.lower is None else (*leading, self.lower.shape[:-2])

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
            ValueError: if the last axis of ``noise`` is not of size D, or leading axes do not broadcast.
        """
        if noise.shape[-1:] != (self.dim,):
            raise ValueError(f"noise must be of shape [..., {self.dim}], as params has; got {noise.shape}")
        if noise.dtype == self.params.u.dtype:
            noise = noise.astype(self.mean.dtype)  # half precision is computed in float32
        lead = jnp.broadcast_shapes(noise.shape[:-1], self.batch_shape)
        mean, log_std, noise = (jnp.broadcast_to(x, (*lead, self.dim)) for x in (self.mean, self.log_std, noise))
        z0 = mean + jnp.exp(log_std) * noise
        if self.lower is not None:
            lower = jnp.tril(self.lower, -1)
            z0 = z0 + jnp.einsum("...ij,...j->...i", lower, noise, precision=jax.lax.Precision.HIGHEST)
        zK, log_det = planar_flow(self.params, z0, h=self.h)
        return zK, standard_normal_log_prob(noise) - jnp.sum(log_std, -1), log_det

    def sample(self, key: jax.Array, shape: int | tuple[int, ...] = ()) -> Float[Array, "*lead D"]:
        """Draws ``[*shape, *batch_shape, D]``; a number n stands for the shape ``(n,)``."""
        return self.transform(self._noise(key, shape))[0]

    def sample_and_log_prob(
        self, key: jax.Array, shape: int | tuple[int, ...] = ()
    ) -> tuple[Float[Array, "*lead D"], Float[Array, "*lead"]]:
        """Draws ``[*shape, *batch_shape, D]`` and their log-densities in nats, without an inverse."""
        zK, log_q0, log_det = self.transform(self._noise(key, shape))
        return zK, log_q0 - log_det

    def log_prob(self, x: Float[Array, "*events D"]) -> Float[Array, "*lead"]:
        """``log q(x)`` in nats, by the inverse; the leading axes of ``x`` are broadcast against :attr:`batch_shape`."""
        z0, log_det = inverse_planar_flow(self.params, x, h=self.h)
        if self.lower is None:
            return add(_normal_log_prob(z0, self.mean, self.log_std), log_det)
        return add(_cholesky_log_prob(z0, self.mean, self.log_std, self.lower), log_det)

    def _noise(self, key: jax.Array, shape: int | tuple[int, ...]) -> jax.Array:
        shape = shape if isinstance(shape, tuple | list) else (operator.index(shape),)
        return jax.random.normal(key, (*shape, *self.batch_shape, self.dim), self.mean.dtype)

    def tree_flatten_with_keys(self) -> tuple[Any, str]:
        """The arrays with their names, and ``h``, which is static."""
        names = ("params", "mean", "log_std", "lower")
        return tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names), self.h

    @classmethod
    def tree_unflatten(cls, h: str, leaves: Any) -> PlanarFlow:
        """Makes the object without checks, as JAX puts other things than arrays into pytrees."""
        flow = object.__new__(cls)
        for name, leaf in zip(("params", "mean", "log_std", "lower", "h"), (*leaves, h), strict=True):
            object.__setattr__(flow, name, leaf)
        return flow


def _cholesky_log_prob(z: jax.Array, mean: jax.Array, log_std: jax.Array, lower: jax.Array) -> jax.Array:
    """``log N(z; mean, C C^T)``, with the ``C`` of :class:`PlanarFlow`."""
    z, mean, log_std = jnp.broadcast_arrays(z, mean, log_std)
    batch, dim = jnp.broadcast_shapes(z.shape[:-1], lower.shape[:-2]), z.shape[-1]
    difference, log_std = (jnp.broadcast_to(array, (*batch, dim)) for array in (z - mean, log_std))
    diagonal = jnp.broadcast_to(jnp.eye(dim, dtype=z.dtype), (*batch, dim, dim)) * jnp.exp(log_std)[..., None]
    factor = diagonal + jnp.tril(jnp.broadcast_to(lower, diagonal.shape), -1)
    noise = jax.scipy.linalg.solve_triangular(factor, difference[..., None], lower=True)[..., 0]
    return standard_normal_log_prob(noise) - jnp.sum(log_std, -1)


def _of_the_base(name: str, value: Any, u: jax.Array, axes: int = 1) -> jax.Array:
    """Makes an array of ``mean``, ``log_std`` or ``lower`` (``axes=2``) and checks it against ``u [..., K, D]``."""
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


def first_layers(flow: PlanarFlow, k: jax.Array | int) -> PlanarFlow:
    """The density after the first k layers.

    The other layers become the identity, so that shapes do not depend on ``k``: it may be traced.
    """
    u = flow.params.u
    kept = jnp.expand_dims(jnp.arange(u.shape[-2]) < k, (*range(u.ndim - 2), -1))
    return dataclasses.replace(flow, params=flow.params._replace(u=jnp.where(kept, u, 0.0)))


def shown_layers(flow_length: int, most: int = 5) -> list[int]:
    """Numbers of layers after which a flow is drawn: 0, K and up to ``most - 2`` evenly spaced ones between."""
    return np.unique(np.linspace(0, flow_length, most).round().astype(int)).tolist()
