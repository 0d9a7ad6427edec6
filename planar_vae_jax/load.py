"""A trained model, ready to use: ``load_run(workdir)`` opens the folder of a run.

::

    run = load_run("runs/mnist-flows=5-seed=0")
    pictures = run.reconstruct(images)              # images [N, H, W], uint8 0..255 or float 0..1
    pictures = run.sample(jax.random.key(0), 64)    # [64, H, W] in 0..1

For a run of another experiment, pass a function that makes its model, ``load_run(workdir, build=build)``::

    def build(flags, image_shape):                  # the flags of the run, by name
        return VAE(MyEncoder(image_shape, rngs=nnx.Rngs(0)), ...)
"""

import dataclasses
import functools
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from planar_vae_jax.analysis import evaluation, latent
from planar_vae_jax.analysis.evaluation import Images
from planar_vae_jax.vae import objectives, whole_number
from planar_vae_jax.vae.likelihoods import default_binarization
from planar_vae_jax.vae.model import VAE
from planar_vae_jax.vae.objectives import Model

Array = jax.Array | np.ndarray
Build = Callable[[Mapping[str, Any], tuple[int, ...]], Model]  # (flags, image_shape) -> a module
NEARLY_BLACK = "uint8 images are 0 to 255, and these are 0 and 1; multiply them by 255 if 1 was meant as white"
_SLACK = 1e-6  # how far rounding may carry black and white out of 0..1
_BUFFER = 1000  # pictures that a compiled program has room for
_AT_ONCE = 20  # images at a time; a single one costs as much
_SAMPLES = 128  # importance samples at a time


