"""Figures of a data set under a trained VAE (estimators: ``objectives``), each image drawn by a key of its own.

The key of an image follows from the split and the image's index in it alone. So no figure depends on a run's seed (but
through its parameters), on the number of importance samples, on a batch size or on the generator that a run trained
with, and the differences between two runs' figures are paired.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from planar_vae_jax.data.streamed import Streamed, map_ahead
from planar_vae_jax.statistics import mean_and_error, means_and_errors
from planar_vae_jax.train import mesh as meshes
from planar_vae_jax.vae import objectives
from planar_vae_jax.vae.binarization import binarize_each
from planar_vae_jax.vae.model import VAE

BATCH = 1000  # images at a time; fixed, so that the last bits of a figure depend on nothing
DECODED = 16_000  # images decoded at a time for the marginal likelihood, so that memory is bounded
DECODED_BY_CONVOLUTIONS = 1000  # 64 channels of 28 x 28 pixels are 0.2 MB an image
_SPLITS = ("test", "valid", "train")


class Figures(NamedTuple):
    """Figures of each image, ``[N]``; nats but for squared error and effective sample size."""

    free_energy: np.ndarray
    nll: np.ndarray
    reconstruction: np.ndarray
    kl: np.ndarray
    squared_error: np.ndarray
    effective_sample_size: np.ndarray
    nll_course: np.ndarray | None = None  # [N, M], the NLL from the first S/4, S/2 and S samples


class Images(NamedTuple):
    """Images as they are evaluated, and what is drawn for each of them."""

    pixels: jax.Array  # [N, H, W] or [N, H, W, C] uint8; 0 or 255 but for grey levels
    keys: jax.Array  # [N], of posterior samples

    def take(self, rows: np.ndarray) -> "Images":
        """Some of them."""
        return _taken(self, rows)


@jax.jit
def _taken(images: Images, rows: jax.Array) -> Images:
    return jax.tree.map(lambda leaf: leaf[rows], images)


def fixed_key() -> jax.Array:
    """The key of what is drawn alike for every run: of threefry, whatever JAX's default is."""
    return jax.random.key(0, impl="threefry2x32")


def fixed_images(images: np.ndarray, index: np.ndarray, split: str, binarization: str) -> Images:
    """Binarises images once, each by its own key.

    Args:
        images: ``[N, H, W]`` or ``[N, H, W, C]`` uint8.
        index: ``[N]``, the position of each in the whole split.
        split: ``"train"``, ``"valid"`` or ``"test"``.
        binarization: one of ``BINARIZATIONS``; ``dynamic`` and ``static`` are the same here.
    """
    return _fixed_images(images, np.asarray(index, np.uint32), _SPLITS.index(split), binarization)


@functools.partial(jax.jit, static_argnames="binarization")
def _fixed_images(images: jax.Array, index: jax.Array, split: jax.Array | int, binarization: str) -> Images:
    # threefry: with another generator, what vmap draws would depend on the batch.
    split_key = jax.random.fold_in(fixed_key(), split)
    return draw_images(images, jax.vmap(lambda number: jax.random.fold_in(split_key, number))(index), binarization)


def draw_images(images: jax.Array, keys: jax.Array, binarization: str) -> Images:
    """Images ``[N, H, W]`` uint8 binarised by keys ``[N]``, one an image, from which its samples follow too."""
    keys = jax.vmap(jax.random.split)(keys)

    def batch(images: jax.Array, keys: jax.Array) -> jax.Array:
        return jnp.round(255.0 * binarize_each(keys, images, binarization)).astype(jnp.uint8)

    return Images(map_batches(batch, (images, keys[:, 0]), BATCH), keys[:, 1])


def unit_pixels(pixels: jax.Array) -> jax.Array:
    """uint8 to float32 in [0, 1]; 0 and 255 are 0 and 1 exactly."""
    return pixels.astype(jnp.float32) / 255.0


