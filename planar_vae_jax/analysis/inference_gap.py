"""Where the gap between the free energy and ``-log p(x)`` comes from (Cremer, Li & Duvenaud 2018, section 3).

    F(encoder's q) - (-log p(x)) = [F(encoder's q) - F(q*)] + [F(q*) + log p(x)]
                                    amortisation gap           approximation gap

``q*`` is the best member of a family for one image. It is found by training the parameters of q for this image alone,
with the decoder fixed. The approximation gap is ``KL(q* || p(z|x))``. Training ends near the optimum, so the
amortisation gap is slightly underestimated and the approximation gap overestimated: on MNIST, 1000 steps end about 0.3
nats above the optimum for 5 layers in 40 dimensions, and at the optimum for a factorised normal.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from planar_vae_jax.analysis.evaluation import BATCH, Images, map_batches, unit_pixels
from planar_vae_jax.flows.distribution import PlanarFlow
from planar_vae_jax.flows.planar import Planar
from planar_vae_jax.statistics import means_and_errors
from planar_vae_jax.vae import objectives

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Key


class Settings(NamedTuple):
    """How q is trained for an image, and how it is judged."""

    steps: int = 1000  # of Adam, whose rate decays to 0 by a cosine
    learning_rate: float = 0.01
    samples: int = 10  # of q in each step
    bound_samples: int = 1000  # of q for each free energy
    nll_samples: int = 5000  # importance samples from each q* for log p(x)


class Gap(NamedTuple):
    """Figures of each image, ``[N]``; nats, except for the effective sample size."""

    encoder: jax.Array  # free energy of the encoder's q
    own: jax.Array  # of the best q of the model's own family, with K layers for this image alone
    factorised: jax.Array  # of the best normal with independent coordinates
    nll: jax.Array  # -log p(x) by importance sampling from the better of the two optimised posteriors
    effective_sample_size: jax.Array  # of that importance sampling

    @property
    def amortisation(self) -> jax.Array:
        """What the encoder (and a shared flow) loses against the best q of its family, ``encoder - own``."""
        return self.encoder - self.own

    @property
    def approximation(self) -> jax.Array:
        """The KL of the best q of the family to the true posterior, ``own - nll``."""
        return self.own - self.nll

    @property
    def factorised_approximation(self) -> jax.Array:
        """The KL of the best factorised normal to the true posterior, ``factorised - nll``."""
        return self.factorised - self.nll


def _free_energies(model: objectives.Model, posterior: PlanarFlow, images: jax.Array, keys: jax.Array) -> jax.Array:
    """Free energy of images ``[B, H, W]`` under ``posterior``, with one sample of each by keys ``[B]``: ``[B]``."""
    return objectives.free_energy(model, images, keys, posterior=posterior).free_energy


def _own_posteriors(posterior: PlanarFlow, size: int) -> PlanarFlow:
    """The same q with layers for each image: parameters ``[B, K, L]``, where B is ``size``, also if all share them."""
    u, w, b = posterior.params
    flow_length, dim = u.shape[-2:]
    u, w = (jnp.broadcast_to(leaf, (size, flow_length, dim)) for leaf in (u, w))
    params = Planar(u, w, jnp.broadcast_to(b, (size, flow_length)))
    return dataclasses.replace(posterior, params=params)


def _factorised_posteriors(posterior: PlanarFlow, keys: jax.Array, samples: int = 64) -> PlanarFlow:
    """Normals with the means and variances of ``samples`` of each q, and no layers."""
    like = posterior.mean
    draw = jax.vmap(lambda key: jax.random.normal(key, (samples, like.shape[-1]), like.dtype), out_axes=1)
    z, _, _ = posterior.transform(draw(keys))  # [S, B, L]
    u, w, b = posterior.params
    nothing = Planar(u[..., :0, :], w[..., :0, :], b[..., :0])
    return PlanarFlow(nothing, jnp.mean(z, axis=0), 0.5 * jnp.log(jnp.var(z, axis=0) + 1e-12), h=posterior.h)


def _optimise_posterior(
    model: objectives.Model, posterior: PlanarFlow, images: jax.Array, keys: jax.Array, settings: Settings
) -> PlanarFlow:
    """The q with the least free energy for each image, by Adam from ``posterior``.

    Images share no parameters and Adam treats each entry alone, so one training on the sum over images trains each of
    them (and is faster than ``jax.vmap``, in which flows look shared).

    Args:
        model: its decoder stays fixed.
        posterior: the start; every array has the leading axis ``B``.
        images: ``[B, H, W]``, as :func:`planar_vae_jax.vae.objectives.free_energy` takes them.
        keys: ``[B]``; the draws for an image follow from its key.
        settings: ``steps``, ``learning_rate`` and ``samples`` are used.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(settings.learning_rate, settings.steps))

    def loss(posterior: PlanarFlow, step: jax.Array) -> jax.Array:
        step_keys = objectives.fold_in_each(keys, step)
        energies = jax.vmap(lambda s: _free_energies(model, posterior, images, objectives.fold_in_each(step_keys, s)))
        return jnp.sum(jnp.mean(energies(jnp.arange(settings.samples)), axis=0))

    def step(number: jax.Array, state: tuple[PlanarFlow, optax.OptState]) -> tuple[PlanarFlow, optax.OptState]:
        posterior, opt_state = state
        updates, opt_state = optimizer.update(jax.grad(loss)(posterior, number), opt_state)
        return optax.apply_updates(posterior, updates), opt_state

    return jax.lax.fori_loop(0, settings.steps, step, (posterior, optimizer.init(posterior)))[0]