class Scores(NamedTuple):
    """How well a model explains each image, ``[N]``, nats; less is better."""

    free_energy: jax.Array  # with one sample of z
    nll: jax.Array  # -log p(x) by importance sampling


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained VAE as functions on images.

    Images are ``[N, H, W]`` (or ``[N, H, W, 3]``) of the size that the run was trained on, uint8 in 0..255 or floats in
    0..1, and are binarised as in training. Pictures are pixel means of that shape in 0..1, and ``z`` is ``[N, L]``.
    Figures are ``[N]`` in nats; :func:`planar_vae_jax.vae.likelihoods.measured` says what these nats measure. The draws
    for image i depend on the key and on i alone; a method without a key binarises image i by a fixed key of i.

    Any number N of images is taken, in memory that grows with N only by the images and the results. A method compiles
    one program for all N: it has room for 1000 images and loops over those that are there, 20 at a time (for the NLL
    of 128 samples or more, and for a traversal, one at a time). So one image costs as much as 20.

    Raises:
        ValueError: (every method) if images or ``z`` have another shape, dtype or range, or if a number is not a whole
            number in its range.
    """

    config: Mapping[str, Any]  # every flag of the run
    model: Model = dataclasses.field(repr=False)  # a VAE
    step: int  # training steps up to the checkpoint
    binarization: str  # one of BINARIZATIONS
    image_shape: tuple[int, ...] = ()  # (H, W) or (H, W, C); (): that of the model's encoder

    def __post_init__(self) -> None:
        if not self.image_shape:
            encoder: Any = getattr(self.model, "encoder", None)
            object.__setattr__(self, "image_shape", tuple(encoder.image_shape))

    # --- Codes

    def encode(self, images: Array, key: jax.Array) -> jax.Array:
        """Returns a sample ``z_K ~ q(z|x)`` for each image, ``[N, L]``."""
        return self._of_images(_sample_of_q, (images,), key)

    def latents(self, images: Array, key: jax.Array | None = None) -> jax.Array:
        """Returns a code ``z_K`` for each image, ``[N, L]``.

        Without a key it is the mean of q_0 sent through the layers, the point that :meth:`reconstruct` decodes and at
        which :meth:`interpolate` and :meth:`traverse` begin. With K > 0 this is not the mean of ``z_K``, which would
        take many samples and may lie where q(z|x) has little mass. With a key it is a sample of q(z|x), as
        :meth:`encode` returns it: together a sample of the aggregate posterior.
        """
        if key is not None:
            return self.encode(images, key)
        return self._of_images(_code_of_mean, (images,), evaluation.fixed_key())

    def posterior(self, images: Array) -> Any:
        """Returns ``q(z|x)`` of the images, for an ``experiments.mnist`` run a :class:`~planar_vae_jax.PlanarFlow`.

        Its leaves are ``[N, ...]``. A leaf that all images share, such as the layers unless they are amortised, has no
        axis of images. So ``run.posterior(images).sample(key)`` and ``.log_prob(z)`` are ``[N, L]`` and ``[N]``.
        """
        own = _of_each_image(self.model, self.image_shape)
        leaves = _posterior_of_nothing(self.model, self.image_shape)
        found = self._of_images(_leaves_of_q, (images,), evaluation.fixed_key(), numbers=own)
        leaves, structure = jax.tree.flatten(leaves)
        for number, leaf in zip(own, found, strict=True):
            leaves[number] = leaf
        return jax.tree.unflatten(structure, leaves)

    def decode(self, z: Array) -> jax.Array:
        """Returns the pictures that the decoder gives for ``z``."""
        like = evaluation.abstract_posterior(self.model, self.image_shape).mean
        z = np.asarray(z, like.dtype)
        if z.ndim != 2 or z.shape[1] != like.shape[-1]:
            raise ValueError(f"z must be [N, {like.shape[-1]}], as the run was trained; got {list(z.shape)}")
        return _mapped(_decode, self.model, (), (z,))

    # --- Pictures

    def reconstruct(self, images: Array) -> jax.Array:
        """Returns the decoded picture of each image, z_0 being the mean of q_0."""
        return self._of_images(_reconstruct, (images,), evaluation.fixed_key())

    def sample(self, key: jax.Array, n: int) -> jax.Array:
        """Returns ``n`` pictures decoded from draws of the prior; picture i is the same for every ``n``."""
        n, key = whole_number("n", n, 0), objectives.typed_key(key)
        like = evaluation.abstract_posterior(self.model, self.image_shape).mean
        return _mapped(_sample, self.model, (key, np.zeros(like.shape[-1], like.dtype)), (_index(n),))

    def interpolate(self, left: Array, right: Array, steps: int = latent.STEPS) -> latent.Interpolations:
        """Returns the pictures on a straight line from each image of ``left`` to that of ``right``.

        ``[N, steps, H, W]`` each; ``base``: on the line in the space of z_0; ``code``: in that of z_K
        (:func:`planar_vae_jax.analysis.interpolate`). Both begin and end at the reconstructions.

        Raises:
            ValueError: also if there are not as many images at the left as at the right.
        """
        steps = whole_number("steps", steps, 2)
        if len(left) != len(right):
            raise ValueError(f"left and right must be as many images; got {len(left)} and {len(right)}")
        return self._of_images(_interpolate, (left, right), evaluation.fixed_key(), size=steps, steps=steps)

    def traverse(
        self, images: Array, dimensions: Sequence[int] | None = None, values: Array | Sequence[float] = latent.VALUES
    ) -> jax.Array:
        """Returns pictures around each image, ``[N, D, T, H, W]``: a coordinate of its code is set to other values.

        Args:
            images: ``[N, H, W]``; the code of each is that of :meth:`latents`.
            dimensions: D numbers of coordinates, from 0; all of them by default.
            values: T values, by default 13 from -3 to 3.

        Raises:
            ValueError: also for a coordinate that ``z`` does not have.
        """
        like = evaluation.abstract_posterior(self.model, self.image_shape).mean
        size = like.shape[-1]
        chosen = [whole_number("dimensions", one, 0) for one in (range(size) if dimensions is None else dimensions)]
        if max(chosen, default=0) >= size:
            raise ValueError(f"dimensions must be numbers from 0 to {size - 1}, as z is [N, {size}]; got {max(chosen)}")
        where = np.asarray(chosen, np.int32), np.asarray(values, like.dtype)
        if where[1].ndim != 1:
            raise ValueError(f"values must be [T]; got {list(where[1].shape)}")
        size = where[0].size * where[1].size
        return self._of_images(_traverse, (images,), evaluation.fixed_key(), *where, size=size, at_once=1)

    # --- Figures

    def free_energy(self, images: Array, key: jax.Array) -> jax.Array:
        """Returns the free energy of each image, estimated with one sample of z."""
        return self._of_images(_free_energy, (images,), key)

    def nll(self, images: Array, key: jax.Array, samples: int = 128) -> jax.Array:
        """Returns ``-log p(x)`` of each image, estimated with ``samples`` importance samples."""
        samples = whole_number("samples", samples, 1)
        at_once = evaluation.images_at_once(samples, _SAMPLES)
        return self._of_images(_nll, (images,), key, at_once=at_once, samples=samples)

    def scores(self, images: Array, samples: int | None = None) -> Scores:
        """Returns free energy and NLL of each image with the random numbers of the test image at the same index.

        So the test images of the run get, to rounding, the figures that the run gave them.

        Args:
            images: ``[N, H, W]``, as for every method.
            samples: importance samples of each image; default: those of the run (its flag ``nll_samples``), or 128.
        """
        samples = self.config.get("nll_samples", 128) if samples is None else samples
        key = evaluation.split_key("test")
        return Scores(self.free_energy(images, key), self.nll(images, key, samples))

    def _of_images(
        self,
        function: Callable[..., Any],
        images: tuple[Array, ...],
        key: jax.Array,
        *more: np.ndarray,
        at_once: int = _AT_ONCE,
        size: int = 1,
        **options: Any,
    ) -> Any:
        """Returns ``function(model, *images, *more, **options)`` of the binarised images, some of them at a time.

        ``size``: how many pictures the result holds for each image, if more than one.
        """
        pixels = [_as_uint8(one, self.image_shape) for one in images]
        of_rows = _OfImages(function, self.binarization, tuple(options.items()))
        rows = (_index(len(pixels[0])), *pixels)
        return _mapped(of_rows, self.model, (objectives.typed_key(key), *more), rows, at_once=at_once, size=size)


@dataclasses.dataclass(frozen=True)
class _OfImages:
    """A function of binarised images as one of grey images and their index; equal ones share a compiled program."""

    function: Callable[..., Any]
    binarization: str
    options: tuple[tuple[str, Any], ...]

    def __call__(self, model: Model, whole: Any, index: jax.Array, *pixels: jax.Array) -> Any:
        key, *more = whole
        keys = evaluation.keys_by_index(key, index)
        images = (evaluation.draw_batch(one, keys, self.binarization) for one in pixels)
        return self.function(model, *images, *more, **dict(self.options))


# --- Any number of rows by one compiled program


def _mapped(
    function: Callable[..., Any],
    model: Model,
    whole: Any,
    arrays: tuple[np.ndarray, ...],
    *,
    at_once: int = _AT_ONCE,
    size: int = 1,
) -> Any:
    """Returns ``function(model, whole, *arrays)``, computed for ``at_once`` rows of the arrays at a time.

    Args:
        function: hashable; its results have the leading axis of the arrays, and each row follows from those of the
            arrays alone.
        model: a VAE.
        whole: what all rows share, a pytree of arrays.
        arrays: ``[N, ...]`` each.
        at_once: rows.
        size: how much larger a row of the results is than a picture: so many times fewer rows are in a buffer.
    """
    rows, count = at_once * max(1, _BUFFER // (at_once * size)), len(arrays[0])
    parts = []
    for start in range(0, max(1, count), rows):
        some = [array[start : start + rows] for array in arrays]
        number = len(some[0])
        filled = [np.concatenate([one, np.zeros((rows - number, *one.shape[1:]), one.dtype)]) for one in some]
        found = _first_rows(function, model, whole, filled, np.int32(number), at_once)
        parts.append(jax.tree.map(lambda leaf, number=number: np.asarray(leaf)[:number], found))
    return jax.device_put(jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts))  # jnp.asarray compiles


@functools.partial(jax.jit, static_argnames=("function", "at_once"))
def _first_rows(
    function: Callable[..., Any], model: Model, whole: Any, arrays: list[jax.Array], number: jax.Array, at_once: int
) -> Any:
    """``function`` of the first ``number`` rows; those beyond the last ``at_once`` of them are not computed."""

    def step(i: jax.Array, results: Any) -> Any:
        some = (jax.lax.dynamic_slice_in_dim(array, i * at_once, at_once) for array in arrays)
        return jax.tree.map(
            lambda result, part: jax.lax.dynamic_update_slice_in_dim(result, part, i * at_once, 0),
            results,
            function(model, whole, *some),
        )

    like = jax.eval_shape(function, model, whole, *(array[:at_once] for array in arrays))
    empty = jax.tree.map(lambda leaf: jnp.zeros((len(arrays[0]), *leaf.shape[1:]), leaf.dtype), like)
    return jax.lax.fori_loop(0, -(-number // at_once), step, empty)


def _index(size: int) -> np.ndarray:
    return np.arange(size, dtype=np.uint32)


# --- What is computed of some rows; images are binarised


def _sample_of_q(model: Model, images: Images) -> jax.Array:
    posterior = model.encode(evaluation.unit_pixels(images.pixels))
    return posterior.transform(objectives.noise(images.keys, posterior.mean))[0]


def _code_of_mean(model: Model, images: Images) -> jax.Array:
    return evaluation.code_of_mean(model.encode(evaluation.unit_pixels(images.pixels)))


def _leaves_of_q(model: Model, images: Images, numbers: tuple[int, ...]) -> list[jax.Array]:
    leaves = jax.tree.leaves(model.encode(evaluation.unit_pixels(images.pixels)))
    return [leaves[number] for number in numbers]


def _of_each_image(model: Model, image_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers of the leaves of ``q(z|x)`` that have an axis of images."""
    one, two = (jax.tree.leaves(evaluation.abstract_posterior(model, image_shape, images)) for images in (1, 2))
    return tuple(number for number, pair in enumerate(zip(one, two, strict=True)) if pair[0].shape != pair[1].shape)


