"""What a planar-flow VAE minimises and is judged by, in nats, on batches of images.

All functions take a model first: a :class:`planar_vae_jax.vae.model.VAE`, or any object with ``encode(images)``,
``decode(z)`` and ``likelihood`` (:class:`Model`).

Keys: one key draws for the whole batch (training). Keys ``[B]`` draw for each image from its own key, so that the draws
of an image depend neither on the other images nor on the batch size (evaluation).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from planar_vae_jax.flows.distribution import standard_normal_log_prob
from planar_vae_jax.keys import is_key
from planar_vae_jax.vae.binarization import binarize, check_binarization
from planar_vae_jax.vae.likelihoods import Likelihood
from planar_vae_jax.vae.model import Posterior

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Key, UInt8, UInt32

OBJECTIVES = ("elbo", "iwae", "reconstruction")
SLACK = 1e-6  # beyond 0..1, what rounding adds to black and white

# One key, or one for each image; of jax.random.key, or the words of jax.random.PRNGKey.
Keys: TypeAlias = 'Key[Array, "..."] | UInt32[Array, "... words"]'
Loss = Callable[[Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


@runtime_checkable
class Model(Protocol):
    """A VAE with its parameters. Images are ``[..., H, W]`` or ``[..., H, W, C]``, values in 0..1."""

    @property
    def likelihood(self) -> Likelihood:
        """The family of ``p(x|z)``."""

    def encode(self, images: jax.Array) -> Posterior:
        """``q(z|x)`` of images, with ``mean [..., L]``."""

    def decode(self, z: jax.Array) -> Any:
        """The parameters of the likelihood for ``z [..., L]``: a pytree of arrays ``[..., H, W]`` (or ``C`` beside)."""


class Terms(NamedTuple):
    """The terms of the free energy of each image under one sample of ``z``, in nats."""

    log_q0: jax.Array  # [...], log q_0(z_0|x)
    log_det: jax.Array  # [...], log|det dz_K/dz_0|
    log_prior: jax.Array  # [...], log p(z_K), at z_K and never at z_0
    log_likelihood: jax.Array  # [...], log p(x|z_K)
    squared_error: jax.Array  # [...], sum over pixels of (x - their mean)^2; not in nats

    @property
    def kl(self) -> jax.Array:
        """One-sample estimate of ``KL(q(z_K|x) || p(z_K))``; may be negative."""
        return self.log_q0 - self.log_det - self.log_prior

    @property
    def reconstruction(self) -> jax.Array:
        """``-log p(x|z_K)``."""
        return -self.log_likelihood

    @property
    def free_energy(self) -> jax.Array:
        """``log q_0 - log_det - log p(z_K) - log p(x|z_K)``, minimised; minus the ELBO (Rezende & Mohamed, eq. 15)."""
        return self.kl + self.reconstruction

    @property
    def importance_bound(self) -> jax.Array:
        """``-log (1/k) sum_s exp(-free_energy_s)`` over the leading axis of k samples, ``[k, ...]`` to ``[...]``.

        Minimised; in expectation it falls with k from the free energy (k = 1) to ``-log p(x)`` (Burda et al. 2016,
        eq. 8).
        """
        return math.log(len(self.log_q0)) - jax.nn.logsumexp(-self.free_energy, axis=0)

    def objective(self, name: str) -> jax.Array:
        """What training by the objective ``name`` minimises, for each image.

        ``"elbo"``: the free energy; ``"iwae"``: the importance bound over the leading axis; ``"reconstruction"``: the
        squared error, without a KL term.

        Raises:
            ValueError: if ``name`` is not one of ``OBJECTIVES``.
        """
        _check_objective(name)
        if name == "iwae":
            return self.importance_bound
        return self.squared_error if name == "reconstruction" else self.free_energy

    def annealed(self, temperature: jax.Array | float, kl_weight: jax.Array | float) -> jax.Array:
        """The free energy for training, under one or both of two annealings; a value of 1 switches one off.

        Args:
            temperature: beta_t of Rezende & Mohamed (eq. 20), which multiplies ``log p(x, z_K)``.
            kl_weight: KL warm-up, which multiplies the KL term.
        """
        kl = self.log_q0 - self.log_det - temperature * self.log_prior
        return kl_weight * kl - temperature * self.log_likelihood


def free_energy(
    model: Model, images: Float[Array, "B H W *C"], key: Keys, *, posterior: Posterior | None = None
) -> Terms:
    """Terms of the free energy of each image, with one sample of ``z_0`` each (Rezende & Mohamed 2015, eq. 15).

    Args:
        model: a VAE.
        images: ``[B, H, W]`` or ``[B, H, W, C]`` of a floating dtype, values in 0..1; 0 or 1 for a Bernoulli
            likelihood. It accepts grey levels too, but then its term is a cross-entropy, and ``free_energy`` bounds no
            likelihood.
        key: one key for the batch, or keys ``[B]``, one for each image.
        posterior: another ``q(z|x)`` of these images than ``model.encode(images)``.

    Returns:
        :class:`Terms`, each ``[B]``.

    Raises:
        ValueError: for images of another rank or dtype, or (outside of ``jax.jit``) with values that are not in 0..1;
            for a key that is not a JAX key, or keys of another number than images.
    """
    _check_images(images)
    key = _checked_key(key, images)
    posterior = model.encode(images) if posterior is None else posterior
    return _terms(model, posterior, images, noise(key, posterior.mean))


def sampled_terms(model: Model, images: Float[Array, "B H W *C"], key: Keys, samples: int) -> Terms:
    """As :func:`free_energy`, with ``samples`` samples of each image from one key for the batch: each ``[samples, B]``.

    Memory is O(samples B H W), for training. For many samples use :func:`importance_nll`.

    Raises:
        ValueError: as :func:`free_energy`.
    """
    _check_images(images)
    key = typed_key(key)
    posterior = model.encode(images)
    shape = (samples, *posterior.mean.shape)
    return _terms(model, posterior, images, jax.random.normal(key, shape, posterior.mean.dtype))


def terms(
    model: Model,
    images: Float[Array, "B H W *C"],
    noise: Float[Array, "*S B L"],
    *,
    posterior: Posterior | None = None,
) -> Terms:
    """As :func:`free_energy`, for noise of the caller's own: each ``[..., B]``.

    For draws that are not independent standard normal ones, such as antithetic or quasi-random ones.

    Args:
        model: a VAE.
        images: as for :func:`free_energy`.
        noise: ``[..., B, L]``, the standard normal draws that :meth:`PlanarFlow.transform` takes; leading axes are
            samples of each image.
        posterior: another ``q(z|x)`` of these images than ``model.encode(images)``.

    Raises:
        ValueError: for images as :func:`free_energy`; for noise of another size.
    """
    _check_images(images)
    posterior = model.encode(images) if posterior is None else posterior
    wanted = posterior.mean.shape
    if noise.shape[-2:] != wanted:
        raise ValueError(f"noise must be of shape [..., {', '.join(map(str, wanted))}]; got {list(noise.shape)}")
    return _terms(model, posterior, images, noise)


def _terms(model: Model, posterior: Posterior, images: jax.Array, noise: jax.Array) -> Terms:
    zK, log_q0, log_det = posterior.transform(noise)
    images, parameters = _pixels(model, images, zK)
    mean = model.likelihood.mean(parameters)
    if mean.shape[-1] != images.shape[-1]:
        raise ValueError(
            f"decoder must return parameters for the {images.shape[-1]} pixels of an image; got {mean.shape[-1]}"
        )
    images = jnp.broadcast_to(images, mean.shape)
    log_likelihood = model.likelihood.log_prob(images, parameters)
    if log_likelihood.shape != log_q0.shape:
        raise ValueError(
            f"likelihood.log_prob must return one number for each image, {list(log_q0.shape)}; got "
            f"{list(log_likelihood.shape)} (a sum over pixels may be missing)"
        )
    return Terms(
        log_q0=log_q0,
        log_det=log_det,
        log_prior=standard_normal_log_prob(zK),
        log_likelihood=log_likelihood,
        squared_error=jnp.sum(jnp.square(images - mean), -1),
    )


def log_joint(model: Model, images: Float[Array, "..."], z: Float[Array, "*Z L"]) -> Float[Array, "*Z"]:
    """``log p(x, z) = log N(z; 0, I) + log p(x|z)`` in nats, ``[...]``, of images at points ``z [..., L]``.

    Args:
        model: a VAE.
        images: one image ``[H, W]`` (or ``[H, W, C]``), or a batch whose leading axes broadcast against those of ``z``.
        z: for instance ``[B, L]``, a point for each image, or ``[N, L]``, a grid for one image.
    """
    images, parameters = _pixels(model, images, z)
    # Not by the shape of the parameters: those of a likelihood may have other axes.
    images = jnp.broadcast_to(images, (*z.shape[:-1], images.shape[-1]))
    return standard_normal_log_prob(z) + model.likelihood.log_prob(images, parameters)


def _pixels(model: Model, images: jax.Array, z: jax.Array) -> tuple[jax.Array, Any]:
    """Images and the parameters of ``p(x|z)``, with the pixels in one axis, since loops over 784 are fast."""
    parameters = model.decode(z)
    axes = max(leaf.ndim for leaf in jax.tree.leaves(parameters)) - (z.ndim - 1)  # of an image: (H, W) or (H, W, C)
    return jax.tree.map(lambda leaf: _flat(leaf, axes), (images, parameters))


def _flat(array: jax.Array, axes: int) -> jax.Array:
    """The last ``axes`` axes as one: ``[..., H, W]`` to ``[..., H W]``."""
    leading = array.ndim - axes
    return array.reshape(*array.shape[:leading], math.prod(array.shape[leading:]))


# --- Keys and noise


def typed_key(key: Keys) -> Key[Array, "..."]:
    """``key`` in the form of ``jax.random.key``; the words of ``jax.random.PRNGKey`` are wrapped.

    Raises:
        ValueError: if it is neither.
    """
    if is_key(key):
        return key
    if getattr(key, "dtype", None) != jnp.uint32 or not key.ndim:
        raise ValueError(f"key must be made by jax.random.key or jax.random.split; got {key!r}")
    return jax.random.wrap_key_data(key)


def _checked_key(key: Keys, images: jax.Array) -> jax.Array:
    """One key for the batch, or one for each image."""
    typed = typed_key(key)
    if typed.shape not in ((), images.shape[:1]):
        raise ValueError(f"key must be one key, or keys [{len(images)}], one for each image; got {list(typed.shape)}")
    return typed


def fold_in_each(keys: Key[Array, " B"], number: Any) -> Key[Array, " B"]:
    """Keys ``[B]``, one for each image, with ``number`` folded into each."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def noise(key: Keys, like: Float[Array, "*B L"]) -> Float[Array, "*B L"]:
    """Standard normal draws of the shape of ``like [B, L]``, from one key or from keys ``[B]``."""
    key = typed_key(key)
    if key.ndim == 0:
        return jax.random.normal(key, like.shape, like.dtype)
    return jax.vmap(lambda key: jax.random.normal(key, like.shape[1:], like.dtype))(key)


