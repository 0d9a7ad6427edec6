"""Log-densities of batches ``[..., D] -> [...]``, in nats, and the density that a planar flow makes of a normal."""

import dataclasses
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from planar_vae_jax.flows.nonlinearities import check_nonlinearity
from planar_vae_jax.flows.planar import Planar, computed_in, inverse_planar_flow, planar_flow

_LOG_2PI = math.log(2.0 * math.pi)


def standard_normal_log_prob(z: jax.Array) -> jax.Array:
    """``log N(z; 0, I)``: ``[...]`` for ``z [..., D]``."""
    return -0.5 * (jnp.sum(jnp.square(z), -1) + z.shape[-1] * _LOG_2PI)


def normal_log_prob(z: jax.Array, mean: jax.Array, log_std: jax.Array) -> jax.Array:
    """``log N(z; mean, diag(exp(2 log_std)))``: ``[...]`` for three of ``[..., D]`` that are broadcast."""
    z, mean, log_std = jnp.broadcast_arrays(z, mean, log_std)
    return standard_normal_log_prob((z - mean) * jnp.exp(-log_std)) - jnp.sum(log_std, -1)


def bernoulli_log_prob(x: jax.Array, logits: jax.Array, axes: int | tuple[int, ...] = -1) -> jax.Array:
    """``log p(x)`` of independent Bernoulli variables, summed over the event's ``axes``: (-2, -1) for images.

    ``x l - softplus(l)`` with logits ``l``: never through probabilities, which saturate. For ``x`` strictly between 0
    and 1 (grey levels) this is a cross-entropy, not a log-likelihood. ``x`` and ``logits`` are broadcast.
    """
    x, logits = jnp.broadcast_arrays(x, logits)
    return jnp.sum(x * logits - jax.nn.softplus(logits), axes)


def normal_mixture_log_prob(z: jax.Array, means: jax.Array, std: float) -> jax.Array:
    """Log-density of an equal mixture of isotropic normals: ``[...]`` for ``z [..., D]``, ``means [C, D]``."""
    components, dim = means.shape
    means = jnp.expand_dims(means, range(1, z.ndim))
    log_probs = standard_normal_log_prob((z[None] - means) / std)  # [C, ...]
    return jax.nn.logsumexp(log_probs, 0) - math.log(components) - dim * math.log(std)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class PlanarFlow:
    """The density of ``zK`` when ``z0 ~ N(mean, diag(exp(2 log_std)))`` passes through K planar layers.

    With ``lower``, ``z0 ~ N(mean, C C^T)``, where ``C`` has ``exp(log_std)`` on its diagonal and ``lower`` beneath.

    A pytree, to be passed through ``jax.jit``, ``jax.grad`` and ``jax.vmap`` like its arrays. Leading axes of
    ``params``, ``mean``, ``log_std`` and ``lower`` are a batch of densities; their broadcast shape is appended to that
    of samples.

    Args:
        params: ``Planar(u [..., K, D], w [..., K, D], b [..., K])``.
        mean: ``[]``, ``[D]`` or ``[..., D]``; a number stands for ``[D]`` of them, of the dtype of ``params``.
        log_std: likewise, the logarithm of the standard deviations.
        h: the nonlinearity, one of ``NONLINEARITIES``.
        lower: None, or ``[..., D, D]``, of which the entries below the diagonal count: the rest of a Cholesky factor.

    Raises:
        ValueError: for a ``mean``, ``log_std`` or ``lower`` of another D or another floating dtype than ``params``, or
            whose leading axes do not broadcast; for an unknown ``h``.
    """

    params: Planar
    mean: jax.Array = 0.0  # type: ignore[assignment]
    log_std: jax.Array = 0.0  # type: ignore[assignment]
    h: str = "tanh"
    lower: jax.Array | None = None

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
    def base_kl(self) -> jax.Array:
        """``KL(q_0 || N(0, I))`` dimension by dimension, ``[..., D]``, in closed form; the layers are left out.

        ``(mean^2 + var - 1 - log var) / 2``. With ``lower`` the term of dimension i is that of ``q_0(z_i|z_1 ..
        z_{i-1})``, averaged, so that the sum is the whole KL again, though a term depends on the order.
        """
        mean, log_std = jnp.broadcast_arrays(self.mean, self.log_std)
        kl = 0.5 * (jnp.square(mean) + jnp.expm1(2.0 * log_std)) - log_std
        if self.lower is None:
            return kl
        return jnp.add(*jnp.broadcast_arrays(kl, 0.5 * jnp.sum(jnp.square(jnp.tril(self.lower, -1)), -1)))

    def transform(self, noise: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """``(zK [..., D], log q_0(z0) [...], log_det [...])`` of ``z0 = mean + exp(log_std) noise + lower noise``.

        Args:
            noise: ``[..., D]``, draws from N(0, I).
        """
        if noise.dtype == self.params.u.dtype:
            noise = noise.astype(self.mean.dtype)  # half precision is computed in float32
        mean, log_std, noise = jnp.broadcast_arrays(self.mean, self.log_std, noise)
        z0 = mean + jnp.exp(log_std) * noise
        if self.lower is not None:
            lower = jnp.tril(self.lower, -1)
            product = jnp.einsum("...ij,...j->...i", lower, noise, precision=jax.lax.Precision.HIGHEST)
            z0 = jnp.add(*jnp.broadcast_arrays(z0, product))
        zK, log_det = planar_flow(self.params, z0, h=self.h)
        return zK, standard_normal_log_prob(noise) - jnp.sum(log_std, -1), log_det

    def sample(self, key: jax.Array, shape: int | tuple[int, ...] = ()) -> jax.Array:
        """Draws ``[*shape, *batch_shape, D]``; a number n is the shape ``(n,)``."""
        return self.transform(self._noise(key, shape))[0]

    def sample_and_log_prob(self, key: jax.Array, shape: int | tuple[int, ...] = ()) -> tuple[jax.Array, jax.Array]:
        """Draws ``[*shape, *batch_shape, D]``, and their log-densities without an inverse."""
        zK, log_q0, log_det = self.transform(self._noise(key, shape))
        return zK, log_q0 - log_det

    def log_prob(self, x: jax.Array) -> jax.Array:
        """``log q(x)``: ``[...]`` for points ``x [..., D]``, by the inverse."""
        z0, log_det = inverse_planar_flow(self.params, x, h=self.h)
        if self.lower is None:
            return normal_log_prob(z0, self.mean, self.log_std) + log_det
        return jnp.add(*jnp.broadcast_arrays(_cholesky_log_prob(z0, self.mean, self.log_std, self.lower), log_det))

    def _noise(self, key: jax.Array, shape: int | tuple[int, ...]) -> jax.Array:
        shape = shape if isinstance(shape, tuple | list) else (operator.index(shape),)
        return jax.random.normal(key, (*shape, *self.batch_shape, self.dim), self.mean.dtype)

    def tree_flatten_with_keys(self) -> tuple[Any, str]:
        """Arrays, and what is static."""
        names = ("params", "mean", "log_std", "lower")
        return tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names), self.h

    @classmethod
    def tree_unflatten(cls, h: str, leaves: Any) -> "PlanarFlow":
        """Without checks: JAX puts other things than arrays into pytrees."""
        flow = object.__new__(cls)
        for name, leaf in zip(("params", "mean", "log_std", "lower", "h"), (*leaves, h), strict=True):
            object.__setattr__(flow, name, leaf)
        return flow