@functools.partial(jax.jit, static_argnames="image_shape")
def _posterior_of_nothing(model: Model, image_shape: tuple[int, ...]) -> Any:
    """``q(z|x)`` of a black image, for the leaves that all images share."""
    return model.encode(jnp.zeros((1, *image_shape), jnp.float32))


def _decode(model: Model, whole: Any, z: jax.Array) -> jax.Array:
    return evaluation.pictures(model, z)


def _sample(model: Model, whole: Any, index: jax.Array) -> jax.Array:
    key, like = whole
    keys = evaluation.keys_by_index(key, index)
    z = jax.vmap(lambda key: jax.random.normal(key, like.shape, like.dtype))(keys)
    return evaluation.pictures(model, z)


def _reconstruct(model: Model, images: Images) -> jax.Array:
    return evaluation.pictures(model, _code_of_mean(model, images))


def _interpolate(model: Model, left: Images, right: Images, steps: int) -> latent.Interpolations:
    return latent.interpolate(model, left.pixels, right.pixels, steps)


def _traverse(model: Model, images: Images, dimensions: jax.Array, values: jax.Array) -> jax.Array:
    """Of one image, ``[1, H, W]``: its pictures are as many as fit into memory."""
    return latent.traverse(model, images.pixels[0], dimensions, values)[None]


