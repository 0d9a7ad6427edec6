"""What the training of a VAE on uint8 images minimises, for :mod:`planar_vae_jax.train.loop`."""

from typing import Any

import jax
import jax.numpy as jnp

from planar_vae_jax.train.loop import Loss
from planar_vae_jax.vae import objectives
from planar_vae_jax.vae.binarization import binarize
from planar_vae_jax.vae.model import VAE


def vae_loss(
    vae: VAE,
    objective: str,
    binarization: str,
    *,
    train_samples: int = 1,
    kl_warmup_steps: int = 0,
    annealing_steps: int = 0,
) -> Loss:
    """The mean over a batch of images ``[B, H, W]`` uint8 of what a VAE minimises.

    Beside it: ``train_loss``, the same without annealing; ``reconstruction`` and ``kl``; ``annealed_loss`` where there
    is annealing.

    Args:
        vae: the architecture.
        objective: ``"elbo"``: the free energy, nats; ``"iwae"``: the bound of Burda et al. (2016, eq. 8) from
            ``train_samples`` samples of each image, nats; ``"reconstruction"``: the squared error, without a KL term.
        binarization: one of ``BINARIZATIONS``; for ``static`` the images are 0 or 255 already.
        train_samples: k of ``"iwae"``; figures of ``reconstruction`` and ``kl`` are means over them.
        kl_warmup_steps: over which the weight of the KL term grows from 0 to 1.
        annealing_steps: over which the temperature of log p(x, z) grows from 0.01 to 1 (Rezende & Mohamed 2015).

    Raises:
        ValueError: samples that the objective has no use for, or annealing that it has none of.
    """
    if train_samples < 1 or (train_samples > 1 and objective != "iwae"):
        raise ValueError(f"train_samples must be 1 but for objective='iwae'; got {train_samples} for {objective!r}")
    if objective == "iwae" and (kl_warmup_steps or annealing_steps):
        raise ValueError("annealing is of the elbo; got objective='iwae'")
    drawn = "none" if binarization == "static" else binarization

    def loss(params: Any, images: jax.Array, key: jax.Array, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        binarize_key, noise_key = jax.random.split(key)
        # Pixels in one axis, as the likelihood has them.
        x = binarize(binarize_key, images.reshape(len(images), -1), drawn).reshape(images.shape)
        if objective == "iwae":
            terms = objectives.sampled_terms(vae.bind(params), x, noise_key, train_samples)
        else:
            terms = objectives.free_energy(vae.bind(params), x, noise_key)
        plain = terms.objective(objective)
        figures = {"train_loss": plain, "reconstruction": terms.reconstruction, "kl": terms.kl}
        if kl_warmup_steps or annealing_steps:
            temperature = jnp.minimum(1.0, 0.01 + step / annealing_steps) if annealing_steps else 1.0
            kl_weight = jnp.minimum(1.0, step / kl_warmup_steps) if kl_warmup_steps else 1.0
            figures["annealed_loss"] = plain = terms.annealed(temperature, kl_weight)
        return jnp.mean(plain), {name: jnp.mean(values) for name, values in figures.items()}

    return loss
