"""A trained model as files that run where neither this package nor Flax is installed.

::

    export_run(run, "exported")     # four functions, each with its parameters, and a README.txt

The files are functions saved by ``jax.export`` for any number of images, for CPUs, CUDA GPUs and TPUs. README.txt says
what they take and return, with the five lines that load each.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from planar_vae_jax.analysis import evaluation
from planar_vae_jax.analysis.evaluation import Images
from planar_vae_jax.load import Run
from planar_vae_jax.runs import replacing
from planar_vae_jax.vae import objectives, whole_number
from planar_vae_jax.vae.likelihoods import measured

PLATFORMS = ("cpu", "cuda", "tpu")
README = "README.txt"
_SUFFIX = ".jaxexport"


def check_export() -> None:
    """Imports what saving a function needs.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import flatbuffers  # noqa: F401
    except ImportError as error:
        message = "exporting needs flatbuffers, the extra `export`: pip install flatbuffers"
        raise ImportError(f"{message} ({error})") from error


def export_run(run: Run, folder: str | os.PathLike[str], samples: int | None = None) -> dict[str, Path]:
    """Writes encoder, decoder, free energy and NLL of a trained model, and the README.txt that explains them.

    For the same images and keys they give what the methods of :class:`~planar_vae_jax.load.Run` give, to rounding.
    README.txt is written last: a folder without it holds an export that did not end.

    Args:
        run: of :func:`planar_vae_jax.load_run`.
        folder: it is made; it must not hold a README.txt.
        samples: importance samples of the NLL; default: those of the run (its flag ``nll_samples``), or 128.

    Returns:
        ``{name: path}`` of ``encoder``, ``decoder``, ``free_energy`` and ``nll``.

    Raises:
        ImportError: if flatbuffers is not installed.
        ValueError: if ``folder`` is a file or holds a README.txt, or for a number of samples below 1.
        planar_vae_jax.runs.RunError: if a file cannot be written.
    """
    check_export()
    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or (folder / README).exists()):
        raise ValueError(f"folder must be a new one, or one without a {README}; got {folder}")
    samples = whole_number("samples", run.config.get("nll_samples", 128) if samples is None else samples, 1)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, (function, arguments) in _functions(run, samples).items():
        saved = jax.export.export(jax.jit(function), platforms=PLATFORMS)(*arguments).serialize()
        paths[name] = folder / f"{name}{_SUFFIX}"
        with replacing(paths[name]) as temporary:
            temporary.write_bytes(saved)
    with replacing(folder / README) as temporary:
        temporary.write_text(_readme(run, samples), encoding="utf-8")
    return paths


def _functions(run: Run, samples: int) -> Mapping[str, tuple[Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]]:
    """The functions by name, with the shapes of their arguments; N is a symbol, so ``len`` of an array is none."""
    model = run.model
    (number,) = jax.export.symbolic_shape("N")
    like = evaluation.abstract_posterior(model, run.image_shape).mean
    images = jax.ShapeDtypeStruct((number, *run.image_shape), jnp.uint8)
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)

    def drawn(images: jax.Array, key: jax.Array) -> Images:
        keys = evaluation.keys_by_index(
            jax.random.wrap_key_data(key, impl="threefry2x32"), jnp.arange(images.shape[0], dtype=jnp.uint32)
        )
        return evaluation.draw_batch(images, keys, run.binarization)

    def encoder(images: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        binary = drawn(images, key)
        posterior = model.encode(evaluation.unit_pixels(binary.pixels))
        noise = objectives.noise(binary.keys, posterior.mean)
        means, codes = posterior.transform(jnp.stack([jnp.zeros_like(noise), noise]))[0]
        return means, codes

    def decoder(z: jax.Array) -> jax.Array:
        return evaluation.pictures(model, z)

    def free_energy(images: jax.Array, key: jax.Array) -> jax.Array:
        return evaluation.terms_of_batch(model, drawn(images, key)).free_energy

    def nll(images: jax.Array, key: jax.Array) -> jax.Array:
        def of_one(image: Images) -> jax.Array:
            return evaluation.likelihood_of_batch(model, jax.tree.map(lambda leaf: leaf[None], image), samples).nll[0]

        return jax.lax.map(of_one, drawn(images, key))  # one after the other: each has many samples

    return {
        "encoder": (encoder, (images, key)),
        "decoder": (decoder, (jax.ShapeDtypeStruct((number, *like.shape[1:]), like.dtype),)),
        "free_energy": (free_energy, (images, key)),
        "nll": (nll, (images, key)),
    }


def _readme(run: Run, samples: int) -> str:
    like = evaluation.abstract_posterior(run.model, run.image_shape).mean
    shape, latent, dtype = ", ".join(map(str, run.image_shape)), like.shape[-1], like.dtype
    drawn = f"They are binarised inside as in training (binarisation: {run.binarization})."
    binarized = "They are not binarised, as in training." if run.binarization == "none" else drawn
    given = f'images, key = numpy.zeros((3, {shape}), "uint8"), numpy.array([0, 0], "uint32")'
    z = f'z = numpy.zeros((3, {latent}), "{dtype}")'
    return f"""\
A trained variational autoencoder (training step {run.step}) as four functions, with their parameters inside.

They were saved by jax.export of jax {jax.__version__} for {", ".join(PLATFORMS)}, and need nothing but
jax and flatbuffers: pip install jax flatbuffers
JAX reads such files for six months of its newer versions. Keep the run, which can be exported again.

Every function takes any number N of images.

  images  [N, {shape}] uint8, grey levels 0 to 255. Of floats in 0 to 1: numpy.rint(255 * x).astype("uint8").
          {binarized}
  key     [2] uint32, the two words of a key of jax.random: jax.random.key_data(jax.random.key(7)) is [0, 7].
          The draws for image i follow from the key and i.
  z       [N, {latent}] {dtype}, codes.

Memory grows with N; of many images give some hundreds at a time.

{_section("encoder", [given, "means, codes = function(images, key)"])}

  means [N, {latent}]: for each image the mean of q_0 sent through the layers of the flow.
  codes [N, {latent}]: for each image a sample of q(z|x).

{_section("decoder", [z, "pictures = function(z)"])}

  pictures [N, {shape}]: pixel means in 0 to 1. For z from N(0, I) they are samples of the model.

{_section("free_energy", [given, "nats = function(images, key)"])}

  nats [N]: the free energy of each image from one sample of z, an upper bound of -log p(x) in expectation.

{_section("nll", [given, "nats = function(images, key)"])}

  nats [N]: -log p(x) of each image from {samples} importance samples.

Nats are of {measured(run.model.likelihood, run.binarization)}.
"""


def _section(name: str, last: list[str]) -> str:
    """The five lines that load and call a function."""
    lines = [
        "import jax.export, numpy, pathlib",
        f'saved = pathlib.Path("{name}{_SUFFIX}").read_bytes()',
        "function = jax.jit(jax.export.deserialize(bytearray(saved)).call)",
        *last,
    ]
    return "\n".join([f"{name}{_SUFFIX}", "", *(f"    {line}" for line in lines)])