def _cholesky_log_prob(z: jax.Array, mean: jax.Array, log_std: jax.Array, lower: jax.Array) -> jax.Array:
    """``log N(z; mean, C C^T)``, with ``C`` as :class:`PlanarFlow` has it."""
    z, mean, log_std = jnp.broadcast_arrays(z, mean, log_std)
    batch, dim = jnp.broadcast_shapes(z.shape[:-1], lower.shape[:-2]), z.shape[-1]
    difference, log_std = (jnp.broadcast_to(array, (*batch, dim)) for array in (z - mean, log_std))
    diagonal = jnp.broadcast_to(jnp.eye(dim, dtype=z.dtype), (*batch, dim, dim)) * jnp.exp(log_std)[..., None]
    factor = diagonal + jnp.tril(jnp.broadcast_to(lower, diagonal.shape), -1)
    noise = jax.scipy.linalg.solve_triangular(factor, difference[..., None], lower=True)[..., 0]
    return standard_normal_log_prob(noise) - jnp.sum(log_std, -1)


def _of_the_base(name: str, value: Any, u: jax.Array, axes: int = 1) -> jax.Array:
    """``mean``, ``log_std`` or (``axes=2``) ``lower`` as an array, checked against ``u [..., K, D]``."""
    dtype = computed_in(u.dtype)
    given = getattr(value, "dtype", None)
    array = jnp.asarray(value)
    if given is None or not jnp.issubdtype(given, jnp.floating):
        array = array.astype(dtype)
    if array.dtype not in (u.dtype, dtype):
        raise ValueError(f"{name} and params must be of one floating dtype; got {array.dtype} and {u.dtype}")
    dim = u.shape[-1]
    if axes == 1 and not array.ndim:  # so that densities that are stacked, or made by jax.vmap, are a batch of them
        array = jnp.broadcast_to(array, (dim,))
    if axes == 1 and array.shape[-1] != dim:
        raise ValueError(f"{name} must be of shape [] or [..., {dim}], as params has; got {array.shape}")
    if axes == 2 and array.shape[-2:] != (dim, dim):
        raise ValueError(f"{name} must be of shape [..., {dim}, {dim}], as params has; got {array.shape}")
    return array.astype(dtype)


def first_layers(flow: PlanarFlow, k: jax.Array | int) -> PlanarFlow:
    """The density after the first k layers: the others become the identity, so that ``k`` may be traced."""
    kept = (jnp.arange(flow.params.u.shape[-2]) < k)[:, None]
    return dataclasses.replace(flow, params=flow.params._replace(u=jnp.where(kept, flow.params.u, 0.0)))


def shown_layers(flow_length: int, most: int = 5) -> list[int]:
    """0, K and up to ``most - 2`` numbers of layers between."""
    return np.unique(np.linspace(0, flow_length, most).round().astype(int)).tolist()
