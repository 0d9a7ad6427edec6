"""Figures of a data set under a trained VAE, in nats an image.

The estimators are those of :mod:`planar_vae_jax.vae.objectives`. What is drawn for an image follows from a key of that
image, which depends on the split and on the image's index in the split alone (:func:`fixed_images`). So no figure
depends on the seed of a run (except through the parameters), on the number of importance samples, on a batch size, on
the number of devices or on the generator used in training, and differences between runs are paired.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from planar_vae_jax.data.streamed import Streamed, map_ahead
from planar_vae_jax.keys import is_key
from planar_vae_jax.statistics import mean_and_error, means_and_errors
from planar_vae_jax.train import mesh as meshes
from planar_vae_jax.vae import objectives
from planar_vae_jax.vae.binarization import binarize_each
from planar_vae_jax.vae.model import Posterior

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Key, UInt8, UInt32

BATCH = 1000  # images decoded at a time: a gated convolution keeps 0.2 MB for each of 28 x 28 pixels
_SPLITS = ("test", "valid", "train")
_CHUNK = 128  # importance samples of an image at a time


class Figures(NamedTuple):
    """Figures of each image, ``[N]``; nats, except for the squared error and the effective sample size."""

    free_energy: np.ndarray
    nll: np.ndarray  # an estimate of -log p(x) by importance sampling
    reconstruction: np.ndarray
    kl: np.ndarray
    squared_error: np.ndarray
    effective_sample_size: np.ndarray
    nll_course: np.ndarray | None = None  # [N, M], the NLL from the first S/4, S/2 and S samples


class Images(NamedTuple):
    """Images as they are evaluated, and the key of each."""

    pixels: jax.Array  # [N, H, W] or [N, H, W, C] uint8; 0 or 255 unless they are grey levels
    keys: jax.Array  # [N], of the posterior samples

    def take(self, rows: np.ndarray) -> Images:
        """The images of these rows."""
        return _taken(self, rows)


@jax.jit
def _taken(images: Images, rows: jax.Array) -> Images:
    return jax.tree.map(lambda leaf: leaf[rows], images)


def fixed_key() -> Key[Array, ""]:
    """The key of everything that is drawn alike for every run: threefry, whatever JAX's default generator is."""
    return jax.random.key(0, impl="threefry2x32")


def fixed_images(images: np.ndarray, index: np.ndarray, split: str, binarization: str) -> Images:
    """Binarises images once, each by the key of its place in the split.

    Args:
        images: ``[N, H, W]`` or ``[N, H, W, C]`` uint8.
        index: ``[N]``, the position of each image in the whole split, before classes are selected.
        split: ``"train"``, ``"valid"`` or ``"test"``.
        binarization: one of ``BINARIZATIONS``; ``dynamic`` and ``static`` are the same here.

    Raises:
        ValueError: if ``split`` or ``binarization`` is unknown.
    """
    return _fixed_images(images, np.asarray(index, np.uint32), split_key(split), binarization)


@functools.partial(jax.jit, static_argnames="binarization")
def _fixed_images(images: jax.Array, index: jax.Array, key: jax.Array, binarization: str) -> Images:
    return draw_images(images, keys_by_index(key, index), binarization)


def split_key(split: str) -> Key[Array, ""]:
    """The key of a split, from which those of its images follow (:func:`keys_by_index`).

    Raises:
        ValueError: if ``split`` is not ``"train"``, ``"valid"`` or ``"test"``.
    """
    if split not in _SPLITS:
        raise ValueError(f"split must be one of {', '.join(sorted(_SPLITS))}; got {split!r}")
    return jax.random.fold_in(fixed_key(), _SPLITS.index(split))


def keys_by_index(key: Key[Array, ""], index: UInt32[Array, " N"]) -> Key[Array, " N"]:
    """Keys ``[N]`` of the images at these positions: of position i the same in every batch, as the key is threefry."""
    return jax.vmap(lambda number: jax.random.fold_in(key, number))(index)


