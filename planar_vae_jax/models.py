"""The variational autoencoder, as Flax NNX modules for one example; the only file that knows Flax."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from planar_vae_jax.flows import Planar, init_planar

# log_std = LOG_STD_RANGE tanh(raw / LOG_STD_RANGE): the identity near 0, and by construction never so
# far out that exp(log_std) or exp(-log_std) overflows or a variance becomes 0.
LOG_STD_RANGE = 10.0


class Posterior(NamedTuple):
    """``q(z|x)``: a diagonal normal for ``z_0``, then K planar layers to ``z_K``."""

    mean: jax.Array  # [L]
    log_std: jax.Array  # [L]
    flow: Planar  # K layers of D = L


class Encoder(nnx.Module):
    """Two linear layers with a ReLU between: ``x [P]`` to mean, log-std and, if amortised, the flow."""

    def __init__(self, pixels: int, hidden: int, latent: int, flow_length: int, amortized: bool, *, rngs: nnx.Rngs):
        self.latent = latent
        self.flow_length = flow_length
        self.amortized = amortized
        self.hidden = nnx.Linear(pixels, hidden, rngs=rngs)
        self.mean = nnx.Linear(hidden, latent, rngs=rngs)
        self.log_std = nnx.Linear(hidden, latent, rngs=rngs)
        layers = init_planar(rngs.flow(), flow_length, latent)
        if amortized:
            # The parameters start near a flow shared by all examples, the biases; small weights move them.
            shared = jnp.concatenate([leaf.ravel() for leaf in layers])
            self.flow = nnx.Linear(
                hidden,
                shared.size,
                kernel_init=nnx.initializers.normal(0.01 / hidden**0.5),
                bias_init=lambda key, shape, dtype: shared.astype(dtype),
                rngs=rngs,
            )
        else:
            self.u, self.w, self.b = map(nnx.Param, layers)

    def __call__(self, x: jax.Array) -> Posterior:
        features = nnx.relu(self.hidden(x))
        log_std = LOG_STD_RANGE * jnp.tanh(self.log_std(features) / LOG_STD_RANGE)
        return Posterior(self.mean(features), log_std, self._flow(features))

    def _flow(self, features: jax.Array) -> Planar:
        if not self.amortized:
            return Planar(self.u[...], self.w[...], self.b[...])
        size = self.flow_length * self.latent
        u, w, b = jnp.split(self.flow(features), [size, 2 * size])
        return Planar(u.reshape(-1, self.latent), w.reshape(-1, self.latent), b)


class Decoder(nnx.Module):
    """Two linear layers with a ReLU between: ``z [L]`` to Bernoulli logits ``[P]``."""

    def __init__(self, latent: int, hidden: int, pixels: int, *, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(latent, hidden, rngs=rngs)
        self.logits = nnx.Linear(hidden, pixels, rngs=rngs)

    def __call__(self, z: jax.Array) -> jax.Array:
        return self.logits(nnx.relu(self.hidden(z)))


class VAE(nnx.Module):
    """Encoder and decoder of one example; K = 0 is the ordinary VAE.

    Args:
        pixels: P, the size of an example.
        hidden: width of both hidden layers.
        latent: L, the size of ``z``.
        flow_length: K >= 0.
        amortized: whether the encoder produces the flow's parameters for each example; otherwise all
            examples share one flow (the paper).
        h: the flow's nonlinearity.
        rngs: streams ``params`` (encoder and decoder; the same for every K) and ``flow``.
    """

    def __init__(
        self,
        pixels: int,
        *,
        hidden: int = 400,
        latent: int = 40,
        flow_length: int = 0,
        amortized: bool = False,
        h: str = "tanh",
        rngs: nnx.Rngs,
    ):
        self.h = h
        self.method = "scan" if amortized else None  # see flows.default_method
        self.decode = Decoder(latent, hidden, pixels, rngs=rngs)
        self.encode = Encoder(pixels, hidden, latent, flow_length, amortized, rngs=rngs)


def functional(
    build: Callable[[nnx.Rngs], nnx.Module],
) -> tuple[Callable[[jax.Array], Any], Callable[[Any], Any]]:
    """Turns a module's constructor into a pair of pure functions.

    Args:
        build: ``rngs -> module``, for example ``lambda rngs: VAE(784, flow_length=5, rngs=rngs)``.

    Returns:
        ``(init, bind)``: ``init(key)`` gives the parameters, a pytree for jax transformations and optax;
        ``bind(params)`` gives the module with these parameters.
    """

    def rngs(key: jax.Array) -> nnx.Rngs:
        params_key, flow_key = jax.random.split(key)
        return nnx.Rngs(params=params_key, flow=flow_key)

    graphdef, _ = nnx.split(nnx.eval_shape(lambda: build(rngs(jax.random.key(0)))), nnx.Param)

    def init(key: jax.Array) -> Any:
        return nnx.split(build(rngs(key)), nnx.Param)[1]

    def bind(params: Any) -> Any:
        return nnx.merge(graphdef, params)

    return init, bind