def _check_images(images: Any) -> None:
    dtype = getattr(images, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"images must be floating-point arrays of values in 0..1; got {dtype or type(images).__name__} "
            "(grey levels 0 to 255: binarize(key, images, binarization) first)"
        )
    if images.ndim not in (3, 4):
        raise ValueError(f"images must be of shape [B, H, W] or [B, H, W, C]; got {list(images.shape)}")
    if isinstance(images, jax.core.Tracer) or not getattr(images, "is_fully_addressable", True) or not images.size:
        return
    values = np.asarray(images)  # by NumPy, since jnp.min of a constant is traced inside jax.jit
    low, high = float(values.min()), float(values.max())
    if not (low >= -SLACK and high <= 1.0 + SLACK):
        raise ValueError(f"images must have values in 0..1; got {low:.9g} to {high:.9g}")


# --- The marginal likelihood


class MarginalLikelihood(NamedTuple):
    """An importance-sampling estimate for each image."""

    nll: jax.Array  # [B], or [M, B] for M numbers of samples; -log p(x), nats
    effective_sample_size: jax.Array  # the same; from 1, where one sample makes the estimate, to S


def sample_counts(samples: int) -> tuple[int, ...]:
    """S/4, S/2 and S as whole numbers without 0; an estimate that has converged is the same for all three."""
    return tuple(sorted({samples // 4, samples // 2, samples} - {0}))


def importance_nll(
    model: Model,
    images: Float[Array, "B H W *C"],
    key: Keys,
    *,
    samples: int | tuple[int, ...],
    chunk: int = 128,
    posterior: Posterior | None = None,
) -> MarginalLikelihood:
    """``-log p(x)`` of each image by importance sampling from ``q(z_K|x)`` (Burda et al. 2016, eq. 8).

    ``-log (1/S) sum_s p(x, z_s) / q(z_s|x)``: an upper bound in expectation, tighter than the free energy, exact as S
    grows. The effective sample size is ``(sum w)^2 / sum w^2``.

    Args:
        model: a VAE.
        images: ``[B, H, W]`` or ``[B, H, W, C]``, as for :func:`free_energy`.
        key: one key for the batch, or keys ``[B]``. Sample ``s`` of an image has the same key for every S.
        samples: S, or several numbers S. The estimate of each S uses the first S samples, all in one pass.
        chunk: samples of an image in memory at a time: memory is O(chunk B H W), time O(S B).
        posterior: another ``q(z|x)`` of these images than ``model.encode(images)``.

    Returns:
        Both ``[B]`` for one S, ``[M, B]`` for M of them.

    Raises:
        ValueError: for a number of samples below 1, and as :func:`free_energy`.
    """
    if not isinstance(samples, tuple | list):
        one = importance_nll(model, images, key, samples=(operator.index(samples),), chunk=chunk, posterior=posterior)
        return MarginalLikelihood(*(leaf[0] for leaf in one))
    if not samples or min(samples) < 1:
        raise ValueError(f"samples must be at least 1; got {samples}")
    _check_images(images)
    key = _checked_key(key, images)
    posterior = model.encode(images) if posterior is None else posterior
    keys = jax.random.split(key, len(images)) if key.ndim == 0 else key
    counts, most = jnp.array(samples), max(samples)
    chunk = min(chunk, most)

    def weights(start: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The largest log-weight of a chunk, and relative to it the sums of weights and of their squares: [M, B]."""
        numbers = start + jnp.arange(chunk)
        draws = jax.vmap(lambda s: noise(fold_in_each(keys, s), posterior.mean))(numbers)
        log_w = -_terms(model, posterior, images, draws).free_energy
        # [M, chunk, B]; the last chunk may be longer than S.
        log_w = jax.vmap(lambda count: jnp.where((numbers < count)[:, None], log_w, -jnp.inf))(counts)
        largest = _shift(jnp.max(log_w, axis=1))
        w = jnp.exp(log_w - largest[:, None])
        return largest, jnp.sum(w, axis=1), jnp.sum(jnp.square(w), axis=1)

    # Relative to the largest weight of all, the sums are exact to rounding however large the image's nats are.
    largest, sums, squares = jax.lax.map(weights, jnp.arange(0, most, chunk))
    shift = _shift(jnp.max(jnp.where(sums > 0, largest, -jnp.inf), axis=0))
    scale = jnp.exp(jnp.where(sums > 0, largest - shift[None], 0.0))
    total, total_squares = jnp.sum(sums * scale, axis=0), jnp.sum(squares * jnp.square(scale), axis=0)
    size = counts.astype(total.dtype)[:, None]
    nll = jnp.log(size) - (shift + jnp.log(total))
    return MarginalLikelihood(nll, jnp.clip(jnp.square(total) / total_squares, 1.0, size))


def _shift(largest: jax.Array) -> jax.Array:
    """``largest`` where it is finite, else 0, as a constant for derivatives."""
    return jax.lax.stop_gradient(jnp.where(jnp.isfinite(largest), largest, 0.0))


# --- What training minimises


def vae_loss(
    objective: str, binarization: str, *, train_samples: int = 1, kl_warmup_steps: int = 0, annealing_steps: int = 0
) -> Loss:
    """The loss of an objective: the mean over a batch of images ``[B, H, W]`` uint8 of what a VAE minimises.

    Args:
        objective: ``"elbo"``: the free energy, nats; ``"iwae"``: the bound of Burda et al. (2016, eq. 8) from
            ``train_samples`` samples of each image, nats; ``"reconstruction"``: the squared error, without a KL term.
        binarization: one of ``BINARIZATIONS``; for ``"static"`` the images have been drawn once, as 0 or 255.
        train_samples: k of ``"iwae"``; the figures ``reconstruction`` and ``kl`` are means over the k samples.
        kl_warmup_steps: steps over which the weight of the KL term grows from 0 to 1; 0 for none.
        annealing_steps: steps over which the temperature of log p(x, z) grows from 0.01 to 1 (Rezende & Mohamed 2015);
            0 for none.

    Returns:
        ``loss(model, images, key, step) -> (value [], figures)``. The figures are ``train_loss``, ``reconstruction``
        and ``kl``, ``[]`` each. Without annealing ``train_loss`` is the value; with it, ``annealed_loss`` is the value,
        and ``train_loss`` is what the value would be without it.

    Raises:
        ValueError: for an unknown name, samples for another objective than ``"iwae"``, or annealing of another than
            ``"elbo"``.
    """
    _check_objective(objective)
    check_binarization(binarization)
    if train_samples < 1 or (train_samples > 1 and objective != "iwae"):
        raise ValueError(f"train_samples must be 1 unless objective='iwae'; got {train_samples} for {objective!r}")
    for name, steps in (("kl_warmup_steps", kl_warmup_steps), ("annealing_steps", annealing_steps)):
        if steps < 0 or (steps and objective != "elbo"):
            raise ValueError(f"{name} must be 0, or positive with objective='elbo'; got {steps} for {objective!r}")
    drawn = "none" if binarization == "static" else binarization

    def loss(
        model: Model, images: UInt8[Array, "B H W *C"], key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        binarize_key, noise_key = jax.random.split(key)
        # An image in one row, whose pixels then share words of random bits.
        x = binarize(binarize_key, images.reshape(len(images), -1), drawn).reshape(images.shape)
        _check_images(x)
        posterior = model.encode(x)
        samples = (train_samples,) if objective == "iwae" else ()
        noise = jax.random.normal(noise_key, (*samples, *posterior.mean.shape), posterior.mean.dtype)
        found = _terms(model, posterior, x, noise)
        value = found.objective(objective)
        figures = {"train_loss": value, "reconstruction": found.reconstruction, "kl": found.kl}
        if kl_warmup_steps or annealing_steps:
            temperature = jnp.minimum(1.0, 0.01 + step / annealing_steps) if annealing_steps else 1.0
            kl_weight = jnp.minimum(1.0, step / kl_warmup_steps) if kl_warmup_steps else 1.0
            figures["annealed_loss"] = value = found.annealed(temperature, kl_weight)
        return jnp.mean(value), {name: jnp.mean(values) for name, values in figures.items()}

    return loss


def _check_objective(name: str) -> None:
    if name not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}; got {name!r}")
