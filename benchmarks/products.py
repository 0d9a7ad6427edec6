"""The floor of a training step: the matrix products of the VAE's four linear layers, forward and backward."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.our_training import Task
from planar_vae_jax.vae.binarization import binarize


def shapes(task: Task) -> dict[str, tuple[int, int]]:
    """Kernels of the four layers; the encoder's two heads are one layer."""
    pixels = task.pixels[0].size
    return {
        "encode": (pixels, task.hidden),
        "heads": (task.hidden, 2 * task.latent),
        "decode": (task.latent, task.hidden),
        "logits": (task.hidden, pixels),
    }


def operations(task: Task) -> int:
    """Of a step's products: forward, by the weights, and by the inputs but for the pixels."""
    sizes = {name: rows * columns for name, (rows, columns) in shapes(task).items()}
    return 2 * task.batch_size * (3 * sum(sizes.values()) - sizes["encode"])


def products(task: Task) -> Callable[[], Any]:
    """An epoch of products alone, on batches that are drawn beforehand: 4 forward, 4 by weights, 3 by inputs.

    Every result is an input of a later product or is handed on, so that no product can be left out.
    """
    latent, kernels = task.latent, shapes(task)
    keys = jax.random.split(jax.random.key(task.seed), len(kernels))
    weights = {
        name: jax.random.normal(key, shape) / shape[0] ** 0.5
        for key, (name, shape) in zip(keys, kernels.items(), strict=True)
    }
    pixels = task.pixels[: task.epoch_steps * task.batch_size]
    x = jax.jit(lambda pixels: binarize(jax.random.key(0), pixels, "dynamic"))(jnp.asarray(pixels))
    batches = x.reshape(task.epoch_steps, task.batch_size, -1)

    @jax.jit
    def epoch(weights: Any, batches: Any) -> Any:
        return jax.lax.scan(lambda _, x: (_backward(weights, x, latent), None), weights, batches)[0]

    return lambda: jax.block_until_ready(epoch(weights, batches))


def _backward(weights: Any, x: Any, latent: int) -> Any:
    """What has the shapes of the weights' gradient."""
    features = x @ weights["encode"]
    heads = features @ weights["heads"]
    z = heads[:, :latent]
    hidden = z @ weights["decode"]
    logits = hidden @ weights["logits"]
    hidden_bar = logits @ weights["logits"].T
    z_bar = hidden_bar @ weights["decode"].T
    heads_bar = jnp.concatenate([z_bar, z_bar], 1)
    features_bar = heads_bar @ weights["heads"].T
    return {
        "encode": x.T @ features_bar,
        "heads": features.T @ heads_bar,
        "decode": z.T @ hidden_bar,
        "logits": hidden.T @ logits,
    }
