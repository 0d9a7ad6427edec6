"""Planar flows in FlowJAX: a bijection, and layers trained there carried over to here."""

from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from planar_vae_jax.flows import Planar, check_nonlinearity
from planar_vae_jax.flows.planar import inverse_planar_flow, planar_flow, planar_from_constrained

try:
    import equinox as eqx
    import flowjax.bijections as fb
    import paramax
except ImportError as error:
    raise ImportError(f"{__name__} needs FlowJAX: pip install 'planar_vae_jax[flowjax]' ({error})") from error


class PlanarBijection(fb.AbstractBijection):
    """K planar layers as a FlowJAX bijection of one event ``[D]``, exact in both directions.

    As in FlowJAX, ``jax.vmap`` and ``Transformed`` batch it, and ``Invert(PlanarBijection(params))`` makes ``log_prob``
    of a ``Transformed`` the faster direction. All arrays in it are trained; there are no conditioning variables.

    Args:
        params: ``Planar(u [K, D], w [K, D], b [K])``.
        h: the nonlinearity, a name in ``NONLINEARITIES``.

    Raises:
        ValueError: if ``params`` has other shapes or ``h`` is unknown.
    """

    params: Planar
    h: str = eqx.field(static=True)
    cond_shape: ClassVar[None] = None

    def __init__(self, params: Planar, h: str = "tanh"):
        check_nonlinearity(h)
        self.params, self.h = Planar(*map(jnp.asarray, params)), h
        u, w, b = (leaf.shape for leaf in self.params)
        if len(u) != 2 or w != u or b != u[:1]:
            raise ValueError(f"params must be Planar(u [K, D], w [K, D], b [K]); got u {u}, w {w}, b {b}")

    @property
    def shape(self) -> tuple[int, ...]:
        """``(D,)``."""
        return self.params.u.shape[-1:]

    def transform_and_log_det(self, x, condition=None):
        """Sends ``x [D]`` forwards: ``(y [D], log|det dy/dx| [])``."""
        return planar_flow(self.params, x, h=self.h)

    def inverse_and_log_det(self, y, condition=None):
        """Sends ``y [D]`` backwards: ``(x [D], log|det dx/dy| [])``."""
        return inverse_planar_flow(self.params, y, h=self.h)


def from_flowjax(bijection: fb.AbstractBijection) -> tuple[Planar, jax.Array]:
    """Carries over the layers of a FlowJAX planar flow, such as ``planar_flow(...).bijection``.

    FlowJAX permutes the variables after each layer. These permutations are folded into ``u`` and ``w``; one is left
    over, and stands on the side of the base distribution:

    - for ``Invert(...)``, FlowJAX's default: ``bijection.inverse(x) == planar_flow(params, x)[0][permutation]``;
    - otherwise: ``bijection.transform(z) == planar_flow(params, z[permutation])[0]``.

    So with a standard normal base, which no permutation changes, the flow's density is
    ``PlanarDensity(params, inverted=True)`` in the first case and ``PlanarDensity(params)`` in the second.

    Args:
        bijection: made of ``Planar`` (tanh, without conditioning), ``Permute``, ``Flip``, ``Identity``, ``Chain``,
            ``Scan`` and ``Invert``.

    Returns:
        ``(Planar(u [K, D], w [K, D], b [K]), permutation [D])``, in the dtype of the bijection.

    Raises:
        ValueError: if it holds anything else, leaky ReLU or conditional layers, layers in both directions, no layer, or
            a layer that has no inverse.
    """
    parts = list(_parts(paramax.unwrap(bijection), inverted=False))
    layers = [part for part in parts if isinstance(part, _Layer)]
    if not layers:
        raise ValueError("bijection must hold Planar layers; it has none")
    inverted = layers[0].inverted
    if any(layer.inverted != inverted for layer in layers):
        raise ValueError("bijection must have all Planar layers in one direction; it has some in each")
    if inverted:
        parts = [part if isinstance(part, _Layer) else jnp.argsort(part) for part in reversed(parts)]

    # y = z[order], where y are the variables as FlowJAX has them after some parts, and z the same without permuting.
    order = jnp.arange(layers[0].w.size)
    folded = []
    for part in parts:
        if isinstance(part, _Layer):
            back = jnp.argsort(order)
            folded.append((part.u_hat[back], part.w[back], part.b))
        else:
            order = order[part]
    u_hat, w, b = map(jnp.stack, zip(*folded, strict=True))
    if not inverted:  # f(z)[order] is g(z[order]), with the entries of g's vectors in that order
        u_hat, w = u_hat[:, order], w[:, order]
    return planar_from_constrained(u_hat, w, b), order


class _Layer(NamedTuple):
    """One layer ``y = x + u_hat tanh(w.x + b)`` of FlowJAX, or its inverse."""

    u_hat: jax.Array  # [D]
    w: jax.Array  # [D]
    b: jax.Array  # []
    inverted: bool


def _parts(bijection: fb.AbstractBijection, *, inverted: bool) -> Iterator[_Layer | jax.Array]:
    """The layers and permutations ``p [D]``, ``y = x[p]``, of a bijection or of its inverse, first applied first."""
    match bijection:
        case fb.Invert():
            yield from _parts(bijection.bijection, inverted=not inverted)
        case fb.Chain():
            for part in bijection.bijections[:: -1 if inverted else 1]:
                yield from _parts(part, inverted=inverted)
        case fb.Scan():
            arrays, static = eqx.partition(bijection.bijection, eqx.is_array)
            steps = range(len(jax.tree.leaves(arrays)[0]))
            for k in reversed(steps) if inverted else steps:
                step = eqx.combine(jax.tree.map(lambda leaf, k=k: leaf[k], arrays), static)
                yield from _parts(step, inverted=inverted)
        case fb.Permute() if len(bijection.shape) == 1:
            yield (bijection.inverse_permutation if inverted else bijection.permutation)[0]
        case fb.Flip() if len(bijection.shape) == 1:
            yield jnp.arange(bijection.shape[0])[::-1]
        case fb.Identity():
            pass
        case fb.Planar():
            yield _layer(bijection, inverted)
        case _:
            raise ValueError(
                "bijection must be made of Planar, Permute, Flip, Identity, Chain, Scan and Invert; "
                f"got {type(bijection).__name__}"
            )


def _layer(planar: fb.Planar, inverted: bool) -> _Layer:
    if planar.negative_slope is not None:
        raise ValueError(
            "bijection must have tanh layers; got leaky ReLU "
            f"(negative_slope={planar.negative_slope}), whose slope jumps at 0 and whose values are unbounded: "
            "the layers here are smooth, with a slope in (0, 1] that is 1 at 0 and |h| < 1"
        )
    if planar.cond_shape is not None:
        raise ValueError(f"bijection must be unconditional; got a Planar with cond_shape {planar.cond_shape}")
    layer = planar.get_planar()
    return _Layer(layer.get_act_scale(), layer.weight, layer.bias, inverted)
