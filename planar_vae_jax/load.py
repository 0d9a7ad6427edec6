"""A trained model, ready to use: ``load_run(workdir)`` opens the folder of a run of ``experiments.mnist``.

run = load_run("runs/mnist-flows=5-seed=0")
pictures = run.reconstruct(images)              # images [N, H, W], uint8 0..255 or float 0..1
pictures = run.sample(jax.random.key(0), 64)    # [64, H, W] in 0..1
"""

import dataclasses
import functools
import json
import math
import operator
import os
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from planar_vae_jax.analysis import evaluation
from planar_vae_jax.vae import objectives
from planar_vae_jax.vae.likelihoods import default_binarization
from planar_vae_jax.vae.model import CHOICES, VAE

Array = jax.Array | np.ndarray
NEARLY_BLACK = "uint8 images are 0 to 255, and these are 0 and 1; multiply them by 255 if 1 was meant as white"


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained VAE as functions on batches of images.

    Images are ``[N, H, W]`` (or ``[N, H, W, 3]``) of the size that the run was trained on, uint8 0..255 or float 0..1,
    and are binarised as in training; pictures are pixel means of that shape in 0..1; ``z`` is ``[N, L]``; figures are
    ``[N]`` in nats, of what :func:`planar_vae_jax.vae.likelihoods.measured` says.
    What is drawn for image i follows from the key and from i.

    Raises:
        ValueError: (every method) for images or ``z`` of another shape or scale, or a number that is none.
    """

    config: dict[str, Any]  # every flag of the run
    params: Any = dataclasses.field(repr=False)  # a pytree
    vae: VAE  # the architecture: vae.bind(params) is the model itself
    step: int  # of the checkpoint
    binarization: str

    def encode(self, images: Array, key: jax.Array) -> jax.Array:
        """One sample ``z_K ~ q(z|x)`` for each image."""
        return _encode(self.vae, self.params, self._draw(images, key))

    def decode(self, z: Array) -> jax.Array:
        """Pictures of ``z``."""
        z = jnp.asarray(z, self.vae.dtype)
        if z.ndim != 2 or z.shape[1] != self.vae.latent:
            raise ValueError(f"z must be [N, {self.vae.latent}], as the run was trained; got {list(z.shape)}")
        return _decode(self.vae, self.params, z)

    def reconstruct(self, images: Array) -> jax.Array:
        """Pictures decoded from the posterior's mean sent through the flow; binarised by a fixed key."""
        return evaluation.reconstruct(self.vae, self.params, self._draw(images, evaluation.fixed_key()).pixels)

    def sample(self, key: jax.Array, n: int) -> jax.Array:
        """``n`` pictures decoded from the prior."""
        n = _whole_number("n", n, at_least=0)
        return evaluation.sample_prior(self.vae, self.params, key, n)

    def free_energy(self, images: Array, key: jax.Array) -> jax.Array:
        """Free energy of each image, one sample each."""
        return evaluation.free_energy_terms(self.vae, self.params, self._draw(images, key)).free_energy

    def nll(self, images: Array, key: jax.Array, samples: int = 128) -> jax.Array:
        """``-log p(x)`` of each image by importance sampling."""
        samples, drawn = _whole_number("samples", samples, at_least=1), self._draw(images, key)
        return evaluation.marginal_likelihood(self.vae, self.params, drawn, samples=samples).nll

    def _draw(self, images: Array, key: jax.Array) -> evaluation.Images:
        return _draw(jnp.asarray(_as_uint8(images, self.vae.image_shape)), key, self.binarization)


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
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"images must be uint8 (0 to 255) or float (0 to 1); got {images.dtype}")
    if not (images.size == 0 or (np.min(images) >= 0.0 and np.max(images) <= 1.0)):  # NaN is refused too
        raise ValueError(f"images of floats must lie in 0 to 1; got {np.min(images):g} to {np.max(images):g}")
    return np.round(255.0 * images).astype(np.uint8)


@functools.partial(jax.jit, static_argnames="binarization")
def _draw(pixels: jax.Array, key: jax.Array, binarization: str) -> evaluation.Images:
    return evaluation.draw_images(pixels, jax.random.split(objectives.typed_key(key), len(pixels)), binarization)


@functools.partial(jax.jit, static_argnames="vae")
def _encode(vae: VAE, params: Any, images: evaluation.Images) -> jax.Array:
    posterior = vae.bind(params).encode(evaluation.unit_pixels(images.pixels))
    return posterior.transform(objectives.noise(images.keys, posterior.mean))[0]