def evaluated_images(
    images: Any, index: np.ndarray, split: str, binarization: str, *, on_host: bool = False
) -> Images | Streamed:
    """:func:`fixed_images`; with ``on_host`` they are binarised and sent chunk by chunk, with the same draws.

    Args:
        images: ``[N, H, W]`` or ``[N, H, W, C]`` uint8, which may be a memory-mapped file.
    """
    if not on_host:
        return fixed_images(np.asarray(images), index, split, binarization)

    def fetch(rows: np.ndarray) -> Images:
        return fixed_images(np.asarray(images[rows]), index[rows], split, binarization)

    like = _one_of(images), jax.ShapeDtypeStruct((8,), np.uint8)  # as many bytes as a key
    return Streamed(fetch, like, len(images))


def training_images(images: Any, index: np.ndarray, binarization: str, *, on_host: bool = False) -> Any:
    """uint8 images as training takes them: for ``"static"`` they are drawn once, alike for every seed.

    Args: as for :func:`evaluated_images`.
    """
    if not on_host:
        whole = np.asarray(images)
        return np.asarray(fixed_images(whole, index, "train", "static").pixels) if binarization == "static" else whole

    def fetch(rows: np.ndarray) -> Any:
        pixels = np.asarray(images[rows])
        return fixed_images(pixels, index[rows], "train", "static").pixels if binarization == "static" else pixels

    return Streamed(fetch, _one_of(images), len(images))


