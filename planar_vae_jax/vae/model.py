"""The variational autoencoder, on batches of images. Flax is known here, in ``convolutions.py`` and ``precision.py``.

A :class:`VAE` is an architecture: a few numbers, hashable, so that it can be a static argument of ``jax.jit``. Its
parameters are a pytree of their own (nested dicts of arrays), and :meth:`VAE.bind` puts the two together into what
the objectives ask for: ``encode(images) -> q(z|x)``, ``decode(z) -> parameters of p(x|z)``, ``likelihood``.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from planar_vae_jax.flows.distribution import PlanarFlow
from planar_vae_jax.flows.nonlinearities import check_nonlinearity
from planar_vae_jax.flows.planar import Planar, init_planar
from planar_vae_jax.vae.conv import GatedDecoder, GatedEncoder, divisible_by_4
from planar_vae_jax.vae.likelihoods import LIKELIHOODS, Likelihood, LocationScale, bounded_log_scale
from planar_vae_jax.vae.precision import PRECISIONS, compute_in_bfloat16

# log_std = LOG_STD_RANGE tanh(raw / LOG_STD_RANGE): the identity near 0, and by construction never so
# far out that exp(log_std) or exp(-log_std) overflows or a variance becomes 0.
LOG_STD_RANGE = 10.0
FIRST_LOG_SCALE = -1.0  # of pixels in 0..1, for likelihoods with a scale

CHOICES: dict[str, tuple[Any, ...]] = {
    "layers": (1, 2),
    "posterior": ("diagonal", "full"),
    "encoder": ("mlp", "conv"),
    "likelihood": tuple(LIKELIHOODS),
    "precision": PRECISIONS,
}


class Encoder(nnx.Module):
    """Images to ``q(z|x)``: one or two linear layers with ReLUs, or gated convolutions; then a linear head a part.

    Heads of what belongs to each image's own flow or covariance start near what all images would share.
    """

    def __init__(self, vae: "VAE", *, rngs: nnx.Rngs):
        self.vae = vae
        if vae.encoder == "conv":
            self.convolutions = GatedEncoder(vae.image_shape, dtype=vae.dtype, rngs=rngs)
        else:
            _add_hidden(self, math.prod(vae.image_shape), rngs)
        self.mean = nnx.Linear(vae.features, vae.latent, param_dtype=vae.dtype, rngs=rngs)
        self.log_std = nnx.Linear(vae.features, vae.latent, param_dtype=vae.dtype, rngs=rngs)
        layers = init_planar(rngs.flow(), vae.flow_length, vae.latent, dtype=vae.dtype)
        if vae.amortized:
            self.flow = _head_near(vae, jnp.concatenate([leaf.ravel() for leaf in layers]), rngs)
        else:
            self.u, self.w, self.b = map(nnx.Param, layers)
        if vae.posterior == "full":
            self.lower = _head_near(vae, jnp.zeros(vae.latent * (vae.latent - 1) // 2), rngs)

    def __call__(self, images: jax.Array) -> PlanarFlow:
        features = self.features(images)
        log_std = LOG_STD_RANGE * jnp.tanh(self.log_std(features) / LOG_STD_RANGE)
        lower = _strictly_lower(self.lower(features), self.vae.latent) if self.vae.posterior == "full" else None
        return PlanarFlow(self._layers(features), self.mean(features), log_std, h=self.vae.h, lower=lower)

    def features(self, images: jax.Array) -> jax.Array:
        """What the heads are given, ``[..., F]``."""
        leading = images.shape[: images.ndim - len(self.vae.image_shape)]
        if self.vae.encoder == "conv":
            return self.convolutions(images.reshape(*leading, *self.vae.image_shape[:2], self.vae.channels))
        return _hidden(self, images.reshape(*leading, math.prod(self.vae.image_shape)))

    def _layers(self, features: jax.Array) -> Planar:
        if not self.vae.amortized:
            return Planar(self.u[...], self.w[...], self.b[...])
        shape = (self.vae.flow_length, self.vae.latent)
        size = math.prod(shape)
        u, w, b = jnp.split(self.flow(features), [size, 2 * size], axis=-1)
        batch = features.shape[:-1]
        return Planar(u.reshape(*batch, *shape), w.reshape(*batch, *shape), b)


def _head_near(vae: "VAE", start: jax.Array, rngs: nnx.Rngs) -> nnx.Linear:
    """``features -> [..., start.size]``: near ``start``, the biases, for all images; small weights move them."""
    return nnx.Linear(
        vae.features,
        start.size,
        kernel_init=nnx.initializers.normal(0.01 / vae.features**0.5),
        bias_init=lambda key, shape, dtype: start.astype(dtype),
        param_dtype=vae.dtype,
        rngs=rngs,
    )


def _strictly_lower(entries: jax.Array, size: int) -> jax.Array:
    """``[..., size (size - 1) / 2]`` as the entries below the diagonal of matrices ``[..., size, size]``.

    The entries and then all of them backwards, in rows of ``size - 1``, have each once in their lower triangle: so it
    needs no gather, and its derivative no scatter.
    """
    side, leading = size - 1, entries.shape[:-1]
    square = jnp.concatenate([entries[..., side:], entries[..., ::-1]], -1).reshape(*leading, side, side)
    return jnp.pad(jnp.tril(square), (*[(0, 0)] * len(leading), (1, 0), (0, 1)))


def _add_hidden(module: Any, size: int, rngs: nnx.Rngs) -> None:
    """The hidden layers of an MLP whose input is ``[..., size]``."""
    vae = module.vae
    module.hidden = nnx.Linear(size, vae.hidden, param_dtype=vae.dtype, rngs=rngs)
    if vae.layers == 2:
        module.hidden2 = nnx.Linear(vae.hidden, vae.hidden, param_dtype=vae.dtype, rngs=rngs)


def _hidden(module: Any, x: jax.Array) -> jax.Array:
    """What they make of it."""
    x = nnx.relu(module.hidden(x))
    return nnx.relu(module.hidden2(x)) if module.vae.layers == 2 else x


class Decoder(nnx.Module):
    """``z [..., L]`` to the parameters of ``p(x|z)``, in the shape of images; the encoder's mirror image."""

    def __init__(self, vae: "VAE", *, rngs: nnx.Rngs):
        self.vae = vae
        if vae.encoder == "conv":  # the last layer is a convolution 1x1
            self.convolutions = GatedDecoder(vae.latent, vae.image_shape, dtype=vae.dtype, rngs=rngs)
            inputs, outputs = self.convolutions.channels, vae.channels
        else:
            _add_hidden(self, vae.latent, rngs)
            inputs, outputs = vae.hidden, math.prod(vae.image_shape)
        last = nnx.Linear(inputs, outputs, param_dtype=vae.dtype, rngs=rngs)
        if vae.likelihood == "bernoulli":
            self.logits = last
        else:
            self.location = last
            self.log_scale = nnx.Param(jnp.full(vae.image_shape, FIRST_LOG_SCALE, vae.dtype))

    def __call__(self, z: jax.Array) -> jax.Array | LocationScale:
        hidden = self.convolutions(z) if self.vae.encoder == "conv" else _hidden(self, z)
        shape = (*z.shape[:-1], *self.vae.image_shape)
        if self.vae.likelihood == "bernoulli":
            return self.logits(hidden).reshape(shape)
        log_scale = bounded_log_scale(self.log_scale[...], LIKELIHOODS[self.vae.likelihood])
        return LocationScale(self.location(hidden).reshape(shape), log_scale)