@functools.partial(jax.jit, static_argnames="vae")
def _decode(vae: VAE, params: Any, z: jax.Array) -> jax.Array:
    return evaluation.pictures(vae.bind(params), z)


def load_run(workdir: str | os.PathLike[str], checkpoint: str = "latest") -> Run:
    """The trained model of a run; reads only, also beside a running process.

    A damaged checkpoint that ``"latest"`` passes over is a warning.

    Args:
        workdir: the folder that ``python -m experiments.mnist --workdir=...`` wrote.
        checkpoint: ``"latest"``, or ``"best"``: the lowest validation loss (``--validation``).

    Raises:
        ValueError: there is no such run, it is no VAE, or it has no such checkpoint.
        planar_vae_jax.runs.reading.CheckpointError: there is no such checkpoint, or it is damaged.
    """
    from planar_vae_jax.runs import leaves, reading

    if checkpoint not in ("latest", "best"):
        raise ValueError(f"checkpoint must be 'latest' or 'best'; got {checkpoint!r}")
    try:
        folder = Path(workdir).expanduser()
    except RuntimeError as error:  # a ~user that there is not
        raise ValueError(f"workdir must be the folder of a run; got {workdir!s} ({error})") from None
    stored = _read_config(folder)
    try:
        found = reading.read_checkpoint(
            folder / "checkpoints",
            checkpoint,
            warn=lambda line: warnings.warn(line, stacklevel=2),
            check=reading.check_finite,
        )
    except reading.NoCheckpointError as error:
        hint = (
            "; only a run with --validation, or with validation images, has a best one" if checkpoint == "best" else ""
        )
        raise reading.NoCheckpointError(f"{error}{hint}") from None
    flags = stored["flags"]
    image_shape = _image_shape(stored, found.leaves)
    try:
        vae = vae_from_flags(flags, image_shape)
        binarization = flags["binarization"] or default_binarization(vae.likelihood, flags["objective"])
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'} is not the config of a run (no flag {error})") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} is not the config of a run ({error})") from None
    try:
        params = leaves.fill_params(found.leaves, jax.eval_shape(vae.init, jax.random.key(0)))
    except ValueError as error:
        raise ValueError(f"{folder} holds the parameters of another model than its flags: {error}") from None
    return Run(flags, params, vae, found.step, binarization)


def vae_from_flags(flags: dict[str, Any], image_shape: tuple[int, ...]) -> VAE:
    """The architecture that the flags of ``experiments.mnist`` name; flags newer than the run are at their defaults."""
    names = {"latent": "latent", "hidden": "hidden", "flow_length": "flows", "amortized": "amortized", "h": "h"}
    newer = {name: flags[name] for name in CHOICES if name in flags}
    return VAE(image_shape, **{field: flags[flag] for field, flag in names.items()}, **newer)


def _read_config(folder: Path) -> dict[str, Any]:
    from planar_vae_jax.runs.config import LAYOUT

    path = folder / "config.json"
    try:
        stored = json.loads(path.read_bytes())
        experiment, _ = stored["experiment"], stored["flags"].keys()
    except FileNotFoundError:
        raise ValueError(f"{folder} must be the folder of a run; it has no config.json") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the config of a run ({error})") from None
    if stored.get("layout", 1) > LAYOUT:
        raise ValueError(f"{path} is of a newer version of planar_vae_jax (layout {stored['layout']}, not {LAYOUT})")
    if experiment != "mnist":
        inside = "; its runs lie in flows=K-seed=S inside" if experiment == "flow_length" else ""
        raise ValueError(f"{folder} must be a run of experiments.mnist; it is one of experiments.{experiment}{inside}")
    return stored


def _image_shape(stored: dict[str, Any], leaves: dict[str, np.ndarray]) -> tuple[int, ...]:
    data = stored.get("data")
    if isinstance(data, dict) and data.get("image_shape"):
        return tuple(data["image_shape"])
    # Version 0.1 did not write it: square images, as far as one can tell.
    pixels = next((array.size for name, array in leaves.items() if "params['decode']['logits']['bias']" in name), 0)
    side = math.isqrt(pixels)
    if side * side != pixels or not pixels:
        raise ValueError(f"the run does not tell the shape of its images, and {pixels} pixels are no square")
    return side, side
