"""The variational autoencoder, made of any encoder, posterior, decoder and likelihood.

A :class:`VAE` is a Flax module and itself the pytree that ``jax.grad``, ``jax.lax.scan``, ``jax.vmap`` over seeds,
optax and checkpoints take. Its parameters are its leaves; there is no second object.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from planar_vae_jax.flows.distribution import PlanarFlow
from planar_vae_jax.flows.nonlinearities import check_nonlinearity
from planar_vae_jax.flows.planar import Planar, init_planar
from planar_vae_jax.vae._shapes import checked_image_shape, whole_number
from planar_vae_jax.vae.conv import GatedDecoder, GatedEncoder
from planar_vae_jax.vae.likelihoods import LIKELIHOODS, Likelihood
from planar_vae_jax.vae.mlp import MLPDecoder, MLPEncoder
from planar_vae_jax.vae.precision import Linear

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# log_std = LOG_STD_RANGE tanh(raw / LOG_STD_RANGE): the identity near 0, and never so large or small that exp(log_std)
# or exp(-log_std) overflows or a variance becomes 0.
LOG_STD_RANGE = 10.0
COVARIANCES = ("diagonal", "full")


@runtime_checkable
class Encoder(Protocol):
    """Images to features."""

    features: int

    def __call__(self, images: jax.Array) -> Any:
        """Features, for instance ``[..., features]``, of images ``[..., H, W]`` or ``[..., H, W, C]``."""


@runtime_checkable
class Posterior(Protocol):
    """``q(z|x)`` of a batch of images, as a map from standard normal noise. :class:`PlanarFlow` is one.

    It is a pytree of floating-point arrays (``jax.tree_util.register_dataclass``), as it leaves compiled functions.
    """

    @property
    def mean(self) -> jax.Array:
        """``[..., L]``, the mean of ``z_0``, before the flow."""

    def transform(self, noise: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """``(z_K [..., L], log q_0(z_0|x) [...], log|det dz_K/dz_0| [...])`` of ``noise [..., L]`` from N(0, I)."""


@runtime_checkable
class Decoder(Protocol):
    """``z`` to the parameters of ``p(x|z)``."""

    def __call__(self, z: jax.Array) -> Any:
        """The parameters of the likelihood: a pytree of arrays ``[..., H, W]`` (or ``[..., H, W, C]``)."""


class PlanarPosterior(nnx.Module):
    """Features ``[..., F]`` to ``q(z|x)``: a normal distribution, then K planar layers (Rezende & Mohamed 2015).

    Heads that give each image its own layers or its own covariance start near one value for all images.

    Args:
        features: F, the ``features`` of the encoder.
        latent: L, the size of ``z``.
        flow_length: K; 0 is a normal posterior.
        amortized: each image has its own layers, from a linear head; otherwise all images share them.
        covariance: of the normal distribution: ``"diagonal"``, or ``"full"`` by a Cholesky factor.
        h: the nonlinearity, one of ``NONLINEARITIES``.
        dtype: of the parameters.
        precision: of the heads, one of ``PRECISIONS``; the flow is always computed in float32 or float64.
        rngs: draws the parameters. The layers come last, and from the stream ``flow`` where ``rngs`` has one, so that
            the heads of ``mean`` and ``log_std`` are the same for every ``flow_length``.

    Raises:
        ValueError: for a size that is not a whole number in its range, an unknown name, or an amortised flow of no
            layers.
    """

    def __init__(
        self,
        features: int,
        latent: int,
        flow_length: int,
        *,
        amortized: bool = False,
        covariance: str = "diagonal",
        h: str = "tanh",
        dtype: Any = "float32",
        precision: str = "float32",
        rngs: nnx.Rngs,
    ):
        when = " with amortized=True" if amortized else ""
        self.latent = whole_number("latent", latent, 1)
        self.flow_length = whole_number("flow_length", flow_length, int(amortized), when)
        if covariance not in COVARIANCES:
            raise ValueError(f"covariance must be one of {', '.join(COVARIANCES)}; got {covariance!r}")
        check_nonlinearity(h)
        self.amortized, self.covariance, self.h = bool(amortized), covariance, h
        options = {"dtype": dtype, "precision": precision, "rngs": rngs}
        features = whole_number("features", features, 1)
        self.mean = Linear(features, self.latent, **options)
        self.log_std = Linear(features, self.latent, **options)
        if covariance == "full":
            self.lower = _head_near(jnp.zeros(self.latent * (self.latent - 1) // 2), features, options)
        layers = init_planar(rngs.flow(), self.flow_length, self.latent, dtype=dtype)
        if amortized:
            self.flow = _head_near(jnp.concatenate([leaf.ravel() for leaf in layers]), features, options)
        else:
            self.u, self.w, self.b = map(nnx.Param, layers)

    def __call__(self, features: jax.Array) -> PlanarFlow:
        log_std = LOG_STD_RANGE * jnp.tanh(self.log_std(features) / LOG_STD_RANGE)
        lower = _strictly_lower(self.lower(features), self.latent) if self.covariance == "full" else None
        return PlanarFlow(self._layers(features), self.mean(features), log_std, h=self.h, lower=lower)

    def _layers(self, features: jax.Array) -> Planar:
        if not self.amortized:
            return Planar(self.u[...], self.w[...], self.b[...])
        shape = (self.flow_length, self.latent)
        size = math.prod(shape)
        u, w, b = jnp.split(self.flow(features), [size, 2 * size], axis=-1)
        batch = features.shape[:-1]
        return Planar(u.reshape(*batch, *shape), w.reshape(*batch, *shape), b)


def _head_near(start: jax.Array, features: int, options: dict[str, Any]) -> Linear:
    """A linear head whose biases are ``start`` and whose weights are small: near ``start`` for all images."""
    return Linear(
        features,
        start.size,
        kernel_init=nnx.initializers.normal(0.01 / features**0.5),
        bias_init=lambda key, shape, dtype: start.astype(dtype),
        **options,
    )


def _strictly_lower(entries: jax.Array, size: int) -> jax.Array:
    """``[..., size (size - 1) / 2]`` as the entries below the diagonal of matrices ``[..., size, size]``.

    The entries followed by all of them in reverse, in rows of ``size - 1``, have each entry once in their lower
    triangle. So neither the map nor its derivative needs a gather or a scatter.
    """
    side, leading = size - 1, entries.shape[:-1]
    square = jnp.concatenate([entries[..., side:], entries[..., ::-1]], -1).reshape(*leading, side, side)
    return jnp.pad(jnp.tril(square), (*[(0, 0)] * len(leading), (1, 0), (0, 1)))


# The posteriors by name: (features, latent, flow_length, *, amortized, h, dtype, precision, rngs) -> a module.
POSTERIORS: dict[str, Callable[..., Any]] = {
    "diagonal": functools.partial(PlanarPosterior, covariance="diagonal"),
    "full": functools.partial(PlanarPosterior, covariance="full"),
}


class VAE(nnx.Module):
    """A variational autoencoder (Xu et al. 2023, figure 1): encoder, posterior, decoder, likelihood.

    ``VAE.mlp`` and ``VAE.conv`` build the models of the experiments; parts of one's own are passed here::

        vae = VAE(encoder, PlanarPosterior(encoder.features, 40, 5, rngs=rngs), decoder, Bernoulli())
        posterior = vae.encode(images)      # q(z|x), a PlanarFlow, of images [B, H, W]
        z, log_q0, log_det = posterior.transform(noise)
        parameters = vae.decode(z)          # of vae.likelihood

    Args:
        encoder: ``images [..., H, W] -> features``.
        posterior: ``features -> q(z|x)``, anything with ``mean`` and ``transform(noise)`` (:class:`Posterior`).
        decoder: ``z [..., L] ->`` the parameters of the likelihood.
        likelihood: what the decoder's result means (:class:`Likelihood`); static, not trained.

    Raises:
        ValueError: if a part holds anything but floating-point ``nnx.Param``.
    """

    def __init__(self, encoder: Any, posterior: Any, decoder: Any, likelihood: Likelihood):
        parts = {"encoder": encoder, "posterior": posterior, "decoder": decoder, "likelihood": likelihood}
        if isinstance(likelihood, str | type):
            raise ValueError(f"likelihood must be an object, such as Bernoulli(); got {likelihood!r}")
        for name, part in parts.items():
            _check_parameters(name, part)
        self.encoder, self.posterior, self.decoder, self.likelihood = parts.values()

    def encode(self, images: Float[Array, "..."]) -> Posterior:
        """``q(z|x)`` of images ``[..., H, W]`` or ``[..., H, W, C]``, values in 0..1."""
        return self.posterior(self.encoder(images))

    def decode(self, z: Float[Array, "... L"]) -> Any:
        """The parameters of the likelihood for ``z [..., L]``: a pytree of arrays ``[..., H, W]`` (or ``C`` beside)."""
        return self.decoder(z)

    @classmethod
    def mlp(
        cls,
        image_shape: Sequence[int],
        *,
        latent: int = 40,
        hidden: int = 400,
        layers: int = 1,
        flow_length: int = 5,
        amortized: bool = False,
        posterior: str = "diagonal",
        h: str = "tanh",
        likelihood: str | Likelihood = "bernoulli",
        precision: str = "float32",
        dtype: Any = "float32",
        rngs: nnx.Rngs,
    ) -> VAE:
        """Linear layers with ReLUs and a planar posterior, as in section 4.2 of the paper.

        Args:
            image_shape: ``(H, W)`` or ``(H, W, C)``.
            latent: L, the size of ``z``.
            hidden: width of the hidden layers of encoder and decoder.
            layers: the number of these layers, 1 or 2.
            flow_length: K, the number of planar layers.
            amortized: each image has its own planar layers, from a head of the encoder.
            posterior: one of ``POSTERIORS``: planar layers behind a normal distribution with a diagonal or a full
                covariance.
            h: the nonlinearity of the planar layers, one of ``NONLINEARITIES``.
            likelihood: one of ``LIKELIHOODS``, or a likelihood of one's own.
            precision: of encoder, heads and decoder, one of ``PRECISIONS``.
            dtype: of the parameters, and so of what is computed from images of this dtype.
            rngs: ``nnx.Rngs(seed)``. Encoder, decoder and the heads of ``mean`` and ``log_std`` are the same for every
                ``flow_length``.

        Raises:
            ValueError: for a size that is not a whole number in its range, an unknown name, or an amortised flow of no
                layers.
        """
        given = _common(image_shape, latent, flow_length, amortized, posterior, h, likelihood, precision, dtype)
        sizes = (("hidden", whole_number("hidden", hidden, 1)), ("layers", layers))
        return _build(rngs.params(), rngs.flow(), encoder=MLPEncoder, decoder=MLPDecoder, sizes=sizes, **given)

    @classmethod
    def conv(
        cls,
        image_shape: Sequence[int],
        *,
        latent: int = 40,
        flow_length: int = 5,
        amortized: bool = False,
        posterior: str = "diagonal",
        h: str = "tanh",
        likelihood: str | Likelihood = "bernoulli",
        precision: str = "float32",
        dtype: Any = "float32",
        rngs: nnx.Rngs,
    ) -> VAE:
        """Gated convolutions (van den Berg et al. 2018) and a planar posterior; arguments as for :meth:`mlp`.

        Raises:
            ValueError: as :meth:`mlp`, and if H or W is not divisible by 4.
        """
        given = _common(image_shape, latent, flow_length, amortized, posterior, h, likelihood, precision, dtype)
        return _build(rngs.params(), rngs.flow(), encoder=GatedEncoder, decoder=GatedDecoder, sizes=(), **given)


def _check_parameters(name: str, part: Any) -> None:
    """Refuses leaves that cannot be differentiated and optimised with the rest of the model."""
    if not isinstance(part, nnx.Module):
        return
    leaves = jax.tree_util.tree_leaves_with_path(part, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    for path, leaf in leaves:
        dtype = getattr(leaf, "dtype", None)
        if not isinstance(leaf, nnx.Param) or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{name} must hold floating-point nnx.Param alone, since a VAE is differentiated as a whole; "
                f"got {name}{jax.tree_util.keystr(path)}: {type(leaf).__name__}, {dtype}. Instead of dropout or batch "
                "statistics use layers without state (such as nnx.LayerNorm); make constants where they are used"
            )


# --- One compiled program makes all parameters: op by op, each shape of a parameter would be a program of its own.


def _common(
    image_shape: Sequence[int],
    latent: int,
    flow_length: int,
    amortized: bool,
    posterior: str,
    h: str,
    likelihood: str | Likelihood,
    precision: str,
    dtype: Any,
) -> dict[str, Any]:
    """Arguments that ``mlp`` and ``conv`` share, checked, as static arguments of a compiled function."""
    shape = checked_image_shape(image_shape)
    if isinstance(likelihood, str):
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood must be one of {', '.join(LIKELIHOODS)}, or an object; got {likelihood!r}")
        likelihood = LIKELIHOODS[likelihood]
    if posterior not in POSTERIORS:
        raise ValueError(f"posterior must be one of {', '.join(POSTERIORS)}; got {posterior!r}")
    return {
        "image_shape": shape,
        "latent": whole_number("latent", latent, 1),
        "flow_length": whole_number("flow_length", flow_length, 0),
        "amortized": bool(amortized),
        "posterior": posterior,
        "h": h,
        "likelihood": likelihood,
        "precision": precision,
        "dtype": jnp.dtype(dtype),
    }


_STATIC = ("encoder", "decoder", "sizes", "image_shape", "latent", "flow_length", "amortized", "posterior", "h")


@functools.partial(jax.jit, static_argnames=(*_STATIC, "likelihood", "precision", "dtype"))
def _build(params_key: jax.Array, flow_key: jax.Array, *, encoder: Any, decoder: Any, sizes: Any, **given: Any) -> VAE:
    """Draws the parameters of decoder, encoder and posterior, in this order.

    Args:
        encoder: the class of the encoder, and ``decoder`` that of the decoder.
        sizes: pairs of names and numbers, arguments of both classes.
        given: what :func:`_common` returns.
    """
    shape, latent, likelihood = given["image_shape"], given["latent"], given["likelihood"]
    rngs = nnx.Rngs(params=params_key, flow=flow_key)
    options = {"dtype": given["dtype"], "precision": given["precision"], "rngs": rngs}
    decodes = decoder(latent, shape, likelihood.head(shape, given["dtype"]), **dict(sizes), **options)
    encodes = encoder(shape, **dict(sizes), **options)
    posterior = POSTERIORS[given["posterior"]](
        encodes.features, latent, given["flow_length"], amortized=given["amortized"], h=given["h"], **options
    )
    return VAE(encodes, posterior, decodes, likelihood)
