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
import operator
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from planar_vae_jax.analysis import evaluation
from planar_vae_jax.analysis.evaluation import BATCH, Images
from planar_vae_jax.vae import objectives
from planar_vae_jax.vae.likelihoods import default_binarization
from planar_vae_jax.vae.model import VAE
from planar_vae_jax.vae.objectives import Model

Array = jax.Array | np.ndarray
Build = Callable[[Mapping[str, Any], tuple[int, ...]], Model]  # (flags, image_shape) -> a module
NEARLY_BLACK = "uint8 images are 0 to 255, and these are 0 and 1; multiply them by 255 if 1 was meant as white"
_SLACK = 1e-6  # how far rounding may carry black and white out of 0..1


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained VAE as functions on images.

    Images are ``[N, H, W]`` (or ``[N, H, W, 3]``) of the size that the run was trained on, uint8 in 0..255 or floats in
    0..1, and are binarised as in training. Pictures are pixel means of that shape in 0..1, and ``z`` is ``[N, L]``.
    Figures are ``[N]`` in nats; :func:`planar_vae_jax.vae.likelihoods.measured` says what these nats measure. The draws
    for image i depend on the key and on i alone.

    Every method computes 1000 images at a time, so only the images and the results need memory in proportion to N.

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

    def encode(self, images: Array, key: jax.Array) -> jax.Array:
        """Returns a sample ``z_K ~ q(z|x)`` for each image, ``[N, L]``."""
        return self._map(_codes, images, key)

    def decode(self, z: Array) -> jax.Array:
        """Returns the pictures that the decoder gives for ``z``."""
        like = evaluation.abstract_posterior(self.model, self.image_shape).mean
        z = np.asarray(z, like.dtype)
        if z.ndim != 2 or z.shape[1] != like.shape[-1]:
            raise ValueError(f"z must be [N, {like.shape[-1]}], as the run was trained; got {list(z.shape)}")
        return _joined(_decode(self.model, z[rows]) for rows in _batches(len(z)))[: len(z)]

    def reconstruct(self, images: Array) -> jax.Array:
        """Returns the decoded picture of each image, z_0 being the mean of q_0; images are binarised by a fixed key."""
        return self._map(_reconstruct, images, evaluation.fixed_key())

    def sample(self, key: jax.Array, n: int) -> jax.Array:
        """Returns ``n`` pictures decoded from draws of the prior; picture i is the same for every ``n``."""
        n, key = _whole_number("n", n, at_least=0), objectives.typed_key(key)
        like = evaluation.abstract_posterior(self.model, self.image_shape).mean
        parts = (_sample(self.model, _index(rows), key, like.shape[-1], like.dtype) for rows in _batches(n))
        return _joined(parts)[:n]

    def free_energy(self, images: Array, key: jax.Array) -> jax.Array:
        """Returns the free energy of each image, estimated with one sample of z."""
        return self._map(_free_energy, images, key)

    def nll(self, images: Array, key: jax.Array, samples: int = 128) -> jax.Array:
        """Returns ``-log p(x)`` of each image, estimated with ``samples`` importance samples."""
        samples = _whole_number("samples", samples, at_least=1)
        return self._map(functools.partial(_nll, samples=samples), images, key)

    def _map(self, function: Callable[[Model, Images], jax.Array], images: Array, key: jax.Array) -> jax.Array:
        """Returns ``function`` of the binarised images, computed batch by batch."""
        pixels, key = _as_uint8(images, self.image_shape), objectives.typed_key(key)
        parts = (
            function(self.model, _draw(pixels[rows], _index(rows), key, self.binarization))
            for rows in _batches(len(pixels))
        )
        return _joined(parts)[: len(pixels)]


def _batches(size: int) -> Iterator[np.ndarray]:
    """Yields the rows of each batch; the first rows fill up the last batch, so that all batches have one shape."""
    batch = max(1, min(size, BATCH))
    for start in range(0, max(1, size), batch):
        yield (start + np.arange(batch)) % size if size else np.arange(0)


def _index(rows: np.ndarray) -> np.ndarray:
    return rows.astype(np.uint32)


def _joined(parts: Iterator[jax.Array]) -> jax.Array:
    """Returns parts, which are computed one after the other, as one array."""
    return jnp.asarray(np.concatenate([np.asarray(part) for part in parts]))


@functools.partial(jax.jit, static_argnames="binarization")
def _draw(pixels: jax.Array, index: jax.Array, key: jax.Array, binarization: str) -> Images:
    return evaluation.draw_images(pixels, jax.vmap(lambda i: jax.random.fold_in(key, i))(index), binarization)


@jax.jit
def _codes(model: Model, images: Images) -> jax.Array:
    posterior = model.encode(evaluation.unit_pixels(images.pixels))
    return posterior.transform(objectives.noise(images.keys, posterior.mean))[0]


@jax.jit
def _decode(model: Model, z: jax.Array) -> jax.Array:
    return evaluation.pictures(model, z)


def _reconstruct(model: Model, images: Images) -> jax.Array:
    return evaluation.reconstruct(model, images.pixels)


@functools.partial(jax.jit, static_argnames=("size", "dtype"))
def _sample(model: Model, index: jax.Array, key: jax.Array, size: int, dtype: Any) -> jax.Array:
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
    return evaluation.pictures(model, jax.vmap(lambda key: jax.random.normal(key, (size,), dtype))(keys))


def _free_energy(model: Model, images: Images) -> jax.Array:
    return evaluation.free_energy_terms(model, images).free_energy


def _nll(model: Model, images: Images, samples: int) -> jax.Array:
    return evaluation.marginal_likelihood(model, images, samples=samples).nll


def _whole_number(name: str, value: int, *, at_least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = at_least - 1
    if number < at_least:
        raise ValueError(f"{name} must be a whole number, at least {at_least}; got {value!r}")
    return number


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