class Networks(nnx.Module):
    """Encoder and decoder with their parameters: a model for :mod:`planar_vae_jax.vae.objectives`."""

    def __init__(self, vae: "VAE", *, rngs: nnx.Rngs):
        self.decode = Decoder(vae, rngs=rngs)
        self.encode = Encoder(vae, rngs=rngs)
        if vae.precision == "bfloat16":
            compute_in_bfloat16(self)

    @property
    def likelihood(self) -> Likelihood:
        """The family of ``p(x|z)``."""
        return LIKELIHOODS[self.decode.vae.likelihood]


@dataclasses.dataclass(frozen=True)
class VAE:
    """The architecture of a VAE whose encoder's sample goes through K planar layers (Xu et al. 2023, figure 1).

    K = 0 is the ordinary VAE: with the same key, encoder and decoder start from the same parameters for every K.

    Args:
        image_shape: ``(H, W)``, or ``(H, W, C)`` as of colours.
        latent: L, the size of ``z``.
        hidden: width of the hidden layers of encoder and decoder; of no use with ``encoder="conv"``.
        layers: hidden layers of encoder and decoder each, 1 or 2; of no use with ``encoder="conv"``.
        flow_length: K >= 0.
        amortized: whether the encoder gives each image its own flow; otherwise all images share one (the paper).
        h: the flow's nonlinearity, one of ``NONLINEARITIES``.
        posterior: ``"diagonal"`` or ``"full"``, the covariance of q_0, by a Cholesky factor from the encoder.
        encoder: ``"mlp"``, or ``"conv"``: the gated convolutions of van den Berg et al. (2018), and their decoder.
        likelihood: one of ``LIKELIHOODS``.
        dtype: of all parameters and therefore of all that is computed from float32 or float64 images.
        precision: one of ``PRECISIONS``, in which encoder and decoder are computed (``precision``).

    Raises:
        ValueError: for a size that is no whole number in its range, a name that is none, an amortised flow without
            layers, or images that the convolutions cannot halve twice.
    """

    image_shape: tuple[int, ...]
    _: dataclasses.KW_ONLY
    latent: int = 40
    hidden: int = 400
    flow_length: int = 5
    amortized: bool = False
    h: str = "tanh"
    dtype: str = "float32"
    layers: int = 1
    posterior: str = "diagonal"
    encoder: str = "mlp"
    likelihood: str = "bernoulli"
    precision: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_shape", tuple(self.image_shape))
        if len(self.image_shape) not in (2, 3) or min(self.image_shape) < 1:
            raise ValueError(f"image_shape must be (H, W) or (H, W, C), all at least 1; got {self.image_shape}")
        for name, least in (("latent", 1), ("hidden", 1), ("flow_length", int(self.amortized))):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                amortized = " with amortized=True" if name == "flow_length" and self.amortized else ""
                raise ValueError(f"{name} must be a whole number of at least {least}{amortized}; got {value!r}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {getattr(self, name)!r}")
        check_nonlinearity(self.h)
        if self.encoder == "conv" and not divisible_by_4(self.image_shape):
            raise ValueError(
                f"image_shape must have H and W divisible by 4 with encoder='conv'; got {self.image_shape}"
            )

    @property
    def features(self) -> int:
        """What the encoder's heads are given: its width before them."""
        return GatedEncoder.features if self.encoder == "conv" else self.hidden

    @property
    def channels(self) -> int:
        """C; 1 of images ``[H, W]``."""
        return self.image_shape[2] if len(self.image_shape) == 3 else 1

    def init(self, key: jax.Array) -> Any:
        """Parameters drawn by ``key``: nested dicts of arrays."""
        return _init(self, key)

    def bind(self, params: Any) -> Networks:
        """The model with these parameters: ``encode(images) -> PlanarFlow``, ``decode(z [..., L])``, ``likelihood``."""
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