def _free_energy(model: Model, images: Images) -> jax.Array:
    return evaluation.terms_of_batch(model, images).free_energy


def _nll(model: Model, images: Images, samples: int) -> jax.Array:
    return evaluation.likelihood_of_batch(model, images, samples).nll


def _as_uint8(images: Array, shape: tuple[int, ...]) -> np.ndarray:
    images = np.asarray(images)
    if images.ndim != 1 + len(shape) or images.shape[1:] != shape:
        wanted = ", ".join(map(str, shape))
        raise ValueError(
            f"images must be [N, {wanted}], the size that the run was trained on; got {list(images.shape)}"
        )
    if images.dtype == np.uint8:
        if np.max(images, initial=0) == 1:
            warnings.warn(NEARLY_BLACK, stacklevel=4)
        return images
    if not jnp.issubdtype(images.dtype, jnp.floating):  # bfloat16 is a floating dtype for JAX, not for NumPy
        raise ValueError(f"images must be uint8 (0 to 255) or float (0 to 1); got {images.dtype}")
    if not images.size:
        return np.zeros(images.shape, np.uint8)
    low, high = float(np.min(images)), float(np.max(images))
    if not (low >= -_SLACK and high <= 1.0 + _SLACK):  # NaN is refused too
        raise ValueError(f"images of floats must lie in 0 to 1; got {low:.9g} to {high:.9g}")
    return np.clip(np.round(255.0 * images.astype(np.float32)), 0.0, 255.0).astype(np.uint8)


# --- Reading the folder of a run