def inference_gap(
    model: objectives.Model, images: Float[Array, "B H W *C"], keys: Key[Array, " B"], settings: Settings
) -> Gap:
    """The gap of each image of a batch.

    Args:
        model: a VAE whose posterior is a :class:`PlanarFlow`.
        images: values in 0..1; 0 or 1 for a Bernoulli likelihood.
        keys: one for each image.
        settings: of the optimisation.

    Raises:
        ValueError: if the posterior is not a :class:`PlanarFlow`.
    """
    posterior = model.encode(images)
    if not isinstance(posterior, PlanarFlow):
        raise ValueError(f"model must have a PlanarFlow as its posterior; got {type(posterior).__name__}")
    train_keys, bound_keys, nll_keys, start_keys = (objectives.fold_in_each(keys, number) for number in range(2, 6))
    encoder = _own_posteriors(posterior, len(images))

    def bound(posterior: PlanarFlow) -> jax.Array:
        each = jax.lax.map(
            lambda s: _free_energies(model, posterior, images, objectives.fold_in_each(bound_keys, s)),
            jnp.arange(settings.bound_samples),
            batch_size=max(1, BATCH // len(images)),
        )
        return jnp.mean(each, axis=0)

    def nll(posterior: PlanarFlow) -> objectives.MarginalLikelihood:
        chunk = max(1, min(settings.nll_samples, BATCH // len(images)))
        return objectives.importance_nll(
            model, images, nll_keys, samples=settings.nll_samples, chunk=chunk, posterior=posterior
        )

    own = _optimise_posterior(model, encoder, images, train_keys, settings)
    own_bound, best = bound(own), nll(own)
    if _is_factorised(encoder):
        return Gap(bound(encoder), own_bound, own_bound, *best)
    normal = _factorised_posteriors(encoder, start_keys)
    normal = _optimise_posterior(model, normal, images, train_keys, settings)
    other = nll(normal)
    best = jax.tree.map(lambda one, two: jnp.where(best.nll <= other.nll, one, two), best, other)
    return Gap(bound(encoder), own_bound, bound(normal), *best)


def _is_factorised(posterior: PlanarFlow) -> bool:
    """Whether q is a normal with independent coordinates: no layers, and no factor of a covariance."""
    return sum(leaf.size > 0 for leaf in jax.tree.leaves(posterior)) == 2


@functools.partial(jax.jit, static_argnames=("settings", "batch_size"))
def gap_of_images(model: objectives.Model, images: Images, settings: Settings, *, batch_size: int = 50) -> Gap:
    """The gap of each image of a data set, ``batch_size`` images at a time (Cremer, Li & Duvenaud 2018, section 3).

    Args:
        model: a VAE whose posterior is a :class:`PlanarFlow`.
        images: of :func:`planar_vae_jax.analysis.evaluation.fixed_images`.
        settings: of the optimisation.
        batch_size: images that are optimised together; it bounds the memory and changes no figure.
    """

    def batch(pixels: jax.Array, keys: jax.Array) -> Gap:
        return inference_gap(model, unit_pixels(pixels), keys, settings)

    return map_batches(batch, images, batch_size)


def summarise(gap: Gap) -> dict[str, Any]:
    """Means over images with their standard errors, by family; nats."""

    def of(**figures: jax.Array) -> dict[str, float | None]:
        return means_and_errors({name: np.asarray(values) for name, values in figures.items()})

    return {
        "images": len(gap.nll),
        **of(nll=gap.nll, effective_sample_size=gap.effective_sample_size),
        "encoder": of(free_energy=gap.encoder, gap=gap.encoder - gap.nll),
        "own_family": of(free_energy=gap.own, amortisation=gap.amortisation, approximation=gap.approximation),
        "factorised": of(free_energy=gap.factorised, approximation=gap.factorised_approximation),
    }