def _one_of(images: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(images.shape[1:], images.dtype)


def draw_images(images: UInt8[Array, "N H W *C"], keys: Key[Array, " N"], binarization: str) -> Images:
    """Binarises images, each by its key, from which the key of its posterior samples follows too."""
    keys = jax.vmap(jax.random.split)(keys)
    pixels = map_batches(functools.partial(_binarized, binarization=binarization), (images, keys[:, 0]), BATCH)
    return Images(pixels, keys[:, 1])


def draw_batch(images: UInt8[Array, "N H W *C"], keys: Key[Array, " N"], binarization: str) -> Images:
    """:func:`draw_images` of all images at a time; N may be a symbolic dimension of ``jax.export``."""
    keys = jax.vmap(jax.random.split)(keys)
    return Images(_binarized(images, keys[:, 0], binarization), keys[:, 1])


def _binarized(images: jax.Array, keys: jax.Array, binarization: str) -> jax.Array:
    """uint8 again: 0 or 255, or the grey levels as they are."""
    return jnp.round(255.0 * binarize_each(keys, images, binarization)).astype(jnp.uint8)


def unit_pixels(pixels: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """uint8 to float32 in [0, 1]; 0 and 255 become 0 and 1 exactly."""
    return pixels.astype(jnp.float32) / 255.0


def map_batches(function: Callable[..., Any], arrays: tuple[jax.Array, ...], batch_size: int) -> Any:
    """``function(*batches)`` over the leading axis ``N`` of the arrays, one batch after the other on the device.

    The last batch is filled up with earlier entries, whose results are dropped: each leaf is ``[N, ...]``. Under a mesh
    (:mod:`planar_vae_jax.train.mesh`) each batch is split over the devices.
    """
    size = len(arrays[0])
    if size == 0:
        return function(*arrays)
    batch_size = _batch_size(size, batch_size)
    batches = -(-size // batch_size)
    indices = (jnp.arange(batches * batch_size) % size).reshape(batches, batch_size)
    indices = meshes.split(indices, axis=1)
    results = jax.lax.map(lambda index: function(*(_rows(array, index) for array in arrays)), indices)
    return meshes.everywhere(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:size], results))


def _rows(array: jax.Array, index: jax.Array) -> jax.Array:
    """``array[index]``; of keys by their words, since JAX_DEBUG_KEY_REUSE takes rows of one array for one key."""
    if not is_key(array):
        return array[index]
    return jax.random.wrap_key_data(jax.random.key_data(array)[index], impl=jax.random.key_impl(array))


def _batch_size(size: int, most: int) -> int:
    devices = meshes.size()
    return -(-max(1, min(most, size)) // devices) * devices


def map_chunks(function: Callable[[Images], Any], images: Images | Streamed, batch_size: int) -> Any:
    """``function(images)``; streamed images are taken chunk by chunk, and each leaf ``[N, ...]`` is NumPy's then.

    A chunk has whole batches of what ``function`` gives to :func:`map_batches`, so the results are the same bits.
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


# --- Figures of each image


@functools.partial(jax.jit, static_argnames="batch_size")
def free_energy_terms(model: objectives.Model, images: Images, *, batch_size: int = BATCH) -> objectives.Terms:
    """Terms of the free energy of each image, ``[N]`` each, with one sample of ``z_0``.

    Args:
        model: a VAE.
        images: of :func:`fixed_images` or :func:`draw_images`.
        batch_size: images decoded at a time; it bounds the memory and changes no figure.
    """

    return map_batches(lambda *rows: terms_of_batch(model, Images(*rows)), images, batch_size)


def terms_of_batch(model: objectives.Model, images: Images) -> objectives.Terms:
    """:func:`free_energy_terms` of all images at a time."""
    return objectives.free_energy(model, unit_pixels(images.pixels), objectives.fold_in_each(images.keys, 0))


@functools.partial(jax.jit, static_argnames=("samples", "batch_size"))
def marginal_likelihood(
    model: objectives.Model, images: Images, *, samples: int | tuple[int, ...], batch_size: int = BATCH
) -> objectives.MarginalLikelihood:
    """``-log p(x)`` of each image by importance sampling, with the effective sample size, ``[N]`` each.

    Args:
        model: a VAE.
        images: of :func:`fixed_images` or :func:`draw_images`.
        samples: S, importance samples of an image; for several numbers S the result is ``[N, M]``
            (:func:`planar_vae_jax.vae.objectives.importance_nll`).
        batch_size: samples decoded at a time, of all images together.
    """
    chunk = _samples_at_once(samples, batch_size)
    return map_batches(
        lambda *rows: likelihood_of_batch(model, Images(*rows), samples, chunk),
        images,
        images_at_once(samples, batch_size),
    )


def likelihood_of_batch(
    model: objectives.Model, images: Images, samples: int | tuple[int, ...], chunk: int = _CHUNK
) -> objectives.MarginalLikelihood:
    """:func:`marginal_likelihood` of all images at a time, ``chunk`` samples of each."""
    keys = objectives.fold_in_each(images.keys, 1)
    found = objectives.importance_nll(model, unit_pixels(images.pixels), keys, samples=samples, chunk=chunk)
    return jax.tree.map(jnp.transpose, found)  # images first


def _samples_at_once(samples: int | tuple[int, ...], batch_size: int) -> int:
    """How many samples of an image are decoded at a time."""
    return min(samples if isinstance(samples, int) else max(samples), _CHUNK, batch_size)


def images_at_once(samples: int | tuple[int, ...], batch_size: int) -> int:
    """How many images have samples decoded at a time, if ``batch_size`` samples are."""
    return max(1, batch_size // _samples_at_once(samples, batch_size))


def _terms(model: objectives.Model, images: Images | Streamed, batch_size: int = BATCH) -> Any:  # objectives.Terms
    return map_chunks(functools.partial(free_energy_terms, model, batch_size=batch_size), images, batch_size)


def _likelihood(
    model: objectives.Model, images: Images | Streamed, samples: int | tuple[int, ...], batch_size: int = BATCH
) -> Any:  # objectives.MarginalLikelihood
    function = functools.partial(marginal_likelihood, model, samples=samples, batch_size=batch_size)
    return map_chunks(function, images, images_at_once(samples, batch_size))


def evaluate(
    model: objectives.Model, images: Images | Streamed, *, nll_samples: int, batch_size: int = BATCH
) -> Figures:
    """All figures of each image, on the host.

    Args:
        model: a VAE.
        images: of :func:`fixed_images`, or streamed.
        nll_samples: importance samples of an image for its NLL.
        batch_size: images decoded at a time; it bounds the memory, and figures depend on it by rounding alone.
    """
    terms = _terms(model, images, batch_size)
    likelihood = _likelihood(model, images, objectives.sample_counts(nll_samples), batch_size)
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


def mean_loss(
    model: objectives.Model, images: Images | Streamed, objective: str, split: str, train_samples: int = 1
) -> dict[str, float | None]:
    """The loss of the images without annealing: ``{SPLIT_loss: mean, SPLIT_loss_se: its standard error}``.

    Args:
        model: a VAE.
        images: of :func:`fixed_images`, or streamed.
        objective: one of ``OBJECTIVES``.
        split: the name in the result.
        train_samples: of ``"iwae"``: samples of each image, as in training.
    """
    if objective == "iwae" and train_samples > 1:
        losses = _likelihood(model, images, train_samples).nll
    else:
        losses = _terms(model, images).objective("elbo" if objective == "iwae" else objective)
    mean, error = mean_and_error(np.asarray(losses))
    return {f"{split}_loss": mean, f"{split}_loss_se": error}


# --- Means of figures


def means(figures: Figures, rows: Any = slice(None)) -> dict[str, float | None]:
    """``{name: mean, name_se: its standard error}`` of every figure over the images in ``rows``."""
    return means_and_errors({name: values[rows] for name, values in figures._asdict().items() if name != "nll_course"})


def nll_by_samples(figures: Figures, nll_samples: int) -> dict[str, dict[str, Any]]:
    """The mean NLL from S/4, S/2 and S importance samples, which agree where the estimate has converged.

    Returns:
        ``{"nll_by_samples": {number of samples: mean}, "nll_by_samples_se": {...: its standard error}}``.
    """
    assert figures.nll_course is not None
    counts = objectives.sample_counts(nll_samples)
    columns = np.asarray(figures.nll_course, np.float64).T
    rows = {str(count): means_and_errors({"nll": column}) for count, column in zip(counts, columns, strict=True)}
    return {f"nll_by_samples{end}": {count: row[f"nll{end}"] for count, row in rows.items()} for end in ("", "_se")}


def means_by_class(figures: Figures, labels: np.ndarray | None) -> dict[str, dict[str, Any]]:
    """``{label: number of images, means and standard errors}`` for labels ``[N]``; empty without labels."""
    if labels is None:
        return {}
    rows = {str(label): labels == label for label in np.unique(labels)}
    return {label: {"images": int(np.sum(row)), **means(figures, row)} for label, row in rows.items()}


def with_bits_per_dim(row: Mapping[str, Any], dims: int) -> dict[str, Any]:
    """A row of :func:`means` with the NLL in bits for each of the ``dims`` pixels (times channels) of an image."""
    unit = dims * math.log(2.0)
    bits = {f"bits_per_dim{end}": row[f"nll{end}"] for end in ("", "_se")}
    return {**row, **{name: None if nats is None else nats / unit for name, nats in bits.items()}}


# --- Pictures


def pictures(model: objectives.Model, z: Float[Array, "*B L"]) -> Float[Array, "..."]:
    """Pixel means ``[..., H, W]`` (or ``[..., H, W, C]``) in 0..1 of ``z [..., L]``."""
    return model.likelihood.mean(model.decode(z))


@functools.partial(jax.jit, static_argnames="batch_size")
def reconstruct(
    model: objectives.Model, pixels: UInt8[Array, "N H W *C"], *, batch_size: int = BATCH
) -> Float[Array, "N H W *C"]:
    """Pictures decoded from the mean of each posterior, sent through the flow."""
    return map_batches(
        lambda rows: pictures(model, code_of_mean(model.encode(unit_pixels(rows)))), (pixels,), batch_size
    )


def code_of_mean(posterior: Posterior) -> Float[Array, "*B L"]:
    """``z_K``, which the flow makes of the mean of q_0; it is the mean of ``z_K`` only without a flow."""
    return posterior.transform(jnp.zeros_like(posterior.mean))[0]


def abstract_posterior(model: objectives.Model, image_shape: tuple[int, ...], images: int = 1) -> Any:
    """``q(z|x)`` of a batch of images, with shapes and dtypes instead of arrays; nothing is computed."""
    image = jax.ShapeDtypeStruct((images, *image_shape), jnp.float32)
    return jax.eval_shape(lambda model, image: model.encode(image), model, image)


@functools.partial(jax.jit, static_argnames=("image_shape", "count", "batch_size"))
def sample_prior(
    model: objectives.Model, image_shape: tuple[int, ...], key: Key[Array, ""], count: int, *, batch_size: int = BATCH
) -> Float[Array, "N H W *C"]:
    """``count`` pictures decoded from ``z_K ~ N(0, I)``.

    Args:
        model: a VAE.
        image_shape: of one image, ``(H, W)`` or ``(H, W, C)``.
        key: of the draws.
        count: how many pictures.
        batch_size: images decoded at a time.
    """
    like = abstract_posterior(model, image_shape).mean
    z = jax.random.normal(key, (count, like.shape[-1]), like.dtype)
    return map_batches(lambda z: pictures(model, z), (z,), batch_size)