def map_batches(function: Callable[..., Any], arrays: tuple[jax.Array, ...], batch_size: int) -> Any:
    """``function(*batches)`` over the leading axis ``N`` of the arrays, a batch after the other on the device.

    The last batch is filled up with entries seen before, whose results are dropped: each leaf is ``[N, ...]``. Under a
    mesh (:mod:`planar_vae_jax.train.mesh`) each batch is split over its devices.
    """
    size = len(arrays[0])
    if size == 0:
        return function(*arrays)
    batch_size = _batch_size(size, batch_size)
    batches = -(-size // batch_size)
    indices = (jnp.arange(batches * batch_size) % size).reshape(batches, batch_size)
    indices = meshes.split(indices, axis=1)
    results = jax.lax.map(lambda index: function(*(array[index] for array in arrays)), indices)
    return meshes.everywhere(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:size], results))


def _batch_size(size: int, most: int) -> int:
    devices = meshes.size()
    return -(-max(1, min(most, size)) // devices) * devices


def map_chunks(function: Callable[[Images], Any], images: Images | Streamed, batch_size: int) -> Any:
    """``function(images)``, of streamed images chunk by chunk, each leaf ``[N, ...]`` then of NumPy's.

    Chunks are of whole batches of what ``function`` gives :func:`map_batches`, so these are the same, and their bits.
    """
    if not isinstance(images, Streamed):
        return function(images)
    size, batch_size = len(images), _batch_size(len(images), batch_size)
    length = images.steps_of_chunk(-(-size // batch_size), batch_size) * batch_size
    parts = map_ahead(
        lambda chunk: jax.tree.map(np.asarray, function(chunk)),
        lambda start: images.take((start + np.arange(length)) % size),
        range(0, size, length),
    )
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:size], *parts)


@functools.partial(jax.jit, static_argnames="vae")
def free_energy_terms(vae: VAE, params: Any, images: Images) -> objectives.Terms:
    """Terms of the free energy of each image, ``[N]`` each, with one sample of ``z_0``."""

    def batch(pixels: jax.Array, keys: jax.Array) -> objectives.Terms:
        return objectives.free_energy(vae.bind(params), unit_pixels(pixels), objectives.fold_in_each(keys, 0))

    return map_batches(batch, images, BATCH)


@functools.partial(jax.jit, static_argnames=("vae", "samples"))
def marginal_likelihood(
    vae: VAE, params: Any, images: Images, *, samples: int | tuple[int, ...]
) -> objectives.MarginalLikelihood:
    """``-log p(x)`` of each image from ``samples`` importance samples, with the effective sample size, ``[N]`` each.

    Of several numbers of samples (:func:`planar_vae_jax.vae.objectives.importance_nll`): ``[N, M]``.
    """
    chunk = _samples_decoded(samples)

    def batch(pixels: jax.Array, keys: jax.Array) -> objectives.MarginalLikelihood:
        model = vae.bind(params)
        keys = objectives.fold_in_each(keys, 1)
        found = objectives.importance_nll(model, unit_pixels(pixels), keys, samples=samples, chunk=chunk)
        return jax.tree.map(jnp.transpose, found)  # images first

    return map_batches(batch, images, _images_decoded(vae, samples))


def _images_decoded(vae: VAE, samples: int | tuple[int, ...]) -> int:
    """How many images have samples decoded at a time."""
    return (DECODED_BY_CONVOLUTIONS if vae.encoder == "conv" else DECODED) // _samples_decoded(samples)


def _samples_decoded(samples: int | tuple[int, ...]) -> int:
    """How many samples of an image are decoded at a time."""
    return min(samples if isinstance(samples, int) else max(samples), 128)


def _terms(vae: VAE, params: Any, images: Images | Streamed) -> Any:  # objectives.Terms
    return map_chunks(functools.partial(free_energy_terms, vae, params), images, BATCH)


def _likelihood(vae: VAE, params: Any, images: Images | Streamed, samples: int | tuple[int, ...]) -> Any:
    function = functools.partial(marginal_likelihood, vae, params, samples=samples)
    return map_chunks(function, images, _images_decoded(vae, samples))


def evaluate(vae: VAE, params: Any, images: Images | Streamed, *, nll_samples: int) -> Figures:
    """All figures of each image, on the host."""
    terms = _terms(vae, params, images)
    likelihood = _likelihood(vae, params, images, objectives.sample_counts(nll_samples))
    figures = Figures(
        terms.free_energy,
        likelihood.nll[:, -1],
        terms.reconstruction,
        terms.kl,
        terms.squared_error,
        likelihood.effective_sample_size[:, -1],
        likelihood.nll,
    )
    return jax.tree.map(np.asarray, figures)


def means(figures: Figures, rows: Any = slice(None)) -> dict[str, float | None]:
    """``{name: mean, name_se: its standard error}`` of every figure over the images in ``rows``."""
    return means_and_errors({name: values[rows] for name, values in figures._asdict().items() if name != "nll_course"})


def nll_by_samples(figures: Figures, nll_samples: int) -> dict[str, dict[str, Any]]:
    """``"nll_by_samples"``, ``{number of importance samples: mean NLL}`` for S/4, S/2 and S of them (the same where the
    estimate is exact), and ``"nll_by_samples_se"``, their standard errors."""
    assert figures.nll_course is not None
    counts = objectives.sample_counts(nll_samples)
    columns = np.asarray(figures.nll_course, np.float64).T
    rows = {str(count): means_and_errors({"nll": column}) for count, column in zip(counts, columns, strict=True)}
    return {f"nll_by_samples{end}": {count: row[f"nll{end}"] for count, row in rows.items()} for end in ("", "_se")}


def means_by_class(figures: Figures, labels: np.ndarray | None) -> dict[str, dict[str, Any]]:
    """``{label: number of images, means and standard errors}``; empty where there are no labels ``[N]``."""
    if labels is None:
        return {}
    rows = {str(label): labels == label for label in np.unique(labels)}
    return {label: {"images": int(np.sum(row)), **means(figures, row)} for label, row in rows.items()}


def with_bits_per_dim(row: dict[str, Any], dims: int) -> dict[str, Any]:
    """A row of :func:`means` with its NLL in bits for each of the ``dims`` pixels (and channels) of an image beside."""
    unit = dims * math.log(2.0)
    bits = {f"bits_per_dim{end}": row[f"nll{end}"] for end in ("", "_se")}
    return row | {name: None if nats is None else nats / unit for name, nats in bits.items()}


def mean_loss(
    vae: VAE, params: Any, images: Images | Streamed, objective: str, split: str, train_samples: int = 1
) -> dict[str, float | None]:
    """``{SPLIT_loss: ..., SPLIT_loss_se: its standard error}`` of the ``objective``, without annealing.

    Of ``"iwae"``: the bound from ``train_samples`` samples, as it is trained.
    """
    if objective == "iwae" and train_samples > 1:
        losses = _likelihood(vae, params, images, train_samples).nll
    else:
        losses = _terms(vae, params, images).objective("elbo" if objective == "iwae" else objective)
    mean, error = mean_and_error(np.asarray(losses))
    return {f"{split}_loss": mean, f"{split}_loss_se": error}


def pictures(model: objectives.Model, z: jax.Array) -> jax.Array:
    """Pixel means ``[..., H, W]`` (or ``[..., H, W, 3]``) of ``z [..., L]``."""
    return model.likelihood.mean(model.decode(z))


@functools.partial(jax.jit, static_argnames="vae")
def reconstruct(vae: VAE, params: Any, pixels: jax.Array) -> jax.Array:
    """Pictures (pixel means) ``[N, H, W]`` decoded from the posterior's mean sent through the flow; pixels uint8."""
    model = vae.bind(params)
    posterior = model.encode(unit_pixels(pixels))
    zK, _, _ = posterior.transform(jnp.zeros_like(posterior.mean))
    return pictures(model, zK)


@functools.partial(jax.jit, static_argnames=("vae", "count"))
def sample_prior(vae: VAE, params: Any, key: jax.Array, count: int) -> jax.Array:
    """Pictures (pixel means) ``[count, H, W]`` decoded from ``z_K ~ N(0, I)``."""
    return pictures(vae.bind(params), jax.random.normal(key, (count, vae.latent), vae.dtype))