def load_run(workdir: str | os.PathLike[str], checkpoint: str = "latest", build: Build | None = None) -> Run:
    """Opens the trained model of a run, which may still be in progress; nothing is written.

    A warning names each damaged checkpoint that ``"latest"`` skips.

    Args:
        workdir: the folder of the run.
        checkpoint: ``"latest"``, or ``"best"`` for the one with the lowest validation loss.
        build: ``build(flags, image_shape) -> module`` makes the model of another experiment. Its parameters need the
            shapes that were trained; their values do not matter. The default makes the model of ``experiments.mnist``.

    Returns:
        The run. Its binarisation is that of the flag ``binarization``; without this flag it is ``"dynamic"`` for a
        likelihood of binary pixels, and otherwise ``"none"``.

    Raises:
        ValueError: if the folder is not that of such a run, or its parameters do not fit the model.
        planar_vae_jax.runs.checkpoints.CheckpointError: if there is no such checkpoint, or it is damaged.
    """
    if checkpoint not in ("latest", "best"):
        raise ValueError(f"checkpoint must be 'latest' or 'best'; got {checkpoint!r}")
    try:
        folder = Path(workdir).expanduser()
    except RuntimeError as error:  # an unknown ~user
        raise ValueError(f"workdir must be the folder of a run; got {workdir!s} ({error})") from None
    stored = _read_config(folder, None if build else "mnist")
    flags, image_shape = stored["flags"], tuple(stored["data"]["image_shape"])
    make = build or model_from_flags
    try:
        like = jax.eval_shape(lambda: make(flags, image_shape))
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'} is not the config of a run (no flag {error})") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} is not the config of a run ({error})") from None
    model, step = _read_model(folder, checkpoint, like)
    binarization = flags.get("binarization") or default_binarization(model.likelihood, flags.get("objective", "elbo"))
    return Run(flags, model, step, binarization, image_shape)


def model_from_flags(flags: Mapping[str, Any], image_shape: tuple[int, ...], key: jax.Array | None = None) -> VAE:
    """Makes the model that the flags of ``experiments.mnist`` describe.

    Args:
        flags: the values of the flags by name.
        image_shape: ``(H, W)`` or ``(H, W, C)``.
        key: the PRNG key of the initial parameters; default: a fixed key.

    Raises:
        KeyError: if a flag is missing.
        ValueError: if a flag has a value that no model has.
    """
    names = ("latent", "amortized", "posterior", "h", "likelihood", "precision")
    options = {name: flags[name] for name in names} | {"flow_length": flags["flows"]}
    rngs = nnx.Rngs(jax.random.key(0) if key is None else key)
    if flags["encoder"] == "conv":
        return VAE.conv(image_shape, **options, rngs=rngs)
    return VAE.mlp(image_shape, hidden=flags["hidden"], layers=flags["layers"], **options, rngs=rngs)


def _read_config(folder: Path, wanted: str | None) -> dict[str, Any]:
    """Returns the content of ``config.json``; the run must be one of experiment ``wanted``, unless that is None."""
    from planar_vae_jax.runs.config import LAYOUT

    path = folder / "config.json"
    try:
        stored: dict[str, Any] = json.loads(path.read_bytes())
        layout, experiment, _ = stored.get("layout", 1), stored["experiment"], stored["flags"].keys()
    except FileNotFoundError:
        raise ValueError(f"{folder} must be the folder of a run; it has no config.json") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the config of a run ({error})") from None
    if layout != LAYOUT:
        raise ValueError(f"{path} is of another version of planar_vae_jax (layout {layout}; this version: {LAYOUT})")
    if wanted is not None and experiment != wanted:
        inside = "; its runs lie in flows=K-seed=S inside" if experiment == "flow_length" else ""
        hint = inside or ", which needs build=FUNCTION (--build=FILE.py:FUNCTION of experiments.use)"
        raise ValueError(f"{folder} must be a run of experiments.{wanted}; it is one of experiments.{experiment}{hint}")
    if not isinstance(stored.get("data"), dict) or not stored["data"].get("image_shape"):
        raise ValueError(f"{path} does not say the shape of the images that the run was trained on")
    return stored


def _read_model(folder: Path, checkpoint: str, like: Any) -> tuple[Any, int]:
    """Returns the module ``like``, whose leaves are shapes, with the stored parameters, and the checkpoint's step."""
    from planar_vae_jax.runs.checkpoints import NoCheckpointError, fill_params, read_checkpoint

    try:
        found = read_checkpoint(folder / "checkpoints", checkpoint, warn=lambda line: warnings.warn(line, stacklevel=3))
    except NoCheckpointError as error:
        hint = "; only a run with validation images has a best one" if checkpoint == "best" else ""
        raise NoCheckpointError(f"{error}{hint}") from None
    try:
        return fill_params(found.leaves, like), found.step
    except ValueError as error:
        raise ValueError(f"{folder} holds the parameters of another model than its flags: {error}") from None
