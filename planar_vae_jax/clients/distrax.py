"""Planar flows in Distrax: a bijector."""

import jax
import jax.numpy as jnp

from planar_vae_jax.flows import Planar, check_nonlinearity
from planar_vae_jax.flows.planar import inverse_planar_flow, planar_flow

try:
    import distrax
except ImportError as error:
    raise ImportError(f"{__name__} needs Distrax: pip install 'planar_vae_jax[distrax]' ({error})") from error


class PlanarBijector(distrax.Bijector):
    """K planar layers as a Distrax bijector of vectors ``[..., D]``, exact in both directions.

    The leading axes of ``params`` are a batch of flows, broadcast against those of the events from the right. It is a
    pytree, as all of Distrax's bijectors are.

    Args:
        params: ``Planar(u [..., K, D], w [..., K, D], b [..., K])``.
        h: the nonlinearity, a name in ``NONLINEARITIES``.

    Raises:
        ValueError: if ``h`` is unknown; when it is called, if shapes or dtypes do not fit.
    """

    def __init__(self, params: Planar, h: str = "tanh"):
        super().__init__(event_ndims_in=1)
        check_nonlinearity(h)
        self.params, self.h = Planar(*map(jnp.asarray, params)), h

    def forward_and_log_det(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns ``(y [..., D], log|det dy/dx| [...])``."""
        return planar_flow(self.params, x, h=self.h)

    def inverse_and_log_det(self, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns ``(x [..., D], log|det dx/dy| [...])``."""
        return inverse_planar_flow(self.params, y, h=self.h)
