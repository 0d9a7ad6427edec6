"""The variational autoencoder, on batches of images; the only file that knows Flax.

A :class:`VAE` is an architecture: a few numbers, hashable, so that it can be a static argument of ``jax.jit``. Its
parameters are a pytree of their own (nested dicts of arrays), and :meth:`VAE.bind` puts the two together into what
the objectives ask for: ``encode(images) -> q(z|x)`` and ``decode(z) -> logits``.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from planar_vae_jax.distributions import PlanarFlow
from planar_vae_jax.planar import Planar, init_planar
from planar_vae_jax.precision import PRECISIONS, compute_in_bfloat16

# log_std = LOG_STD_RANGE tanh(raw / LOG_STD_RANGE): the identity near 0, and by construction never so
# far out that exp(log_std) or exp(-log_std) overflows or a variance becomes 0.
LOG_STD_RANGE = 10.0


class Encoder(nnx.Module):
    """Two linear layers with a ReLU between: images ``[..., H, W]`` to ``q(z|x)``."""

    def __init__(self, vae: "VAE", *, rngs: nnx.Rngs):
        self.vae = vae
        self.hidden = nnx.Linear(math.prod(vae.image_shape), vae.hidden, param_dtype=vae.dtype, rngs=rngs)
        self.mean = nnx.Linear(vae.hidden, vae.latent, param_dtype=vae.dtype, rngs=rngs)
        self.log_std = nnx.Linear(vae.hidden, vae.latent, param_dtype=vae.dtype, rngs=rngs)
        layers = init_planar(rngs.flow(), vae.flow_length, vae.latent, dtype=vae.dtype)
        if vae.amortized:
            self.flow = _amortized_head(vae, layers, rngs)
        else:
            self.u, self.w, self.b = map(nnx.Param, layers)

    def __call__(self, images: jax.Array) -> PlanarFlow:
        pixels = images.reshape(*images.shape[:-2], math.prod(self.vae.image_shape))
        features = nnx.relu(self.hidden(pixels))
        log_std = LOG_STD_RANGE * jnp.tanh(self.log_std(features) / LOG_STD_RANGE)
        return PlanarFlow(self._layers(features), self.mean(features), log_std, h=self.vae.h)

    def _layers(self, features: jax.Array) -> Planar:
        if not self.vae.amortized:
            return Planar(self.u[...], self.w[...], self.b[...])
        shape = (self.vae.flow_length, self.vae.latent)
        size = math.prod(shape)
        u, w, b = jnp.split(self.flow(features), [size, 2 * size], axis=-1)
        batch = features.shape[:-1]
        return Planar(u.reshape(*batch, *shape), w.reshape(*batch, *shape), b)


def _amortized_head(vae: "VAE", layers: Planar, rngs: nnx.Rngs) -> nnx.Linear:
    """``features -> (u, w, b)`` in one vector: near ``layers``, the biases, for all images; small weights move them."""
    shared = jnp.concatenate([leaf.ravel() for leaf in layers])
    return nnx.Linear(
        vae.hidden,
        shared.size,
        kernel_init=nnx.initializers.normal(0.01 / vae.hidden**0.5),
        bias_init=lambda key, shape, dtype: shared.astype(dtype),
        param_dtype=vae.dtype,
        rngs=rngs,
    )


class Decoder(nnx.Module):
    """Two linear layers with a ReLU between: ``z [..., L]`` to Bernoulli logits ``[..., H, W]``."""

    def __init__(self, vae: "VAE", *, rngs: nnx.Rngs):
        self.vae = vae
        self.hidden = nnx.Linear(vae.latent, vae.hidden, param_dtype=vae.dtype, rngs=rngs)
        self.logits = nnx.Linear(vae.hidden, math.prod(vae.image_shape), param_dtype=vae.dtype, rngs=rngs)

    def __call__(self, z: jax.Array) -> jax.Array:
        logits = self.logits(nnx.relu(self.hidden(z)))
        return logits.reshape(*z.shape[:-1], *self.vae.image_shape)


class Networks(nnx.Module):
    """Encoder and decoder with their parameters: a model for :mod:`planar_vae_jax.objectives`."""

    def __init__(self, vae: "VAE", *, rngs: nnx.Rngs):
        self.decode = Decoder(vae, rngs=rngs)
        self.encode = Encoder(vae, rngs=rngs)
        if vae.precision == "bfloat16":
            compute_in_bfloat16(self)


@dataclasses.dataclass(frozen=True)
class VAE:
    """The architecture of a VAE whose encoder's sample goes through K planar layers (Xu et al. 2023, figure 1).

    K = 0 is the ordinary VAE: with the same key, encoder and decoder start from the same parameters for every K.

    Args:
        image_shape: ``(H, W)``.
        latent: L, the size of ``z``.
        hidden: width of the hidden layer of encoder and decoder.
        flow_length: K >= 0.
        amortized: whether the encoder gives each image its own flow; otherwise all images share one (the paper).
        h: the flow's nonlinearity, one of ``NONLINEARITIES``.
        dtype: of all parameters and therefore of all that is computed from float32 or float64 images.
        precision: one of ``PRECISIONS``, in which encoder and decoder are computed (:mod:`planar_vae_jax.precision`).

    Raises:
        ValueError: for a size that is no whole number in its range, or an amortised flow without layers.
    """

    image_shape: tuple[int, int]
    _: dataclasses.KW_ONLY
    latent: int = 40
    hidden: int = 400
    flow_length: int = 5
    amortized: bool = False
    h: str = "tanh"
    dtype: str = "float32"
    precision: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_shape", tuple(self.image_shape))
        if len(self.image_shape) != 2 or min(self.image_shape) < 1:
            raise ValueError(f"image_shape must be (H, W), both at least 1; got {self.image_shape}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {self.precision!r}")
        for name, least in (("latent", 1), ("hidden", 1), ("flow_length", int(self.amortized))):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                amortized = " with amortized=True" if name == "flow_length" and self.amortized else ""
                raise ValueError(f"{name} must be a whole number of at least {least}{amortized}; got {value!r}")

    def init(self, key: jax.Array) -> Any:
        """Parameters drawn by ``key``: nested dicts of arrays."""
        return _init(self, key)

    def bind(self, params: Any) -> Networks:
        """The model with these parameters: ``encode(images [..., H, W]) -> PlanarFlow``, ``decode(z [..., L])``."""
        graphdef, state = _structure(self)
        nnx.replace_by_pure_dict(state := jax.tree.map(lambda leaf: leaf, state), params)
        return nnx.merge(graphdef, state)


@functools.partial(jax.jit, static_argnums=0)
def _init(vae: VAE, key: jax.Array) -> Any:
    return nnx.to_pure_dict(nnx.state(Networks(vae, rngs=_rngs(key)), nnx.Param))


def _rngs(key: jax.Array) -> nnx.Rngs:
    """Encoder and decoder draw from one stream and the flow from another, so that K does not change the former."""
    params_key, flow_key = jax.random.split(key)
    return nnx.Rngs(params=params_key, flow=flow_key)


@functools.cache
def _structure(vae: VAE) -> tuple[Any, Any]:
    """Flax's description of the modules, and the shapes of their parameters."""
    return nnx.split(nnx.eval_shape(lambda: Networks(vae, rngs=_rngs(jax.random.key(0)))), nnx.Param)
