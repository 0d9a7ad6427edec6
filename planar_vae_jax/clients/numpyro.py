"""Planar flows in NumPyro: a transform, and a guide for variational inference."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from planar_vae_jax.flows import Planar, PlanarDensity, check_nonlinearity
from planar_vae_jax.flows.planar import init_planar, inverse_planar_flow, planar_flow

try:
    import numpyro
    from numpyro import distributions as dist
    from numpyro.distributions import constraints
    from numpyro.distributions.transforms import AffineTransform, IndependentTransform, Transform
    from numpyro.infer.autoguide import AutoContinuous
    from numpyro.infer.initialization import init_to_uniform
except ImportError as error:
    raise ImportError(f"{__name__} needs NumPyro: pip install 'planar_vae_jax[numpyro]' ({error})") from error


class PlanarTransform(Transform):
    """K planar layers as a NumPyro transform of vectors; its ``inv`` is exact.

    The leading axes of ``params`` are a batch of flows: ``TransformedDistribution(base, PlanarTransform(params))`` has
    the batch shape to which they and those of ``base`` broadcast. It is a pytree.

    Args:
        params: ``Planar(u [..., K, D], w [..., K, D], b [..., K])``.
        h: the nonlinearity, a name in ``NONLINEARITIES``.

    Raises:
        ValueError: if ``h`` is unknown; when it is called, if shapes or dtypes do not fit.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, params: Planar, h: str = "tanh"):
        check_nonlinearity(h)
        self.params, self.h = Planar(*map(jnp.asarray, params)), h

    def __call__(self, x: jax.Array) -> jax.Array:
        """Sends ``x [..., D]`` through the layers: ``[..., D]``."""
        return self.call_with_intermediates(x)[0]

    def call_with_intermediates(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns ``(y [..., D], log_det [...])``; NumPyro hands ``log_det`` back, so no pass is made twice."""
        return planar_flow(self.params, x, h=self.h)

    def _inverse(self, y: jax.Array) -> jax.Array:
        return inverse_planar_flow(self.params, y, h=self.h)[0]

    def log_abs_det_jacobian(self, x: jax.Array, y: jax.Array, intermediates: jax.Array | None = None) -> jax.Array:
        """``log|det dy/dx|`` ``[...]`` in nats."""
        return self.call_with_intermediates(x)[1] if intermediates is None else intermediates

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of ``y`` for an ``x`` of this shape."""
        return (*jnp.broadcast_shapes(shape[:-1], self.params.b.shape[:-1]), shape[-1])

    inverse_shape = forward_shape

    def tree_flatten(self) -> Any:
        """The parameters, and ``h``."""
        return (self.params,), (("params",), {"h": self.h})


class AutoPlanar(AutoContinuous):
    """A guide over all latent variables of a model: noise, then K planar layers, then an affine map.

    It is a :class:`~planar_vae_jax.flows.distribution.PlanarDensity` over the model's unconstrained space, with
    ``K (2 D + 1) + 2 D`` parameters for D latent dimensions. It starts near a normal distribution around the initial
    values of the model, as NumPyro's ``AutoDiagonalNormal`` does. ``SVI``, ``Predictive`` and ``NeuTraReparam`` take it
    as they take NumPyro's own flow guides; as with those, ``median`` and ``quantiles`` are not available in closed
    form: take them of ``sample_posterior``.

    Args:
        model: a NumPyro model whose latent variables are continuous.
        flow_length: K >= 0, the number of layers.
        prefix: the beginning of the names of the guide's parameters.
        init_loc_fn: NumPyro's function of a site that gives its initial value.
        init_scale: the standard deviation of the guide at the start, positive.

    Raises:
        ValueError: if ``flow_length`` is not a whole number >= 0 or ``init_scale`` is not positive.
    """

    def __init__(
        self,
        model: Any,
        flow_length: int = 16,
        *,
        prefix: str = "auto",
        init_loc_fn: Any = init_to_uniform,
        init_scale: float = 0.1,
    ):
        if isinstance(flow_length, bool) or not hasattr(flow_length, "__index__") or flow_length < 0:
            raise ValueError(f"flow_length must be a whole number >= 0; got {flow_length!r}")
        if not init_scale > 0:
            raise ValueError(f"init_scale must be positive; got {init_scale!r}")
        self.flow_length, self._init_scale = flow_length, init_scale
        super().__init__(model, prefix=prefix, init_loc_fn=init_loc_fn)

    def density(self, params: dict[str, Any]) -> PlanarDensity:
        """The posterior in the model's unconstrained space: the vector of all latent variables in NumPyro's order.

        Args:
            params: the parameters that ``SVI.get_params`` or ``SVI.run`` returns.
        """
        return PlanarDensity(*(params[name] for name in self._names))

    @property
    def _names(self) -> tuple[str, str, str]:
        return f"{self.prefix}_layers", f"{self.prefix}_loc", f"{self.prefix}_log_scale"

    def _get_posterior(self) -> dist.Distribution:
        dtype = jnp.result_type(float)  # of the noise that NumPyro draws
        layers, loc, log_scale = self._names
        params = numpyro.param(layers, lambda key: init_planar(key, self.flow_length, self.latent_dim, dtype=dtype))
        affine = AffineTransform(
            numpyro.param(loc, self._init_latent.astype(dtype)),
            jnp.exp(numpyro.param(log_scale, jnp.full(self.latent_dim, math.log(self._init_scale), dtype))),
        )
        transforms = [PlanarTransform(params), IndependentTransform(affine, 1)]
        return dist.TransformedDistribution(self.get_base_dist(), transforms)

    def get_base_dist(self) -> dist.Distribution:
        """``N(0, I)`` in D dimensions."""
        return dist.Normal(jnp.zeros(self.latent_dim), 1).to_event(1)
